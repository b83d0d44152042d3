"""The order of samples: a pure function, every sample once an epoch, the same on any world size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import Stream, epoch_order, first_step, random_stream, rank_slice

sizes = st.lists(st.integers(0, 30), min_size=1, max_size=12)
worlds = st.integers(1, 16)


@settings(max_examples=50, deadline=None)
@given(sizes, st.integers(0, 2**31), st.integers(0, 1000), st.integers(1, 5))
def test_every_sample_stands_once_and_again_in_the_same_place(shards, seed, epoch, window):
    order = epoch_order(shards, seed, epoch, window)
    assert sorted(order.tolist()) == list(range(sum(shards)))
    np.testing.assert_array_equal(order, epoch_order(shards, seed, epoch, window))


def test_epochs_and_seeds_differ():
    orders = [epoch_order([50, 50], seed, epoch, 2) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            assert (one != other).mean() > 0.9


@settings(max_examples=50, deadline=None)
@given(sizes.filter(any), st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 40))
def test_the_stream_holds_every_sample_once_an_epoch(shards, seed, epochs, batch_size):
    total = sum(shards)
    stream = Stream(shards, seed, window=2)
    steps = first_step(total, batch_size, epochs)
    seen = np.concatenate([stream.batch(step, batch_size) for step in range(steps)])
    # All of these epochs, in order, and what the last batch takes of the next.
    expected = [(e, s) for e in range(epochs) for s in epoch_order(shards, seed, e, 2).tolist()]
    assert list(map(tuple, seen[: epochs * total].tolist())) == expected
    assert 0 <= len(seen) - len(expected) < batch_size
    assert (seen[len(expected) :, 0] >= epochs).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 60))
def test_an_epoch_ends_with_the_step_that_completes_it(samples, batch_size, epoch):
    end = first_step(samples, batch_size, epoch)
    assert end * batch_size >= epoch * samples > (end - 1) * batch_size


@settings(max_examples=50, deadline=None)
@given(sizes.filter(any), worlds, worlds, st.integers(1, 40), st.integers(0, 9), st.data())
def test_a_resume_on_another_world_size_sees_the_rest(
    shards, before, after, batch_size, stop, data
):
    """Up to `stop` on one number of ranks, then on another: the uninterrupted sequence."""
    resumed_at = data.draw(st.integers(0, stop))
    one = Stream(shards, 5, window=3)
    expected = np.concatenate([one.batch(step, batch_size) for step in range(stop + 1)])
    seen = []
    for world, steps in ((before, range(resumed_at)), (after, range(resumed_at, stop + 1))):
        stream = Stream(shards, 5, window=3)  # a restart knows nothing of the steps before
        for step in steps:
            for rank in range(world):
                seen.append(rank_slice(stream.batch(step, batch_size), rank, world))
    np.testing.assert_array_equal(np.concatenate(seen), expected)


@pytest.mark.parametrize("window", [1, 4, 7])
def test_a_window_keeps_few_shards_open(window):
    shards = np.repeat(np.arange(20), 50)
    order = epoch_order([50] * 20, 0, 0, window)
    for start in range(0, 1000, 50 * window):
        assert len(set(shards[order[start : start + 50 * window]])) <= window


def test_streams_of_different_keys_are_independent():
    first = {random_stream(*key).random() for key in [(0,), (0, 0), (0, 0, 0), (1, 0), (0, 1)]}
    assert len(first) == 5
