"""Means of the losses, and the speed, between two lines of the metrics log."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Meter:
    """Collects on the device, so that nothing waits for it but `flush`."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.waited, self.since = 0.0, time.perf_counter()

    def timed(self, steps: Iterable[T]) -> Iterator[T]:
        """Passes the steps on, counting them and the seconds spent waiting for data."""
        iterator = iter(steps)
        while True:
            start = time.perf_counter()
            step = next(iterator, None)
            if step is None:
                return
            self.waited += time.perf_counter() - start
            self.steps += 1
            yield step

    def add(self, losses: dict[str, Tensor], passes: int) -> None:
        """The losses of one of the step's `passes` through the model."""
        for name, value in losses.items():
            value = value.detach() / passes
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def flush(self) -> dict[str, float]:
        """Since the last call (collective): mean losses over steps and ranks, `images_per_second`,
        `data_wait` (seconds a step that the rank with the slowest loader waited for its data) and
        on a GPU `memory_gib`."""
        names = sorted(self.sums)
        means = torch.stack([self.sums[n].float() for n in names])
        means = means / (self.steps * dist.get_world_size())
        dist.all_reduce(means)
        wait = torch.tensor(self.waited / self.steps, device=means.device)
        dist.all_reduce(wait, dist.ReduceOp.MAX)
        values = dict(zip(names, means.tolist(), strict=True))
        seconds = time.perf_counter() - self.since
        values["images_per_second"] = self.steps * self.batch_size / seconds
        values["data_wait"] = wait.item()
        if torch.cuda.is_available():
            values["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.restart()
        return values
