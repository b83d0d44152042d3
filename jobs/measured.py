"""What run folders and grids hold, read for a comparison. Needs neither Ray nor MLflow.

A file that is torn or lacks something costs what it would have told, and is named among the
problems: what is finished stays readable whatever else is broken.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs.published import METRICS, meant, published
from pipeline.config import LOCATIONS
from pipeline.errors import UserError
from pipeline.tracking import read_lines


@dataclass(frozen=True)
class Measurement:
    """One evaluation. `metrics` (METRICS) and `per_class`: percent, without what is undefined.
    `hours`: of training and evaluation so far; `device_hours`: times the processes. None: its line
    in metrics.jsonl is lost."""

    step: int
    epoch: float
    metrics: dict[str, float]
    per_class: dict[str, float]
    hours: float | None = None
    device_hours: float | None = None


@dataclass(frozen=True)
class Run:
    """One run folder. `curve`: its evaluations by step; `best`: the first of the highest AP, which
    is also the one whose detections the pipeline keeps; `config`: of config.json, empty where there
    is none; `flag`: why its grid took it for hopeless, "" where it did not."""

    folder: Path
    seed: int
    config: dict[str, Any] = field(default_factory=dict)
    val_digest: str = ""
    curve: tuple[Measurement, ...] = ()
    best: Measurement | None = None
    problems: tuple[str, ...] = ()
    flag: str = ""

    @property
    def epochs(self) -> int:
        """Length of its schedule; 0 where it is not known."""
        return int(_number(_section(self.config, "schedule").get("epochs")) or 0)

    @property
    def drop_epochs(self) -> tuple[float, ...]:
        """Where its learning rate falls."""
        schedule = _section(self.config, "schedule")
        drops = schedule.get("drop_epochs") if schedule.get("kind") == "step" else None
        found = [_number(drop) for drop in drops] if isinstance(drops, list) else []
        return tuple(drop for drop in found if drop is not None)

    @property
    def epoch(self) -> float:
        return max((point.epoch for point in self.curve), default=0.0)

    @property
    def finished(self) -> bool:
        return 0 < self.epochs <= self.epoch

    @property
    def val(self) -> str:
        """Where its validation shards were."""
        return str(_section(self.config, "data").get("val", ""))

    @property
    def batch_size(self) -> int:
        return int(_number(_section(self.config, "optimizer").get("batch_size")) or 0)


@dataclass(frozen=True)
class Cell:
    """One entry of a grid, of one seed or several. `differences`: dotted field -> (the baseline's
    value, its own); `published`: key of the paper's row, if any."""

    name: str
    runs: tuple[Run, ...]
    published: str | None = None
    differences: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def measured(self) -> tuple[Run, ...]:
        """The runs that count: those that are finished; where none is, those with an evaluation."""
        found = [run for run in self.runs if run.best is not None]
        return tuple([run for run in found if run.finished] or found)

    @property
    def finished(self) -> bool:
        return bool(self.measured) and all(run.finished for run in self.measured)

    @property
    def metrics(self) -> dict[str, float]:
        """Percent by METRICS: means over the runs that count, of those that have it."""
        return _means([run.best.metrics for run in self.measured if run.best])

    @property
    def per_class(self) -> dict[str, float]:
        """The same by class."""
        return _means([run.best.per_class for run in self.measured if run.best])


def _means(of_runs: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for values in of_runs for name in values)
    known = {name: [values[name] for values in of_runs if name in values] for name in names}
    return {name: sum(values) / len(values) for name, values in known.items()}


@dataclass(frozen=True)
class Grid:
    """What is compared. `mistakes`: what the user has to mend, a line each; the rest is there."""

    name: str
    folder: Path
    baseline: str | None
    cells: tuple[Cell, ...]
    mistakes: tuple[str, ...] = ()


def read_run(folder: Path, seed: int = 0) -> Run:
    """A run folder as far as it is there: a cell that has not begun gives a run without curve."""
    problems: list[str] = []
    identity = _read(folder / "config.json", problems)
    config = _section(identity, "config")
    seed_of_run = _number(config.get("seed"))
    lines = _lines(folder / "metrics.jsonl", problems)
    points = {point.step: point for point in _logged(lines)}
    for path in sorted(folder.glob("evaluations/step-*.json")):
        content, digits = _read(path, problems), path.stem.removeprefix("step-")
        if digits.isdecimal() and int(digits) not in points and content:
            # Evaluated, but the log does not have it: a line was torn, or it was resumed before.
            epoch = _number(content.get("epoch"))
            if epoch is not None:
                metrics, classes = _section(content, "summary"), _section(content, "per_class")
                points[int(digits)] = Measurement(
                    int(digits), epoch, _percent(metrics, METRICS), _percent(classes)
                )
    curve = tuple(points[step] for step in sorted(points) if "AP" in points[step].metrics)
    best = max(curve, key=lambda point: (point.metrics["AP"], -point.step), default=None)
    return Run(
        folder=folder,
        seed=seed if seed_of_run is None else int(seed_of_run),
        config=config,
        val_digest=str(identity.get("val_digest", "")),
        curve=curve,
        best=best,
        problems=tuple(problems),
    )


