"""The objects that a detector of queries found in one image, to draw figures of."""

from dataclasses import dataclass
from typing import Any

import torch
from torchvision.ops import nms

from model.boxes import cxcywh_to_xyxy
from model.postprocess import class_scores, require_finite
from model.precision import full_precision


@dataclass(frozen=True)
class Detected:
    """One detection: the query that made it, its class, score and box."""

    query: int
    column: int
    """Of the classes."""
    score: float
    box: tuple[float, float, float, float]
    """(x0, y0, x1, y1) as fractions of the image's width and height."""


@torch.no_grad()
def best_objects(outputs: dict[str, Any], threshold: float, most: int) -> list[Detected]:
    """The at most `most` best of the first image that score `threshold` or more, best first.

    A query counts with its best class. Of boxes that overlap by an IoU above 0.5 the best alone is
    taken: further ones would be figures of the same object. Raises FloatingPointError where
    predictions are not finite.
    """
    require_finite(outputs)
    scores, columns = class_scores(outputs)[0].max(-1)
    boxes = cxcywh_to_xyxy(full_precision(outputs["pred_boxes"][0]))
    kept = nms(boxes, scores, 0.5)
    kept = kept[scores[kept] >= threshold][:most]
    return [
        Detected(query, int(columns[query]), float(scores[query]), tuple(boxes[query].tolist()))
        for query in kept.tolist()
    ]
