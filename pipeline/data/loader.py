"""Batches of an epoch for one rank, decoded by worker processes in the exact order."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import DataLoader, Dataset

from pipeline.config import AugmentConfig, RunConfig
from pipeline.data.augment import augment, resize_for_evaluation
from pipeline.data.batch import Batch, collate, decode
from pipeline.data.labels import Labels
from pipeline.data.order import epoch_order, random_stream, rank_slice
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError


class _Batches(Dataset):
    """Item i is the i-th batch: a list of sample indices, made into a `Batch` by a worker."""

    def __init__(
        self,
        shards: ShardSet,
        labels: Labels,
        config: AugmentConfig,
        batches: list[np.ndarray],
        random_key: tuple[int, int] | None,
    ) -> None:
        self.shards, self.column_of, self.config = shards, labels.column_of(), config
        self.batches, self.random_key = batches, random_key

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> Batch:
        examples, records = [], []
        for index in self.batches[i]:
            sample = self.shards.read(int(index))
            example = decode(sample, self.column_of)
            if self.random_key is None:
                example = resize_for_evaluation(example, self.config)
            else:  # seeded by (seed, epoch, sample): the same pixels on any rank or worker
                example = augment(example, self.config, random_stream(*self.random_key, int(index)))
            examples.append(example)
            records.append(sample.image)
        return collate(examples, records)


def _load(batches: _Batches, workers: int, pin_memory: bool) -> DataLoader:
    return DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=pin_memory)


def steps_per_epoch(shards: ShardSet, batch_size: int) -> int:
    """Whole global batches in an epoch. The remainder of fewer than `batch_size` samples is left
    out, other ones in every epoch."""
    if len(shards) < batch_size:
        raise UserError(
            f"{shards.folder} has {len(shards)} images, fewer than one global batch of "
            f"{batch_size}; lower --optimizer.batch-size"
        )
    return len(shards) // batch_size


def training_steps(
    shards: ShardSet,
    labels: Labels,
    config: RunConfig,
    epoch: int,
    first_step: int,
    rank: int,
    world: int,
    pin_memory: bool,
) -> Iterator[list[Batch]]:
    """For each optimizer step of the epoch from `first_step` on: this rank's micro-batches."""
    order = epoch_order(shards.shard_sizes, config.seed, epoch, config.data.shuffle_window)
    micro = micro_batch_size(config, world)
    batches: list[np.ndarray] = []
    for step in range(first_step, steps_per_epoch(shards, config.optimizer.batch_size)):
        mine = rank_slice(order, step, config.optimizer.batch_size, rank, world)
        batches += [mine[i : i + micro] for i in range(0, len(mine), micro)]
    per_step = config.optimizer.batch_size // world // micro
    dataset = _Batches(shards, labels, config.augment, batches, (config.seed, epoch))
    pending: list[Batch] = []
    for batch in _load(dataset, config.engine.loader_workers, pin_memory):
        pending.append(batch)
        if len(pending) == per_step:
            yield pending
            pending = []
    assert not pending


def evaluation_batches(
    shards: ShardSet,
    labels: Labels,
    config: RunConfig,
    rank: int,
    world: int,
    batch_size: int,
    pin_memory: bool,
) -> DataLoader:
    """This rank's share of all samples, each exactly once over the ranks. Images of like shape
    stand together, so that padding is small."""
    width, height = shards.size[:, 0], shards.size[:, 1]
    by_shape = np.lexsort((np.arange(len(shards)), height, width))
    mine = by_shape[rank::world]
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    dataset = _Batches(shards, labels, config.augment, batches, None)
    return _load(dataset, config.engine.loader_workers, pin_memory)


def micro_batch_size(config: RunConfig, world: int) -> int:
    """Images in one forward pass of one process.

    Raises `UserError` where the global batch does not divide evenly."""
    total, micro = config.optimizer.batch_size, config.engine.micro_batch
    if total % world:
        raise UserError(
            f"optimizer.batch_size {total} does not divide over {world} processes; "
            f"choose a multiple of {world}"
        )
    share = total // world
    if micro and share % micro:
        raise UserError(
            f"engine.micro_batch {micro} does not divide the {share} images of one process; "
            f"choose a divisor of {share}"
        )
    return micro or share
