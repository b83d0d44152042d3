"""Charts as inline SVG, drawn from numbers alone. Colours are the page's: classes s0, s1, …, and
up and down for bars."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 920, 470
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 46
LABELS = 84  # pixels at the right for what the paper reports
COLOURS = 8  # that the page has; further lines repeat them dashed, then dotted
STROKES = ("", " dashed", " dotted")
BAR, LABEL, ROW = 17, 15, 26  # pixels from one bar, label, row of spots to the next


@dataclass(frozen=True)
class Line:
    """`points`: (x, y) by x; `group`: number of what it belongs to, which gives its colour."""

    name: str
    group: int
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A single point with a label: a number that was published, or a moment of a run."""

    label: str
    group: int
    x: float
    y: float
    kind: str  # "paper" or "drop": how the page shows it


def curves(lines: list[Line], marks: list[Mark], x_label: str, y_label: str, log: bool) -> str:
    """Lines over a linear or logarithmic axis (which leaves out what is not above 0). A line of one
    point is a dot. "" where there is nothing to draw."""
    if log:
        lines = [Line(e.name, e.group, [p for p in e.points if p[0] > 0]) for e in lines]
        marks = [mark for mark in marks if mark.x > 0]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    every = [p for line in lines for p in line.points] + [(mark.x, mark.y) for mark in marks]
    first, last = min(x for x, _ in every), max(x for x, _ in every)
    x_ticks = log_ticks(first, last) if log else ticks(0, last)
    y_ticks = ticks(0, max(y for _, y in every))
    low, high = (min(first, x_ticks[0]), max(last, x_ticks[-1])) if log else (0.0, x_ticks[-1])
    right = WIDTH - (LABELS if any(mark.kind == "paper" for mark in marks) else RIGHT)
    across = _scale(low, high, LEFT, right, log)
    up = _scale(0, y_ticks[-1], HEIGHT - BOTTOM, TOP, False)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_e(y_label)} against '
        f'{_e(x_label)}">'
    ]
    for y in y_ticks:
        parts.append(f'<path class="rule" d="M{LEFT} {up(y):.1f}H{right}"/>')
        parts.append(f'<text class="end" x="{LEFT - 8}" y="{up(y) + 4:.1f}">{y:g}</text>')
    for x in x_ticks:
        parts.append(
            f'<path class="rule" d="M{across(x):.1f} {HEIGHT - BOTTOM}v5"/>'
            f'<text class="mid" x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 20}">'
            f"{_short(x)}</text>"
        )
    middle = (LEFT + right) / 2
    parts.append(f'<text class="mid" x="{middle}" y="{HEIGHT - 6}">{_e(x_label)}</text>')
    parts.append(f'<text x="{LEFT + 6}" y="{TOP + 10}">{_e(y_label)}</text>')
    for line in lines:
        parts.append(_drawn(line, across, up))
    parts.append(_marked(marks, across, up))
    parts.append('<circle class="here" r="5"/></svg>')
    return "".join(parts)


