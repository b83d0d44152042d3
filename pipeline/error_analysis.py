"""What keeps a detector's AP down: TIDE (Bolya et al., ECCV 2020, arXiv:2008.08115).

Every false detection is of one of five kinds, every object that nothing came near is missed; what a
kind costs is the AP50 that is won where all errors of it are mended and the others stay (dAP).
D detections, G objects.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.image_boxes import Floats, ImageBoxes, Ints

Bools = NDArray[np.bool_]

FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU
KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND_ERROR, MISSED = range(6)
RIGHT = -1


@dataclass(frozen=True)
class Verdicts:
    """What TIDE calls the detections and objects of one image.

    kind [D]: RIGHT, or an index of KINDS. ignored [D]: inside a crowd and not matched, which costs
    nothing. of [D]: the object that a right detection found, or that an error of class or place
    was about; else -1. mends [D]: the best such error about an object that is not found, which
    would find it. found [G], missed [G]: not found, and no error would have found it.
    """

    kind: Ints
    ignored: Bools
    of: Ints
    mends: Bools
    found: Bools
    missed: Bools


@dataclass(frozen=True)
class Errors:
    """ap: AP50 as TIDE has it, in [0, 1], like all the d_ap. d_ap, counts: by name of KINDS.
    false_positives, false_negatives: dAP where no detection were wrong, no object missed.
    class_counts [K, 6]: of each kind, by the detection's class or the missed object's."""

    ap: float
    d_ap: dict[str, float]
    counts: dict[str, int]
    false_positives: float
    false_negatives: float
    categories: tuple[int, ...]
    class_counts: Ints


def judge(image: ImageBoxes) -> Verdicts:
    """The rules are those of the authors' package tidecv, ties included."""
    detections, objects = len(image.boxes), len(image.object_boxes)
    overlaps = image.overlaps()
    same = image.classes[:, None] == image.object_classes
    of_class, of_others = overlaps * same, overlaps * ~same

    of = _matched(of_class)
    right = of >= 0
    found = np.zeros(objects, dtype=bool)
    found[of[right]] = True
    ignored = ~right & (image.inside_crowd() > FOREGROUND)

    kind = np.full(detections, BACKGROUND_ERROR)
    if objects:
        nearest, other = of_class.argmax(axis=1), of_others.argmax(axis=1)
        nearest_iou = of_class.max(axis=1)
        # From the last test to the first, which has the last word.
        kind[overlaps.max(axis=1) > BACKGROUND] = BOTH
        kind[(of_class * found).max(axis=1) >= FOREGROUND] = DUPLICATE
        wrong_class = of_others.max(axis=1) >= FOREGROUND
        kind[wrong_class] = CLASSIFICATION
        misplaced = (nearest_iou >= BACKGROUND) & (nearest_iou <= FOREGROUND)
        kind[misplaced] = LOCALISATION
        of = np.where(right, of, np.where(misplaced, nearest, np.where(wrong_class, other, -1)))
    kind[right] = RIGHT

    mends = np.zeros(detections, dtype=bool)
    near = np.zeros(objects, dtype=bool)
    for d in np.flatnonzero(~right & (of >= 0)):  # best first
        mends[d] = not found[of[d]] and not near[of[d]]
        near[of[d]] = True
    return Verdicts(kind, ignored, of, mends, found, ~found & ~near)


def _matched(overlaps: Floats) -> Ints:
    """[D]: the object that each detection finds, best detection first; -1 for none. overlaps
    [D, G], 0 for other classes."""
    of = np.full(len(overlaps), -1)
    free = overlaps.copy()
    for d in np.flatnonzero((overlaps >= FOREGROUND).any(axis=1)):
        g = free[d].argmax()
        if free[d, g] >= FOREGROUND:
            of[d] = g
            free[:, g] = 0.0
    return of


def analyse(images: list[ImageBoxes]) -> Errors:
    """Raises ValueError where no image has an object."""
    if not any(len(image.object_boxes) for image in images):
        raise ValueError("images: got none with an object, expected at least one")
    verdicts = [judge(image) for image in images]
    classes = np.concatenate([image.classes for image in images])
    scores = np.concatenate([image.scores for image in images])
    object_classes = np.concatenate([image.object_classes for image in images])
    kind = np.concatenate([v.kind for v in verdicts])
    counted = ~np.concatenate([v.ignored for v in verdicts])
    mends = np.concatenate([v.mends for v in verdicts])
    found = np.concatenate([v.found for v in verdicts])
    missed = np.concatenate([v.missed for v in verdicts])
    mended_class = np.concatenate(
        [_mended_class(image, v) for image, v in zip(images, verdicts, strict=True)]
    )
    right = kind == RIGHT
    # Of equal scores errors come first, as tidecv has them where it mends.
    order = np.concatenate([np.flatnonzero(~right), np.flatnonzero(right)])

    ap = mean_ap(classes[counted], scores[counted], right[counted], object_classes)
    d_ap = {}
    for i, name in enumerate(KINDS):
        errors = kind == i
        kept = np.where(errors, mends, counted)[order]
        now = np.where(errors & mends, mended_class, classes)[order][kept]
        correct = (right | (errors & mends))[order][kept]
        objects = object_classes[~missed] if i == MISSED else object_classes
        d_ap[name] = max(mean_ap(now, scores[order][kept], correct, objects) - ap, 0.0)
    # False detections last; and objects that are not found no longer asked for.
    kept = counted[order]
    points = classes[order][kept], right[order][kept]
    last = mean_ap(points[0], points[1].astype(np.float64), points[1], object_classes)
    only_found = mean_ap(points[0], scores[order][kept], points[1], object_classes[found])

    categories = np.unique(np.concatenate([classes, object_classes]))
    class_counts = np.stack(
        [_counts(classes[kind == i], categories) for i in range(MISSED)]
        + [_counts(object_classes[missed], categories)],
        axis=1,
    )
    return Errors(
        ap=ap,
        d_ap=d_ap,
        counts=dict(zip(KINDS, class_counts.sum(axis=0).tolist(), strict=True)),
        false_positives=last - ap,
        false_negatives=only_found - ap,
        categories=tuple(categories.tolist()),
        class_counts=class_counts,
    )


def _mended_class(image: ImageBoxes, verdicts: Verdicts) -> Ints:
    """[D]: the class of the object that a detection was about, its own where of none."""
    if not len(image.object_classes):
        return image.classes
    return np.where(verdicts.of >= 0, image.object_classes[verdicts.of], image.classes)


def _counts(classes: Ints, categories: Ints) -> Ints:
    return np.bincount(np.searchsorted(categories, classes), minlength=len(categories))


def mean_ap(classes: Ints, scores: Floats, right: Bools, object_classes: Ints) -> float:
    """AP, interpolated at 101 recalls, as a mean over the classes with a detection or an object; a
    class without objects has 0, which COCO leaves out. Detections [D], objects [G].

    Without either there is nothing left to be wrong about: 1.
    """
    present = np.unique(np.concatenate([classes, object_classes]))
    if not len(present):
        return 1.0
    total = 0.0
    for category in present:
        mine = classes == category
        order = np.argsort(-scores[mine], kind="stable")
        total += average_precision(right[mine][order], int((object_classes == category).sum()))
    return total / len(present)


def average_precision(right: Bools, objects: int) -> float:
    """Of one class, detections [D] best first."""
    if not objects:
        return 0.0
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(hits / objects, np.arange(101) / 100, side="left")
    return float(precision[at[at < len(right)]].sum() / 101)
