"""What do DeepSpeed, Ray and tracking cost a training step, beside a bare loop of PyTorch?

    python -m tests.jobs.cost TRAIN VAL

trains `deformable_detr_r50` on the shards, small images, in one process: as `python -m jobs submit`
does, and as a loop of the same model, loss, optimizer and loader alone. Both run at the same time,
and one is always suspended: they take turns of a few steps, so that what else the machine does
befalls both alike. TRAIN needs images for `rounds` turns and some more of each. Do not run it
beside other jobs that are yours: it is the only one that it suspends, but they are noise.
"""

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import psutil
import torch
import tyro
from torch.nn.utils import clip_grad_norm_

from model.criterion import build_criterion
from model.detr import build_model
from pipeline.config import RunConfig
from pipeline.data.loader import training_steps
from pipeline.dataset import open_dataset
from pipeline.engine import AUTOCAST, build_optimizer
from pipeline.recipes import recipe
from pipeline.tracking import read_lines

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 5  # steps of each before the first turn


@dataclass(frozen=True)
class Options:
    train: tyro.conf.Positional[str]
    """Shard folder to train on."""
    val: tyro.conf.Positional[str]
    """Shard folder of the evaluation, which is not reached."""
    side: int = 256
    """Shorter side of the images, in pixels."""
    batch_size: int = 2
    steps: int = 6
    """Steps of a turn that count; the one before them, which the pause falls into, does not."""
    rounds: int = 40
    """Turns of each."""
    threads: int = 2
    bare: str = ""
    """Run the bare loop with this config, and print the time after each step."""


def config(options: Options) -> RunConfig:
    base = recipe("deformable_detr_r50")
    return replace(
        base,
        data=replace(base.data, train=options.train, val=options.val),
        augment=replace(
            base.augment, short_sides=(options.side,), max_side=2 * options.side,
            val_short_side=options.side, crop_probability=0.0,
        ),
        optimizer=replace(base.optimizer, batch_size=options.batch_size),
        engine=replace(base.engine, loader_workers=1, log_every=1, device="cpu"),
        schedule=replace(base.schedule, epochs=1, drop_epochs=()),
    )  # fmt: skip


