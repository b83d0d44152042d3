"""What looks wrong with labels by themselves, before anything is trained.

It is looked at as a whole: one odd box is the conversion's to report, here it is what most of the
boxes have in common. Where nothing is wrong nothing is said.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import AugmentConfig, RunConfig
from pipeline.data.objects import objects
from pipeline.data.shards import ShardSet
from pipeline.sanity import Finding

SLACK = 1.0  # pixels that a box may leave its image by, of rounding
FEWEST = 5  # boxes from which on something is said of what most of them have in common
NEARLY_ALL = 0.99
MOST_EVALUATED = 100  # detections of an image that COCO's AP counts
WRONG_SIZE = "size mismatch: "  # how the conversion's reason begins
SHOWN = 3  # of the images left out
TINY = 8.0  # pixels: the stride of the finest feature map


@dataclass(frozen=True)
class Boxes:
    """The boxes of objects that are no crowds, n of them, in images whose size is recorded.

    box [n, 4] as written in the file; size [n, 2] (width, height) of their images.
    """

    box: NDArray[np.float64]
    size: NDArray[np.float64]

    def inside(self, corners: NDArray[np.float64], size: NDArray[np.float64]) -> float:
        """Share of `corners` [n, 4] (x0, y0, x1, y1) that are boxes within `size` [n, 2]."""
        proper = (corners[:, 2:] > corners[:, :2]).all(1)
        within = (corners[:, :2] >= -SLACK).all(1) & (corners[:, 2:] <= size + SLACK).all(1)
        return float((proper & within).mean())

    def as_written(self) -> float:
        return self.inside(_as_xywh(self.box), self.size)


def _as_xywh(box: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1)


def _as_cxcywh(box: NDArray[np.float64]) -> NDArray[np.float64]:
    half = box[:, 2:] / 2
    return np.concatenate([box[:, :2] - half, box[:, :2] + half], axis=1)


def check_labels(train: dict[str, Any], val: dict[str, Any], config: RunConfig) -> list[Finding]:
    """What looks wrong with two annotation files in COCO's format, as parsed.

    config: of the training, for its image sizes and number of queries.
    """
    return [
        *box_findings(_boxes_of(train, val), config.augment),
        *class_findings(train, val),
        *object_findings([train, val], config),
    ]


def _boxes_of(*parts: dict[str, Any]) -> Boxes:
    rows: list[list[float]] = []
    for part in parts:
        sizes = {i["id"]: (i.get("width"), i.get("height")) for i in part["images"]}
        for a in _objects(part):
            width, height = sizes.get(a.get("image_id"), (None, None))
            if _positive(width) and _positive(height) and not a.get("iscrowd"):
                rows.append([*map(float, a["bbox"]), float(width), float(height)])
    columns = np.array(rows).reshape(-1, 6)
    return Boxes(columns[:, :4], columns[:, 4:])


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _objects(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Annotations with a box, whether their category is known or not."""
    annotations = part.get("annotations") or []
    ids = {a.get("category_id") for a in annotations if type(a.get("category_id")) is int}
    return objects((a for a in annotations if type(a.get("category_id")) is int), ids)


def box_findings(boxes: Boxes, augment: AugmentConfig) -> Iterator[Finding]:
    """Of how boxes are written: the first reading that explains them is said, alone."""
    n = len(boxes.box)
    if n < FEWEST:
        return
    largest = np.abs(boxes.box).max(1)
    if (fractions := float((largest <= 1).mean())) >= 0.95:
        yield Finding(
            "boxes are fractions of the image",
            f"{fractions:.0%} of {n} boxes have no number above 1, such as "
            f"{_text(boxes.box[0])} in an image of {_pixels(boxes.size[0])}",
            "COCO's boxes are pixels: multiply x and width by the image's width, y and height "
            "by its height",
            surely_wrong=True,
        )
        return
    if (out := 1 - boxes.as_written()) >= 0.02:
        example = _text(boxes.box[_first_outside(boxes)])
        size = _pixels(boxes.size[_first_outside(boxes)])
        seen = f"{out:.0%} of {n} boxes are none or leave their image when read as [x, y, width, "
        seen += f"height], such as {example} in {size}"
        turned = boxes.size[:, ::-1]
        if boxes.inside(boxes.box, boxes.size) >= NEARLY_ALL:
            yield Finding(
                "boxes are corners",
                f"{seen}; all fit as [x0, y0, x1, y1]",
                "subtract x0 and y0 from the last two numbers",
                surely_wrong=True,
            )
        elif boxes.inside(_as_cxcywh(boxes.box), boxes.size) >= NEARLY_ALL:
            yield Finding(
                "boxes are centres",
                f"{seen}; all fit as [centre x, centre y, width, height]",
                "subtract half of width and height from the first two numbers",
                surely_wrong=True,
            )
        elif boxes.inside(_as_xywh(boxes.box), turned) >= NEARLY_ALL:
            yield Finding(
                "x and y are swapped",
                f"{seen}; all fit where width and height of the image are exchanged",
                "either the boxes are [y, x, height, width], or they are drawn on pictures as EXIF "
                "turns them: then turn the files (exiftran -ai, or jpegtran) and exchange width "
                "and height of those images in the list; the boxes can stay as they are",
                surely_wrong=True,
            )
        else:
            yield Finding(
                "boxes leave their images",
                seen,
                "labels and pictures may be of different sizes or of different pictures",
            )
        return
    area = boxes.box[:, 2] * boxes.box[:, 3]
    whole = float((area >= 0.9 * boxes.size.prod(1)).mean())
    if whole >= 0.9:
        yield Finding(
            "boxes are whole images",
            f"{whole:.0%} of {n} boxes cover nine tenths of their image or more",
            "labels of whole pictures teach no detector: draw boxes around the objects",
        )
    scale = training_scale(boxes.size, augment)
    side = float(np.median(np.sqrt(area) * scale))
    if side < TINY:
        yield Finding(
            "objects are tiny",
            f"half of {n} boxes are below {side:.1f} pixels a side (square root of the area) "
            f"once the images are resized, by {np.median(scale):.2f} in the middle",
            f"cut the pictures into tiles, or raise --augment.val-short-side and "
            f"--augment.short-sides; boxes below {TINY:g} pixels are hardly found",
        )


