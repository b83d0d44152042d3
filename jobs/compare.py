"""`python -m jobs compare GRID` or `RUN RUN …`: measured beside published, row by row."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jobs.bootstrap import interval
from jobs.measured import Cell, Grid, Run, read_grid, read_runs
from jobs.noise import (
    Difference,
    SeedSpread,
    bootstrapped,
    sample_mean,
    seed_spread,
    to_baseline,
    to_paper,
)
from jobs.papers_grids import PAPERS_GRIDS
from jobs.published import Published, Table, published, tables
from pipeline.errors import UserError
from pipeline.recipes import DEMO_SCALE

GRIDS = Path("outputs/grids")
COCO_CLASSES = 80


@dataclass(frozen=True)
class Row:
    """A row of the comparison: a published row, a cell, or both.

    `metrics`: means over seeds, percent; `spread`: standard deviation of AP over them; `interval`:
    95% of AP over resampled images; `to_paper`, `to_baseline`: differences of AP, the former None
    on other data than the paper's; `paper_to_baseline`: the published difference of the same two
    rows; `settled`: both the cell and the baseline are finished, so their difference can be judged.
    """

    label: str
    published: Published | None
    cell: Cell | None
    metrics: dict[str, float]
    spread: float | None = None
    interval: tuple[float, float] | None = None
    to_paper: Difference | None = None
    to_baseline: Difference | None = None
    paper_to_baseline: float | None = None
    settled: bool = False

    @property
    def finished(self) -> bool:
        return self.cell is not None and self.cell.finished

    @property
    def ordering(self) -> str:
        """Whether the cell stands to the baseline as in the paper."""
        if self.to_baseline is None or not self.paper_to_baseline:
            return ""
        if not self.settled or self.to_baseline.verdict in ("noise", "not known", "same run"):
            return "undecided"
        return (
            "as in the paper" if self.paper_to_baseline * self.to_baseline.value > 0 else "opposite"
        )


@dataclass(frozen=True)
class Comparison:
    """`notes`: what is missing or has to be known to read the numbers."""

    grid: Grid
    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    spread: SeedSpread | None

    @property
    def baseline(self) -> Row | None:
        return next((r for r in self.rows if r.cell and r.cell.name == self.grid.baseline), None)

    @property
    def beside_paper(self) -> bool:
        """Whether published numbers are of the data that was measured on, as far as the number of
        classes tells."""
        return class_counts(self.grid) == {COCO_CLASSES}


def open_targets(targets: tuple[str, ...]) -> Grid:
    """A grid's folder or its name below outputs/grids, or run folders."""
    if not targets:
        raise UserError(
            "compare: expected a grid (its folder, or its name below outputs/grids) or run folders"
        )
    first = Path(targets[0])
    if len(targets) == 1:
        for folder in (first, GRIDS / first):
            if (folder / "grid.json").is_file():
                return read_grid(folder)
        if not first.exists():
            name, small = first.name.removesuffix(DEMO_SCALE), first.name.endswith(DEMO_SCALE)
            remedy = "expected a grid or a run folder"
            if name in PAPERS_GRIDS:
                scale = " --scale demo" if small else ""
                remedy = f"submit it with: python -m jobs grid {name}{scale}"
            raise UserError(f"compare: neither {first} nor {GRIDS / first} is there; {remedy}")
    if grids := [target for target in targets if (Path(target) / "grid.json").is_file()]:
        raise UserError(f"compare: {grids[0]} is a grid: expected one grid alone, or run folders")
    grid = read_runs([Path(target) for target in targets])
    if not grid.cells:
        raise UserError(f"compare: {'; '.join(grid.mistakes)}")
    return grid


def compare(grid: Grid, resamples: int, val: str = "") -> Comparison:
    """All numbers of the comparison. val: shard folder of the validation set, where it lies
    elsewhere now than config.json says. resamples 0: no bootstrap."""
    problems = [problem for cell in grid.cells for run in cell.runs for problem in run.problems]
    notes = list(dict.fromkeys(problems))  # cells may share a run
    samples = bootstrapped(grid, resamples, val, notes) if resamples else {}
    spread = seed_spread(grid)
    base = next((cell for cell in grid.cells if cell.name == grid.baseline), None)
    same_data = class_counts(grid) == {COCO_CLASSES}
    rows = []
    for label, row, cell in paired(grid):
        if cell is None or not cell.measured:
            rows.append(Row(label, row, cell, {}))
            continue
        aps = [run.best.metrics["AP"] for run in cell.measured if run.best]
        drawn = sample_mean(cell, samples)
        other = base if base is not None and base.measured and base is not cell else None
        rows.append(
            Row(
                label,
                row,
                cell,
                cell.metrics,
                spread=statistics.stdev(aps) if len(aps) > 1 else None,
                interval=None if drawn is None else ap_interval(drawn[:, 0], cell.metrics["AP"]),
                to_paper=to_paper(cell, row, spread) if row and same_data else None,
                to_baseline=to_baseline(cell, other, samples, spread) if other else None,
                paper_to_baseline=published_difference(row, base),
                settled=cell.finished and other is not None and other.finished,
            )
        )
    notes += remarks(grid, rows, spread)
    return Comparison(grid, title(grid), tuple(rows), tuple(notes), spread)


