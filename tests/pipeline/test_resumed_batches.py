"""Resumed at any step, on any number of processes and loader workers, training sees what remains of
the stream, to the pixel."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.labels import build_labels
from pipeline.data.loader import micro_batch_size, training_steps
from pipeline.data.micro_batches import cut, padded_pixels
from pipeline.data.order import first_step
from pipeline.data.shards import ShardSet
from pipeline.recipes import recipe

SAMPLES, MOST_SIDE = 40, 80
# Of torch, where the machine has fewer cores than the test has workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def config_for(batch_size=8, **engine):
    """Small pictures, of which an epoch has two windows of shards."""
    config = recipe("demo")
    augment = replace(
        config.augment, short_sides=(40, 56), crop_probability=0.5, crop_short_sides=(48,),
        crop_sides=(30, 44), max_side=MOST_SIDE,
    )  # fmt: skip
    return replace(
        config,
        augment=augment,
        data=replace(config.data, shuffle_window=2),
        optimizer=replace(config.optimizer, batch_size=batch_size),
        engine=replace(config.engine, **engine),
    )


def images_of(batch):
    """(image id, (height, width), digest of pixels, boxes and labels) of each image, without its
    padding, which is only what it lacks to the largest of the batch."""
    seen = []
    for i, image in enumerate(batch.images):
        padding = batch.padding_mask[i]
        height, width = int((~padding[:, 0]).sum()), int((~padding[0]).sum())
        assert not padding[:height, :width].any()
        assert padding.sum() == padding.numel() - height * width
        assert not image[:, padding].any()
        kept = (image[:, :height, :width], batch.targets[i]["boxes"], batch.targets[i]["labels"])
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in kept))
        seen.append((batch.image_ids[i], (height, width), digest.hexdigest()))
    sizes = np.array([size for _, size, _ in seen])
    assert batch.images[:, 0].numel() == padded_pixels(sizes)
    return seen


def seen_by_ranks(drawn, config, steps, world):
    """For each rank, for each step, for each micro-batch: `images_of`."""
    shards = ShardSet(drawn.shards / "train")
    labels = build_labels(shards.categories, "contiguous")
    ranks = (training_steps(shards, labels, config, steps, r, world, False) for r in range(world))
    return [[[images_of(batch) for batch in step] for step in rank] for rank in ranks]


@pytest.fixture(scope="module")
def stream(drawn):
    """The images of three epochs as one process sees them, by itself, one at a time."""
    [steps] = seen_by_ranks(drawn, config_for(1), range(3 * SAMPLES), 1)
    return [image for step in steps for batch in step for image in batch]


def global_batch(stream, step, batch_size):
    return stream[step * batch_size : (step + 1) * batch_size]


@pytest.mark.slow
@pytest.mark.parametrize("workers", range(5))
@pytest.mark.parametrize("world", range(1, 17))
def test_a_resume_on_any_world_and_workers_gives_the_rest_with_the_same_pixels(
    drawn, stream, world, workers
):
    """The step is random, and so is the batch, which the world does not divide."""
    random = np.random.default_rng((world, workers))
    sizes = [size for size in range(world, SAMPLES + 1) if world == 1 or size % world]
    batch_size = int(random.choice(sizes))
    end = first_step(SAMPLES, batch_size, 2)
    steps = range(int(random.integers(end)), end)
    micro = int(random.integers(batch_size // world + 2))  # 0: the rank's whole share
    config = config_for(batch_size, loader_workers=workers, micro_batch=micro)
    ranks = seen_by_ranks(drawn, config, steps, world)
    assert [len(rank) for rank in ranks] == [len(steps)] * world
    for step, of_ranks in zip(steps, zip(*ranks, strict=True), strict=True):
        shares = [[image for batch in share for image in batch] for share in of_ranks]
        assert {len(share) for share in shares} <= {batch_size // world, -(-batch_size // world)}
        together = [image for share in shares for image in share]
        assert together == global_batch(stream, step, batch_size)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2), st.data())
def test_micro_batches_by_shape_are_those_of_the_images_as_they_are(
    drawn, stream, world, workers, data
):
    """Also after a resume, and past the end of an epoch: the sizes of whole pictures, cut."""
    batch_size = data.draw(st.integers(world, SAMPLES))
    micro = data.draw(st.integers(0, 6))
    most = data.draw(st.sampled_from([0, 2 * MOST_SIDE**2]))
    ends = [first_step(SAMPLES, batch_size, epoch) for epoch in (1, 2)]
    steps = range(data.draw(st.integers(0, ends[0] - 1)), ends[1])
    config = config_for(
        batch_size, loader_workers=workers, micro_batch=micro, group_by_shape=True,
        max_padded_pixels=most,
    )  # fmt: skip
    largest = micro_batch_size(config, world)
    for rank, found in enumerate(seen_by_ranks(drawn, config, steps, world)):
        for step, batches in zip(steps, found, strict=True):
            images = global_batch(stream, step, batch_size)
            parts = cut(np.array([s for _, s, _ in images]), rank, world, largest, True, most)
            assert batches == [[images[i] for i in part] for part in parts]


def test_every_image_is_seen_once_an_epoch_with_other_random_choices(drawn, stream):
    ids, _, digests = zip(*stream, strict=True)
    every = sorted(ShardSet(drawn.shards / "train").image_id.tolist())
    for epoch in range(3):
        assert sorted(ids[epoch * SAMPLES : (epoch + 1) * SAMPLES]) == every
    assert len(set(digests)) > 105  # of 120; a few coincide
