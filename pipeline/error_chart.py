"""The error analysis as a table and as a picture."""

import csv
from pathlib import Path

from matplotlib.figure import Figure

from pipeline.error_analysis import KINDS, Errors

BAR, SUM = "#0072b2", "#d55e00"


def save_errors(errors: Errors, names: dict[int, str], folder: Path) -> tuple[Path, Path]:
    """Writes errors.csv, by kind and class, and errors.png; returns their paths. names: of category
    ids."""
    table, picture = folder / "errors.csv", folder / "errors.png"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", *KINDS])
        writer.writerow(["(dAP)", *(f"{errors.d_ap[kind]:.6g}" for kind in KINDS)])
        writer.writerow(["(all)", *(errors.counts[kind] for kind in KINDS)])
        for category, counts in zip(errors.categories, errors.class_counts.tolist(), strict=True):
            writer.writerow([names[category], *counts])
    draw_errors(errors).savefig(picture)
    return table, picture


def draw_errors(errors: Errors) -> Figure:
    """What each kind of error costs."""
    rows = [(name, value, BAR) for name, value in errors.d_ap.items()]
    rows += [
        ("all false positives", errors.false_positives, SUM),
        ("all false negatives", errors.false_negatives, SUM),
    ]
    figure = Figure(figsize=(6.4, 3.2), dpi=120, layout="constrained")
    axis = figure.subplots()
    places = range(len(rows))
    axis.barh(places, [value for _, value, _ in rows], color=[colour for *_, colour in rows])
    for place, (_, value, _) in zip(places, rows, strict=True):
        axis.annotate(
            f"{value:.3f}", (max(value, 0), place), (3, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
    axis.set_yticks(places, [name for name, *_ in rows], fontsize=9)
    axis.invert_yaxis()
    values = [value for _, value, _ in rows]
    axis.set_xlim(min(0.0, *values), max(0.05, 1.15 * max(values)))
    axis.set_xlabel("AP50 won where these were mended (dAP)")
    axis.set_title(f"AP50 {errors.ap:.3f} and what keeps it down", fontsize=10)
    return figure
