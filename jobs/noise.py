"""What of a difference between cells is noise.

A difference of two cells varies for two reasons, and each is estimated where there is data for it:

- images: other validation images would have given other APs. Both cells' AP on the same resampled
  images, mean over seeds, gives the paired bootstrap's interval of the difference.
- seeds: another training of the same cell would have. The standard deviation over seeds is pooled
  over all cells that have several; Student's t for its degrees of freedom gives the interval.

Both half widths together are the root of the sum of their squares, for the two are independent.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from jobs.bootstrap import average_precision, interval, match, resampled
from jobs.measured import Cell, Grid, Run
from jobs.published import Published
from pipeline.errors import UserError

DETECTIONS = Path("evaluations/best-detections.json")
SEED = 2021  # of the resamples


@dataclass(frozen=True)
class Difference:
    """Measured minus something, in points of AP. `low`, `high`: its 95% interval by `sources`
    ("images", "seeds"); both NaN and no sources where nothing is known of its noise. `same_run`:
    the two are one run, as cells are that differ in what demo scale does not have."""

    value: float
    low: float = math.nan
    high: float = math.nan
    sources: tuple[str, ...] = ()
    same_run: bool = False

    @property
    def verdict(self) -> str:
        if self.same_run:
            return "same run"
        if not self.sources:
            return "not known"
        return "noise" if self.low <= 0 <= self.high else "higher" if self.value > 0 else "lower"


@dataclass(frozen=True)
class SeedSpread:
    """Standard deviation of AP over seeds, pooled over `cells` cells; `freedom`: its degrees of
    freedom, the seeds less the cells."""

    deviation: float
    freedom: int
    cells: int

    def half_width(self, *runs: int) -> float:
        """Half of the 95% interval of a difference of two means, over so many runs each."""
        quantile = float(t.ppf(0.975, self.freedom))
        return quantile * self.deviation * math.sqrt(sum(1 / n for n in runs))


def seed_spread(grid: Grid) -> SeedSpread | None:
    """From the finished cells that have several seeds; None where there is no such cell."""
    squares, freedom, cells = 0.0, 0, 0
    for cell in {tuple(run.folder for run in cell.runs): cell for cell in grid.cells}.values():
        aps = [run.best.metrics["AP"] for run in cell.measured if run.best and run.finished]
        if len(aps) > 1:
            squares += float(np.var(aps)) * len(aps)
            freedom += len(aps) - 1
            cells += 1
    return SeedSpread(math.sqrt(squares / freedom), freedom, cells) if freedom else None


def to_paper(cell: Cell, row: Published, spread: SeedSpread | None) -> Difference:
    """Its noise is that of seeds, the paper's one training's too; its images are the paper's."""
    value = cell.metrics["AP"] - row.metrics["AP"]
    if spread is None:
        return Difference(value)
    half = spread.half_width(len(cell.measured), 1)
    return Difference(value, value - half, value + half, ("seeds",))


def to_baseline(
    cell: Cell, base: Cell, samples: dict[Path, NDArray[np.float64]], spread: SeedSpread | None
) -> Difference | None:
    """None where the two were evaluated on different data, which compares to nothing."""
    if len({run.val_digest for run in (*cell.measured, *base.measured)}) > 1:
        return None
    value = cell.metrics["AP"] - base.metrics["AP"]
    if {run.folder for run in cell.measured} == {run.folder for run in base.measured}:
        return Difference(value, same_run=True)
    below = above = 0.0
    sources = []
    mine, theirs = sample_mean(cell, samples), sample_mean(base, samples)
    if mine is not None and theirs is not None:
        low, high = interval(mine[:, 0] - theirs[:, 0], value)
        if math.isfinite(low):
            below, above = max(0.0, value - low), max(0.0, high - value)
            sources.append("images")
    if spread is not None:
        half = spread.half_width(len(cell.measured), len(base.measured))
        below, above = math.hypot(below, half), math.hypot(above, half)
        sources.append("seeds")
    if not sources:
        return Difference(value)
    return Difference(value, value - below, value + above, tuple(sources))


def sample_mean(cell: Cell, samples: dict[Path, NDArray[np.float64]]) -> NDArray[np.float64] | None:
    """[resamples, metrics] in percent, mean over seeds; None unless every run has them."""
    of_runs = [samples[run.folder] for run in cell.measured if run.folder in samples]
    if not of_runs or len(of_runs) < len(cell.measured):
        return None
    return np.mean(of_runs, axis=0)


def bootstrapped(
    grid: Grid, resamples: int, val: str, notes: list[str]
) -> dict[Path, NDArray[np.float64]]:
    """[resamples, metrics] in percent of every run that has its best evaluation's detections. What
    stands in the way is noted."""
    runs = list({run.folder: run for cell in grid.cells for run in cell.measured}.values())
    there = [run for run in runs if (run.folder / DETECTIONS).is_file()]
    if lacking := len(runs) - len(there):
        notes.append(
            f"{lacking} of {len(runs)} runs have no {DETECTIONS}: no interval over images for them"
        )
    truths: dict[str, Any] = {}
    found = {}
    for number, run in enumerate(there, 1):
        print(f"bootstrap {number}/{len(there)}: {run.folder}", file=sys.stderr, flush=True)
        try:
            if run.val_digest not in truths:
                truths[run.val_digest] = _truth(run, val)
            found[run.folder] = _samples(run, truths[run.val_digest], resamples)
        except (UserError, OSError) as error:
            notes.append(f"{run.folder}: no interval over images: {error}")
    return found


def _truth(run: Run, val: str) -> Any:
    """The objects to find. Raises `UserError` where the shards are not those of the run."""
    from pipeline.data.shards import ShardSet
    from pipeline.evaluate import ground_truth

    shards = ShardSet(val or run.val)
    if shards.digest != run.val_digest:
        raise UserError(
            f"{shards.folder}: got other data than the run was evaluated on; give --val SHARDS"
        )
    return ground_truth(shards)


def _samples(run: Run, truth: Any, resamples: int) -> NDArray[np.float64]:
    try:
        detections = json.loads((run.folder / DETECTIONS).read_text(encoding="utf-8"))
        matches = match(truth, detections)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{DETECTIONS} is no COCO result of this data ({error!r})") from None
    images = len(matches.image_ids)
    assert run.best is not None
    own = 100 * float(average_precision(matches, np.ones((1, images), dtype=np.int64))[0, 0])
    if not math.isclose(own, run.best.metrics["AP"], abs_tol=1e-6):
        raise UserError(
            f"{DETECTIONS} gives AP {own:.3f}, its best evaluation has "
            f"{run.best.metrics['AP']:.3f}: they are of another evaluation"
        )
    return 100 * average_precision(matches, resampled(images, resamples, SEED))