def _read(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object; empty where the file is not there, and with a problem where it is damaged."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{path}: not readable as JSON ({error})")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path}: got a {type(content).__name__}, expected a JSON object")
        return {}
    return content


def _lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The log's whole lines; those that lack what every line has are counted as damaged."""
    if not path.is_file():
        return []
    try:
        lines = read_lines(path)
        written = len(path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:
        problems.append(f"{path}: not readable ({error})")
        return []
    whole = [
        line
        for line in lines
        if isinstance(line, dict)
        and "kind" in line
        and all(_number(line.get(name)) is not None for name in ("step", "epoch", "time"))
    ]
    if damaged := written - len(whole):
        problems.append(f"{path}: {damaged} of {written} lines are torn; the rest is used")
    return whole


def _logged(lines: list[dict[str, Any]]) -> list[Measurement]:
    """The evaluations of a log. Time counts from each start of the run to its next, so what lies
    between a stop and the start after it does not."""
    found = []
    seconds = device_seconds = 0.0
    before, world = None, 1
    for line in lines:
        if line.get("event") == "start":
            before, world = line["time"], max(1, int(_number(line.get("world")) or 1))
        elif before is not None:
            # Nodes' clocks differ: one that is behind must not take time back.
            passed = max(0.0, line["time"] - before)
            seconds, device_seconds = seconds + passed, device_seconds + passed * world
            before = line["time"]
        if line["kind"] == "evaluation":
            classes = {k.removeprefix("AP/"): v for k, v in line.items() if k.startswith("AP/")}
            found.append(
                Measurement(
                    int(line["step"]),
                    float(line["epoch"]),
                    _percent(line, METRICS),
                    _percent(classes),
                    seconds / 3600,
                    device_seconds / 3600,
                )
            )
    return found


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    """A part that should be an object; empty where it is not."""
    part = content.get(name)
    return part if isinstance(part, dict) else {}


def _number(value: Any) -> float | None:
    """A finite number of 0 or more, as steps, epochs, times and shares are; else None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if 0 <= number < math.inf else None


def _percent(values: dict[str, Any], names: Iterable[str] | None = None) -> dict[str, float]:
    """Fractions as percent. -1, pycocotools' "no such object", is left out."""
    chosen = {name: _number(values.get(name)) for name in (values if names is None else names)}
    return {name: 100 * v for name, v in chosen.items() if v is not None and v <= 1}


GRID_FIELDS = {"name": str, "baseline": str | None, "cells": list, "command": dict}
CELL_FIELDS = {
    "name": str, "folder": str, "seed": int, "published": str | None, "differences": dict,
}  # fmt: skip


def read_grid(folder: Path) -> Grid:
    """The grid of `folder/grid.json`. Raises `UserError` where the file as a whole is wrong; what
    is wrong in one cell is among the grid's mistakes."""
    path = folder / "grid.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); write it again, or correct it") from None
    if isinstance(content, dict):
        content = {"command": {}, **content}  # for `jobs resume`; a file of one's own has none
    if wrong := _wrong(content, GRID_FIELDS):
        raise UserError(f"{path}: {wrong}")
    mistakes: list[str] = []
    entries: list[dict[str, Any]] = []
    for number, entry in enumerate(content["cells"], 1):
        wrong = _wrong(entry, CELL_FIELDS) or _wrong_row(entry["published"])
        if not wrong and (entry["name"], entry["seed"]) in [
            (e["name"], e["seed"]) for e in entries
        ]:
            wrong = f"a second one of this name with seed {entry['seed']}; rename one of the two"
        if wrong:
            called = entry.get("name") if isinstance(entry, dict) else None
            mistakes.append(f"{path}: cell {number} ({called or 'without a name'}): {wrong}")
        else:
            entries.append(entry)
    names = list(dict.fromkeys(entry["name"] for entry in entries))
    baseline = content["baseline"]
    if baseline is not None and baseline not in names:
        mistakes.append(f"{path}: baseline {baseline!r} is no cell: {meant(baseline, names)}")
        baseline = None
    cells = [_cell(folder, [e for e in entries if e["name"] == name]) for name in names]
    return Grid(content["name"], folder, baseline, tuple(cells), tuple(mistakes))


