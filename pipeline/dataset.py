"""The data of a run: two shard folders with the same categories."""

from dataclasses import dataclass

from pipeline.config import DataConfig, RunConfig
from pipeline.data.augment import largest
from pipeline.data.labels import Labels, build_labels
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError


@dataclass(frozen=True)
class Dataset:
    """The shards of a run, and the class columns that its model learns."""

    train: ShardSet
    val: ShardSet
    labels: Labels


def open_dataset(config: RunConfig) -> Dataset:
    """Raises `UserError` where a folder is missing, the two disagree about categories, a column
    that the model needs for the background is taken, or an image may be larger than the bound on
    a micro-batch."""
    if not config.data.train or not config.data.val:
        raise UserError(
            "data.train and data.val: expected two shard folders; "
            "give --data.train DIR --data.val DIR"
        )
    train, val = (
        open_shards(location, config.data) for location in (config.data.train, config.data.val)
    )
    for name, shards in (("train", train), ("val", val)):
        if not shards.annotations.any():
            raise UserError(
                f"data.{name} {shards.folder}: got {len(shards)} images without a single "
                f"annotation, expected some; was it converted from the right annotation file?"
            )
    labels = build_labels(train.categories, config.data.labels)
    if build_labels(val.categories, config.data.labels) != labels:
        raise UserError(
            f"{val.folder} and {train.folder} have different categories; "
            f"convert both from annotation files with the same list"
        )
    if config.model.architecture == "faster_rcnn" and labels.category_of[0] >= 0:
        raise UserError(
            f"data.labels {config.data.labels}: got category {labels.names[0]!r} in column 0, "
            f"expected none: it is a Faster R-CNN's background; "
            f"use --data.labels contiguous_from_1"
        )
    _check_bound(train, config)
    return Dataset(train, val, labels)


def _check_bound(train: ShardSet, config: RunConfig) -> None:
    """At the start, because the largest images may come after hours."""
    most = config.engine.max_padded_pixels
    if most and len(train):
        height, width = largest(train.size[:, ::-1], config.augment)
        if height * width > most:
            raise UserError(
                f"engine.max_padded_pixels: got {most}, expected {height * width} or more, for an "
                f"image of {height}x{width}, which augmentation can make of one of {train.folder}; "
                f"raise it, or lower --augment.max-side and --augment.short-sides"
            )


def open_shards(location: str, data: DataConfig) -> ShardSet:
    """A shard folder, or its URL by way of a local cache. Raises `UserError` where it is none, or
    where the cache is too small for what training reads at a time."""
    shards = ShardSet(location, data.cache_dir, data.cache_gb)
    # The window that is read and the one that is fetched meanwhile.
    needed = min(sum(shards.shard_bytes), 2 * data.shuffle_window * max(shards.shard_bytes))
    if shards.cache is not None and shards.cache.most_bytes < needed:
        raise UserError(
            f"data.cache_gb: got {data.cache_gb:g}, expected {needed / 1e9:g} or more for two "
            f"times data.shuffle_window {data.shuffle_window} shards of {shards.folder}"
        )
    return shards