def _drawn(line: Line, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    at = [f"{across(x):.1f},{up(y):.1f}" for x, y in line.points]
    dots = ""
    if len(at) <= 60:
        pairs = (point.split(",") for point in at)
        dots = "".join(f'<circle cx="{x}" cy="{y}" r="2.4"/>' for x, y in pairs)
    values = " ".join(f"{x:.6g},{y:.4g}" for x, y in line.points)
    return (
        f'<g class="line {style(line.group)}" data-group="{line.group}" '
        f'data-name="{_e(line.name)}" data-values="{values}">'
        f'<polyline points="{" ".join(at)}"/>{dots}</g>'
    )


def _marked(
    marks: list[Mark], across: Callable[[float], float], up: Callable[[float], float]
) -> str:
    """Labels keep LABEL pixels from each other; those of one place and text are one."""
    parts = []
    taken: list[tuple[float, float]] = []
    said = set()
    for mark in sorted(marks, key=lambda mark: -mark.y):
        x, y, label = across(mark.x), up(mark.y), ""
        if mark.kind == "paper":
            shape = f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"/>'
            if (mark.x, mark.label) not in said:
                height = y - 9
                while any(abs(x - a) < 90 and abs(height - b) < LABEL for a, b in taken):
                    height += 1
                taken.append((x, height))
                said.add((mark.x, mark.label))
                label = f'<text x="{x + 12:.1f}" y="{height:.1f}">{_e(mark.label)}</text>'
        else:
            shape = f'<path d="M{x:.1f} {y + 14:.1f}v-28"/>'
        parts.append(
            f'<g class="mark {mark.kind} {style(mark.group)}" data-group="{mark.group}">'
            f"<title>{_e(mark.label)}</title>{shape}{label}</g>"
        )
    return "".join(parts)


@dataclass(frozen=True)
class Spot:
    """One row of `spots`: a value of each run, the interval of their mean, a published value."""

    name: str
    group: int
    values: list[float]
    interval: tuple[float, float] | None
    paper: float | None


def spots(rows: list[Spot], label: str) -> str:
    """Values and intervals over an axis that shows their range alone, a row each. "" without any
    value."""
    every = [v for row in rows for v in (*row.values, *(row.interval or ()))]
    if not every:
        return ""
    every += [row.paper for row in rows if row.paper is not None]
    marked = ticks(min(every), max(every), most=9)
    names = min(20.0 + 7.0 * max(len(row.name) for row in rows), WIDTH * 0.4)
    across = _scale(marked[0], marked[-1], names + 10, WIDTH - 24, False)
    height = len(rows) * ROW + 8
    parts = [f'<svg viewBox="0 0 {WIDTH} {height + 40}" role="img" aria-label="{_e(label)}">']
    for x in marked:
        parts.append(
            f'<path class="rule" d="M{across(x):.1f} 0V{height}"/>'
            f'<text class="mid" x="{across(x):.1f}" y="{height + 16}">{x:g}</text>'
        )
    for i, row in enumerate(rows):
        y = i * ROW + ROW / 2 + 4
        drawn = ""
        if row.interval:
            low, high = map(across, row.interval)
            drawn += f'<path class="span" d="M{low:.1f} {y}H{high:.1f}"/>'
        drawn += "".join(f'<circle cx="{across(v):.1f}" cy="{y}" r="4"/>' for v in row.values)
        if row.paper is not None:
            drawn += f'<path class="paper" d="M{across(row.paper):.1f} {y - 7}l7 7l-7 7l-7 -7z"/>'
        said = ", ".join(f"{value:.2f}" for value in row.values)
        parts.append(
            f'<g class="spot {style(row.group)}"><title>{_e(row.name)}: {said}</title>'
            f'<text class="end" x="{names:.1f}" y="{y + 4}">{_e(cut(row.name, int(names / 6.4)))}'
            f"</text>{drawn}</g>"
        )
    parts.append(
        f'<text class="mid" x="{(names + WIDTH) / 2}" y="{height + 36}">{_e(label)}</text>'
    )
    return "".join(parts) + "</svg>"


def bars(values: list[tuple[str, float]], unit: str, columns: int = 1) -> str:
    """Differences from zero as horizontal bars with their numbers, from top to bottom, then in the
    next column. "" where there are none."""
    if not values:
        return ""
    rows = -(-len(values) // columns)
    width = WIDTH / columns
    longest = max(len(name) for name, _ in values)
    names = min(20.0 + 7.0 * longest, width * 0.45)
    digits = 1 if max(abs(value) for _, value in values) >= 1 else 2
    low = min(0.0, *(value for _, value in values))
    high = max(0.0, *(value for _, value in values))
    scale = (width - names - 2 * 44) / max(high - low, 0.1)
    zero = names + 44 - low * scale
    parts = [f'<svg viewBox="0 0 {WIDTH} {rows * BAR + 6}" role="img" aria-label="{_e(unit)}">']
    for i, (name, value) in enumerate(values):
        column, row = divmod(i, rows)
        at, y = column * width, row * BAR + 4
        length = abs(value) * scale
        start = at + zero - (length if value < 0 else 0)
        side, end = ("end", -length - 5) if value < 0 else ("", length + 5)
        parts.append(
            f'<g class="bar {"down" if value < 0 else "up"}"><title>{_e(name)}: {value:+.2f} '
            f"{_e(unit)}</title>"
            f'<text class="end" x="{at + names - 6:.1f}" y="{y + 10}">'
            f"{_e(cut(name, int(names / 6.4)))}</text>"
            f'<path class="rule" d="M{at + zero:.1f} {y - 3}v{BAR}"/>'
            f'<rect x="{start:.1f}" y="{y}" width="{max(length, 0.6):.1f}" height="{BAR - 5}"/>'
            f'<text class="{side}" x="{at + zero + end:.1f}" y="{y + 10}">'
            f"{value:+.{digits}f}</text></g>"
        )
    return "".join(parts) + "</svg>"


def _scale(
    low: float, high: float, start: float, end: float, log: bool
) -> Callable[[float], float]:
    def place(value: float) -> float:
        if high == low:
            return (start + end) / 2
        if log:
            share = math.log(value / low) / math.log(high / low)
        else:
            share = (value - low) / (high - low)
        return start + share * (end - start)

    return place


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round values, at most so many, the first at or below `low` and the last at or above `high`;
    steps are 1, 2 or 5 times a power of ten."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / (most - 1)))
    while span / step > most - 1:
        step *= 2.5 if f"{step:e}"[0] == "2" else 2
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between the two; at least the two themselves."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    found = [round(value, 12) for value in found if low * 0.999 <= value <= high * 1.001]
    return found if len(found) > 1 else [low, high] if high > low else [low]


def _short(value: float) -> str:
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


def style(group: int) -> str:
    """The classes of a group's colour and stroke."""
    return f"s{group % COLOURS}{STROKES[group // COLOURS % len(STROKES)]}"


def cut(text: str, most: int) -> str:
    """The text, its end as "…" where it has more letters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _e(text: str) -> str:
    return escape(text, quote=True)