def _cell(folder: Path, entries: list[dict[str, Any]]) -> Cell:
    first = entries[0]
    return Cell(
        first["name"],
        tuple(_run_of(folder, entry) for entry in entries),
        first["published"],
        {name: (old, new) for name, (old, new) in first["differences"].items()},
    )


def _run_of(grid: Path, entry: dict[str, Any]) -> Run:
    """A run with what the grid remembers of it."""
    run, problems = read_run(grid / entry["folder"], entry["seed"]), list[str]()
    record = _read(grid / "records" / f"{Path(entry['folder']).name}.json", problems)
    outcome, flag = record.get("outcome"), record.get("flag")
    said = f"{'pruned' if outcome == 'pruned' else 'flagged'}: {flag}" if flag else ""
    return replace(run, flag=said, problems=(*run.problems, *problems))


def _wrong(content: Any, fields: dict[str, Any]) -> str:
    """What is wrong with an object's fields; "" if nothing is."""
    if not isinstance(content, dict):
        return f"got a {type(content).__name__}, expected an object with {', '.join(fields)}"
    if unknown := [name for name in content if name not in fields]:
        return f"unknown field {unknown[0]!r}: {meant(unknown[0], list(fields))}"
    for name, kind in fields.items():
        if name not in content:
            return f"{name} is missing"
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            expected = getattr(kind, "__name__", str(kind))
            return f"{name}: got {content[name]!r}, expected {expected}"
    pairs = content.get("differences", {})
    if odd := [name for name, pair in pairs.items() if not _is_pair(pair)]:
        return f"differences: {odd[0]}: got {pairs[odd[0]]!r}, expected [baseline's value, its own]"
    return ""


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _wrong_row(key: str | None) -> str:
    try:
        if key is not None:
            published(key)
    except UserError as error:
        return str(error)
    return ""


def read_runs(folders: list[Path]) -> Grid:
    """Run folders as a grid whose baseline is the first. Runs that differ in nothing but the seed
    are one cell."""
    mistakes: list[str] = []
    cells: dict[str, list[Path]] = {}
    runs: dict[Path, Run] = {}
    for folder in folders:
        if folder.resolve() in [other.resolve() for other in runs]:
            mistakes.append(f"{folder}: given twice; it is counted once")
        elif not (folder / "config.json").is_file():
            what = "it has no config.json" if folder.exists() else "there is no such folder"
            mistakes.append(f"{folder}: not a run folder ({what})")
        else:
            run, key = read_run(folder), ""
            # A second run of one seed is no further seed, but a row of its own.
            for number in range(len(folders)):
                key = f"{_but_seed(run)} {number}"
                if run.seed not in [runs[other].seed for other in cells.get(key, [])]:
                    break
            runs[folder] = run
            cells.setdefault(key, []).append(folder)
    names = _distinct(list(runs))
    firsts = [runs[group[0]] for group in cells.values()]
    found = tuple(
        Cell(
            names[group[0]],
            tuple(runs[folder] for folder in group),
            differences=_differences(firsts[0].config, runs[group[0]].config),
        )
        for group in cells.values()
    )
    baseline = found[0].name if found else None
    return Grid("runs", Path("outputs/comparison"), baseline, found, tuple(mistakes))


def _but_seed(run: Run) -> str:
    """What makes runs seeds of one cell, as a key: all that decides the result but the seed."""
    decisive = {name: value for name, value in _decisive(run.config).items() if name != "seed"}
    return json.dumps([decisive or str(run.folder), run.val_digest], sort_keys=True)


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted fields of a config but those that say where data lies or how work is spread."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        fields = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{name}.{key}".rstrip("."): setting for key, setting in fields}
    aside = {f"data.{name}" for name in LOCATIONS}
    aside |= {name for name in flat if name.startswith("engine.")} - {"engine.precision"}
    return {name: value for name, value in flat.items() if name not in aside}


def _differences(baseline: dict[str, Any], config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    old, new = _decisive(baseline), _decisive(config)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return {name: (old.get(name), new.get(name)) for name in names if name != "seed"}


def _distinct(folders: list[Path]) -> dict[Path, str]:
    """The last part of each path, with as many parts before it as tell it from the others."""
    parts = {folder: folder.resolve().parts for folder in folders}
    names = {}
    for folder, own in parts.items():
        others = [other for f, other in parts.items() if f is not folder]
        length = next(n for n in range(1, len(own) + 1) if own[-n:] not in [o[-n:] for o in others])
        names[folder] = "/".join(own[-length:])
    return names
