"""How often a job may start over."""

from pathlib import Path


class Restarts:
    """Counts failures since the run last got a new checkpoint.

    A job on preemptible nodes fails dozens of times and still gets on; one that fails again and
    again at the same place does not, and ends.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.newest = self._newest_step()
        self.failures = 0

    def allowed(self) -> bool:
        """Counts one more failure; whether the job may start over after it."""
        newest = self._newest_step()
        self.failures = self.failures + 1 if newest <= self.newest else 1
        self.newest = newest
        return self.failures <= self.limit

    def __str__(self) -> str:
        return f"restart {self.failures} of {self.limit} since the checkpoint of step {self.newest}"

    def _newest_step(self) -> int:
        # Imports torch, which the job's parent process does without unless its child dies.
        from pipeline.checkpoint_store import checkpoint_steps

        return max(checkpoint_steps(self.folder), default=0)
