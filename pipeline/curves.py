"""Precision over recall, and AP of each class: as numbers and as a picture.

T thresholds of IoU (0.50, 0.55, ... 0.95), R = 101 recalls, K categories.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pycocotools.coco import COCO

from pipeline.coco_scores import Scores, score
from pipeline.errors import UserError

Array = NDArray[np.float64]

# Legend, index of the threshold (all: None), colour, dashes.
LINES = (
    ("IoU 0.50", 0, "#56b4e9", "-"),
    ("IoU 0.75", 5, "#e69f00", "-"),
    ("IoU 0.50:0.95", None, "black", "--"),
)
BAR = "#0072b2"
MOST_BARS = 80  # classes with a bar of their own


@dataclass(frozen=True)
class Curves:
    """precision [T, R, K] of objects of all sizes, at most 100 detections an image; NaN for a
    category without objects. recall [R]; names [K]."""

    precision: Array
    recall: Array
    names: tuple[str, ...]

    def mean(self, threshold: int | None) -> Array:
        """[R] over the categories that have objects, at one threshold or over all."""
        some = self.precision if threshold is None else self.precision[threshold : threshold + 1]
        return some[:, :, self.present].mean(axis=(0, 2))

    def class_ap(self, threshold: int | None = None) -> Array:
        """[K]"""
        some = self.precision if threshold is None else self.precision[threshold : threshold + 1]
        return some.mean(axis=(0, 1))

    @property
    def present(self) -> NDArray[np.bool_]:
        return ~np.isnan(self.precision[0, 0])


def curves(truth: COCO, detections: list[dict[str, Any]]) -> Curves:
    """Of COCO result records. Raises `UserError` for a ground truth with nothing to find."""
    return curves_of(score(truth, detections))


def curves_of(scores: Scores) -> Curves:
    """Raises `UserError` for a ground truth with nothing to find."""
    precision = scores.precision[..., 0]
    if not (precision > -1).any():
        raise UserError("the ground truth has no object that counts: expected at least one")
    defined = np.where(precision > -1, precision, np.nan)
    return Curves(defined, np.linspace(0, 1, precision.shape[1]), scores.names)


def save_curves(of: Curves, folder: Path) -> list[Path]:
    """Writes precision_recall.csv, class_ap.csv and precision_recall.png; returns their paths."""
    points, picture = save_precision(of, folder)
    classes = folder / "class_ap.csv"
    with classes.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "AP", "AP50", "AP75"])
        columns = [of.class_ap(), of.class_ap(0), of.class_ap(5)]
        for name, *values in zip(of.names, *columns, strict=True):
            writer.writerow([name, *("" if np.isnan(x) else f"{x:.6g}" for x in values)])
    return [points, classes, picture]


def save_precision(of: Curves, folder: Path) -> tuple[Path, Path]:
    """Writes precision_recall.csv and precision_recall.png; returns their paths."""
    points, picture = folder / "precision_recall.csv", folder / "precision_recall.png"
    with points.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["recall", *(name for name, *_ in LINES)])
        columns = [of.recall, *(of.mean(threshold) for _, threshold, *_ in LINES)]
        writer.writerows([f"{x:.6g}" for x in row] for row in zip(*columns, strict=True))
    draw_curves(of).savefig(picture)
    return points, picture


def draw_curves(of: Curves) -> Figure:
    """On the left precision over recall, means over classes; on the right AP of each class, of
    many the best and the worst."""
    order = np.argsort(np.nan_to_num(of.class_ap(), nan=-1.0), kind="stable")
    order = order[of.present[order]]  # worst first, as bars are drawn from below
    left_out = len(order) - MOST_BARS
    if left_out > 0:
        order = np.concatenate([order[: MOST_BARS // 2], order[-MOST_BARS // 2 :]])
    height = max(4.2, 0.9 + 0.17 * len(order))
    figure = Figure(figsize=(10, height), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, threshold, colour, dashes in LINES:
        line = of.mean(threshold)
        label = f"{name}: AP {line.mean():.3f}"
        left.plot(of.recall, line, color=colour, linestyle=dashes, label=label)
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    left.set_title("precision over recall, mean over classes", fontsize=10)
    left.set_box_aspect(1)
    left.set_anchor("N")
    left.grid(alpha=0.3)
    left.legend(loc="lower left", fontsize=8)
    values = of.class_ap()[order]
    places = np.arange(len(order))
    right.barh(places, values, height=0.72, color=BAR)
    for place, value in zip(places, values, strict=True):
        beside = {"textcoords": "offset points", "va": "center", "fontsize": 7}
        right.annotate(f"{value:.3f}", (value, place), (3, 0), **beside)
    right.set_yticks(places, [shortened(of.names[k]) for k in order], fontsize=7)
    right.set(xlabel="AP", xlim=(0, max(0.1, 1.15 * values.max())), ylim=(-0.7, len(order) - 0.3))
    title = "AP of each class"
    if left_out > 0:
        title += f" ({left_out} in the middle left out)"
    right.set_title(title, fontsize=10)
    return figure


def shortened(name: str, most: int = 28) -> str:
    """A class's name in plain text, which matplotlib must not take for a formula."""
    cut = name if len(name) <= most else f"{name[: most - 1]}…"
    return cut.replace("$", r"\$")
