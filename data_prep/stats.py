"""What is in a folder of shards: classes, sizes and shapes of objects and images."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.checks import annotation_problems
from data_prep.coco import category_ids
from data_prep.export import stored_records
from data_prep.manifest import read_manifest
from data_prep.storage import Location, folder_at

# COCO's object sizes: the `area` field against these, in square pixels.
SMALL, LARGE = 32**2, 96**2
ASPECTS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)  # edges of the classes of width / height
MOST_BARS = 40  # classes in the plot
BAR = 24  # characters


@dataclass
class Statistics:
    """Counts over all images. Objects are annotations without a fault that are no crowds.

    `areas`, `aspects` (width / height) and `relative` (square root of box area over image area)
    have one entry an object; `per_image` (objects), `widths` and `heights` one an image.
    """

    names: dict[int, str]
    objects: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    crowds: Counter[int] = field(default_factory=Counter)
    faulty: int = 0
    areas: list[float] = field(default_factory=list)
    aspects: list[float] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)
    per_image: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)


def collect(shards: Location) -> Statistics:
    """Read the records of every sample of a folder of shards; path or fsspec URL.

    Raises:
        ValueError: the folder is unusable or damaged.
    """
    folder = folder_at(shards)
    manifest = read_manifest(shards)
    ids = category_ids(manifest.categories, str(shards))
    # A lone surrogate is legal in JSON and cannot be printed.
    names = [c["name"].encode("utf-8", "replace").decode() for c in manifest.categories]
    stats = Statistics(dict(zip(ids, names, strict=True)))
    known = frozenset(ids)
    samples = manifest.samples
    for i, record in stored_records(folder, manifest, "stats"):
        width, height = samples["width"][i], samples["height"][i]
        seen = []
        for annotation in json.loads(record)["annotations"]:
            if any(annotation_problems(annotation, (width, height), known)):
                stats.faulty += 1
                continue
            category, (*_, box_width, box_height) = annotation["category_id"], annotation["bbox"]
            if annotation.get("iscrowd"):
                stats.crowds[category] += 1
                continue
            seen.append(category)
            area = annotation.get("area")
            box_area = box_width * box_height
            stats.areas.append(float(area if isinstance(area, int | float) else box_area))
            stats.aspects.append(box_width / box_height)
            stats.relative.append((box_area / (width * height)) ** 0.5)
        stats.objects.update(seen)
        stats.images.update(set(seen))
        stats.per_image.append(len(seen))
        stats.widths.append(width)
        stats.heights.append(height)
    return stats


def tables(stats: Statistics) -> str:
    """The statistics as plain-text tables."""
    total = len(stats.areas)
    most = max(stats.objects.values(), default=0)
    classes: list[tuple[object, ...]] = [
        ("class", "id", "objects", "share", "images", "crowds", _bar(0, 0))
    ]
    for number, name in sorted(stats.names.items(), key=lambda item: -stats.objects[item[0]]):
        count = stats.objects[number]
        classes.append(
            (
                name,
                number,
                count,
                _share(count, total),
                stats.images[number],
                stats.crowds[number],
                _bar(count, most),
            )
        )
    areas = np.array(stats.areas)
    small, large = int((areas < SMALL).sum()), int((areas >= LARGE).sum())
    sizes: list[tuple[object, ...]] = [("size (area)", "objects", "share", _bar(0, 0))]
    for name, count in (
        ("small  < 32x32", small),
        ("medium", total - small - large),
        ("large >= 96x96", large),
    ):
        sizes.append((name, count, _share(count, total), _bar(count, total)))
    edges = (0.0, *ASPECTS, np.inf)
    aspects: list[tuple[object, ...]] = [("width / height", "objects", "share", _bar(0, 0))]
    counts = np.histogram(np.array(stats.aspects), edges)[0]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        share, bar = _share(int(count), total), _bar(int(count), total)
        aspects.append((f"{low:g} to {high:g}", int(count), share, bar))
    images: list[tuple[object, ...]] = [("images", "least", "median", "mean", "most")]
    for name, values in (
        ("objects an image", stats.per_image),
        ("width", stats.widths),
        ("height", stats.heights),
    ):
        column = np.array(values)
        images.append(
            (name, column.min(), f"{np.median(column):g}", f"{column.mean():.1f}", column.max())
        )
    empty = sum(count == 0 for count in stats.per_image)
    footer = (
        f"{len(stats.per_image)} images, {empty} without objects; {total} objects, "
        f"{sum(stats.crowds.values())} crowds, {stats.faulty} faulty annotations (not counted)"
    )
    return "\n\n".join([*(_table(rows) for rows in (classes, sizes, aspects, images)), footer])


def save_plots(stats: Statistics, folder: Path) -> list[Path]:
    """Write classes.png, sizes.png and images.png into `folder`; returns their paths."""
    from matplotlib.figure import Figure  # takes half a second, and only plots need it
    from matplotlib.ticker import MaxNLocator

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("classes.png", "sizes.png", "images.png")]

    ranked = sorted(stats.names, key=lambda number: -stats.objects[number])[:MOST_BARS]
    figure = Figure(figsize=(max(5.0, 0.3 * len(ranked) + 2), 4), layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(ranked))
    axes.bar(positions - 0.2, [stats.objects[n] for n in ranked], 0.4, label="objects")
    axes.bar(positions + 0.2, [stats.images[n] for n in ranked], 0.4, label="images")
    # A dollar sign would start a formula.
    labels = [stats.names[n].replace("$", r"\$")[:30] for n in ranked]
    axes.set_xticks(positions, labels, rotation=90 if len(ranked) > 8 else 0)
    axes.set_ylabel("count")
    if len(ranked) < len(stats.names):
        axes.set_title(f"the {len(ranked)} most frequent of {len(stats.names)} classes")
    axes.margins(y=0.2)
    axes.legend()
    figure.savefig(paths[0], dpi=120)

    figure = Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.hist(np.sqrt(np.maximum(stats.areas, 0)), bins=50)
    for edge in (SMALL, LARGE):
        left.axvline(edge**0.5, color="black", linestyle="--", linewidth=1)
    left.set(xlabel="square root of area (pixels); dashed: COCO's sizes", ylabel="objects")
    middle.hist(stats.relative, bins=50)
    middle.set(xlabel="square root of box area / image area", ylabel="objects")
    right.hist(np.log2(np.clip(stats.aspects, 2**-6, 2**6)), bins=50)
    right.set(xlabel="log2 of box width / height, within -6..6", ylabel="objects")
    figure.savefig(paths[1], dpi=120)

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(stats.per_image, bins=np.arange(max(stats.per_image) + 2) - 0.5)
    left.set(xlabel="objects an image", ylabel="images")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.plot(stats.widths, stats.heights, ".", alpha=0.3)
    right.set(xlabel="image width (pixels)", ylabel="image height (pixels)")
    figure.savefig(paths[2], dpi=120)
    return paths


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f}%" if total else "-"


def _bar(count: int, full: int) -> str:
    """A bar of a histogram, always of the same width; full at `full`."""
    return ("#" * round(BAR * count / full) if full else "").ljust(BAR)


def _table(rows: Iterable[tuple[object, ...]]) -> str:
    """Rows of cells as aligned text: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    )
