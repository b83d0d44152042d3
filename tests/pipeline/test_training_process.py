"""Training as a user starts it: real processes, real DeepSpeed over gloo."""

import json
import math
import subprocess
from dataclasses import replace

import pytest

from pipeline.__main__ import COMMANDS
from pipeline.checkpoint_store import checkpoint_steps, load_model
from pipeline.cli import main
from pipeline.config import RunConfig
from pipeline.data.order import Stream, rank_slice
from pipeline.data.shards import ShardSet
from tests.pipeline.training_runs import ENVIRONMENT, ROOT, command, events, kill_once, metrics, run

pytestmark = pytest.mark.slow


@pytest.fixture
def squares(drawn, tmp_path, run_command):
    """Images of one size: padding depends on what shares a pass, and a little of it is seen. Two of
    three are without objects."""
    for split in ("train", "val"):
        content = drawn.annotations(split)
        images = [x for x in content["images"] if x["width"] == x["height"] == 128]
        ids = {x["id"] for x in images[::3]}
        annotations = [x for x in content["annotations"] if x["image_id"] in ids]
        file = tmp_path / f"{split}.json"
        file.write_text(json.dumps({**content, "images": images, "annotations": annotations}))
        folders = ["--images", drawn.coco / split, "--output", tmp_path / "shards" / split]
        done = run_command("data_prep", "convert", *folders, "--annotations", file)
        assert done.returncode == 0, done.stderr
    return replace(drawn, shards=tmp_path / "shards")


def test_a_run_goes_on_with_other_numbers_of_processes(squares, tmp_path):
    """1 and then 3, whose shares of 8 images are uneven and whose parameters are in parts, against
    2 from beginning to end."""
    options = [
        "--schedule.epochs", 5, "--optimizer.batch-size", 8, "--engine.log-every", 1,
        "--engine.precision", "fp32", "--engine.checkpoint-steps", 1,
        "--optimizer.lr", 5e-4, "--optimizer.backbone-lr", 5e-4,
    ]  # fmt: skip
    # One without a choice among proposals, which rounding decides while all are alike.
    recipe = "deformable_detr_r50_refine_demo"
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run(command(squares, recipe, whole, *options, ranks=2))
    alone = command(squares, recipe, moved, *options, "--engine.micro-batch", 3)
    kill_once(lambda: checkpoint_steps(moved), alone, tmp_path / "log")
    run(command(squares, recipe, moved, *options, "--engine.zero-stage", 3, ranks=3))
    assert [x["world"] for x in events(moved, "start")] == [1, 3]
    pairs = list(zip(metrics(moved), metrics(whole), strict=True))
    assert empty_shares(squares, world=3) > 0
    assert sum(line["kind"] == "train" for line, _ in pairs) >= 6
    for mine, theirs in pairs:
        assert mine["kind"] == theirs["kind"]
        for name in [n for n in theirs if n == "lr" or n.startswith("loss")]:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), (theirs["step"], name)


@pytest.mark.chaos  # minutes
def test_the_loss_curve_of_an_elastic_run_is_that_of_an_undisturbed_one(squares, tmp_path):
    """2, 1 and then 3 processes against 2, over 50 steps, at a rate at which rounding grows slowly
    (docs/log.md, "Is it rounding?")."""
    epochs = math.ceil(50 * 8 / len(ShardSet(squares.shards / "train")))
    options = [
        "--schedule.epochs", epochs, "--schedule.evaluate-every", epochs, "--engine.log-every", 1,
        "--engine.precision", "fp32", "--engine.checkpoint-steps", 5, "--model.dropout", 0,
        "--optimizer.batch-size", 8, "--optimizer.lr", 2e-5, "--optimizer.backbone-lr", 2e-5,
    ]  # fmt: skip
    name = "deformable_detr_r50_refine_demo"
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run(command(squares, name, whole, *options, ranks=2))

    def killed_at(step: int, ranks: int) -> None:
        arguments = command(squares, name, moved, *options, ranks=ranks)
        kill_once(lambda: checkpoint_steps(moved)[-1:] >= [step], arguments, tmp_path / "log")

    killed_at(10, ranks=2)
    killed_at(25, ranks=1)
    run(command(squares, name, moved, *options, ranks=3))
    assert [x["world"] for x in events(moved, "start")] == [2, 1, 3]
    pairs = list(zip(metrics(moved), metrics(whole), strict=True))[:50]
    assert len(pairs) == 50
    for mine, theirs in pairs:
        assert mine["step"] == theirs["step"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5), mine["step"]


