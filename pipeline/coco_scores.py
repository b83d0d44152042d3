"""COCO's evaluation of boxes: precision and recall, and the 12 numbers made of them.

Matching and sums are faster-coco-eval's, whose numbers are pycocotools' up to rounding
(docs/evaluation.md says what was compared). T = 10 thresholds of IoU (0.50, 0.55, ... 0.95),
R = 101 recalls (0, 0.01, ... 1), K categories, A areas (all, small, medium, large), M limits of
detections.
"""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCOeval_faster  # type: ignore[import-untyped]
from numpy.typing import NDArray
from pycocotools.coco import COCO

from pipeline.errors import UserError

Array = NDArray[np.float64]
AREAS = ("all", "small", "medium", "large")


@dataclass(frozen=True)
class Scores:
    """precision [T, R, K, A] with the `limits[-1]` best detections of each category and image, and
    recall [T, K, A, M]; -1 where a category has no object of that area. categories, names [K]."""

    precision: Array
    recall: Array
    categories: tuple[int, ...]
    names: tuple[str, ...]
    limits: tuple[int, ...]

    def summary(self) -> dict[str, float]:
        """The 12 COCO numbers; -1 where undefined."""
        half, three_quarters = self.precision[:1], self.precision[5:6]
        whole = [self.precision, half, three_quarters]
        numbers = [defined_mean(of[..., 0]) for of in whole]
        numbers += [defined_mean(self.precision[..., area]) for area in (1, 2, 3)]
        numbers += [defined_mean(self.recall[:, :, 0, m]) for m in range(len(self.limits))]
        numbers += [defined_mean(self.recall[:, :, area, -1]) for area in (1, 2, 3)]
        return dict(zip(summary_names(self.limits), numbers, strict=True))

    def of_class(self, k: int) -> dict[str, float]:
        """AP, AP50, AP75, AP_S, AP_M, AP_L and AR of one category; -1 where undefined."""
        mine = self.precision[:, :, k]
        numbers = {
            "AP": mine[..., 0], "AP50": mine[:1, :, 0], "AP75": mine[5:6, :, 0],
            "AP_S": mine[..., 1], "AP_M": mine[..., 2], "AP_L": mine[..., 3],
            f"AR_{self.limits[-1]}": self.recall[:, k, 0, -1],
        }  # fmt: skip
        return {name: defined_mean(values) for name, values in numbers.items()}


def summary_names(limits: tuple[int, ...] = (1, 10, 100)) -> tuple[str, ...]:
    """Names of the numbers of `Scores.summary`. limits: most detections of an image that each AR_n
    counts."""
    recalls = [f"AR_{limit}" for limit in limits]
    return ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", *recalls, "AR_S", "AR_M", "AR_L")


def defined_mean(values: Array) -> float:
    """Of the values that are not -1; -1 where none is."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else -1.0


def score(truth: COCO, detections: list[dict[str, Any]], most: int = 100) -> Scores:
    """Of COCO result records, which are left as they are. most: how many of them count, of each
    category in each image, the best first; of equal scores the first.

    Raises `UserError` for a detection in an image that the ground truth lacks."""
    limits = (1, 10, most)
    # It prints nothing of its own, unlike pycocotools.
    scored = COCOeval_faster(truth, _indexed(truth, detections), iouType="bbox")
    scored.params.maxDets = list(limits)
    scored.evaluate()
    scored.accumulate()
    categories = tuple(int(k) for k in scored.params.catIds)
    shape = (10, 101, len(categories), len(AREAS), len(limits))
    precision = np.asarray(scored.eval["precision"], dtype=np.float64).reshape(shape)
    recall = np.asarray(scored.eval["recall"], dtype=np.float64).reshape(shape[0], *shape[2:])
    names = tuple(str(truth.cats[k]["name"]) for k in categories)
    return Scores(precision[..., -1], recall, categories, names, limits)


def _indexed(truth: COCO, detections: list[dict[str, Any]]) -> COCO:
    """Result records as annotations, as `COCO.loadRes` makes them, of an empty list too."""
    unknown = {d["image_id"] for d in detections} - truth.imgs.keys()
    if unknown:
        raise UserError(
            f"detections: got image id {min(unknown)}, which the ground truth lacks; expected "
            f"detections in its {len(truth.imgs)} images"
        )
    found = COCO()
    annotations = [
        {**d, "id": i, "area": d["bbox"][2] * d["bbox"][3], "iscrowd": 0}
        for i, d in enumerate(detections, 1)
    ]
    found.dataset = {**truth.dataset, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        found.createIndex()
    return found
