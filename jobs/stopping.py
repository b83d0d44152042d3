"""A stop that is asked of a running training: the file `stop` in its run folder.

`pipeline.train` looks for it, saves a checkpoint and ends with `Stopped`. Who launched the training
removes it.
"""

import time
from pathlib import Path

from pipeline.stop import STOP_FILE
from pipeline.whole_file import write_whole

ASKED = "asked"  # by a person, a signal or the cluster's jobs API: the job ends
PREEMPTED = "preempted"  # a node is about to go: the job goes on elsewhere
RESIZED = "resized"  # a worker group of another size is to follow


class StopFile:
    """The file in a run folder by which the driver asks training to save and stop."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / STOP_FILE

    def ask(self, reason: str) -> None:
        write_whole(self.path, reason, aside=self.path.parent / "ray")

    def answer(self) -> str:
        """Called once training has stopped: removes the request and returns its reason."""
        try:
            reason = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:  # a signal to the training process itself
            return ASKED
        self.withdraw()
        return reason or ASKED  # an empty file: made by hand

    def withdraw(self) -> None:
        self.path.unlink(missing_ok=True)

    def wait(self, seconds: float) -> bool:
        """Whether the request is answered within so many seconds."""
        deadline = time.monotonic() + seconds
        while self.path.exists():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True
