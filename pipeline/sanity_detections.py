"""What looks wrong with labels once a detector's boxes are laid beside them.

Two questions, both of a sample of training images. Do the detections agree with the labels as they
are read, or with the same numbers read in another way? Where the boxes agree, do the classes? A
detector that was trained before, on right labels, answers best, and before its first step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from pipeline.sanity import Finding

Array = NDArray[np.float64]
Reading = Callable[[Array, Array], Array]
"""(numbers [n, 4] as in the file, (width, height) [2] of the image) -> corners [n, 4]."""

FEWEST = 30  # labels, from which on shares mean something
OVERLAP = 0.5  # IoU at which two boxes agree
CONFIDENT = 0.3  # score
LARGE = 0.5  # share of an image above which a box agrees with too much to tell anything


@dataclass(frozen=True)
class Compared:
    """One image: n labels, m detections.

    size [2] (width, height) in pixels; label [n, 4] the numbers of bbox as in the annotation file;
    label_class [n] int64 and found_class [m] int64 columns; found [m, 4] corners (x0, y0, x1, y1)
    in pixels; score [m].
    """

    size: Array
    label: Array
    label_class: NDArray[np.int64]
    found: Array
    found_class: NDArray[np.int64]
    score: Array

    def at_least(self, score: float) -> "Compared":
        kept = self.score >= score
        return Compared(
            self.size, self.label, self.label_class,
            self.found[kept], self.found_class[kept], self.score[kept],
        )  # fmt: skip


def _xywh(box: Array, size: Array) -> Array:
    return np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1)


def _flipped_x(box: Array, size: Array) -> Array:
    x0, y0, x1, y1 = _xywh(box, size).T
    return np.stack([size[0] - x1, y0, size[0] - x0, y1], axis=1)


def _flipped_y(box: Array, size: Array) -> Array:
    x0, y0, x1, y1 = _xywh(box, size).T
    return np.stack([x0, size[1] - y1, x1, size[1] - y0], axis=1)


def _turned(box: Array, size: Array) -> Array:
    """Drawn on the picture turned by 90 degrees clockwise, (x', y') = (height - y, x)."""
    x0, y0, x1, y1 = _xywh(box, size).T
    return np.stack([y0, size[1] - x1, y1, size[1] - x0], axis=1)


def _turned_back(box: Array, size: Array) -> Array:
    """Drawn on the picture turned by 90 degrees anticlockwise, (x', y') = (y, width - x)."""
    x0, y0, x1, y1 = _xywh(box, size).T
    return np.stack([size[0] - y1, x0, size[0] - y0, x1], axis=1)


def _scaled(factor: float) -> Reading:
    return lambda box, size: _xywh(box * factor, size)


def _centred(box: Array, size: Array) -> Array:
    return np.concatenate([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], axis=1)


FACTORS = (1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 4 / 3, 3 / 2, 2.0, 3.0, 4.0)
READINGS: dict[str, Reading] = {
    "[x0, y0, x1, y1]": lambda box, size: box,
    "[centre x, centre y, width, height]": _centred,
    "[y, x, height, width]": lambda box, size: _xywh(box[:, [1, 0, 3, 2]], size),
    "[x, y, width, height] as fractions of the image": lambda box, size: _xywh(
        box * np.tile(size, 2), size
    ),
    "[centre x, centre y, width, height] as fractions of the image": lambda box, size: _centred(
        box * np.tile(size, 2), size
    ),
    "boxes of the picture mirrored left to right": _flipped_x,
    "boxes with y counted from below": _flipped_y,
    "boxes of the picture turned to the right": _turned,
    "boxes of the picture turned to the left": _turned_back,
    **{f"boxes of a picture {1 / f:.3g} times as large": _scaled(f) for f in FACTORS},
}


def check_detections(
    images: Sequence[Compared],
    names: Sequence[str],
    pretrained: bool = True,
    same_classes: bool = True,
) -> list[Finding]:
    """What looks wrong with the labels of `images`, judged by a detector. Nothing where there is
    too little to tell.

    names: of the columns. pretrained: it was trained on other data before, so that its boxes tell
    something while its scores are low. same_classes: its columns mean these classes.
    """
    labels = sum(len(image.label) for image in images)
    if labels < FEWEST:
        return []
    sure = [image.at_least(CONFIDENT) for image in images]
    confident = sum(len(image.found) for image in sure) >= labels / 2
    if not confident and not pretrained:
        return []
    seen = sure if confident else images
    agreeing = recall(seen, _xywh)
    if other := better_reading(seen, agreeing):
        return [other]
    if not confident or agreeing < 0.5 or not same_classes:
        return []
    return class_findings(confusion(seen, len(names)), names)


def check_training(
    images: Sequence[Compared],
    names: Sequence[str],
    losses: Sequence[float],
    step: int,
    pretrained: bool,
) -> list[Finding]:
    """`check_detections`, and what looks wrong with a fine-tuning after its first `step` steps.

    losses: those logged so far, oldest first.
    """
    findings = check_detections(images, names, pretrained)
    labels = sum(len(image.label) for image in images)
    # From scratch, nothing detected and a loss that hardly falls are usual at this time.
    if findings or labels < FEWEST or not pretrained:
        return findings
    best = max((float(image.score.max()) for image in images if len(image.score)), default=0.0)
    if best < 0.05:
        findings.append(
            Finding(
                "nothing is detected",
                f"after {step} steps no score of {len(images)} training images is above {best:.3f}",
                "look whether --init.weights was loaded, the learning rate (not far from 1e-4 for "
                "16 images), and the pictures with their boxes",
            )
        )
    third = len(losses) // 3
    if third and recall(images, _xywh) < 0.3:
        first, last = float(np.mean(losses[:third])), float(np.mean(losses[-third:]))
        if last >= 0.98 * first:
            findings.append(
                Finding(
                    "the loss does not fall",
                    f"it was {first:.2f} at first and is {last:.2f} after {step} steps",
                    "lower --optimizer.lr by ten; if that changes nothing, look at the labels",
                )
            )
    return findings


def recall(images: Sequence[Compared], reading: Reading) -> float:
    """Share of the labels, read so, that a detection of any class overlaps by an IoU of 0.5."""
    hit = total = 0
    for image in images:
        total += len(image.label)
        boxes = reading(image.label, image.size)
        boxes = np.clip(boxes, 0, np.tile(image.size, 2))
        telling = _area(boxes) <= LARGE * image.size.prod()
        if len(image.found) and len(boxes):
            hit += int((iou(boxes, image.found).max(1)[telling] >= OVERLAP).sum())
    return hit / total


def better_reading(images: Sequence[Compared], agreeing: float) -> Finding | None:
    """The reading with which the detections agree far better than with the labels as they are."""
    shares = {name: recall(images, reading) for name, reading in READINGS.items()}
    best = max(shares, key=lambda name: shares[name])
    if shares[best] < max(0.5, 2 * agreeing, agreeing + 0.3):
        return None
    return Finding(
        "boxes are in another format",
        f"detections overlap {agreeing:.0%} of the labels as they are read, [x, y, width, height] "
        f"in pixels, and {shares[best]:.0%} of the same numbers as {best}",
        "write them as [x, y, width, height] in pixels of the picture as it is stored",
    )


def confusion(images: Sequence[Compared], classes: int) -> NDArray[np.int64]:
    """[classes, classes] labels of class i that the detection over them, the best scored of those
    that overlap by an IoU of 0.5, calls j."""
    matrix = np.zeros((classes, classes), np.int64)
    for image in images:
        if not len(image.found) or not len(image.label):
            continue
        over = iou(_xywh(image.label, image.size), image.found) >= OVERLAP
        best = np.where(over, image.score, -1.0).argmax(1)
        for i in np.flatnonzero(over.any(1)):
            matrix[image.label_class[i], image.found_class[best[i]]] += 1
    return matrix


def class_findings(matrix: NDArray[np.int64], names: Sequence[str]) -> list[Finding]:
    """Of a confusion matrix of labels (rows) and detections (columns) at the same places."""
    total = int(matrix.sum())
    right = matrix.trace() / max(1, total)
    rows, columns = matrix.sum(1), matrix.sum(0)
    if total < FEWEST or right >= 0.5 or np.count_nonzero(rows) < 2:
        return []
    said = f"of {total} labels with a detection over them {right:.0%} have its class"
    if columns.max() >= 0.95 * total:
        name = names[int(columns.argmax())]
        return [
            Finding(
                "everything is detected as one class",
                f"{said}; {columns.max() / total:.0%} of the detections are {name!r}",
                "either the ids of all annotations are one, or that class dominates: look at the "
                "number of objects by class",
            )
        ]
    shifts = {k: np.trace(matrix, k) / total for k in range(1 - len(matrix), len(matrix)) if k}
    shift = max(shifts, key=lambda k: shifts[k])
    if shifts[shift] >= 0.5 and len(matrix) > 2:
        return [
            Finding(
                "class ids are shifted",
                f"{said}; {shifts[shift]:.0%} have the class {abs(shift)} "
                f"{'after' if shift > 0 else 'before'} it in the list of categories",
                "category_id counts from the ids in the list, which need not begin at 0 or 1: add "
                f"{shift:+d} places, or correct the list",
            )
        ]
    i, j = linear_sum_assignment(matrix, maximize=True)
    if (permuted := matrix[i, j].sum() / total) >= 0.7:
        pairs = [f"{names[a]!r} is {names[b]!r}" for a, b in zip(i, j, strict=True)
                 if a != b and matrix[a, b]]  # fmt: skip
        return [
            Finding(
                "classes are exchanged",
                f"{said}; {permuted:.0%} have it if {', '.join(pairs[:6])}",
                "put the names of the categories in the order that the ids were given in",
            )
        ]
    chance = float((rows / total) @ (columns / total))
    if right <= chance + 0.1:
        return [
            Finding(
                "classes are at chance",
                f"{said}, and {chance:.0%} would by chance",
                "boxes are right and classes are not: look whether category_id belongs to the "
                "boxes that it stands with",
            )
        ]
    return []


def iou(a: Array, b: Array) -> Array:
    """[n, m] intersection over union of corners [n, 4] and [m, 4]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    union = _area(a)[:, None] + _area(b)[None] - both
    shares: Array = both / np.maximum(union, 1e-9)
    return shares


def _area(box: Array) -> Array:
    area: Array = np.clip(box[:, 2:] - box[:, :2], 0, None).prod(1)
    return area
