"""A comparison as one HTML page that needs nothing but itself."""

import time
from collections.abc import Callable
from html import escape
from pathlib import Path

from jobs.charts import Line, Mark, Spot, bars, curves, spots, style
from jobs.compare import Comparison, Row
from jobs.measured import Cell, Measurement, Run
from jobs.report_text import NOTHING, Sheet, progress, sheets

Value = Callable[[Run, Measurement], float | None]
SIZES = {"AP_S": "small", "AP_M": "medium", "AP_L": "large"}
AXES: dict[str, tuple[str, Value]] = {
    "epochs": ("epochs", lambda run, point: point.epoch),
    "images": (
        "images seen (steps × batch size)",
        lambda run, point: point.step * run.batch_size if run.batch_size else None,
    ),
    "seconds": (
        "seconds of training and evaluation",
        lambda run, point: None if point.hours is None else 3600 * point.hours,
    ),
    "hours": ("hours of training and evaluation", lambda run, point: point.hours),
    "device-hours": ("worker-hours (hours × processes)", lambda run, point: point.device_hours),
}
SCALES = {"linear": False, "log": True}
VERDICTS = (
    "higher",
    "lower",
    "noise",
    "not known",
    "not begun",
    "not evaluated",
    "unfinished",
    "same run",
)


def page(comparison: Comparison) -> str:
    """The whole page: one file without links."""
    sections = [
        *(_table(sheet) for sheet in sheets(comparison)),
        _results(comparison),
        _convergence(comparison),
        _sizes(comparison),
        _classes(comparison),
        _configs(comparison),
        _notes(comparison),
        _reading(),
    ]
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    script = Path(__file__).with_name("report.js").read_text(encoding="utf-8")
    cells = comparison.grid.cells
    done = sum(cell.finished for cell in cells)
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(comparison.grid.name)}: comparison</title>\n"
        f"<style>\n{style}</style></head>\n<body><header>"
        f"<p class='kind'>{escape(comparison.grid.name)}</p>"
        f"<h1>{escape(comparison.title)}</h1>"
        f"<p class='quiet'>{done} of {len(cells)} cells finished · {written}</p></header>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<script>\n{script}</script></body></html>\n"
    )


def _table(sheet: Sheet) -> str:
    """Further columns of words, which name the row too, stand below the first in small print."""
    head = "".join(
        f"<th>{escape(c)}</th>" for c in (sheet.columns[0], *sheet.columns[sheet.words :])
    )
    body = []
    for label, *values in sheet.rows:
        aside, rest = values[: sheet.words - 1], values[sheet.words - 1 :]
        small = "".join(f"<small>{escape(text)}</small>" for text in aside if text)
        shown = [f"<th>{escape(label)}{small}</th>", *(f"<td>{_tagged(v)}</td>" for v in rest)]
        body.append(f"<tr>{''.join(shown)}</tr>")
    return (
        f"<section><h2>{escape(sheet.title)}</h2><div class='wide'><table>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>{chr(10).join(body)}</tbody></table></div></section>"
    )


def _tagged(value: str) -> str:
    if value in VERDICTS:
        return f'<span class="tag {value.replace(" ", "-")}">{escape(value)}</span>'
    return escape(value)


def with_curves(comparison: Comparison) -> list[Row]:
    """The rows with a curve, in the order that gives their colours."""
    return [r for r in comparison.rows if r.cell and any(run.curve for run in r.cell.runs)]


def _results(comparison: Comparison) -> str:
    rows = [
        Spot(
            _named(row),
            group,
            [run.best.metrics["AP"] for run in row.cell.measured if run.best] if row.cell else [],
            row.interval,
            row.published.metrics.get("AP") if row.published and comparison.beside_paper else None,
        )
        for group, row in enumerate(with_curves(comparison))
        if row.finished or not any(other.finished for other in comparison.rows)
    ]
    svg = spots(rows, "AP")
    if not svg:
        return ""
    hint = "A dot is a run" + ("; a diamond is the paper's" if comparison.beside_paper else "")
    if any(row.interval for row in rows):
        hint += "; a bar is the 95% interval over images of the runs' mean"
    return f"<section><h2>AP</h2>{svg}<p class='quiet'>{hint}.</p></section>"


def _convergence(comparison: Comparison) -> str:
    rows = with_curves(comparison)
    charts, choices = [], []
    for axis, (label, value) in AXES.items():
        lines = [line for i, row in enumerate(rows) for line in lines_of(row, i, value)]
        marks = _marks(comparison, rows) if axis == "epochs" else []
        drawn = {s: curves(lines, marks, label, "AP", log) for s, log in SCALES.items()}
        if all(drawn.values()):
            choices.append(axis)
            charts += [f'<div class="chart {axis} {s}">{svg}</div>' for s, svg in drawn.items()]
    if not choices:
        return ""
    legend = "".join(
        f'<button type="button" class="key {style(i)}" data-group="{i}" aria-pressed="true">'
        f"<i></i>{escape(row.label)}</button>"
        for i, row in enumerate(rows)
    )
    # Radio buttons before the charts: the style sheet shows the chart that they choose.
    radios = _radios("axis", choices) + _radios("scale", list(SCALES))
    picks = _picks("axis", choices) + _picks("scale", list(SCALES))
    kinds = {mark.kind for mark in _marks(comparison, rows)}
    hint = "Point at a curve for its numbers, press a name to hide it."
    if "drop" in kinds:
        hint += " A short upright line: here the learning rate falls."
    if "paper" in kinds:
        hint += " A diamond: what the paper reports."
    return (
        f"<section class='curves'><h2>Convergence</h2>{radios}<div class='picks'>{picks}</div>"
        f"<div class='legend'>{legend}</div><div class='charts'>{''.join(charts)}"
        f"<div class='tip' hidden></div></div><p class='quiet'>{hint}</p></section>"
    )


