"""Means of the losses, and the speed, between two lines of the metrics log."""

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Meter:
    """Collects on the device, so that nothing waits for it but `flush`.

    What is collected is part of a checkpoint: a resumed run logs the same means.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.batch_size, self.device = batch_size, device
        self.restart()

    def restart(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = self.skipped = 0
        self.waited, self.since, self.timed_steps = 0.0, time.perf_counter(), 0

    def timed(self, steps: Iterable[T]) -> Iterator[T]:
        """Passes the steps on, counting them and the seconds spent waiting for data."""
        iterator = iter(steps)
        while True:
            start = time.perf_counter()
            step = next(iterator, None)
            if step is None:
                return
            self.waited += time.perf_counter() - start
            self.timed_steps += 1
            yield step

    def add(self, passes: list[dict[str, Tensor]]) -> None:
        """The losses of a step's passes through the model."""
        self.steps += 1
        for losses in passes:
            for name, value in losses.items():
                value = value.detach().float() / len(passes)
                self.sums[name] = self.sums[name] + value if name in self.sums else value

    def skip(self) -> None:
        """A step that was left out: it counts in no mean."""
        self.skipped += 1

    def flush(self) -> dict[str, float]:
        """Since the last call (collective): mean losses over steps and ranks, `skipped_steps`,
        `images_per_second`, `data_wait` (seconds a step that the rank with the slowest loader
        waited for its data) and on a GPU `memory_gib`."""
        values: dict[str, float] = {}
        if self.steps:
            names = sorted(self.sums)
            means = torch.stack([self.sums[n] for n in names])
            means = means / (self.steps * dist.get_world_size())
            dist.all_reduce(means)
            values = dict(zip(names, means.tolist(), strict=True))
        wait = torch.tensor(self.waited / max(1, self.timed_steps), device=self.device)
        dist.all_reduce(wait, dist.ReduceOp.MAX)
        seconds = time.perf_counter() - self.since
        values["skipped_steps"] = self.skipped
        values["images_per_second"] = self.timed_steps * self.batch_size / seconds
        values["data_wait"] = wait.item()
        if self.device.type == "cuda":
            values["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.restart()
        return values

    def gather(self) -> dict[str, Any]:
        """What was collected since the last line, of every rank (collective)."""
        names = sorted(self.sums)
        sums = torch.stack([self.sums[n] for n in names]) if names else torch.zeros(0)
        sums = sums.to(self.device)
        of_all = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
        dist.all_gather(of_all, sums)
        return {
            "names": names,
            "sums": torch.stack(of_all).cpu(),
            "steps": self.steps,
            "skipped": self.skipped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `gather` returned; exactly on as many ranks."""
        sums = state["sums"].to(self.device)
        rank, world = dist.get_rank(), dist.get_world_size()
        # Of ranks that are no more, rank 0 keeps the sums.
        mine = sums[rank] if rank < len(sums) else torch.zeros_like(sums[0])
        if rank == 0 and len(sums) > world:
            mine = mine + sums[world:].sum(0)
        # A mean over ranks divides by their number: of another one, all has to be scaled.
        mine = mine * (world / len(sums))
        self.sums = dict(zip(state["names"], mine.unbind(), strict=True))
        self.steps, self.skipped = state["steps"], state["skipped"]
