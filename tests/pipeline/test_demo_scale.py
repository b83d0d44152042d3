"""Every recipe at demo scale: the same system, small, through data, trainer and evaluation."""

from dataclasses import asdict, replace

import pytest

from model.detr import build_model
from pipeline.errors import UserError
from pipeline.recipes import RECIPES, at_demo_scale, recipe
from pipeline.tracking import read_lines

# What makes a model the one that its name says.
KEPT = (
    "architecture", "classification", "num_levels", "neck", "level_exchange", "num_points",
    "decoder_layers", "dilation", "box_refine", "two_stage", "auxiliary_loss", "class_weight",
    "class_cost",
)  # fmt: skip


@pytest.mark.parametrize("name", [n for n in RECIPES if n != "demo"])
def test_a_recipe_stays_the_same_system(name):
    full, small = recipe(name), recipe(f"{name}_demo")
    assert small.recipe == f"{name}_demo"
    for field in KEPT:
        assert getattr(small.model, field) == getattr(full.model, field), field
    deformable = full.model.backbone.endswith("_dcn")
    assert small.model.backbone == ("tiny_dcn" if deformable else "tiny")
    assert sum(p.numel() for p in build_model(small.model).parameters()) < 2e6


def test_the_demo_is_the_two_stage_recipe():
    demo = recipe("demo")
    assert replace(recipe("deformable_detr_r50_two_stage_demo"), recipe="demo") == demo
    assert asdict(at_demo_scale(demo).model) == asdict(demo.model)


def test_a_recipe_of_no_such_name_is_refused():
    with pytest.raises(UserError, match=r"did you mean 'detr_r50_demo'.*with _demo behind it"):
        recipe("detr_r5_demo")
    with pytest.raises(UserError, match="unknown recipe 'demo_demo'"):
        recipe("demo_demo")


@pytest.mark.chaos  # minutes; trainings of the demo, Faster R-CNN and the paper's recipe stay
@pytest.mark.parametrize(
    ("name", "losses"),
    [
        ("deformable_detr_x101_dcn_two_stage", {"loss_ce_enc", "loss_giou_4"}),
        ("detr_r50_dc5", {"loss_ce", "loss_giou_4"}),
    ],
)
def test_it_trains_and_evaluates(drawn, tmp_path, run_command, name, losses):
    """The rest of the path is the same for all; docs/models.md has what they learn."""
    folder = tmp_path / "run"
    done = run_command(
        "pipeline", "train", f"{name}_demo", "--output", folder,
        "--data.train", drawn.shards / "train", "--data.val", drawn.shards / "val",
        "--schedule.epochs", 4, "--optimizer.batch-size", 8, "--engine.log-every", 1,
        "--engine.device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = read_lines(folder / "metrics.jsonl")
    loss = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(loss) == 20
    assert sum(loss[-4:]) < 0.95 * sum(loss[:4])
    assert all(line.keys() >= losses for line in lines if line["kind"] == "train")
    assert sum(line["kind"] == "evaluation" for line in lines) == 4
