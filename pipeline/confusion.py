"""Which classes are taken for which: objects and detections of one score and above, counted.

K categories; row and column K are the background: objects that are missed, detections of nothing.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.curves import shortened
from pipeline.error_analysis import FOREGROUND
from pipeline.image_boxes import Floats, ImageBoxes, Ints

MOST_DRAWN = 30  # classes in the picture


@dataclass(frozen=True)
class Confusion:
    """counts [K + 1, K + 1]: rows objects, columns detections. names [K]."""

    counts: Ints
    names: tuple[str, ...]

    def precision(self) -> Floats:
        """[K]; NaN for a class without detections."""
        return _share(self.right, self.counts[:, :-1].sum(axis=0))

    def recall(self) -> Floats:
        """[K]; NaN for a class without objects."""
        return _share(self.right, self.counts[:-1].sum(axis=1))

    @property
    def right(self) -> Ints:
        return self.counts.diagonal()[:-1]


def confusion(
    images: list[ImageBoxes], categories: tuple[int, ...], names: tuple[str, ...]
) -> Confusion:
    """Detections and objects are joined one to one where their IoU is 0.5 or more, the best
    detection first, each to the free object that it overlaps most: within each class to begin with,
    so that the diagonal is what COCO calls right, then what is left over, across classes. A
    detection that is left over inside a crowd of its class is not counted."""
    row = {category: k for k, category in enumerate(categories)}
    counts = np.zeros((len(categories) + 1, len(categories) + 1), dtype=np.int64)
    for image in images:
        predicted = [row[c] for c in image.classes.tolist()] + [len(categories)]
        actual = [row[c] for c in image.object_classes.tolist()] + [len(categories)]
        joined = join(image)
        excused = image.inside_crowd() >= FOREGROUND
        for d, g in enumerate(joined.tolist()):
            if g >= 0 or not excused[d]:
                counts[actual[g], predicted[d]] += 1  # -1 is the background's
        for g in set(range(len(image.object_classes))) - set(joined.tolist()):
            counts[actual[g], -1] += 1
    return Confusion(counts, names)


def join(image: ImageBoxes) -> NDArray[np.int64]:
    """[D]: the object that each detection is joined to, or -1."""
    joined = np.full(len(image.boxes), -1)
    overlaps = image.overlaps()
    same = image.classes[:, None] == image.object_classes
    for allowed in (overlaps * same, overlaps * ~same):
        allowed[:, joined[joined >= 0]] = 0.0
        for d in np.flatnonzero((joined < 0) & (allowed >= FOREGROUND).any(axis=1)):
            g = int(allowed[d].argmax())
            if allowed[d, g] >= FOREGROUND:
                joined[d] = g
                allowed[:, g] = 0.0
    return joined


def _share(part: Ints, whole: Ints) -> Floats:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def save_confusion(of: Confusion, folder: Path) -> tuple[Path, Path]:
    """Writes confusion.csv, all counts, and confusion.png; returns their paths."""
    table, picture = folder / "confusion.csv", folder / "confusion.png"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["object \\ detection", *of.names, "(missed)"])
        for name, counts in zip([*of.names, "(background)"], of.counts.tolist(), strict=True):
            writer.writerow([name, *counts])
    draw_confusion(of).savefig(picture)
    return table, picture


def draw_confusion(of: Confusion) -> Figure:
    """Shares of each class's objects, the last row of all detections of nothing; of many classes
    those that are confused most."""
    chosen = _most_confused(of.counts)
    places = [*chosen, len(of.names)]
    counts = of.counts[np.ix_(places, places)]
    # Shares are of the whole row, of classes too that are not drawn.
    shares = counts / np.maximum(of.counts.sum(axis=1)[places], 1)[:, None]
    side = max(4.0, 1.8 + 0.3 * len(places))
    figure = Figure(figsize=(side + 0.6, side), dpi=120, layout="constrained")
    axis = figure.subplots()
    # By the root: what is rare, which is what one looks for, would be white otherwise.
    shown = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    names = [shortened(of.names[k], 20) for k in chosen]
    axis.set_xticks(range(len(places)), [*names, "(missed)"], rotation=90, fontsize=8)
    axis.set_yticks(range(len(places)), [*names, "(background)"], fontsize=8)
    axis.set(xlabel="detections", ylabel="objects")
    for (i, j), count in np.ndenumerate(counts):
        if count:
            ink = "white" if shares[i, j] > 0.3 else "black"
            axis.text(j, i, str(count), ha="center", va="center", fontsize=7, color=ink)
    if len(chosen) < len(of.names):
        axis.set_title(f"the {len(chosen)} most confused of {len(of.names)} classes", fontsize=9)
    figure.colorbar(
        shown, ax=axis, shrink=0.7, label="share of the row", ticks=[0, 0.05, 0.25, 0.5, 1]
    )
    return figure


def _most_confused(counts: Ints) -> list[int]:
    """The classes drawn, in their order: those most often taken for another, or another for
    them."""
    between = counts[:-1, :-1].copy()
    np.fill_diagonal(between, 0)
    order = np.argsort(-(between.sum(axis=0) + between.sum(axis=1)), kind="stable")
    return sorted(order[:MOST_DRAWN].tolist())
