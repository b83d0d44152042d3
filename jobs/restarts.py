"""How often a job may start over."""

from pathlib import Path


class Restarts:
    """Counts failures since the run last got a new checkpoint.

    A job on preemptible nodes fails dozens of times and still gets on; one that fails again and
    again at the same place does not, and ends.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.newest = 0
        self.newest = self._newest_step()
        self.failures = 0
        self.killed_at: int | None = None  # step of the last kill for memory

    def allowed(self) -> bool:
        """Counts one more failure; whether the job may start over after it."""
        newest = self._newest_step()
        self.failures = self.failures + 1 if newest <= self.newest else 1
        self.newest = newest
        return self.failures <= self.limit

    def stuck(self) -> bool:
        """Notes that a process was killed for memory; whether the run has got no further since the
        one before. A third start would end as the second did."""
        before = self.killed_at
        try:
            self.killed_at = self._last_step()
        except OSError:  # storage is away: it may well have got further
            return False
        return before is not None and self.killed_at <= before

    def __str__(self) -> str:
        return f"restart {self.failures} of {self.limit} since the checkpoint of step {self.newest}"

    def spent(self) -> str:
        """Why the job does not start over, once `allowed` has said no."""
        return (
            f"failures since the checkpoint of step {self.newest}: {self.failures}, expected at "
            f"most --restarts {self.limit}; the same command goes on from there"
        )

    def _newest_step(self) -> int:
        """Of the checkpoints that are intact: a damaged one is none to go on from. As before where
        storage is away."""
        # Imports torch, which the job's parent process does without unless its child dies.
        from pipeline.checkpoint_store import newest_intact

        try:
            newest = newest_intact(self.folder, lambda _: None)
        except OSError:
            return self.newest
        return int(newest.name.removeprefix("step-")) if newest else 0

    def _last_step(self) -> int:
        """The last one that the run has logged or saved."""
        from pipeline.storage import patiently
        from pipeline.tracking import read_lines

        try:
            lines = patiently(lambda: read_lines(self.folder / "metrics.jsonl"))
        except FileNotFoundError:
            lines = []
        logged = (line["step"] for line in lines if line["kind"] == "train")
        return max(self._newest_step(), max(logged, default=0))
