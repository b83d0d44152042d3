"""What a grid would take: a few steps of each run, measured on this machine, and arithmetic.

One process takes one worker's share of the global batch through training's own step, loader
included. The exchange of gradients between workers, checkpoints and COCO's scoring come on top.
"""

import heapq
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.grid import Entry
from jobs.grid_status import columns
from pipeline.config import RunConfig
from pipeline.errors import UserError

WARM_UP = 3  # steps that are not counted
EVALUATED = 8  # batches of evaluation that are timed


@dataclass(frozen=True)
class Measured:
    """Seconds: of a step in the mean and of the slowest, and of evaluating once. `failed`: why
    there are none."""

    step: float = 0.0
    slowest: float = 0.0
    evaluation: float = 0.0
    steps: int = 0
    """Of the whole run."""
    gpu: bool = False
    failed: str = ""

    def hours(self, share: float, step: float, epochs: int) -> float:
        """Of `share` of the run, with steps of so many seconds."""
        return share * (self.steps * step + epochs * self.evaluation) / 3600


@dataclass(frozen=True)
class Planned:
    """A run of the plan; `share`: how much of it is left to do."""

    entry: Entry
    share: float
    measured: Measured

    @property
    def hours(self) -> float:
        m = self.measured
        return m.hours(self.share, m.step, self.entry.config.schedule.epochs)

    @property
    def ceiling(self) -> float:
        """Hours with every step as slow as the slowest."""
        m = self.measured
        return m.hours(self.share, m.slowest, self.entry.config.schedule.epochs)


def measure_in_a_process(config: RunConfig, workers: int, steps: int) -> Measured:
    """`measure` in a process of its own, so that one which takes all memory ends alone."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        try:
            return pool.submit(measure, config, workers, steps).result()
        except BrokenProcessPool:
            return Measured(failed="its process was killed, by the kernel if memory ran out")


def measure(config: RunConfig, workers: int, steps: int) -> Measured:
    """Times `steps` steps, after a few that are not counted, and a few batches of evaluation."""
    import torch

    share = -(-config.optimizer.batch_size // workers)
    one = replace(config, optimizer=replace(config.optimizer, batch_size=share))
    try:
        with tempfile.TemporaryDirectory() as folder:
            return timed(one, Path(folder), workers, steps)
    except (UserError, FloatingPointError, torch.OutOfMemoryError) as error:
        return Measured(failed=str(error).splitlines()[0])


def timed(config: RunConfig, folder: Path, workers: int, steps: int) -> Measured:
    """Takes `steps` training steps of one worker's share, and evaluates a few batches; seconds of
    each."""
    import torch

    from pipeline.checkpoint_store import Progress
    from pipeline.evaluate import detect
    from pipeline.run import started
    from pipeline.step import take_step
    from pipeline.train import remaining_steps

    with started(config, folder) as run:
        progress, seconds = Progress(), []
        whole = run.end_of_epoch(config.schedule.epochs)
        batches = remaining_steps(run, progress)
        run.state.engine.train()
        for _ in range(min(WARM_UP + steps, whole)):
            start = time.perf_counter()
            outcome = take_step(run, progress, next(batches), save=False)
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            progress = replace(progress, step=progress.step + 1, skipped=outcome.skipped)
        val, size = run.dataset.val, config.engine.evaluation_batch
        all_batches = -(-len(val) // size)
        every = max(1, all_batches // EVALUATED)
        start = time.perf_counter()
        detect(run.state.model, val, run.dataset.labels, run.config, run.device, 0, every)
        evaluation = (time.perf_counter() - start) / len(range(0, all_batches, every))
        kept = seconds[WARM_UP:] or seconds[-1:]
        return Measured(
            step=sum(kept) / len(kept),
            slowest=max(kept),
            evaluation=evaluation * all_batches / workers,
            steps=whole,
            gpu=run.device.type == "cuda",
        )


def finish(hours: Sequence[float], parallel: int) -> float:
    """Hours until all are done, started in this order, so many at a time."""
    free = [0.0] * min(parallel, max(1, len(hours)))
    for one in hours:
        heapq.heappush(free, heapq.heappop(free) + one)
    return max(free)


def report(planned: Sequence[Planned], workers: int, parallel: int, price: float) -> list[str]:
    """The plan as a table and its sums. price: of an hour of one worker."""
    unit = "GPU-hours" if any(p.measured.gpu for p in planned) else "worker-hours"
    cells: list[tuple[str, ...]] = [
        ("run", "steps", "s/step", "slowest", "evaluation s", "hours", unit, "cost", "")
    ]
    for p in planned:
        m = p.measured
        if m.failed:
            cells.append((p.entry.run, *["-"] * 7, m.failed))
            continue
        cells.append(
            (
                p.entry.run, f"{m.steps * p.share:.0f}", f"{m.step:.3f}", f"{m.slowest:.3f}",
                f"{m.evaluation:.1f}", f"{p.hours:.2f}", f"{p.hours * workers:.2f}",
                f"{p.hours * workers * price:.2f}", "",
            )
        )  # fmt: skip
    good = [p for p in planned if not p.measured.failed]
    hours, ceiling = [p.hours for p in good], [p.ceiling for p in good]
    lines = columns(cells)
    for what, each in (("in the mean", hours), ("at most", ceiling)):
        lines.append(
            f"{what}: {sum(each) * workers:.2f} {unit}, cost {sum(each) * workers * price:.2f}, "
            f"finished after {finish(each, parallel):.2f} hours; runs at a time: {parallel}, "
            f"workers of each: {workers}"
        )
    if len(good) < len(planned):
        lines.append(f"not measured, and in no sum: {len(planned) - len(good)} runs")
    return lines
