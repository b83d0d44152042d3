"""Cutting a global batch into micro-batches: nothing lost, bounds kept, as many on every rank."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.micro_batches import cut, padded_pixels


@st.composite
def global_batches(draw):
    world, passes, micro = (
        draw(st.integers(1, 16)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
    )
    sides = st.tuples(st.integers(20, 120), st.integers(20, 120))
    images = world * passes * micro
    sizes = draw(st.lists(sides, min_size=images, max_size=images))
    return np.array(sizes), world, micro


@settings(max_examples=60, deadline=None)
@given(global_batches(), st.booleans(), st.sampled_from([0, 120 * 120, 2 * 120 * 120]))
def test_every_image_is_in_one_micro_batch_within_the_bounds(batch, by_shape, most):
    sizes, world, micro = batch
    ranks = [cut(sizes, rank, world, micro, by_shape, most) for rank in range(world)]
    assert len({len(parts) for parts in ranks}) == 1
    parts = [part for of_rank in ranks for part in of_rank]
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    assert all(1 <= len(part) <= micro for part in parts)
    if most:
        assert max(padded_pixels(sizes[part]) for part in parts) <= most
    else:
        assert len(ranks[0]) == len(sizes) // world // micro


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 16), st.integers(0, 20), st.integers(1, 8), st.sampled_from([0, 9000]))
def test_uneven_shares_leave_no_rank_without_images(world, more, micro, most):
    sizes = np.random.default_rng(more).integers(20, 90, (world + more, 2))
    ranks = [cut(sizes, rank, world, micro, True, most) for rank in range(world)]
    assert sorted(i for parts in ranks for part in parts for i in part) == list(range(len(sizes)))
    passes = {len(parts) for parts in ranks}
    assert min(passes) >= 1
    assert len(passes) == 1 or all(len(part) == 1 for parts in ranks for part in parts)


def test_like_shapes_share_a_micro_batch():
    #                 0           1           2           3
    sizes = np.array([(480, 640), (640, 480), (500, 660), (660, 500)])
    plain = cut(sizes, 0, 1, 2, by_shape=False, most_pixels=0)
    assert [part.tolist() for part in plain] == [[0, 1], [2, 3]]
    grouped = cut(sizes, 0, 1, 2, by_shape=True, most_pixels=0)
    assert sorted(sorted(part.tolist()) for part in grouped) == [[0, 2], [1, 3]]


def test_a_bound_splits_what_is_too_large_and_nothing_else():
    sizes = np.array([(10, 20), (20, 10), (10, 20), (10, 20)])
    parts = cut(sizes, 0, 1, micro=4, by_shape=True, most_pixels=600)
    assert sorted(part.tolist() for part in parts) == [[0, 2, 3], [1]]
    parts = cut(sizes, 0, 1, micro=4, by_shape=True, most_pixels=1600)
    assert [part.tolist() for part in parts] == [[1, 0, 2, 3]]


def test_ranks_take_turns_by_size():
    """At the same time they have micro-batches of about the same area."""
    sizes = np.array([(10 * n, 10) for n in range(1, 9)])
    ranks = [cut(sizes, rank, 2, 1, by_shape=True, most_pixels=0) for rank in range(2)]
    assert [int(sizes[p[0], 0]) for p in ranks[0]] == [10, 30, 50, 70]
    assert [int(sizes[p[0], 0]) for p in ranks[1]] == [20, 40, 60, 80]


def test_an_image_above_the_bound_is_named():
    with pytest.raises(ValueError, match=r"max_padded_pixels: got 199, expected 200 .*10x20"):
        cut(np.array([(10, 10), (10, 20)]), 0, 1, 2, by_shape=False, most_pixels=199)
