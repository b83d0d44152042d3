"""Denoising queries through the real step: passes of a global batch on two ranks, and replay."""

import pytest
import torch

from pipeline.engine import stop_process_group
from pipeline.replay import replay_step
from tests.pipeline.training_runs import command, metrics, run


@pytest.fixture
def one_thread():
    """As a rank has: with more, sums are rounded otherwise, which chooses other proposals among
    those that are alike at the start."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.chaos  # a minute; test_contrastive_denoising.py has the queries by themselves
@pytest.mark.usefixtures("one_thread")
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
    replayed = replay_step(folder, 3, torch.device("cpu"))
    stop_process_group()
    assert (replayed.start, replayed.applied) == (2, True)
    assert replayed.grad_norm == pytest.approx(steps[2]["grad_norm"], rel=1e-3)
    assert {"loss_ce_dn", "loss_giou_0_dn", "loss_bbox_enc"} <= replayed.losses.keys()
    for name, value in replayed.losses.items():
        assert value == pytest.approx(steps[2][name], rel=1e-5), name