def training_scale(size: NDArray[np.float64], augment: AugmentConfig) -> NDArray[np.float64]:
    """[n] factor of the resize of evaluation, which is the largest common one of training, too."""
    if not augment.val_short_side:
        return np.ones(len(size))
    by_short = augment.val_short_side / size.min(1)
    return np.minimum(by_short, augment.max_side / size.max(1))


def _first_outside(boxes: Boxes) -> int:
    corners = _as_xywh(boxes.box)
    out = (corners[:, 2:] > boxes.size + SLACK).any(1) | (corners[:, :2] < -SLACK).any(1)
    out |= (boxes.box[:, 2:] <= 0).any(1)
    return int(out.argmax())


def _text(box: NDArray[np.float64]) -> str:
    return f"[{', '.join(f'{v:.4g}' for v in box)}]"


def _pixels(size: NDArray[np.float64]) -> str:
    return f"{size[0]:g}x{size[1]:g}"


def class_findings(train: dict[str, Any], val: dict[str, Any]) -> Iterator[Finding]:
    """Of category ids: in annotations, in the list of categories, in both parts."""
    names = {c["id"]: str(c["name"]) for c in train["categories"]}
    parts = {"train": train, "val": val}
    used = [a.get("category_id") for part in parts.values() for a in part.get("annotations") or []]
    unknown = Counter(repr(c) for c in used if type(c) is not int or c not in names)
    if unknown:
        yield _unknown_ids(unknown, used, names)
    count = {
        part: Counter(
            a["category_id"]
            for a in _objects(content)
            if a["category_id"] in names and not a.get("iscrowd")
        )
        for part, content in parts.items()
    }
    if without := [names[c] for c in names if not count["train"][c] and not count["val"][c]]:
        yield Finding(
            "categories without objects",
            f"{len(without)} of {len(names)} categories have none in train or val: "
            f"{_listed(without)}",
            "harmless where that is known (some exports list a group as category 0); else the "
            "ids of the annotations are not those of the list",
        )
    for here, there in (("train", "val"), ("val", "train")):
        if only := [names[c] for c in names if count[here][c] and not count[there][c]]:
            means = "their AP is not measured" if there == "val" else "they are never learned"
            yield Finding(
                f"classes missing in {there}",
                f"{len(only)} of {len(names)} have objects in {here} alone: {_listed(only)}",
                f"{means}; label more images, or split anew",
            )
    total = count["train"]
    if len(+total) >= 2 and (share := max(total.values()) / total.total()) >= 0.9:
        most = max(total, key=lambda c: total[c])
        rest = sorted((n, names[c]) for c, n in (+total).items() if c != most)
        yield Finding(
            "one class dominates",
            f"{share:.0%} of {total.total()} objects of train are {names[most]!r}; the rarest is "
            f"{rest[0][1]!r} with {rest[0][0]}",
            "look at AP by class, and label more of the rare ones; AP is the mean over classes",
        )


