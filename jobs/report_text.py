"""A comparison as tables: for the terminal, in Markdown, and as CSV."""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass

from jobs.compare import Comparison, Row
from jobs.measured import Cell
from jobs.noise import Difference
from jobs.published import METRICS

NOTHING = "–"


@dataclass(frozen=True)
class Sheet:
    """One table of text. The first `words` columns are words, the others numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    words: int = 1


def sheets(comparison: Comparison) -> list[Sheet]:
    """Published beside measured; the cells beside the baseline; the parts of AP."""
    found = [_published_sheet(comparison), _baseline_sheet(comparison), _parts_sheet(comparison)]
    return [_without_empty_columns(sheet) for sheet in found if sheet.rows]


def _without_empty_columns(sheet: Sheet) -> Sheet:
    kept = [i for i in range(len(sheet.columns)) if {row[i] for row in sheet.rows} - {"", NOTHING}]
    return Sheet(
        sheet.title,
        [sheet.columns[i] for i in kept],
        [[row[i] for i in kept] for row in sheet.rows],
        words=sum(i < sheet.words for i in kept),
    )


def _published_sheet(comparison: Comparison) -> Sheet:
    columns = ["row", "cell", "epoch", "seeds", "paper", "AP", "95% images"]
    columns += ["to paper", "verdict", "worker-hours"]
    rows = []
    for row in comparison.rows:
        paper = row.published.metrics.get("AP") if row.published else None
        rows.append(
            [
                row.label,
                row.cell.name if row.cell and row.cell.name != row.label else "",
                progress(row.cell),
                _seeds(row.cell),
                number(paper),
                _ap(row),
                between(row.interval),
                signed(row.to_paper),
                verdict(row.to_paper, row.finished),
                _hours(row),
            ]
        )
    published = any(row.published for row in comparison.rows)
    return Sheet("Published and measured" if published else "Measured", columns, rows, words=2)


def _baseline_sheet(comparison: Comparison) -> Sheet:
    columns = ["row", "paper", "measured", "95%", "noise of", "verdict", "order"]
    rows = []
    for row in comparison.rows:
        if (difference := row.to_baseline) is None:
            continue
        known = bool(difference.sources)
        paper = row.paper_to_baseline
        rows.append(
            [
                row.label,
                NOTHING if paper is None else plus(paper),
                signed(difference),
                between((difference.low, difference.high) if known else None, plus),
                " and ".join(difference.sources) or NOTHING,
                verdict(difference, row.settled),
                row.ordering or NOTHING,
            ]
        )
    label = comparison.baseline.label if comparison.baseline else ""
    return Sheet(f"AP less the baseline's ({label})", columns, rows)


def _parts_sheet(comparison: Comparison) -> Sheet:
    rows = []
    for row in comparison.rows:
        paper = row.published.metrics if row.published else {}
        if row.metrics or paper:
            parts = [_part(row.metrics.get(name), paper.get(name)) for name in METRICS[1:]]
            rows.append([row.label, *parts])
    published = any(row.published for row in comparison.rows)
    title = "Parts of AP: measured (paper)" if published else "Parts of AP"
    return Sheet(title, ["row", *METRICS[1:]], rows)


def _part(measured: float | None, paper: float | None) -> str:
    if paper is None:
        return number(measured)
    return f"{number(measured)} ({paper:.1f})"


def number(value: float | None, digits: int = 1) -> str:
    """Rounded; a dash for None."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def plus(value: float) -> str:
    """With its sign; 0.0 has none."""
    text = f"{value:+.1f}"
    return text[1:] if text[1:] == "0.0" else text


def signed(difference: Difference | None) -> str:
    """A difference with its sign; a dash for None."""
    return NOTHING if difference is None else plus(difference.value)


def between(bounds: tuple[float, float] | None, shown: Callable[[float], str] = number) -> str:
    """An interval; a dash for None."""
    return NOTHING if bounds is None else f"{shown(bounds[0])} … {shown(bounds[1])}"


def verdict(difference: Difference | None, finished: bool) -> str:
    """What the difference is; that of a run which goes on is not judged."""
    if difference is None:
        return NOTHING
    return difference.verdict if finished else "unfinished"


def _hours(row: Row) -> str:
    """Measured, and the paper's in brackets where both are there."""
    paper, own = row.published.extra.get("gpu_hours") if row.published else None, hours(row.cell)
    shown = NOTHING if own is None else f"{own:.0f}" if own >= 10 else f"{own:.2g}"
    return f"{shown} ({paper})" if paper else shown


