"""ZeRO stage 3 with the real detector: in parts, and as exact as in one piece."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint_store import checkpoint_path, checkpoint_steps
from pipeline.engine import stop_process_group
from pipeline.replay import replay_saved, replay_step
from tests.pipeline.training_runs import (
    ENVIRONMENT,
    ROOT,
    command,
    events,
    metrics,
    require_same_ends,
    run,
)

pytestmark = pytest.mark.slow

NO_PARAMETER_WHOLE = """
import sys
import pipeline.engine
from pipeline.__main__ import COMMANDS
from pipeline.cli import main

pipeline.engine.KEPT_WHOLE = 0
sys.exit(main("apart", "", COMMANDS, sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def found(made_once) -> tuple[dict, Path]:
    """What zero3_cases.py prints, and the folder that it wrote to."""

    def make(folder: Path) -> None:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2",
                    "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]  # fmt: skip
        script = Path(__file__).with_name("zero3_cases.py")
        done = subprocess.run(
            [sys.executable, *launcher, str(script), str(folder)],
            cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
        (folder / "report.json").write_text(line)

    folder = made_once("zero3", make)
    return json.loads((folder / "report.json").read_text()), folder


def test_a_rank_keeps_its_part_of_each_parameter_and_of_its_average(found):
    report, _ = found
    assert report["parts"] == {"sum": True, "uneven": 0, "share": 0.5}
    assert report["apart"]["between"] == [0] * 4  # nothing else is left of them after a step
    assert (report["average_parts"], report["average_kept"]) == (report["all"] / 2, 0)


def test_small_parameters_stay_whole_between_steps(found):
    report, _ = found
    assert 0 < report["small"] < report["all"]
    assert report["some_whole"]["between"] == [report["small"]] * 4
    assert report["some_whole"]["losses"] == report["apart"]["losses"]


def test_steps_are_those_of_stage_2(found):
    """With recomputed activations, dropout, two passes a step, shared heads, a rank that never has
    an object, and a step in which none has one."""
    report, _ = found
    for name in ("losses", "norm"):
        assert report["apart"][name] == pytest.approx(report["gathered"][name], rel=1e-4), name
    assert min(report["apart"]["losses"][4:6]) < 1 < min(report["apart"]["losses"][6:])


def test_a_faster_rcnn_trains_as_in_stage_2(found):
    report, _ = found
    assert report["cnn_apart"] == pytest.approx(report["cnn_gathered"], rel=1e-4)
    assert report["cnn_apart"][2] < report["cnn_apart"][0]


def test_the_average_in_parts_is_that_of_whole_weights(found):
    assert found[0]["apart"]["same_average"]


def test_what_is_evaluated_is_whole_and_runs_on_one_rank_alone(found):
    assert found[0]["evaluated"] == {"pred_logits": True, "pred_boxes": True}


def test_a_bad_pass_of_one_rank_is_left_out_on_both_and_saved_with_whole_weights(found):
    report, folder = found
    assert report["bad"] == {"applied": [False, True], "saved": 1}
    (file,) = (folder / "non_finite").iterdir()
    assert file.name == "step-00000012-rank-1.pt"
    losses, said = replay_saved(file, torch.device("cpu"))
    saved = torch.load(file, weights_only=True)
    assert losses.keys() == saved["losses"].keys()
    for name, value in saved["losses"].items():
        torch.testing.assert_close(losses[name], value, rtol=0, atol=0, equal_nan=True)
    assert "inputs boxes of image 0 (1 of 4)" in said


def test_a_weight_that_is_not_finite_on_one_rank_is_told_by_the_other(found):
    assert "parameters encoder.0.norm.weight (2 of 64)" in found[0]["said"]


@pytest.mark.chaos  # minutes; test_training_state.py has the same of small engines
def test_a_run_goes_on_to_the_last_bit_and_is_replayed_on_one_process(drawn, tmp_path):
    """What a kill after step 6 would leave is made of a whole run, to save a start."""
    script = tmp_path / "script.py"
    script.write_text(NO_PARAMETER_WHOLE)
    options = [
        "--engine.zero-stage", 3, "--schedule.epochs", 2, "--optimizer.batch-size", 8,
        "--engine.log-every", 3, "--engine.precision", "fp32", "--model.dropout", 0.1,
        "--engine.checkpoint-steps", 2, "--engine.keep-checkpoints", 9,
        "--optimizer.ema-decay", 0.9,
    ]  # fmt: skip
    # One without a choice among proposals, which rounding would decide in the replay.
    recipe = "deformable_detr_r50_refine_demo"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(command(drawn, recipe, whole, *options, ranks=2, script=str(script)))
    shutil.copytree(whole, killed)
    kept = checkpoint_steps(killed)
    assert kept == [2, 4, 5, 6, 8, 10]
    for step in kept[4:]:
        shutil.rmtree(checkpoint_path(killed, step))
    run(command(drawn, recipe, killed, *options, ranks=2, script=str(script)))
    assert [x["step"] for x in events(killed, "start")] == [0, 6]
    require_same_ends(killed, whole)

    replayed = replay_step(whole, 3, torch.device("cpu"))
    stop_process_group()
    line = next(x for x in metrics(whole) if x["kind"] == "train")
    assert (replayed.step, replayed.start, line["step"]) == (3, 2, 3)
    assert replayed.grad_norm == pytest.approx(line["grad_norm"], rel=1e-4)
