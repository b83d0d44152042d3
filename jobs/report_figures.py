"""The curves of a comparison as SVG files, for documents: AP against images seen and seconds."""

import re
from html import escape
from pathlib import Path

from jobs.charts import COLOURS, HEIGHT, WIDTH, Line, curves, cut, style
from jobs.compare import Comparison
from jobs.report_html import AXES, lines_of, with_curves

FIGURES = ("images", "seconds")
LEGEND, ROW, SWATCH = 320, 21, 26  # pixels: the legend's width, a row of it, a stroke in it
LETTERS = 38  # of a name in the legend

# The page's, without variables and media queries, which few programs but browsers know.
STYLE = """text { font: 12px system-ui, "DejaVu Sans", sans-serif; fill: INK }
.mid { text-anchor: middle } .end { text-anchor: end }
.rule { stroke: RULE; fill: none }
.here { display: none }
.line polyline { fill: none; stroke-width: 2; stroke-linejoin: round }
.dashed polyline { stroke-dasharray: 6 4 }
.dotted polyline { stroke-dasharray: 1.5 4; stroke-linecap: round }
"""


def figures(comparison: Comparison) -> dict[str, str]:
    """SVG by axis, of those axes for which there are numbers."""
    found = {}
    for axis in FIGURES:
        label, value = AXES[axis]
        rows = with_curves(comparison)
        lines = [line for i, row in enumerate(rows) for line in lines_of(row, i, value)]
        if svg := curves(lines, [], label, "AP", False):
            found[axis] = _document(svg, lines)
    return found


def _document(svg: str, lines: list[Line]) -> str:
    """The chart with a legend at its right, the highest end first."""
    chart = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
    ended = sorted((e for e in lines if e.points), key=lambda line: -line.points[-1][1])
    rows = [_row(line, 24 + i * ROW) for i, line in enumerate(ended)]
    width, height = WIDTH + LEGEND, max(HEIGHT, 24 + len(rows) * ROW)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">\n<style>\n{_styles()}</style>\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        f"{chart}\n{chr(10).join(rows)}\n</svg>\n"
    )


def _styles() -> str:
    """STYLE in the page's light colours."""
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--(\w+): (#\w+)", css[: css.index("@media")]))
    groups = [
        f".s{i} polyline {{ stroke: {light[f'c{i}']} }} .s{i} circle {{ fill: {light[f'c{i}']} }}\n"
        for i in range(COLOURS)
    ]
    return STYLE.replace("INK", light["ink"]).replace("RULE", light["rule"]) + "".join(groups)


def _row(line: Line, y: int) -> str:
    start = WIDTH + 8
    return (
        f'<g class="line {style(line.group)}">'
        f'<polyline points="{start},{y} {start + SWATCH},{y}"/>'
        f'<text x="{start + SWATCH + 8}" y="{y + 4}">'
        f"{line.points[-1][1]:.1f}  {escape(cut(line.name, LETTERS))}</text></g>"
    )
