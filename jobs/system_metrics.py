"""Use of processors, memory, GPUs, disk and network on rank 0's node, as lines of a file.

`system.jsonl` is beside `metrics.jsonl`, and is never rewound: time on a machine is spent whatever
becomes of the steps. `step` counts the lines of all attempts, as MLflow's own sampler does.
"""

import json
import threading
import time
from pathlib import Path

import psutil

from jobs.gpus import Gpus
from jobs.tracking import SYSTEM_FILE
from pipeline.tracking import read_lines
from pipeline.whole_file import write_whole

EVERY = 15.0  # seconds between two lines
MEGABYTE = 1e6


class Sampler:
    """Values by the names that MLflow's own sampler gives them, without "system/"."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.gpus = folder, Gpus()
        psutil.cpu_percent()  # the next call tells of the time since this one
        self.received, self.transmitted = self._network()

    def sample(self) -> dict[str, float]:
        """`disk_*` are of the file system that the run folder is on; `network_*` count from the
        start of this process."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(self.folder))
        received, transmitted = self._network()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / MEGABYTE,
            "disk_available_megabytes": disk.free / MEGABYTE,
            "network_receive_megabytes": received - self.received,
            "network_transmit_megabytes": transmitted - self.transmitted,
        }
        return {name: round(x, 3) for name, x in {**values, **self.gpus.sample()}.items()}

    @staticmethod
    def _network() -> tuple[float, float]:
        count = psutil.net_io_counters()
        return count.bytes_recv / MEGABYTE, count.bytes_sent / MEGABYTE


class SystemMetrics(threading.Thread):
    """Writes a line every few seconds while the block lasts, once the folder is a run's."""

    def __init__(self, folder: Path, every: float = EVERY) -> None:
        super().__init__(daemon=True)
        self.folder, self.every, self.path = folder, every, folder / SYSTEM_FILE
        self.sampler, self.done = Sampler(folder), threading.Event()

    def __enter__(self) -> "SystemMetrics":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()

    def run(self) -> None:
        while not (self.folder / "config.json").exists():  # it might be refused as a run folder
            if self.done.wait(1.0):
                return
        step = -1
        while True:
            try:
                step = self._next_step() if step < 0 else step + 1
                self._write(step)
            except OSError:  # storage that is full or away: training itself will tell
                step = -1  # the line may be torn
            if self.done.wait(self.every):
                return

    def _write(self, step: int) -> None:
        line = {"kind": "system", "step": step, "time": time.time(), **self.sampler.sample()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _next_step(self) -> int:
        """Of the line after those that are there. One that a crash cut short is removed."""
        if not self.path.exists():
            return 0
        lines, text = read_lines(self.path), self.path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        return 1 + max((line["step"] for line in lines), default=-1)
