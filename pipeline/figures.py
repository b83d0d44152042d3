"""Figures 5 and 6 of the paper, drawn for the objects of one image.

All that is drawn lies in fractions of the image's width and height. H x W pixels of the image as
the model saw it, P sampling points (of all heads and levels together).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pipeline.detected import Detected
from pipeline.pixel_gradients import ITEMS

Array = NDArray[np.float32]
Picture = NDArray[np.uint8]

GREEN = "#39ff14"
GRADIENTS, WEIGHTS = "inferno", "turbo"  # colour maps
DPI = 160
GAP, MARGIN, BAR = 0.08, 0.3, 0.85  # inches; MARGIN at the top and the left, BAR at the right


@dataclass(frozen=True)
class Points:
    """What one query samples."""

    reference: Array
    """(x, y), the centre of a reference box."""
    points: Array
    """[P, 2] (x, y)."""
    weights: Array
    """[P], of sum 1 for each head."""

    def outside(self) -> float:
        """The share of the attention that lies outside the image, where values count as zero."""
        outside = ((self.points < 0) | (self.points > 1)).any(axis=-1)
        return float(self.weights[outside].sum() / self.weights.sum())


def draw_pixel_gradients(
    image: Picture, objects: Sequence[Detected], names: Sequence[str], norms: Array
) -> Figure:
    """Figure 5, a row for each object: the image, then how much each item depends on each pixel.

    image [H, W, 3]; names: of the objects' classes; norms [objects, 5, H, W]. Each panel has a
    scale of its own, which ends where one pixel in 500 is brighter.
    """
    figure, axes, bar = _panels(image, len(objects), 1 + len(ITEMS), side=2.0)
    for row, found, name, of_object in zip(axes, objects, names, norms, strict=True):
        _show(row[0], image)
        _mark_box(row[0], found, name)
        for axis, norm in zip(row[1:], of_object, strict=True):
            _show(axis, norm / max(float(np.quantile(norm, 0.998)), 1e-30), GRADIENTS)
            _mark_box(axis, found)
    for axis, item in zip(axes[0, 1:], ITEMS, strict=True):
        axis.set_title(rf"$\|\partial {item}\,/\,\partial I\|$", fontsize=12)
    figure.colorbar(ScalarMappable(Normalize(0, 1), GRADIENTS), cax=bar)
    bar.set_yticks([0, 1], labels=["0", "max"], fontsize=8)
    bar.set_ylabel("gradient norm", fontsize=9, labelpad=-10)
    return figure


def draw_sampling_points(
    image: Picture,
    objects: Sequence[Detected],
    names: Sequence[str],
    encoder: Sequence[Points],
    decoder: Sequence[Points],
) -> Figure:
    """Figure 6, a column for each object: (a) what a token of the encoder samples, (b) what the
    object's query samples in the decoder. image [H, W, 3]; names: of the objects' classes. One of
    encoder and decoder may be empty, which leaves out its row.

    Points outside the image, where there is nothing to sample, are left out.
    """
    both = {"(a) encoder": encoder, "(b) decoder": decoder}
    rows = {title: sampled for title, sampled in both.items() if sampled}
    figure, axes, bar = _panels(image, len(rows), len(objects), side=3.0)
    scale = Normalize(0, max(float(points.weights.max()) for points in (*encoder, *decoder)))
    faded = _faded(image)
    for axis, found, name in zip(axes[-1], objects, names, strict=True):
        _mark_box(axis, found, name)
    for row, (title, sampled) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(title, fontsize=11)
        for axis, points in zip(row, sampled, strict=True):
            _show(axis, faded)
            _mark_points(axis, points, scale)
    figure.colorbar(ScalarMappable(scale, WEIGHTS), cax=bar)
    bar.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    bar.tick_params(labelsize=8)
    bar.set_ylabel("attention weight\n(sum 1 in each head)", fontsize=9)
    return figure


def _panels(
    image: Picture, rows: int, columns: int, side: float
) -> tuple[Figure, NDArray[np.object_], Axes]:
    """Axes [rows, columns] for pictures whose longer side is `side` inches, and one on their right
    for a colour bar."""
    pixels = image.shape[:2]
    height, width = (side * n / max(pixels) for n in pixels)
    right, top = MARGIN + columns * (width + GAP), GAP + rows * (height + GAP)
    whole = (right + BAR, top + MARGIN)
    figure = Figure(figsize=whole, dpi=DPI)

    def axes_at(x: float, y: float, wide: float, high: float) -> Axes:
        return figure.add_axes((x / whole[0], y / whole[1], wide / whole[0], high / whole[1]))

    axes = np.empty((rows, columns), dtype=object)
    for row, column in np.ndindex(rows, columns):
        x, y = MARGIN + column * (width + GAP), top - (row + 1) * (height + GAP)
        axes[row, column] = axes_at(x, y + GAP, width, height)
    return figure, axes, axes_at(right, top / 2 - 0.4 * top, 0.14, 0.8 * top)


def _show(axis: Axes, image: Array | Picture, cmap: str | None = None) -> None:
    height, width = image.shape[:2]
    axis.imshow(image, extent=(0, 1, 1, 0), aspect=height / width, cmap=cmap, vmin=0, vmax=1)
    axis.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _faded(image: Picture) -> Picture:
    """Half in grey and darker, for coloured points to stand out."""
    pixels = image.astype(np.float32)
    grey = pixels.mean(axis=-1, keepdims=True)
    return ((0.5 * pixels + 0.5 * grey) * 0.75).astype(np.uint8)


def _mark_box(axis: Axes, found: Detected, name: str = "") -> None:
    """The box; with a name also that and the score, just above it or, at the image's upper edge,
    just inside."""
    x0, y0, x1, y1 = found.box
    line = 1.6 if name else 0.7
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=GREEN, lw=line))
    if not name:
        return
    inside, leftwards = y0 < 0.08, x0 > 0.6
    axis.annotate(
        f"{name} {found.score:.2f}",
        (min(x1, 1) if leftwards else max(x0, 0), max(y0, 0)),
        (0, -1 if inside else 1),
        textcoords="offset points",
        annotation_clip=False,  # rounding may put the edge outside
        ha="right" if leftwards else "left",
        va="top" if inside else "bottom",
        fontsize=8,
        color="black",
        bbox={"boxstyle": "square,pad=0.15", "facecolor": GREEN, "edgecolor": "none"},
    )


def _mark_points(axis: Axes, points: Points, scale: Normalize) -> None:
    order = np.argsort(points.weights)  # the heaviest on top
    x, y = points.points[order].T
    weights = points.weights[order]
    axis.scatter(
        x, y, s=7 + 33 * scale(weights), c=weights, norm=scale, cmap=WEIGHTS,
        edgecolors="black", linewidths=0.3, clip_on=True,
    )  # fmt: skip
    for colour, size, width in (("black", 11, 3.4), (GREEN, 10, 1.8)):
        axis.plot(*points.reference, "+", color=colour, markersize=size, markeredgewidth=width)
    if points.outside() >= 0.005:
        axis.text(
            0.98, 0.98, f"{points.outside():.0%} outside", fontsize=7, color="white",
            ha="right", va="bottom", zorder=5,
        )  # fmt: skip
