"""A grid as a table: state, epoch, AP, time left and attempts of each cell, from its folder."""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.grid_state import (
    DONE,
    FAILED,
    NOT_BEGUN,
    PRUNED,
    RESUME,
    RUNNING,
    STOPPED,
    Record,
    RunProgress,
    progress,
    read_grid,
)

QUIET = 300.0  # seconds without a line of a run until the table says so
LOOK_EVERY = 2.0
LONGEST_NOTE = 100


@dataclass(frozen=True)
class Row:
    """A cell of a grid as `jobs status` shows it."""

    cell: str
    seed: int
    state: str
    progress: RunProgress
    record: Record
    note: str

    @property
    def under_way(self) -> bool:
        return self.record.outcome == RUNNING and self.state != DONE


def rows(folder: Path) -> list[Row]:
    """Of every cell and seed in the grid's `grid.json`."""
    found = []
    for cell in read_grid(folder)["cells"]:
        record = Record.read(folder, Path(cell["folder"]).name)
        now = progress(folder / cell["folder"])
        state = state_of(record, now)
        note = record.error if state in (FAILED, PRUNED) else ""
        if state in (RUNNING, STOPPED) and record.flag:
            note = f"flagged: {record.flag}"
        if state == RUNNING and (silence := quiet(folder, cell["folder"], now)) > QUIET:
            note = f"no line for {duration(silence)}; was its command killed?"
        if record.submitting and state != DONE:
            note = "being submitted, unless its command was killed"
        if not cell["folder"].startswith(f"runs/{cell['name']}-seed"):
            note = f"the run of {Path(cell['folder']).name}"
        found.append(Row(cell["name"], cell["seed"], state, now, record, note))
    return found


def quiet(grid: Path, run: str, now: RunProgress) -> float:
    """Seconds since the last line of a running run, or since its record, if that is newer: a job
    may end, or wait for room, before it has written anything."""
    written = (grid / "records" / f"{Path(run).name}.json").stat().st_mtime
    return time.time() - max(now.last, written)


def state_of(record: Record, now: RunProgress) -> str:
    """One of the states of jobs.grid_state, by the record of the job and the run's own metrics."""
    if now.finished:
        return DONE
    if record.outcome in (RUNNING, FAILED, STOPPED, PRUNED) and not record.submitting:
        return record.outcome
    return RESUME if now.last else NOT_BEGUN


def status(folder: Path, watch: bool) -> None:
    """Prints the table; `watch`: anew every two seconds, in place, while something runs."""
    lines = text(rows(folder))
    print("\n".join(lines), flush=True)
    while watch and any(row.under_way for row in rows(folder)):
        time.sleep(LOOK_EVERY)
        up = f"\033[{len(lines)}A\033[J" if sys.stdout.isatty() else "\n"
        lines = text(rows(folder))
        print(f"{up}{chr(10).join(lines)}", flush=True)


def text(found: Sequence[Row]) -> list[str]:
    """The table of cells as lines."""
    cells = [("cell", "seed", "state", "epoch", "best AP", "left", "attempts", "")]
    for row in found:
        now = row.progress
        cells.append(
            (
                row.cell,
                str(row.seed),
                row.state,
                f"{now.epoch:.1f}/{now.epochs}" if now.epochs else "-",
                f"{now.ap:.3f}" if now.ap >= 0 else "-",
                duration(now.left) if row.state == RUNNING and now.left >= 0 else "-",
                str(row.record.attempts),
                cut(row.note),
            )
        )
    counts = [f"{sum(r.state == s for r in found)} {s}" for s in order(r.state for r in found)]
    return [*columns(cells), f"{len(found)} cells: {', '.join(counts)}"]


def order(states: Iterable[str]) -> list[str]:
    """Each state once, in the order in which they come."""
    return list(dict.fromkeys(states))


def columns(cells: Sequence[Sequence[Any]]) -> list[str]:
    """Rows as lines, each column as wide as its longest entry; the last one as it is."""
    widths = [max(len(str(row[i])) for row in cells) for i in range(len(cells[0]) - 1)] + [0]
    return [
        "  ".join(str(x).ljust(width) for x, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def cut(note: str) -> str:
    """A note short enough for a line."""
    return note if len(note) <= LONGEST_NOTE else f"{note[: LONGEST_NOTE - 1]}…"


def duration(seconds: float) -> str:
    """ "42 s", "17 min", "3.2 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
