"""The model's output to detections in pixels."""

from typing import Any

import torch
from torch import Tensor

from model.boxes import cxcywh_to_xyxy
from model.faster_rcnn import detections
from model.precision import full_precision

# Of a set prediction, then of both stages of a Faster R-CNN.
PREDICTIONS = (
    "pred_logits", "pred_boxes", "objectness", "anchor_deltas", "class_logits", "box_deltas",
)  # fmt: skip


@torch.no_grad()
def postprocess(outputs: dict[str, Any], sizes: Tensor, top: int = 100) -> list[dict[str, Tensor]]:
    """The `top` best (query, class) pairs of each image, best first.

    With softmax classification (outputs["classification"]) each query gives its best class alone,
    as DETR has it; a Faster R-CNN gives what `faster_rcnn.detections` says. outputs: of the model,
    N images. sizes: [N, 2] (height, width) in pixels of what the boxes are wanted in, usually the
    original images. Returns for each image `scores` [top], `labels` [top] int64 and `boxes`
    [top, 4] absolute (x0, y0, x1, y1), not clipped to the image; fewer than `top` where there are
    fewer pairs. Raises ValueError if `sizes` is not [N, 2], FloatingPointError where predictions
    are not finite.
    """
    require_finite(outputs)
    if "proposals" in outputs:
        return detections(outputs, sizes, top)
    batch = len(outputs["pred_logits"])
    if tuple(sizes.shape) != (batch, 2):
        raise ValueError(f"sizes: got shape {tuple(sizes.shape)}, expected ({batch}, 2)")
    scores, labels, boxes = best_pairs(outputs, top)
    height, width = sizes.to(boxes).unbind(1)
    boxes = boxes * torch.stack((width, height, width, height), dim=1)[:, None]
    return [
        {"scores": s, "labels": c, "boxes": b}
        for s, c, b in zip(scores, labels, boxes, strict=True)
    ]


def require_finite(outputs: dict[str, Any]) -> None:
    """Raises FloatingPointError naming the predictions that are not finite."""
    given = [(name, outputs[name]) for name in PREDICTIONS if name in outputs]
    counts = torch.stack([(~x.isfinite()).sum() for _, x in given]).tolist()
    bad = [f"{name} ({n} of {x.numel()})" for (name, x), n in zip(given, counts, strict=True) if n]
    if bad:
        raise FloatingPointError(f"predictions are not finite: {', '.join(bad)}")


def best_pairs(outputs: dict[str, Any], top: int) -> tuple[Tensor, Tensor, Tensor]:
    """`postprocess` of a set prediction as tensors of the batch: scores [N, top], labels [N, top]
    int64, and boxes [N, top, 4] as (x0, y0, x1, y1) in shares of the image's width and height."""
    softmax = outputs.get("classification") == "softmax"
    scores = class_scores(outputs)
    queries, classes = scores.shape[1:]
    if softmax:
        classwise = scores.max(-1)
        best = classwise.values.topk(min(top, queries), dim=1)
        query, labels = best.indices, classwise.indices.gather(1, best.indices)
    else:
        best = scores.flatten(1).topk(min(top, queries * classes), dim=1)
        query, labels = best.indices // classes, best.indices % classes
    boxes = cxcywh_to_xyxy(full_precision(outputs["pred_boxes"]))
    return best.values, labels, boxes.gather(1, query[..., None].expand(-1, -1, 4))


def class_scores(outputs: dict[str, Any]) -> Tensor:
    """Probabilities [N, Q, classes] of a set prediction, without the column for no object."""
    logits = full_precision(outputs["pred_logits"])
    kind = outputs.get("classification", "focal")
    scores = logits.softmax(-1) if kind == "softmax" else logits.sigmoid()
    return scores if kind == "focal" else scores[..., :-1]
