"""Times a training step in interleaved rounds, beside other operators and implementations."""

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from pipeline.config import RunConfig
from pipeline.contenders import Contender, build_contender
from pipeline.data.batch import Batch
from pipeline.engine import seed_step
from pipeline.step_timing import (
    Marks,
    Workload,
    busy_time,
    count_syncs,
    matcher_times,
    peak_memory,
    train_step,
)

BATCHES = 8
"""Different batches that the steps take in turn."""
ROUNDS = 5
MEAN_BOXES, MOST_BOXES = 7, 60


@dataclass
class Measured:
    """What became of one contender under one workload. Times in milliseconds."""

    contender: str
    what: str = ""
    failed: str = ""
    """Why there are no figures: out of memory."""
    trained_parameters: int = 0
    first_loss: float = math.nan
    first_step: float = math.nan
    """With what is done only once, such as compiling."""
    peak_memory: float = math.nan
    """MiB. GPU: parameters, optimizer state and what the step allocates on top at its peak.
    CPU: the process's peak during a step over what it held before."""
    syncs: dict[str, int] | None = None
    """On a GPU: times that each phase waits for it, as torch counts them."""
    device_busy: float | None = None
    """On a GPU: time of one step in which it ran a kernel or a copy."""
    matcher: dict[str, float] | None = None
    """Host time in our matcher, a part of the loss."""
    rounds: list[float] = field(default_factory=list)
    """Wall time of a step, the mean of each round."""
    host: list[dict[str, float]] = field(default_factory=list)
    """The host's time in each phase, for each step; on a GPU this is launching, and waiting."""
    on_device: list[dict[str, float]] = field(default_factory=list)
    """On a GPU: time in its stream from one phase's end to the next, for each step."""
    losses: list[float] = field(default_factory=list)


def benchmark_step(
    config: RunConfig,
    names: list[str],
    size: tuple[int, int],
    batch_sizes: tuple[int, ...],
    precisions: tuple[Literal["fp32", "bf16"], ...],
    steps: int,
    device: torch.device,
) -> Iterator[tuple[Workload, list[Measured]]]:
    """Times `steps` steps of each contender for each batch size and precision, (h, w) images.

    Yields each workload as soon as it is measured. Raises `UserError` for a contender that cannot
    be built, `FloatingPointError` where a loss is not finite, and `RuntimeError` where a step
    leaves a group of weights as it was.
    """
    for batch_size in batch_sizes:
        batches = make_batches(size, batch_size, config.model.num_classes, config.seed)
        if device.type == "cuda":
            batches = [batch.pin_memory() for batch in batches]
        for precision in precisions:
            work = Workload(size, batch_size, precision, device, batches)
            mine = replace(
                config,
                engine=replace(config.engine, precision=precision, micro_batch=0),
                optimizer=replace(config.optimizer, batch_size=batch_size),
            )
            yield work, measure(work, mine, names, steps)


def make_batches(
    size: tuple[int, int], batch_size: int, num_classes: int, seed: int
) -> list[Batch]:
    """Noise of `size`, with boxes as many and as large as COCO's.

    Boxes per image are quantiles of a geometric distribution of mean 7, at most 60; the side of a
    box is log-uniform from 2% to 80% of the image's, its aspect ratio log-normal.
    """
    random = np.random.default_rng(seed)
    height, width = size
    total = BATCHES * batch_size
    share = random.permutation((np.arange(total) + 0.5) / total)
    counts = np.log1p(-share) / math.log(MEAN_BOXES / (MEAN_BOXES + 1))
    batches = []
    for some in counts.clip(max=MOST_BOXES).astype(int).reshape(BATCHES, batch_size):
        targets = []
        for count in some:
            side = np.exp(random.uniform(math.log(0.02), math.log(0.8), (count, 1)))
            aspect = np.exp(random.normal(0, 0.35, (count, 1)))
            sides = np.concatenate([side * aspect, side / aspect], axis=1).clip(max=0.95)
            centres = random.uniform(sides / 2, 1 - sides / 2)
            boxes = torch.from_numpy(np.concatenate([centres, sides], axis=1)).float()
            # Column 0 is a Faster R-CNN's background, and no category of COCO's.
            labels = torch.from_numpy(random.integers(min(1, num_classes - 1), num_classes, count))
            targets.append({"labels": labels, "boxes": boxes})
        pixels = random.integers(0, 256, (batch_size, 3, height, width), dtype=np.uint8)
        padding_mask = torch.zeros(batch_size, height, width, dtype=torch.bool)
        sizes = torch.tensor([[height, width]] * batch_size)
        ids = list(range(batch_size))
        images = torch.from_numpy(pixels).contiguous(memory_format=torch.channels_last)
        batches.append(Batch(images, padding_mask, targets, ids, sizes))
    return batches


