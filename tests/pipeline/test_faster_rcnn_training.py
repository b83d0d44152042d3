"""Faster R-CNN through the trainer, the evaluation and the tracking of the DETRs."""

from dataclasses import replace

import pytest

from pipeline.__main__ import COMMANDS
from pipeline.checkpoint_store import load_model
from pipeline.cli import main
from pipeline.config import DataConfig
from pipeline.dataset import open_dataset
from pipeline.errors import UserError
from pipeline.recipes import recipe
from pipeline.tracking import read_lines

LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}


def data(drawn, labels: str) -> DataConfig:
    folders = {"train": str(drawn.shards / "train"), "val": str(drawn.shards / "val")}
    return DataConfig(**folders, labels=labels)


@pytest.mark.slow
def test_it_learns_evaluates_and_draws(drawn, tmp_path, run_command, capsys):
    folder = tmp_path / "run"
    arguments = [
        "pipeline", "train", "faster_rcnn_r50_fpn_demo", "--output", folder,
        "--data.train", drawn.shards / "train", "--data.val", drawn.shards / "val",
        "--schedule.epochs", 4, "--optimizer.batch-size", 8, "--engine.log-every", 1,
        "--engine.checkpoint-steps", 5, "--engine.device", "cpu",
    ]  # fmt: skip
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = read_lines(folder / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == 20
    for line in steps:
        assert line.keys() >= LOSSES
        assert line["loss"] == pytest.approx(sum(line[name] for name in LOSSES), rel=1e-3)
    first, last = ([x["loss"] for x in part] for part in (steps[:4], steps[-4:]))
    assert sum(last) < 0.8 * sum(first)
    assert len([x for x in lines if x["kind"] == "evaluation"]) == 4
    assert (folder / "predictions.png").stat().st_size > 1000

    content = load_model(folder)
    # Column 0 is the background, then the categories in order of id.
    ids = sorted(c["id"] for c in drawn.annotations("val")["categories"])
    assert content["labels"]["category_of"] == (-1, *ids)
    assert content["model"]["roi_heads.box_predictor.cls_score.bias"].shape == (1 + len(ids),)
    arguments = ["evaluate", str(folder), "--data", str(drawn.shards / "val")]
    assert main("python -m pipeline", "", COMMANDS, arguments) == 0
    best = max(x["AP"] for x in lines if x["kind"] == "evaluation")
    assert f"{best:.3f}" in capsys.readouterr().out.splitlines()[1]


@pytest.mark.parametrize("name", ["faster_rcnn_r50_fpn_demo", "faster_rcnn_r50_fpn"])
def test_a_category_in_the_backgrounds_column_is_refused(drawn, name):
    config = replace(recipe(name), data=data(drawn, "contiguous"))
    with pytest.raises(UserError, match=r"in column 0, expected none.*--data\.labels cont"):
        open_dataset(config)
    for labels in ("contiguous_from_1", "category_id"):
        columns = open_dataset(replace(config, data=data(drawn, labels))).labels.category_of
        assert columns[0] == -1