def _ap(row: Row) -> str:
    """With the standard deviation over seeds where there are several."""
    if row.cell and not row.metrics:
        begun = any(run.config for run in row.cell.runs)
        return "not evaluated" if begun else "not begun"
    if not row.metrics:
        return NOTHING
    spread = "" if row.spread is None else f" ± {row.spread:.2f}"
    return f"{row.metrics['AP']:.1f}{spread}"


def progress(cell: Cell | None) -> str:
    """Epochs done of those planned, "12/50"; of several seeds the least."""
    if cell is None:
        return NOTHING
    run = min(cell.measured or cell.runs, key=lambda run: run.epoch)
    if not run.epochs:  # without a config.json
        return f"{run.epoch:g}" if run.curve else NOTHING
    return f"{run.epoch:g}/{run.epochs}"


def _seeds(cell: Cell | None) -> str:
    if cell is None:
        return NOTHING
    counted, asked = len(cell.measured), len(cell.runs)
    return f"{counted}" if counted == asked else f"{counted}/{asked}"


def hours(cell: Cell | None) -> float | None:
    """Worker-hours to the last evaluation, mean over the runs that count."""
    ends = [run.curve[-1].device_hours for run in cell.measured] if cell else []
    known = [end for end in ends if end is not None]
    return sum(known) / len(known) if known else None


def terminal(comparison: Comparison) -> str:
    """The tables in columns."""
    parts = [comparison.title]
    for sheet in sheets(comparison):
        widths = [max(map(len, column)) for column in zip(sheet.columns, *sheet.rows, strict=True)]
        lines = [
            "  ".join(
                f"{value:<{width}}" if i < sheet.words else f"{value:>{width}}"
                for i, (value, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (sheet.columns, *sheet.rows)
        ]
        parts.append("\n".join([sheet.title, *lines]))
    if comparison.notes:
        parts.append("\n".join(["Notes", *(f"- {note}" for note in comparison.notes)]))
    return "\n\n".join(parts)


def markdown(comparison: Comparison) -> str:
    """The tables in Markdown."""
    parts = [f"# {_cell(comparison.title)}"]
    for sheet in sheets(comparison):
        lines = [f"## {_cell(sheet.title)}", ""]
        rule = ["---" if i < sheet.words else "---:" for i in range(len(sheet.columns))]
        for values in (sheet.columns, rule, *sheet.rows):
            lines.append(f"| {' | '.join(_cell(value) for value in values)} |")
        parts.append("\n".join(lines))
    if comparison.notes:
        notes = "\n".join(f"- {_cell(note)}" for note in comparison.notes)
        parts.append(f"## Notes\n\n{notes}")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """Text that neither ends a cell of a table nor becomes markup."""
    for special in "\\|<*_`":
        text = text.replace(special, f"\\{special}")
    return " ".join(text.split())


def as_csv(comparison: Comparison) -> str:
    """One line a row, unrounded; empty where there is nothing."""
    buffer = io.StringIO()
    lines = [_record(row) for row in comparison.rows]
    writer = csv.DictWriter(buffer, fieldnames=list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _record(row: Row) -> dict[str, object]:
    paper, difference = row.published, row.to_baseline
    record: dict[str, object] = {
        "row": row.label,
        "cell": row.cell.name if row.cell else None,
        "key": paper.key if paper else None,
        "source": paper.source if paper else None,
        "epochs_done": min((r.epoch for r in row.cell.measured), default=0) if row.cell else None,
        "finished": row.finished if row.cell else None,
        "seeds": len(row.cell.measured) if row.cell else None,
        "device_hours": hours(row.cell),
        "paper_gpu_hours": paper.extra.get("gpu_hours") if paper else None,
    }
    for name in METRICS:
        record[f"paper_{name}"] = paper.metrics.get(name) if paper else None
        record[name] = row.metrics.get(name)
    return record | {
        "AP_seed_deviation": row.spread,
        "AP_images_low": row.interval[0] if row.interval else None,
        "AP_images_high": row.interval[1] if row.interval else None,
        "AP_to_paper": row.to_paper.value if row.to_paper else None,
        "to_paper_verdict": verdict(row.to_paper, row.finished) if row.to_paper else None,
        "paper_AP_to_baseline": row.paper_to_baseline,
        "AP_to_baseline": difference.value if difference else None,
        "to_baseline_low": difference.low if difference and difference.sources else None,
        "to_baseline_high": difference.high if difference and difference.sources else None,
        "to_baseline_noise_of": "+".join(difference.sources) if difference else None,
        "to_baseline_verdict": verdict(difference, row.settled) if difference else None,
        "order": row.ordering or None,
    }
