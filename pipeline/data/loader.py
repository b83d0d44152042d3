"""Batches for one rank, decoded by worker processes in the exact order.

The process that trains decides which samples make a batch; a worker is told them, and needs
nothing else than the shards. So the number of workers changes nothing.
"""

import atexit
import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.config import AugmentConfig, RunConfig
from pipeline.data.augment import Example, Geometry, choose, for_evaluation, transform
from pipeline.data.batch import Batch, collate, decode
from pipeline.data.labels import Labels
from pipeline.data.micro_batches import cut
from pipeline.data.order import Stream, random_stream, rank_slice
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError

T = TypeVar("T")
EVALUATION = -1
"""In place of an epoch: the sample is resized for evaluation, without randomness."""
CUTS = ("micro_batch", "group_by_shape", "max_padded_pixels")
"""Settings of the engine that say which images share a pass. A run may go on with others."""


class _Samples(Dataset):
    """Made into a `Batch` by a worker: item [n, 2] int64 (epoch, sample)."""

    def __init__(
        self, shards: ShardSet, labels: Labels, config: AugmentConfig, seed: int = 0
    ) -> None:
        self.shards, self.column_of = shards, labels.column_of()
        self.config, self.seed = config, seed

    def __getitem__(self, samples: np.ndarray) -> Batch | UserError | OSError:
        examples, records = [], []
        try:
            for epoch, index in samples.tolist():
                width, height = self.shards.size[index].tolist()
                if epoch == EVALUATION:
                    geometry = for_evaluation((height, width), self.config)
                else:  # seeded by (seed, epoch, sample): the same pixels on any rank or worker
                    random = random_stream(self.seed, epoch, index)
                    geometry = choose((height, width), self.config, random)
                example, record = self._decoded(index, geometry)
                examples.append(transform(example, geometry))
                records.append(record)
        except (UserError, OSError) as error:
            return error  # raised in a worker it would arrive with a traceback in its text
        return collate(examples, records)

    def _decoded(self, index: int, geometry: Geometry) -> tuple[Example, dict[str, Any]]:
        """The sample, not yet transformed, and its image record."""
        sample = self.shards.read(index)
        try:
            return decode(sample, self.column_of, geometry), sample.image
        except UserError:
            if not self.shards.mend(index):
                raise
        sample = self.shards.read(index)
        return decode(sample, self.column_of, geometry), sample.image


def _left_to_the_trainer(worker: int) -> None:
    """In a worker process: schedulers and terminals signal it, too, and while the trainer saves
    because of that, it is still needed. It ends with the trainer, whichever way."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Of a loader that is still held when this process ends. multiprocessing would send them
    SIGTERM then, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes their end for a failure
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _load(
    samples: _Samples, batches: Iterable[np.ndarray], workers: int, pin_memory: bool
) -> Iterator[Batch]:
    loader = DataLoader(
        samples, sampler=batches, batch_size=None, num_workers=workers, pin_memory=pin_memory,
        worker_init_fn=_left_to_the_trainer,
    )  # fmt: skip
    try:
        for batch in loader:
            if isinstance(batch, (UserError, OSError)):
                raise batch
            yield batch
    except Exception as error:
        # In torch's an error of a worker refers to itself, so that the workers would not end with
        # the loader, and the process would wait for them at its end, for ever.
        traceback.clear_frames(error.__traceback__)
        raise


def steps_per_epoch(shards: ShardSet, batch_size: int) -> float:
    """Global batches in the samples of an epoch, which need not be whole (`pipeline.data.order`).

    Raises `UserError` where a global batch is larger than the data."""
    if len(shards) < batch_size:
        raise UserError(
            f"{shards.folder} has {len(shards)} images, fewer than one global batch of "
            f"{batch_size}; lower --optimizer.batch-size"
        )
    return len(shards) / batch_size


def training_steps(
    shards: ShardSet,
    labels: Labels,
    config: RunConfig,
    steps: range,
    rank: int,
    world: int,
    pin_memory: bool,
) -> Iterator[list[Batch]]:
    """For each of the global `steps`: this rank's micro-batches."""
    stream = Stream(shards.shard_sizes, config.seed, config.data.shuffle_window)
    sent: list[int] = []  # micro-batches of the steps that are under way

    def batches() -> Iterator[np.ndarray]:
        for step in fetching(shards, config, steps):
            parts = micro_batches(shards, config, stream, step, rank, world)
            sent.append(len(parts))
            yield from parts

    samples = _Samples(shards, labels, config.augment, config.seed)
    pending: list[Batch] = []
    for batch in _load(samples, batches(), config.engine.loader_workers, pin_memory):
        pending.append(batch)
        if len(pending) == sent[0]:
            yield pending
            pending = []
            del sent[0]
    assert not pending