def bare(settings: RunConfig) -> None:
    """A loop as one would write it without any of it."""
    dataset = open_dataset(settings)
    torch.manual_seed(0)
    model = build_model(replace(settings.model, num_classes=dataset.labels.num_classes)).train()
    criterion = build_criterion(settings.model)
    optimizer = build_optimizer(model, settings)
    dtype = AUTOCAST[settings.engine.precision]
    steps = range(len(dataset.train) // settings.optimizer.batch_size)
    for step in training_steps(dataset.train, dataset.labels, settings, steps, 0, 1, False):
        for batch in step:
            boxes = max(1, sum(len(t["labels"]) for t in batch.targets))
            with torch.autocast("cpu", dtype=dtype):
                outputs = model(batch.normalized_images(), batch.padding_mask)
            criterion(outputs, batch.targets, torch.tensor(float(boxes)))["loss"].backward()
        clip_grad_norm_(model.parameters(), settings.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        print(time.time(), flush=True)


@dataclass(frozen=True)
class Contender:
    """A training that goes on for as long as it is let. `trains`: whether a process of those that
    `started` has begun does; `times`: when each step ended."""

    started: subprocess.Popen
    trains: Callable[[psutil.Process], bool]
    times: Callable[[], list[float]]

    def turn(self, options: Options) -> float:
        """Median seconds a step."""
        begun = len(self.times())
        self.signal(psutil.Process.resume)
        self.wait_for(begun + 1 + options.steps)
        self.signal(psutil.Process.suspend)
        times = self.times()[begun : begun + 1 + options.steps]
        return statistics.median(b - a for a, b in pairwise(times))

    def warm_up(self) -> None:
        self.wait_for(WARM_UP)
        self.signal(psutil.Process.suspend)

    def wait_for(self, steps: int) -> None:
        while len(self.times()) < steps:
            assert self.started.poll() is None, "it has ended before its turns were over"
            time.sleep(0.05)

    def signal(self, send: Callable[[psutil.Process], None]) -> None:
        """To the process that trains, and to its loader's worker."""
        with suppress(psutil.NoSuchProcess):
            me = psutil.Process(self.started.pid)
            for process in [me, *me.children(recursive=True)]:
                if self.trains(process):
                    send(process)

    def end(self) -> None:
        self.signal(psutil.Process.resume)
        self.started.terminate()
        self.started.wait()


def start_bare(options: Options, settings: RunConfig, folder: Path) -> Contender:
    command = [sys.executable, "-m", "tests.jobs.cost", options.train, options.val, "--bare"]
    printed = folder / "bare"
    with printed.open("w") as file:
        started = subprocess.Popen(
            [*command, settings.to_json()], cwd=ROOT, env=environment(options), stdout=file
        )
    return Contender(started, lambda _: True, lambda: [float(t) for t in lines(printed)])


def lines(path: Path) -> list[str]:
    """The whole ones."""
    return path.read_text().split("\n")[:-1]


def start_ours(options: Options, settings: RunConfig, folder: Path) -> Contender:
    run = folder / "run"
    command = [
        sys.executable, "-m", "jobs", "submit", "deformable_detr_r50", "--output", str(run),
        "--workers", "1", "--cpus-per-worker", str(options.threads),
    ]  # fmt: skip
    for section in ("data", "augment", "optimizer", "engine", "schedule"):
        given, default = (getattr(c, section) for c in (settings, recipe("deformable_detr_r50")))
        for name, value in vars(given).items():
            if value != getattr(default, name):
                values = value if isinstance(value, tuple) else (value,)
                command += [f"--{section}.{name.replace('_', '-')}", *map(str, values)]
    with (folder / "log").open("w") as log:
        started = subprocess.Popen(
            command, cwd=ROOT, env=environment(options), stdout=log, stderr=log
        )

    def trains(process: psutil.Process) -> bool:
        names = [process, *process.parents()[:1]]  # the loader's worker is a child of the other
        return any("RayTrainWorker" in " ".join(p.cmdline()) for p in names)

    def times() -> list[float]:
        path = run / "metrics.jsonl"
        return (
            [x["time"] for x in read_lines(path) if x["kind"] == "train"] if path.exists() else []
        )

    return Contender(started, trains, times)


def environment(options: Options) -> dict[str, str]:
    # Ray runs workers at low priority; here nothing else is to run.
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "RAY_worker_niceness": "0",
    }


def interval(ratios: list[float]) -> tuple[float, float]:
    """Of the median, by 10,000 resamples: 95% of them are within."""
    chance = random.Random(0)
    medians = sorted(
        statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(10_000)
    )
    return medians[250], medians[-251]


def main(options: Options) -> None:
    if options.bare:
        bare(RunConfig.from_json(options.bare))
        return
    settings, ratios = config(options), []
    with tempfile.TemporaryDirectory() as folder:
        contenders = []
        try:
            for start in (start_ours, start_bare):
                contenders.append(start(options, settings, Path(folder)))
                contenders[-1].warm_up()
            for number in range(options.rounds):
                order = contenders if number % 2 else contenders[::-1]
                taken = {id(contender): contender.turn(options) for contender in order}
                ours, alone = (taken[id(contender)] for contender in contenders)
                ratios.append(ours / alone)
                print(f"ours {ours:.3f} s a step, bare {alone:.3f}: {ratios[-1]:.3f}", flush=True)
        finally:
            for contender in contenders:
                contender.end()
    low, high = interval(ratios)
    print(f"ratio {statistics.median(ratios):.3f} (95%: {low:.3f}-{high:.3f})")


if __name__ == "__main__":
    main(tyro.cli(Options))
