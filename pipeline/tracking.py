"""metrics.jsonl: the primary log of a run, one JSON object a line.

Every line has `kind` ("train", "evaluation" or "event"), `step` (optimizer steps so far), `epoch`
(as a fraction) and `time` (Unix seconds). Trackers such as MLflow are fed from this file.
"""

import json
import time
from pathlib import Path
from typing import Any

from pipeline.whole_file import write_whole


class MetricsLog:
    """Appends lines to `folder/metrics.jsonl`; used by rank 0 only."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"

    def write(self, kind: str, step: int, epoch: float, **values: Any) -> None:
        line = {"kind": kind, "step": step, "epoch": epoch, "time": time.time(), **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, step: int, epoch: int) -> None:
        """Drops what was logged after `step`, and evaluations after `epoch`: the run goes on from
        there."""
        if not self.path.exists():
            return
        lines = [line for line in read_lines(self.path) if line["step"] <= step]
        kept = [line for line in lines if line["kind"] != "evaluation" or line["epoch"] <= epoch]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file. A last line cut short by a crash is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if text.endswith("\n"):
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:  # a torn line that a later write completed
                continue
    return lines