def paper_table(grid: Grid) -> Table | None:
    """The table that the grid is of, at demo scale too."""
    return tables().get(grid.name.removesuffix(DEMO_SCALE))


def title(grid: Grid) -> str:
    """The caption of the paper's table, or the grid's name."""
    table, small = paper_table(grid), grid.name.endswith(DEMO_SCALE)
    caption = table.caption if table else f"Comparison of {grid.name}"
    return f"{caption}, at demo scale" if table and small else caption


def paired(grid: Grid) -> list[tuple[str, Published | None, Cell | None]]:
    """The paper's rows in its order, each with the cells that reproduce it, then other cells."""
    found: list[tuple[str, Published | None, Cell | None]] = []
    table = paper_table(grid)
    of_table = table.rows if table else ()
    placed = set()
    for row in of_table:
        cells = [cell for cell in grid.cells if cell.published == row.key]
        found += [
            (f"{row.label} [{c.name}]" if len(cells) > 1 else row.label, row, c) for c in cells
        ]
        placed |= {cell.name for cell in cells}
        if not cells:
            found.append((row.label, row, None))
    for cell in grid.cells:
        if cell.name not in placed:
            row_of = published(cell.published) if cell.published else None
            found.append((row_of.label if row_of else cell.name, row_of, cell))
    return found


def ap_interval(drawn: NDArray[np.float64], measured: float) -> tuple[float, float]:
    """Of APs, which are percent: moved to lie around what was measured, it may pass 0 or 100."""
    low, high = interval(drawn, measured)
    return max(low, 0.0), min(high, 100.0)


def published_difference(row: Published | None, base: Cell | None) -> float | None:
    """AP of a published row less the baseline's published AP; None where there is either not."""
    if row is None or base is None or base.published in (None, row.key):
        return None
    return row.metrics["AP"] - published(str(base.published)).metrics["AP"]


def remarks(grid: Grid, rows: list[Row], spread: SeedSpread | None) -> list[str]:
    """What a reader has to know: cells without numbers, half-done ones, other data."""
    said = []
    for cell in grid.cells:
        state = [f"{_epochs(run)} (seed {run.seed})" for run in cell.runs if not run.finished]
        if not cell.measured:
            said.append(f"{cell.name}: nothing measured yet")
        elif state:
            said.append(f"{cell.name}: not finished: {', '.join(state)}")
    if elsewhere := [row.label for row in rows if row.published and row.cell is None]:
        said.append(f"published alone, no cell of this grid: {'; '.join(elsewhere)}")
    if spread is not None:
        said.append(
            f"between seeds AP has a standard deviation of {spread.deviation:.2f} (pooled over "
            f"{spread.cells} {'cell' if spread.cells == 1 else 'cells'}, degrees of freedom: "
            f"{spread.freedom})"
        )
    measured = [run for cell in grid.cells for run in cell.measured]
    if len({run.val_digest for run in measured}) > 1:
        said.append("the cells were evaluated on different data: their APs do not compare")
    classes = class_counts(grid)
    with_paper = any(row.published for row in rows)
    if with_paper and classes and classes != {COCO_CLASSES}:
        said.append(
            f"measured on data of {', '.join(map(str, sorted(classes)))} classes, not COCO's "
            f"{COCO_CLASSES}: beside the paper only the order of cells means something"
        )
    elif with_paper and any(r.published and "test-dev" in r.published.split for r in rows):
        said.append("published on COCO test-dev, measured on the run's validation set")
    return said


def class_counts(grid: Grid) -> set[int]:
    """The numbers of classes that the cells' data has."""
    return {len(r.best.per_class) for cell in grid.cells for r in cell.measured if r.best}


def _epochs(run: Run) -> str:
    epochs = f"epoch {run.epoch:g} of {run.epochs}" if run.epochs else f"epoch {run.epoch:g}"
    return f"{epochs}, {run.flag}" if run.flag else epochs


def report(targets: tuple[str, ...], output: Path | None, val: str, resamples: int) -> None:
    """Prints the comparison and writes compare.md, compare.csv, compare.html and figures
    (compare-images.svg, compare-seconds.svg) into `output`, or into the grid's folder
    (outputs/comparison for runs). Raises `UserError` at the end where an
    entry of the grid or a run is wrong: what could be compared is shown by then."""
    from jobs.report_figures import figures
    from jobs.report_html import page
    from jobs.report_text import as_csv, markdown, terminal

    if resamples < 0:
        raise UserError(f"resamples: got {resamples}, expected 0 (no bootstrap) or more")
    grid = open_targets(targets)
    comparison = compare(grid, resamples, val)
    folder = output or grid.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[Comparison], str]] = {"md": markdown, "csv": as_csv, "html": page}
    for ending, write in writers.items():
        (folder / f"compare.{ending}").write_text(write(comparison), encoding="utf-8")
    drawn = figures(comparison)
    for axis, svg in drawn.items():
        (folder / f"compare-{axis}.svg").write_text(svg, encoding="utf-8")
    print(terminal(comparison))
    names = [".md", ".csv", *(f"-{axis}.svg" for axis in drawn)]
    print(f"\nwritten: {folder}/compare.html, {', '.join(names[:-1])} and {names[-1]}")
    if grid.mistakes:
        raise UserError("; ".join(grid.mistakes))
