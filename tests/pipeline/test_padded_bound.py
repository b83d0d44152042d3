"""A bound on padded pixels that an image can exceed is refused when the data is opened."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import DataConfig
from pipeline.data.augment import choose
from pipeline.data.loader import micro_batches
from pipeline.data.order import Stream, random_stream
from pipeline.dataset import open_dataset
from pipeline.errors import UserError
from pipeline.recipes import recipe


def config_of(drawn, most: int):
    config = recipe("demo")
    shards = [str(drawn.shards / split) for split in ("train", "val")]
    augment = replace(
        config.augment, short_sides=(40, 48, 56), max_side=80, crop_probability=0.2,
        crop_short_sides=(48,), crop_sides=(30, 44),
    )  # fmt: skip
    return replace(
        config,
        data=DataConfig(*shards),
        augment=augment,
        optimizer=replace(config.optimizer, batch_size=8),
        engine=replace(config.engine, max_padded_pixels=most, loader_workers=0),
    )


def test_the_least_bound_that_will_do_is_named_at_the_start(drawn):
    with pytest.raises(UserError) as caught:
        open_dataset(config_of(drawn, 100))
    said = str(caught.value)
    assert said.startswith("engine.max_padded_pixels: got 100, expected ")
    assert "\n" not in said
    least = int(said.partition("expected ")[2].split()[0])
    with pytest.raises(UserError, match=f"got {least - 1}, expected {least} or more"):
        open_dataset(config_of(drawn, least - 1))
    config = config_of(drawn, least)
    data = open_dataset(config)
    stream = Stream(data.train.shard_sizes, config.seed, config.data.shuffle_window)
    largest = 0
    for step in range(50):  # ten epochs, in which the largest comes
        for samples in micro_batches(data.train, config, stream, step, 0, 1):
            sizes = np.array([size_of(data.train, config, *sample) for sample in samples.tolist()])
            largest = max(largest, len(sizes) * sizes[:, 0].max() * sizes[:, 1].max())
    assert largest == least


def size_of(shards, config, epoch: int, index: int) -> tuple[int, int]:
    """(height, width) of a sample as it comes to training."""
    width, height = shards.size[index].tolist()
    return choose((height, width), config.augment, random_stream(config.seed, epoch, index)).size
