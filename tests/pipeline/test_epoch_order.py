"""The order of an epoch: a pure function, every sample once, the same on any world size."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.order import epoch_order, random_stream, rank_slice

sizes = st.lists(st.integers(0, 30), min_size=1, max_size=12)


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


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 4))
def test_ranks_together_see_the_global_batch_whatever_their_number(world, step):
    order = epoch_order([40, 20], 7, 3, 8)
    joined = np.concatenate([rank_slice(order, step, 12, rank, world) for rank in range(world)])
    np.testing.assert_array_equal(joined, order[step * 12 : (step + 1) * 12])


def test_a_window_keeps_few_shards_open():
    shards = np.repeat(np.arange(20), 50)
    order = epoch_order([50] * 20, 0, 0, window=4)
    for start in range(0, 1000, 200):
        assert len(set(shards[order[start : start + 200]])) == 4


def test_streams_of_different_keys_are_independent():
    first = {random_stream(*key).random() for key in [(0,), (0, 0), (0, 0, 0), (1, 0), (0, 1)]}
    assert len(first) == 5
