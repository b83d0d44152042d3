"""Denoising queries through the real step: passes of a global batch on two ranks, and replay."""

import json
import subprocess
import sys

import pytest

from tests.pipeline.training_runs import ENVIRONMENT, ROOT, command, metrics, run

# In a process of its own, with as many threads as a rank: more round sums otherwise, which chooses
# other proposals among those that are alike at the start.
REPLAY = """
import json, sys
from pathlib import Path
import torch
from pipeline.replay import replay_step
replayed = replay_step(Path(sys.argv[1]), 3, torch.device("cpu"))
names = ("start", "applied", "grad_norm", "losses")
print(json.dumps({name: getattr(replayed, name) for name in names}))
"""


@pytest.mark.chaos  # a minute; test_contrastive_denoising.py has the queries by themselves
def test_a_step_of_two_ranks_is_taken_again(drawn, tmp_path):
    """The noise is that of the step, the rank and the pass."""
    folder = tmp_path / "run"
    options = [
        "--schedule.epochs", 1, "--optimizer.batch-size", 8, "--engine.micro-batch", 2,
        "--engine.log-every", 1, "--engine.checkpoint-steps", 2, "--engine.keep-checkpoints", 9,
        "--engine.device", "cpu", "--model.denoising-pairs", 10, "--model.decoder-layers", 2,
    ]  # fmt: skip
    run(command(drawn, "dino_r50_4scale_demo", folder, *options, ranks=2))
    steps = [x for x in metrics(folder) if x["kind"] == "train"]
    assert len(steps) == 5
    done = subprocess.run(
        [sys.executable, "-c", REPLAY, str(folder)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    replayed = json.loads(done.stdout.splitlines()[-1])
    assert (replayed["start"], replayed["applied"]) == (2, True)
    assert replayed["grad_norm"] == pytest.approx(steps[2]["grad_norm"], rel=1e-3)
    assert {"loss_ce_dn", "loss_giou_0_dn", "loss_bbox_enc"} <= replayed["losses"].keys()
    for name, value in replayed["losses"].items():
        assert value == pytest.approx(steps[2][name], rel=1e-5), name
