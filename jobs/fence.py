"""Keeps the workers of an earlier attempt, alive on a node that was cut off, out of the run folder.

Ray on such a node may take minutes to notice that nobody hears it, and holds the folder's lock all
that time. But where the folder can be written, the name of the present attempt can be read.
"""

import json
import os
import threading
import time
from pathlib import Path

from pipeline.whole_file import write_whole

LOOK_EVERY = 2.0  # seconds


class Fence:
    """`folder/ray/attempt.json`: which attempt of which job may train there. Other jobs' attempts
    are left to the folder's lock."""

    def __init__(self, folder: Path, job: str) -> None:
        self.path, self.job = folder / "ray" / "attempt.json", job

    def begin(self) -> int:
        """Names a new attempt, to the end of those before it; returns its number."""
        number = time.time_ns()
        write_whole(self.path, json.dumps({"job": self.job, "attempt": number}))
        return number

    def over(self, number: int) -> bool:
        """Whether this job has begun an attempt after that one."""
        try:
            present = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # storage that is away cannot be written to either
            return False
        return present["job"] == self.job and present["attempt"] > number

    def end_process_when_over(self, number: int) -> None:
        """Ends this process, from a thread, once the attempt is over."""

        def watch() -> None:
            while not self.over(number):
                time.sleep(LOOK_EVERY)
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
