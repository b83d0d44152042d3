"""The entry point of a training job: runs the driver, and once more where something killed it.

Runs on the cluster as `python -m jobs.entry`. Light, so that the kernel, short of memory, takes
another process first. Exit status: the driver's.
"""

import os
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from jobs.lost import LESS_MEMORY
from jobs.restarts import Restarts
from jobs.spec import JOB_VARIABLE, SPEC_VARIABLE, JobSpec
from pipeline.parent import end_with_parent
from pipeline.whole_file import write_whole

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main() -> int:
    spec = JobSpec.from_json(os.environ[SPEC_VARIABLE])
    with suppress(OSError):  # of a folder that cannot be made the driver tells
        write_whole(Path(spec.folder) / "ray" / "job.json", spec.to_json())  # for jobs resume
    environment = {**os.environ, JOB_VARIABLE: secrets.token_hex(8)}
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if driver.poll() is None:
            driver.send_signal(number)

    restarts: Restarts | None = None
    while True:
        # A driver that outlived the job would keep its workers from the next submission.
        command = [sys.executable, "-m", "jobs.driver"]
        driver = subprocess.Popen(command, env=environment, preexec_fn=end_with_parent)
        for number in SIGNALS:
            signal.signal(number, pass_on)
        for early in asked:  # while there was no driver to hear it
            driver.send_signal(early)
        status = driver.wait()
        if status >= 0 or asked:
            return status if status >= 0 else 128 - status
        restarts = restarts or Restarts(Path(spec.folder), spec.restarts)
        name = name_of(-status)
        if not restarts.allowed():
            memory = f"; where it was for memory: {LESS_MEMORY}" if name == "SIGKILL" else ""
            print(f"error: the driver was killed by {name}; {restarts.spent()}{memory}", flush=True)
            return 1
        print(f"the driver was killed by {name}; {restarts}", flush=True)


def name_of(number: int) -> str:
    """SIGKILL for 9; of a real-time signal, which has none of its own, the number."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


if __name__ == "__main__":
    sys.exit(main())
