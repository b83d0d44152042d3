"""The model's output to detections in pixels."""

from typing import Any

import torch
from torch import Tensor

from model.boxes import cxcywh_to_xyxy
from model.faster_rcnn import detections
from model.precision import full_precision


@torch.no_grad()
def postprocess(outputs: dict[str, Any], sizes: Tensor, top: int = 100) -> list[dict[str, Tensor]]:
    """The `top` best (query, class) pairs of each image, best first.

    With softmax classification (outputs["classification"]) each query gives its best class alone,
    as DETR has it; a Faster R-CNN gives what `faster_rcnn.detections` says. outputs: of the model,
    N images. sizes: [N, 2] (height, width) in pixels of what the boxes are wanted in, usually the
    original images. Returns for each image `scores` [top], `labels` [top] int64 and `boxes`
    [top, 4] absolute (x0, y0, x1, y1), not clipped to the image; fewer than `top` where there are
    fewer pairs. Raises ValueError if `sizes` is not [N, 2].
    """
    if "proposals" in outputs:
        return detections(outputs, sizes, top)
    logits = full_precision(outputs["pred_logits"])
    softmax = outputs.get("classification") == "softmax"
    scores = logits.softmax(-1)[..., :-1] if softmax else logits.sigmoid()
    batch, queries, classes = scores.shape
    if tuple(sizes.shape) != (batch, 2):
        raise ValueError(f"sizes: got shape {tuple(sizes.shape)}, expected ({batch}, 2)")
    if softmax:
        classwise = scores.max(-1)
        best = classwise.values.topk(min(top, queries), dim=1)
        query, labels = best.indices, classwise.indices.gather(1, best.indices)
    else:
        best = scores.flatten(1).topk(min(top, queries * classes), dim=1)
        query, labels = best.indices // classes, best.indices % classes
    boxes = cxcywh_to_xyxy(full_precision(outputs["pred_boxes"]))
    boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
    height, width = sizes.to(boxes).unbind(1)
    boxes = boxes * torch.stack((width, height, width, height), dim=1)[:, None]
    return [
        {"scores": s, "labels": c, "boxes": b}
        for s, c, b in zip(best.values, labels, boxes, strict=True)
    ]