def fetching(shards: ShardSet, config: RunConfig, steps: range) -> Iterator[int]:
    """The steps, while in the background remote shards are fetched that will be needed after as
    many samples as a window of shards has. A failure there is not lost: who reads the shard tries
    again."""
    if shards.cache is None:
        yield from steps
        return
    window, batch_size = config.data.shuffle_window, config.optimizer.batch_size
    stream = Stream(shards.shard_sizes, config.seed, window)
    distance = window * max(shards.shard_sizes) // batch_size + 1
    asked: deque[int] = deque(maxlen=2 * window)
    pool = ThreadPoolExecutor(2)
    try:
        for step in steps:
            if step + distance < steps.stop:
                samples = stream.batch(step + distance, batch_size)[:, 1]
                for shard in np.unique(shards.shard[samples]).tolist():
                    if shard not in asked:
                        asked.append(shard)
                        pool.submit(shards.cache.fetch, shard)
            yield step
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def micro_batches(
    shards: ShardSet, config: RunConfig, stream: Stream, step: int, rank: int, world: int
) -> list[np.ndarray]:
    """[n, 2] (epoch, sample) of each micro-batch of one rank in a global step."""
    engine, batch = config.engine, stream.batch(step, config.optimizer.batch_size)
    micro = micro_batch_size(config, world)
    if not engine.group_by_shape and not engine.max_padded_pixels:
        mine = rank_slice(batch, rank, world)
        return [mine[i : i + micro] for i in range(0, len(mine), micro)]
    sizes = []
    for epoch, index in batch.tolist():
        width, height = shards.size[index].tolist()
        random = random_stream(config.seed, epoch, index)
        sizes.append(choose((height, width), config.augment, random).size)
    most = engine.max_padded_pixels
    try:
        parts = cut(np.array(sizes), rank, world, micro, engine.group_by_shape, most)
    except ValueError as error:
        raise UserError(str(error)) from None
    return [batch[part] for part in parts]


def evaluation_batches(
    shards: ShardSet,
    labels: Labels,
    config: RunConfig,
    rank: int,
    world: int,
    batch_size: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    """This rank's share of all samples, each exactly once over the ranks, so that ranks may have
    different numbers of them, or none. Images of like shape stand together, so that padding is
    small, within windows of shards, so that few are read at a time."""
    width, height = shards.size[:, 0], shards.size[:, 1]
    windows = shards.shard // config.data.shuffle_window
    by_shape = np.lexsort((np.arange(len(shards)), height, width, windows))
    of_evaluation = np.stack([np.full_like(by_shape, EVALUATION), by_shape], axis=1)
    # Batches first, ranks then: an image has the same neighbours, so the same padding, on any.
    batches = [of_evaluation[i : i + batch_size] for i in range(0, len(shards), batch_size)][
        rank::world
    ]
    samples = _Samples(shards, labels, config.augment)
    return _load(samples, batches, config.engine.loader_workers, pin_memory)


def micro_batch_size(config: RunConfig, world: int) -> int:
    """Most images in one forward pass of one process.

    Raises `UserError` where a process would have none, or where processes would need different
    numbers of passes, which ZeRO stages 2 and 3 do not do."""
    total, engine = config.optimizer.batch_size, config.engine
    if total < world:
        raise UserError(
            f"optimizer.batch_size: got {total} images for {world} processes, expected {world} or "
            f"more"
        )
    largest, smallest = -(-total // world), total // world
    micro = min(engine.micro_batch or largest, largest)
    cut = engine.group_by_shape or engine.max_padded_pixels
    uneven = total % world > 0 if cut else -(-largest // micro) != -(-smallest // micro)
    if engine.zero_stage >= 2 and uneven:
        raise UserError(
            f"optimizer.batch_size: {total} images over {world} processes need different numbers "
            f"of passes, which ZeRO stage {engine.zero_stage} does not do; use "
            f"--engine.zero-stage 1"
        )
    return micro


def on_device(steps: Iterable[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """The steps on the device. On a GPU the next one is copied from pinned memory, on a stream of
    its own, while the present one is computed."""
    if device.type != "cuda":
        for step in steps:
            yield [batch.to(device) for batch in step]
        return
    side = torch.cuda.Stream(device)
    for step, copied in ahead(_copied(step, device, side) for step in steps):
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for tensor in (tensor for batch in step for tensor in batch.tensors()):
            # Else its memory could be given to the next copy while the step still reads it.
            tensor.record_stream(current)
        yield step


def _copied(
    step: list[Batch], device: torch.device, side: torch.cuda.Stream
) -> tuple[list[Batch], torch.cuda.Event]:
    with torch.cuda.stream(side):
        moved = [batch.to(device) for batch in step]
        return moved, side.record_event()


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each next one taken before the present one is handed out."""
    iterator = iter(items)
    try:
        present = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield present
        present = following
    yield present
