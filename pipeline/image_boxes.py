"""Detections beside objects, image by image, as arrays.

Boxes are (x, y, width, height) in pixels, classes category ids. D detections, G objects, C crowds.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask
from pycocotools.coco import COCO

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ImageBoxes:
    """Detections best first, of equal scores the first first; objects without the crowds."""

    image_id: int
    boxes: Floats  # [D, 4]
    scores: Floats  # [D]
    classes: Ints  # [D]
    object_boxes: Floats  # [G, 4]
    object_classes: Ints  # [G]
    crowd_boxes: Floats  # [C, 4]
    crowd_classes: Ints  # [C]

    def overlaps(self) -> Floats:
        """IoU of detections and objects, [D, G]."""
        return _iou(self.boxes, self.object_boxes, crowd=False)

    def inside_crowd(self) -> Floats:
        """[D]: the largest share of a detection's area that a crowd of its class covers."""
        covered = _iou(self.boxes, self.crowd_boxes, crowd=True)
        covered = covered * (self.classes[:, None] == self.crowd_classes)
        return covered.max(axis=1, initial=0.0)


def _iou(boxes: Floats, others: Floats, crowd: bool) -> Floats:
    if not len(boxes) or not len(others):  # pycocotools gives an empty list
        return np.zeros((len(boxes), len(others)))
    return np.asarray(mask.iou(boxes, others, [int(crowd)] * len(others)))


def by_image(
    truth: COCO, detections: list[dict[str, Any]], most: int, threshold: float = 0.0
) -> list[ImageBoxes]:
    """Every image of the ground truth, in its order, with its `most` best COCO result records of
    score `threshold` or more."""
    found: dict[int, list[dict[str, Any]]] = {image: [] for image in truth.imgs}
    for detection in detections:
        if detection["score"] >= threshold:
            found[detection["image_id"]].append(detection)
    images = []
    for image, records in found.items():
        best = sorted(records, key=lambda d: -d["score"])[:most]
        objects = [a for a in truth.imgToAnns[image] if not a["iscrowd"]]
        crowds = [a for a in truth.imgToAnns[image] if a["iscrowd"]]
        scores = np.asarray([d["score"] for d in best], dtype=np.float64)
        images.append(
            ImageBoxes(
                image,
                _boxes(best),
                scores,
                _classes(best),
                _boxes(objects),
                _classes(objects),
                _boxes(crowds),
                _classes(crowds),
            )
        )
    return images


def _boxes(records: list[dict[str, Any]]) -> Floats:
    return np.asarray([r["bbox"] for r in records], dtype=np.float64).reshape(-1, 4)


def _classes(records: list[dict[str, Any]]) -> Ints:
    return np.asarray([r["category_id"] for r in records], dtype=np.int64)
