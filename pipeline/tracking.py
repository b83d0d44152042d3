"""metrics.jsonl: the primary log of a run, one JSON object a line.

Every line has `kind` ("train", "evaluation" or "event"), `step` (optimizer steps so far), `epoch`
(as a fraction) and `time` (Unix seconds). Trackers such as MLflow are fed from this file.
"""

import json
import time
from pathlib import Path
from typing import Any

from pipeline.storage import patiently
from pipeline.whole_file import write_whole


class MetricsLog:
    """Appends lines to `folder/metrics.jsonl`; used by rank 0 only."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"

    def write(self, kind: str, step: int, epoch: float, **values: Any) -> None:
        """Raises `OSError` naming the file where the disk is full or closed."""
        line = {"kind": kind, "step": step, "epoch": epoch, "time": time.time(), **values}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def rewind(self, step: int, epoch: int) -> None:
        """Drops what was logged after `step`, and evaluations after `epoch`: the run goes on from
        there."""
        try:
            lines = patiently(lambda: read_lines(self.path))
        except FileNotFoundError:
            return
        lines = [line for line in lines if line["step"] <= step]
        kept = [line for line in lines if line["kind"] != "evaluation" or line["epoch"] <= epoch]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file. A last line cut short by a crash is left out, and so is
    what is no line of metrics."""
    return whole_lines(path.read_bytes())[0]


def whole_lines(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics in `data`, and how many bytes there are up to the end of the last line.
    One that is damaged, such as a torn one that a later write has completed, is left out."""
    end = data.rfind(b"\n") + 1
    parsed = [_parsed(line) for line in data[:end].splitlines()]
    return [line for line in parsed if line is not None], end


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        return None
    named = line["kind"] != "event" or isinstance(line.get("event"), str)
    return line if named and type(line.get("step")) is int else None