def _unknown_ids(unknown: Counter[str], used: list[Any], names: dict[int, str]) -> Finding:
    evidence = (
        f"{unknown.total()} of {len(used)} annotations have a category_id that the list of "
        f"categories ({_listed([str(c) for c in sorted(names)])}) lacks: "
        f"{_listed([c for c, _ in unknown.most_common()])}"
    )
    numbers = {c for c in used if type(c) is int}
    shift = [k for k in (1, -1) if {c + k for c in numbers} <= set(names)]
    if numbers and shift and all(type(c) is int for c in used):
        return Finding(
            "category ids are off by one",
            f"{evidence}; with {shift[0]:+d} all are in it",
            f"add {shift[0]:+d} to category_id of every annotation",
        )
    return Finding(
        "category ids without category",
        evidence,
        "such annotations are left out; add the categories or correct the ids",
    )


def object_findings(parts: Iterable[dict[str, Any]], config: RunConfig) -> Iterator[Finding]:
    """Of numbers of objects: crowds, repetitions, images with very many."""
    every, crowds, copies = 0, 0, 0
    per_image: Counter[tuple[int, Any]] = Counter()
    for number, part in enumerate(parts):
        seen = set()
        for a in _objects(part):
            every += 1
            crowds += bool(a.get("iscrowd"))
            per_image[number, a.get("image_id")] += not a.get("iscrowd")
            key = (a.get("image_id"), a["category_id"], tuple(a["bbox"]))
            copies += key in seen
            seen.add(key)
    if every and crowds / every >= 0.9:
        yield Finding(
            "everything is a crowd",
            f"{crowds} of {every} annotations have iscrowd 1",
            "crowds are neither trained nor counted: write iscrowd 0 for single objects",
        )
    if copies >= FEWEST and copies / every > 0.01:
        yield Finding(
            "annotations are repeated",
            f"{copies} of {every} have image, category and box of another one",
            "remove the copies: they count as objects that cannot be found twice",
        )
    limit = MOST_EVALUATED
    if config.model.architecture != "faster_rcnn":
        limit = min(limit, config.model.num_queries)
    most = max(per_image.values(), default=0)
    if most > limit:
        many = sum(n > limit for n in per_image.values())
        yield Finding(
            "more objects than can be found",
            f"{many} images have more than {limit}, the most {most}; the model has "
            f"{config.model.num_queries} queries, and COCO's AP counts the best {MOST_EVALUATED}",
            "cut such pictures into tiles",
        )


def left_out(quarantined: Iterable[dict[str, Any]], images: int, part: str) -> Iterator[Finding]:
    """Of images that the conversion left out. quarantined: of its manifest; images: those given;
    part: "train" or "val"."""
    reasons = [str(row["reason"]) for row in quarantined]
    sizes = [r.removeprefix(WRONG_SIZE) for r in reasons if r.startswith(WRONG_SIZE)]
    if sizes:
        turned = sum("turned" in detail for detail in sizes)
        remedy = "they are left out: boxes drawn on other pixels are wrong boxes"
        if turned:
            remedy += (
                "; turned ones are mostly photos with an EXIF rotation: turn the files (exiftran "
                "-ai, or jpegtran), the labels can stay as they are"
            )
        yield Finding(
            "image sizes are wrong",
            f"{len(sizes)} of {images} {part} images have another size than the annotation file "
            f"says, {turned} of them width and height exchanged: "
            f"{_listed([detail.split('; ')[0] for detail in sizes], SHOWN)}",
            remedy,
        )
    if others := [reason for reason in reasons if not reason.startswith(WRONG_SIZE)]:
        count = Counter(reason.split(": ")[0] for reason in others)
        yield Finding(
            "images are left out",
            f"{len(others)} of {images} {part} images are not trained on or evaluated ("
            f"{', '.join(f'{n} {kind}' for kind, n in count.most_common())}): "
            f"{_listed(others, SHOWN)}",
            "mend these files or their records, or take them out of the list",
        )


def shared_images(train: ShardSet, val: ShardSet) -> Iterator[Finding]:
    """Pictures, byte for byte, that are in both. Reads all of both."""
    digests = [
        {_digest(shards, i): int(shards.image_id[i]) for i in range(len(shards))}
        for shards in (train, val)
    ]
    if both := digests[0].keys() & digests[1].keys():
        pairs = [f"{digests[0][d]} and {digests[1][d]}" for d in sorted(both)]
        yield Finding(
            "images are in train and val",
            f"{len(both)} of {len(val)} val images are in train, too, byte for byte; image ids "
            f"{_listed(pairs)}",
            "AP is then too good to be true: remove them from one of the two",
        )


def _digest(shards: ShardSet, index: int) -> bytes:
    return hashlib.sha256(shards.read(index).image_bytes).digest()


def _listed(values: list[str], most: int = 5) -> str:
    return ", ".join(values[:most]) + (f" and {len(values) - most} more" if values[most:] else "")