def measure(work: Workload, config: RunConfig, names: list[str], steps: int) -> list[Measured]:
    """All contenders under one workload: a first look at each, then rounds of steps in turn."""
    found = [Measured(name) for name in names]
    ready: dict[str, Contender] = {}
    for result in found:
        _unless_out_of_memory(
            result, lambda r: ready.update({r.contender: prepare(r, work, config)})
        )
    rounds = min(steps, ROUNDS)
    for index in range(rounds):
        first = index % len(found)
        for result in found[first:] + found[:first]:
            if not result.failed:
                _unless_out_of_memory(
                    result,
                    lambda r: run_round(r, ready[r.contender], work, math.ceil(steps / rounds)),
                )
            if result.failed:
                ready.pop(result.contender, None)
    for result in found:
        if not all(math.isfinite(loss) for loss in result.losses):
            raise FloatingPointError(f"{result.contender}: losses {result.losses}")
    return found


def _unless_out_of_memory(result: Measured, call: Callable[[Measured], None]) -> None:
    """A GPU's memory being too small for a contender is a result of the benchmark, too."""
    try:
        call(result)
    except torch.OutOfMemoryError as error:
        result.failed = f"out of memory: {str(error).splitlines()[0]}"
    if result.failed:  # only here is what the error held on to free
        gc.collect()
        torch.cuda.empty_cache()


def prepare(result: Measured, work: Workload, config: RunConfig) -> Contender:
    """Builds the contender and takes untimed steps: does it learn, what does it hold, where does
    it wait?"""
    cuda = work.device.type == "cuda"
    allocated = torch.cuda.memory_allocated() if cuda else 0
    contender = build_contender(result.contender, config, work.device)
    result.what = contender.what
    result.trained_parameters = sum(p.numel() for group in contender.groups for p in group)
    learn(result, contender, work, config.seed)
    held = torch.cuda.memory_allocated() - allocated if cuda else 0
    result.peak_memory = (held + peak_memory(contender, work)) / 2**20
    if cuda:
        result.syncs = count_syncs(contender, work)
        result.device_busy = busy_time(contender, work)
    if contender.name == "ours":
        result.matcher = matcher_times(contender, work)
    return contender


def learn(result: Measured, contender: Contender, work: Workload, seed: int) -> None:
    """The first step, whose loss must be finite and which must change each group of weights."""
    before = [[p.detach().clone() for p in group] for group in contender.groups]
    seed_step(seed, 0, 0)
    start = time.perf_counter()
    result.first_loss = train_step(contender, work, work.batches[0], Marks(work.device)).item()
    result.first_step = 1000 * (time.perf_counter() - start)
    if not math.isfinite(result.first_loss):
        raise FloatingPointError(f"{contender.name}: the first loss is {result.first_loss}")
    for index, (old, new) in enumerate(zip(before, contender.groups, strict=True)):
        if all(torch.equal(a, b) for a, b in zip(old, new, strict=True)):
            raise RuntimeError(f"{contender.name}: a step left parameter group {index} unchanged")


def run_round(result: Measured, contender: Contender, work: Workload, steps: int) -> None:
    """`steps` steps on end, the device waited for only after the last, as in training."""
    cuda = work.device.type == "cuda"
    if cuda:  # fills the allocator's cache, which another contender may have emptied
        train_step(contender, work, work.batches[0], Marks(work.device))
        torch.cuda.synchronize()
    marks = [Marks(work.device) for _ in range(steps)]
    losses = []
    start = time.perf_counter()
    for step in range(steps):
        batch = work.batches[(len(result.host) + step) % BATCHES]
        losses.append(train_step(contender, work, batch, marks[step]))
    if cuda:
        torch.cuda.synchronize()
    result.rounds.append(1000 * (time.perf_counter() - start) / steps)
    result.host += [mark.host() for mark in marks]
    if cuda:
        result.on_device += [mark.on_device() for mark in marks]
    result.losses += [loss.item() for loss in losses]
