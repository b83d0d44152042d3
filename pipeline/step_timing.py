"""One training step of a contender, and what can be read from it.

The step is training's: uint8 images to the device and normalised there, the model under autocast
with float32 parameters, the loss outside of it, the gradient clipped, AdamW with three rates.
Without DeepSpeed, so that it runs wherever torch does, and the same for every contender.
"""

import ctypes
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from model import attention, criterion, matcher
from pipeline.contenders import Contender, replaced
from pipeline.data.batch import Batch

PHASES = ("input", "forward", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class Workload:
    """One batch size and precision, at one image size (height, width)."""

    size: tuple[int, int]
    batch_size: int
    precision: str
    device: torch.device
    batches: list[Batch]


class Marks:
    """The boundaries of a step's phases, by a clock of the host and in the GPU's stream."""

    def __init__(self, device: torch.device, clock: Callable[[], float] | None = None) -> None:
        self.clock = clock or (lambda: 1000 * time.perf_counter())
        self.cuda = device.type == "cuda"
        self.readings: list[float] = []
        self.events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        self.readings.append(self.clock())
        if self.cuda:
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()

    def host(self) -> dict[str, float]:
        pairs = zip(self.readings[:-1], self.readings[1:], strict=True)
        return dict(zip(PHASES, (after - before for before, after in pairs), strict=True))

    def on_device(self) -> dict[str, float]:
        """After the stream has been waited for."""
        pairs = zip(self.events[:-1], self.events[1:], strict=True)
        return dict(
            zip(PHASES, (before.elapsed_time(after) for before, after in pairs), strict=True)
        )


def train_step(contender: Contender, work: Workload, batch: Batch, marks: Marks) -> Tensor:
    """One optimizer step; returns the loss, on the device."""
    with replaced(attention, "fused_deformable_attention", contender.operator):
        marks.mark()
        batch = batch.to(work.device)
        images = batch.normalized_images()
        marks.mark()
        predictions = contender.predict(images, batch.padding_mask, batch.targets)
        marks.mark()
        loss = contender.score(predictions, batch.targets)
        marks.mark()
        contender.backward(loss)
        marks.mark()
    contender.update()
    marks.mark()
    return loss.detach()


def peak_memory(contender: Contender, work: Workload) -> int:
    """Bytes that one step needs at its peak over what there is before it."""
    if work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train_step(contender, work, work.batches[0], Marks(work.device))
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # else a step takes what earlier ones left in the heap
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    train_step(contender, work, work.batches[0], Marks(work.device))
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def count_syncs(contender: Contender, work: Workload) -> dict[str, int]:
    """How often the host waits for the GPU in each phase of one step, as far as torch can tell."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def waits() -> float:
            return sum("synchronizing CUDA" in str(warning.message) for warning in caught)

        marks = Marks(work.device, waits)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train_step(contender, work, work.batches[0], marks)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {phase: int(count) for phase, count in marks.host().items()}


def busy_time(contender: Contender, work: Workload) -> float | None:
    """Milliseconds of one step in which the GPU was at work; None where the profiler sees none."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        train_step(contender, work, work.batches[0], Marks(work.device))
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    busy, reached = 0.0, -math.inf
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1000 if spans else None


def matcher_times(contender: Contender, work: Workload) -> dict[str, float]:
    """Host milliseconds of the matcher, medians of five steps.

    `total`; of it `costs` (launching them), `assign`, and `wait` for the GPU and the copy.
    """
    spent: list[dict[str, float]] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            spent[-1][name] += 1000 * (time.perf_counter() - start)
            return result

        return call

    with (
        replaced(matcher, "matching_cost", timed("costs", matcher.matching_cost)),
        replaced(matcher, "assign", timed("assign", matcher.assign)),
        replaced(criterion, "match", timed("total", criterion.match)),
    ):
        for batch in work.batches[:5]:
            spent.append({"total": 0.0, "costs": 0.0, "assign": 0.0})
            train_step(contender, work, batch, Marks(work.device))
    medians = {name: statistics.median(step[name] for step in spent) for name in spent[0]}
    return medians | {"wait": medians["total"] - medians["costs"] - medians["assign"]}
