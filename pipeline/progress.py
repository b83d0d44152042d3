"""A training's progress as text: a bar while it trains, a line after each evaluation."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.follow import Tail


@contextmanager
def printed_progress(folder: Path, name: str) -> Iterator[None]:
    """Prints what the run in `folder` logs while the block lasts."""
    printer = ProgressPrinter(folder, name)
    printer.start()
    try:
        yield
    finally:
        printer.finish()


class ProgressPrinter(threading.Thread):
    """Prints what is new in the run's metrics every second until `finish`; not what was there
    before, of a run that is resumed."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(daemon=True)
        self.tail, self.name_ = Tail(folder / "metrics.jsonl"), name
        self.done = threading.Event()
        self.steps = self.epochs = 0
        self.first: tuple[int, float] | None = None
        self.best = -1.0
        self.since = time.time()

    def run(self) -> None:
        while not self.done.wait(1.0):
            self.print_new()

    def finish(self) -> None:
        self.done.set()
        self.join()
        self.print_new()

    def print_new(self) -> None:
        try:
            lines = self.tail.new_lines()
        except OSError:  # storage that is away for a moment; they are read the next time
            return
        for line in lines:
            if line["time"] <= self.since:  # of an earlier start, or read before
                self.best = max(self.best, line.get("AP", -1.0))
                continue
            self.since = line["time"]
            if line["kind"] == "event" and line["event"] == "start":
                self.steps, self.epochs = line["steps"], line["epochs"]
                self.first = (line["step"], line["time"])
            elif line["kind"] == "event" and line["event"] == "message":
                print(line["text"], flush=True)
            elif line["kind"] == "train":
                print(self.bar(line), flush=True)
            elif line["kind"] == "evaluation":
                print(self.evaluation(line), flush=True)

    def bar(self, line: dict[str, Any]) -> str:
        """tqdm's bar with the loss, the speed and the time left of this attempt."""
        first_step, first_time = self.first or (0, time.time())
        elapsed = line["time"] - first_time
        left = elapsed / max(1, line["step"] - first_step) * (self.steps - line["step"])
        epoch = min(self.epochs, int(line["epoch"] - 1e-9) + 1)
        loss = f"{line['loss']:.2f}" if "loss" in line else "-"  # none where all were left out
        return tqdm.format_meter(
            line["step"], self.steps, elapsed, ncols=100,
            prefix=f"{self.name_} epoch {epoch}/{self.epochs}",
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} " + (
                f"loss {loss} {line['images_per_second']:.0f} images/s "
                f"{tqdm.format_interval(left)} left"
            ),
        )  # fmt: skip

    def evaluation(self, line: dict[str, Any]) -> str:
        mark = " (best)" if line["AP"] > self.best else ""
        self.best = max(self.best, line["AP"])
        shown = {"AP50": "AP50", "AP75": "AP75", "small": "AP_S", "medium": "AP_M", "large": "AP_L"}
        # -1 is COCO's for what has no object in the data.
        others = [f"{k} " + ("n/a" if line[v] < 0 else f"{line[v]:.3f}") for k, v in shown.items()]
        return "  ".join(
            [f"epoch {line['epoch']:.0f}/{self.epochs}: AP {line['AP']:.3f}{mark}", *others]
        )
