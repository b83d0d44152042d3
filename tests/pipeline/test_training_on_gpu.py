"""Trainings on a GPU: what a kill, an overflow and a process that hangs come to. The first two by
the same code on a CPU; a hang there is in test_stopping.py."""

import subprocess
import time
from itertools import pairwise

import pytest
import torch

from pipeline.checkpoint_store import checkpoint_steps
from tests.pipeline.test_stopping import HANGING
from tests.pipeline.training_runs import (
    ENVIRONMENT,
    ROOT,
    command,
    events,
    kill_once,
    metrics,
    require_same_ends,
    run,
)

GPUS = torch.cuda.device_count()
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="needs a CUDA device")]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.chaos),  # most of a minute
    pytest.param("cuda", marks=ON_A_GPU),
]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("device", DEVICES)
def test_a_killed_run_ends_as_the_undisturbed_one_to_the_last_bit(drawn, tmp_path, device):
    options = [
        "--schedule.epochs", 2, "--optimizer.batch-size", 8, "--model.dropout", 0.1,
        "--engine.device", device, "--engine.deterministic", "--engine.log-every", 1,
        "--engine.checkpoint-steps", 2,
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(command(drawn, "demo", whole, *options))
    arguments = command(drawn, "demo", killed, *options)
    kill_once(lambda: checkpoint_steps(killed), arguments, tmp_path / "log")
    run(arguments)
    assert len(events(killed, "start")) == 2
    require_same_ends(killed, whole)


OVERFLOWING = """
import sys
import torch
import pipeline.run
import pipeline.update
from pipeline.__main__ import COMMANDS
from pipeline.cli import main

scale = pipeline.update.LossScale(2.0**20, dynamic=True)
pipeline.update.LossScale.of = staticmethod(lambda precision: scale)
pipeline.run.choose_device = lambda config: torch.device(config.device)  # fp16 on a CPU, too
sys.exit(main("overflowing", "", COMMANDS, sys.argv[1:]))
"""


@pytest.mark.parametrize("device", DEVICES)
def test_steps_that_overflow_in_fp16_are_left_out_and_the_run_goes_on(drawn, tmp_path, device):
    """From a loss scale of 2^20, of which half precision cannot hold a tenth."""
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(OVERFLOWING)
    options = [
        "--schedule.epochs", 2, "--optimizer.batch-size", 8, "--engine.device", device,
        "--engine.precision", "fp16", "--engine.log-every", 1,
    ]  # fmt: skip
    run(command(drawn, "demo", folder, *options, script=str(script)))
    lines = [x for x in metrics(folder) if x["kind"] == "train"]
    assert len(lines) == 10
    skipped = [x["skipped_steps"] for x in lines]
    assert 3 <= sum(skipped) < 10  # as many faults would end it: overflows do not count
    assert skipped[0] == 1
    assert skipped[-1] == 0
    for before, after in pairwise(lines):
        assert after["loss_scale"] == before["loss_scale"] / 2 ** after["skipped_steps"]
        assert ("loss" in after) != after["skipped_steps"]
    assert events(folder, "finished")


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")
def test_a_process_that_hangs_ends_the_run_in_time(drawn, tmp_path):
    """NCCL's own watch ends the processes."""
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(HANGING)
    options = [
        "--optimizer.batch-size", 8, "--engine.collective-timeout", 15, "--engine.device", "cuda",
    ]  # fmt: skip
    arguments = command(drawn, "demo", folder, *options, ranks=2, script=str(script))
    began = time.monotonic()
    done = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode != 0
    assert time.monotonic() - began < 250  # it would hang for 600