def empty_shares(squares, world: int) -> int:
    """How often a rank has no object at all in the first two epochs."""
    shards = ShardSet(squares.shards / "train")
    stream = Stream(shards.shard_sizes, RunConfig("").seed, RunConfig("").data.shuffle_window)
    found = 0
    for step in range(2 * len(shards) // 8):
        for rank in range(world):
            samples = rank_slice(stream.batch(step, 8), rank, world)[:, 1]
            found += not any(shards.read(i).annotations for i in samples)
    return found


def test_the_papers_recipe_trains_saves_resumes_evaluates_and_draws(drawn, tmp_path, capsys):
    folder = tmp_path / "r50"
    options = [
        "--optimizer.batch-size", 4, "--engine.micro-batch", 2, "--schedule.epochs", 1,
        "--augment.short-sides", 64, 80, "--augment.max-side", 96, "--augment.val-short-side", 64,
        "--augment.crop-short-sides", 64, "--augment.crop-sides", 48, 64,
        "--engine.log-every", 1, "--engine.checkpoint-steps", 1,
        "--data.train", drawn.shards / "val",  # twelve images: three steps of a large model
    ]  # fmt: skip
    arguments = command(drawn, "deformable_detr_r50", folder, *options)
    kill_once(lambda: checkpoint_steps(folder), arguments, tmp_path / "log")
    run(arguments)
    lines = metrics(folder)
    assert [x["step"] for x in lines if x["kind"] == "train"] == [1, 2, 3]
    assert all(0 < x["loss"] < 100 for x in lines if x["kind"] == "train")
    assert "AP" in lines[-1]
    assert (folder / "predictions.png").stat().st_size > 1000
    content = load_model(folder)
    # Ids 1..7 as columns of their own, as in the published COCO checkpoints.
    ids = [c["id"] for c in drawn.annotations("val")["categories"]]
    assert content["labels"]["category_of"][max(ids)] == max(ids)
    assert sum(c >= 0 for c in content["labels"]["category_of"]) == len(ids)

    options = ["--data", drawn.shards / "val", "--results", tmp_path / "results.json"]
    arguments = ["evaluate", folder, *options]
    assert main("python -m pipeline", "", COMMANDS, [str(x) for x in arguments]) == 0
    assert f"{lines[-1]['AP']:.3f}" in capsys.readouterr().out.splitlines()[1]
    assert json.loads((tmp_path / "results.json").read_text())[0].keys() == {
        "image_id", "category_id", "bbox", "score",
    }  # fmt: skip
    of_the_run = json.loads((folder / "evaluations" / "best-detections.json").read_text())
    again = json.loads((tmp_path / "results.json").read_text())
    assert sorted(map(str, of_the_run)) == sorted(map(str, again))
    image = next((drawn.coco / "val").glob("*.jpg"))
    given = ["predict", folder, image, "--output", tmp_path / "found"]
    code = main("python -m pipeline", "", COMMANDS, [str(x) for x in given])
    assert code == 0, capsys.readouterr().err
    assert (tmp_path / "found" / "pictures" / image.name).exists()


def test_a_run_folder_of_another_experiment_is_refused(drawn, tmp_path, run_command):
    (tmp_path / "config.json").write_text(
        json.dumps({"config_digest": "0" * 64, "train_digest": "", "val_digest": ""})
    )
    done = subprocess.run(
        command(drawn, "demo", tmp_path, "--optimizer.batch-size", 8),
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "belongs to another config" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "checkpoints").exists()