def _radios(name: str, values: list[str]) -> str:
    return "".join(
        f'<input type="radio" name="{name}" id="{value}"{" checked" if i == 0 else ""}>'
        for i, value in enumerate(values)
    )


def _picks(name: str, values: list[str]) -> str:
    labels = "".join(f'<label for="{v}">{v.replace("device-", "worker-")}</label>' for v in values)
    return f'<span class="pick {name}">{labels}</span>'


def lines_of(row: Row, group: int, value: Value) -> list[Line]:
    """The curve of each of a row's runs, over what `value` takes of an evaluation."""
    assert row.cell is not None
    lines = []
    for run in row.cell.runs:
        places = [(value(run, point), point.metrics["AP"]) for point in run.curve]
        points = [(x, y) for x, y in places if x is not None]
        several = len(row.cell.runs) > 1
        lines.append(Line(f"{row.label}, seed {run.seed}" if several else row.label, group, points))
    return lines


def _marks(comparison: Comparison, rows: list[Row]) -> list[Mark]:
    """Where learning rates fall, and what the paper reports if the data is the paper's."""
    marks = []
    for group, row in enumerate(rows):
        assert row.cell is not None
        for run in row.cell.runs:
            for epoch in run.drop_epochs:
                if (height := _height(run, epoch)) is not None:
                    said = f"{row.label}: learning rate falls after epoch {epoch:g}"
                    marks.append(Mark(said, group, epoch, height, "drop"))
        paper = row.published
        if comparison.beside_paper and paper and paper.epochs and "AP" in paper.metrics:
            ap = paper.metrics["AP"]
            marks.append(Mark(f"paper {ap:.1f}", group, float(paper.epochs), ap, "paper"))
    return marks


def _height(run: Run, epoch: float) -> float | None:
    """AP of the curve at an epoch, between its evaluations; None outside them."""
    for before, after in zip(run.curve, run.curve[1:], strict=False):
        if before.epoch <= epoch <= after.epoch and after.epoch > before.epoch:
            share = (epoch - before.epoch) / (after.epoch - before.epoch)
            return before.metrics["AP"] * (1 - share) + after.metrics["AP"] * share
    return None


def _others(comparison: Comparison) -> tuple[Cell | None, list[Row]]:
    """The baseline's cell, if it is measured, and the rows that are held against it."""
    base = comparison.baseline
    if base is None or base.cell is None or not base.metrics:
        return None, []
    return base.cell, [
        r for r in comparison.rows if r.cell and r.metrics and r.cell is not base.cell
    ]


def _named(row: Row) -> str:
    return row.label if row.finished else f"{row.label} (epoch {progress(row.cell)})"


def _sizes(comparison: Comparison) -> str:
    base, rows = _others(comparison)
    if base is None:
        return ""
    values = [
        (f"{_named(row)} · {size}", row.metrics[name] - base.metrics[name])
        for row in rows
        for name, size in SIZES.items()
        if name in row.metrics and name in base.metrics
    ]
    svg = bars(values, "points of AP")
    return f"<section><h2>By size, less the baseline</h2>{svg}</section>" if svg else ""


def _classes(comparison: Comparison) -> str:
    base, rows = _others(comparison)
    charts: list[str] = []
    for row in rows:
        if base is None or row.cell is None:
            continue
        mine, theirs = row.cell.per_class, base.per_class
        values = [(name, mine[name] - theirs[name]) for name in mine if name in theirs]
        values.sort(key=lambda pair: -pair[1])
        if svg := bars(values, "points of AP", columns=2 if len(values) > 12 else 1):
            charts.append(
                f"<details{' open' if not charts else ''}><summary>{escape(_named(row))}</summary>"
                f"{svg}</details>"
            )
    if not charts:
        return ""
    return f"<section><h2>By class, less the baseline</h2>{''.join(charts)}</section>"


def _configs(comparison: Comparison) -> str:
    rows = [row for row in comparison.rows if row.cell]
    rows = [row for row in rows if row.cell and row.cell.differences]
    names = list(dict.fromkeys(n for row in rows if row.cell for n in row.cell.differences))
    if not names:
        return ""
    before = {n: pair[0] for row in rows if row.cell for n, pair in row.cell.differences.items()}
    base = comparison.baseline
    lines = [[base.label if base else "baseline", *(_value(before[n]) for n in names)]]
    for row in rows:
        assert row.cell is not None
        own = row.cell.differences
        lines.append([row.label, *(_value(own[n][1]) if n in own else NOTHING for n in names)])
    # A field a line: there may be more fields than fit beside each other.
    turned = [list(column) for column in zip(["field", *names], *lines, strict=True)]
    return _table(
        Sheet(f"Configs: what differs ({NOTHING}: as the baseline)", turned[0], turned[1:])
    )


def _value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _notes(comparison: Comparison) -> str:
    said = [*comparison.grid.mistakes, *comparison.notes]
    if not said:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in said)
    return f"<section><h2>Missing, and to be known</h2><ul>{items}</ul></section>"


def _reading() -> str:
    return (
        "<section class='quiet'><h2>How to read it</h2><p>All APs are percent; of a run its best "
        "evaluation, of several seeds the mean ± standard deviation. <b>95% images</b>: AP on "
        "resampled validation images. A difference is <b>noise</b> where its 95% interval holds "
        "zero, counting the sources of noise that are named, and <b>not known</b> where there are "
        "none.</p></section>"
    )
