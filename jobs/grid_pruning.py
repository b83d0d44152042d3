"""Cells that seem hopeless: their AP has left the band below a reference run's.

Runs are held against the reference epoch by epoch, also where their schedules differ in length. A
slow starter looks hopeless, too, until it has caught up: DETR beside Deformable DETR, in the
paper's own Figure 3. So a flag is only told, unless pruning is asked for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.grid import Entry, runs
from jobs.grid_state import RunProgress, progress
from pipeline.errors import UserError

Curve = Mapping[float, float]  # AP, a fraction, by epoch


@dataclass(frozen=True)
class Band:
    """How far below the reference's AP a run may be, the larger of the two, before it is flagged.
    Of several references, such as a baseline's seeds, the lowest at an epoch counts there."""

    absolute: float = 0.02
    """AP, from 0 to 1."""
    relative: float = 0.5
    """Share of the reference's AP."""
    after: float = 0.5
    """Share of a run's own schedule before which its evaluations do not count."""
    evaluations: int = 3
    """How many of them in a row, up to the last one, have to be below."""

    def __post_init__(self) -> None:
        for name in ("absolute", "relative", "after"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"band.{name}: got {getattr(self, name)}, expected 0 to 1")
        if self.evaluations < 1:
            raise UserError(f"band.evaluations: got {self.evaluations}, expected 1 or more")

    def lowest(self, reference: float) -> float:
        """The lowest AP within the band of a reference's AP."""
        return reference - max(self.absolute, self.relative * reference)


@dataclass(frozen=True)
class Left:
    """That a curve has left the band: its AP at its last epoch, the reference's there, and the
    lowest that would have been within."""

    epoch: float
    ap: float
    reference: float
    lowest: float


def left_band(curve: Curve, epochs: int, references: Sequence[Curve], band: Band) -> Left | None:
    """Whether a run on a schedule of so many epochs has left the band, going by its last
    `band.evaluations` evaluations. One where no reference is evaluated yet says that it has not,
    and so does one before `band.after` of the schedule."""
    found = None
    last = sorted(curve)[-band.evaluations :]
    if len(last) < band.evaluations:
        return None
    for epoch in last:
        there = [other[epoch] for other in references if epoch in other]
        if not there or epoch < band.after * epochs:
            return None
        reference = min(there)
        if curve[epoch] >= band.lowest(reference):
            return None
        found = Left(epoch, curve[epoch], reference, band.lowest(reference))
    return found


@dataclass(frozen=True)
class Pruning:
    """What the runs in `folder` are held against: `references`, run folders called `name`. `stop`:
    those that leave the band are stopped, and not only flagged."""

    folder: Path
    references: tuple[Path, ...]
    name: str
    band: Band
    stop: bool

    def flag(self, entry: Entry) -> str:
        """Why the entry's run seems hopeless; "" where it does not, is a reference itself, has
        nothing left to train, or was evaluated on other data."""
        folder = self.folder / entry.folder
        mine = progress(folder)
        if mine.evaluated >= mine.epochs or is_one_of(folder, self.references):
            return ""
        others = {path: progress(path) for path in self.references}
        curves = [dict(other.curve) for other in others.values()]
        left = left_band(dict(mine.curve), mine.epochs, curves, self.band)
        if left is None or len({val_digest(path) for path in (folder, *others)}) > 1:
            return ""
        return said(left, self.name, mine, list(others.values()))


def said(left: Left, name: str, mine: RunProgress, others: Sequence[RunProgress]) -> str:
    """A flag in words: AP and epoch of the run, and where the band is."""
    text = (
        f"AP {left.ap:.3f} at epoch {left.epoch:g} is below {left.lowest:.3f}, the band of {name} "
        f"(AP {left.reference:.3f} there)"
    )
    lengths = sorted({other.epochs for other in others})
    if lengths != [mine.epochs]:
        text += f", compared by epoch: {mine.epochs} are planned, {', '.join(map(str, lengths))} of"
        text += f" {name}"
    return text


def is_one_of(folder: Path, others: Sequence[Path]) -> bool:
    """Whether the folder is one of the others, by whatever path."""
    return folder.resolve() in [other.resolve() for other in others]


def val_digest(folder: Path) -> str:
    """Identity of the validation data that a run was evaluated on; "" where it is not known."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["val_digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def pruning(
    folder: Path,
    wanted: Sequence[Entry],
    baseline: str,
    given: tuple[Path, ...],
    band: Band,
    stop: bool,
) -> Pruning:
    """Against the given run folders, or without any against the baseline's runs in the grid.
    Raises `UserError` for a folder that is no evaluated run."""
    for path in given:
        if not progress(path).curve or not val_digest(path):
            raise UserError(
                f"reference: {path} has no evaluated run, expected a run folder with config.json "
                f"and evaluations in its metrics.jsonl"
            )
    own = tuple(folder / entry.folder for entry in runs(wanted) if entry.cell == baseline)
    name = " and ".join(path.name for path in given) or baseline
    return Pruning(folder, given or own, name, band, stop)
