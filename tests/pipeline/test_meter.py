"""Means of losses that a checkpoint falls into, gone on with by other numbers of ranks."""

import pytest
import torch
import torch.distributed as dist

from pipeline.meter import Meter

# Of two ranks: sums over three steps.
STATE = {
    "names": ["loss", "loss_ce"],
    "sums": torch.tensor([[3.0, 1.5], [9.0, 4.5]]),
    "steps": 3,
    "skipped": 1,
}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_mean_is_that_of_all_that_was_collected(world, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    totals = torch.zeros(2)
    for rank in range(world):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        meter = Meter(8, torch.device("cpu"))
        meter.restore(STATE)
        assert (meter.steps, meter.skipped) == (3, 1)
        if world == 2:  # to the last bit
            assert [float(x) for x in meter.sums.values()] == STATE["sums"][rank].tolist()
        totals += torch.stack(list(meter.sums.values()))
    assert (totals / (3 * world)).tolist() == pytest.approx([2.0, 1.0])


def test_nothing_collected_is_restored_as_nothing(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    meter = Meter(8, torch.device("cpu"))
    meter.restore({"names": [], "sums": torch.zeros(2, 0), "steps": 0, "skipped": 2})
    assert meter.sums == {}
    meter.skip()
    assert meter.skipped == 3
