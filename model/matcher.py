"""One-to-one matching of predictions and ground truth (DETR, section 3.1).

D decoder layers, N batch, Q queries, T boxes of the whole batch, P matched pairs.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from model.boxes import cxcywh_to_xyxy, generalized_iou
from model.config import ModelConfig
from model.parts import Known
from model.precision import full_precision

COST_ALPHA = 0.25
"""The published matcher fixes the focal alpha of its cost, whatever the loss's."""


class Truth(NamedTuple):
    """The batch's ground truth in one piece."""

    image: Tensor
    """[T] int64, the image each box belongs to; ascending."""
    labels: Tensor
    """[T] int64."""
    boxes: Tensor
    """[T, 4] normalised (cx, cy, w, h)."""
    counts: list[int]
    """Boxes of each image."""


class Layers(NamedTuple):
    """Predictions of D layers with the same queries, and the labels they are to be given."""

    names: list[str]
    """The suffix of each layer's losses: "" for the last, "_0" ... before it, "_enc"."""
    logits: Tensor
    """[D, N, Q, classes]."""
    boxes: Tensor
    """[D, N, Q, 4] normalised (cx, cy, w, h), float32 at the least."""
    labels: Tensor
    """[T] int64: the truth's own, or zeros for the class-agnostic first stage."""
    known: Known | None = None
    """The pairs of each layer, if they need no matching."""
    counted: Tensor | None = None
    """[N, Q] bool: of these queries alone the classification is a loss."""
    repeats: int = 1
    """Queries that each box is matched to."""


class Matches(NamedTuple):
    """P matched pairs, layer after layer, the same number in each."""

    layer: Tensor
    query: Tensor
    target: Tensor


@torch.no_grad()
def match(groups: list[Layers], truth: Truth, config: ModelConfig) -> list[Matches]:
    """The cheapest assignment of each image's boxes to its queries, for each layer of each group.

    An image with more boxes (times `repeats`) than queries leaves the dearest out. All costs go to
    the host in one copy. Raises `FloatingPointError` naming the tensors where a cost is not a
    number.
    """
    unknown = [group for group in groups if group.known is None]
    costs = [matching_cost(group, truth, config) for group in unknown]
    on_host = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
    sizes = [cost.numel() for cost in costs]
    blocks = np.split(on_host, np.cumsum(sizes)[:-1])
    try:
        pairs = [
            assign(block.reshape(cost.shape), truth.counts, group.repeats)
            for block, cost, group in zip(blocks, costs, unknown, strict=True)
        ]
    except ValueError as error:
        raise FloatingPointError(_describe_non_finite(groups, truth)) from error
    device = truth.boxes.device
    indices = torch.from_numpy(np.concatenate(pairs, axis=1)).to(device, non_blocking=True)
    matched = iter(indices.split([pair.shape[1] for pair in pairs], dim=1))
    return [
        Matches(*next(matched)) if group.known is None else _in_each_layer(group)
        for group in groups
    ]


def _in_each_layer(group: Layers) -> Matches:
    """The known pairs, for each of the layers."""
    assert group.known is not None
    layers, pairs = len(group.names), group.known
    layer = torch.arange(layers, device=pairs.query.device).repeat_interleave(len(pairs.query))
    return Matches(layer, pairs.query.repeat(layers), pairs.target.repeat(layers))


def matching_cost(group: Layers, truth: Truth, config: ModelConfig) -> Tensor:
    """Cost of giving each box to each query of its own image: [T, D, Q].

    Classes by the difference of the focal terms, or for softmax by the probability; boxes by L1
    distance and generalised IoU.
    """
    logits = full_precision(group.logits[:, truth.image, :, group.labels])
    boxes = group.boxes[:, truth.image].transpose(0, 1)
    if config.classification == "softmax":
        total = full_precision(group.logits).logsumexp(-1)[:, truth.image].transpose(0, 1)
        classes = -(logits - total).exp()
    else:
        probability = logits.sigmoid()
        positive = COST_ALPHA * (1 - probability) ** 2 * -(probability + 1e-8).log()
        negative = (1 - COST_ALPHA) * probability**2 * -(1 - probability + 1e-8).log()
        classes = positive - negative
    target = truth.boxes[:, None, None]
    distance = (boxes - target).abs().sum(-1)
    overlap = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target), config.area_eps)
    return config.bbox_cost * distance + config.class_cost * classes - config.giou_cost * overlap


def assign(cost: np.ndarray, counts: list[int], repeats: int = 1) -> np.ndarray:
    """cost [T, D, Q] to matched (layer, query, target): [3, P] int64, layer after layer; each
    target to `repeats` queries."""
    pairs = []
    for layer in range(cost.shape[1]):
        start = 0
        for count in counts:
            if count:
                of_image = np.tile(cost[start : start + count, layer], (repeats, 1))
                rows, queries = linear_sum_assignment(of_image)
                pairs.append(np.stack((np.full_like(rows, layer), queries, rows % count + start)))
            start += count
    return np.concatenate(pairs, axis=1) if pairs else np.zeros((3, 0), dtype=np.int64)


def _describe_non_finite(groups: list[Layers], truth: Truth) -> str:
    tensors = {"target boxes": truth.boxes}
    for group in groups:
        for name, logits, boxes in zip(group.names, group.logits, group.boxes, strict=True):
            tensors[f"pred_logits{name}"] = logits
            tensors[f"pred_boxes{name}"] = boxes
    counts = {name: int((~x.isfinite()).sum()) for name, x in tensors.items()}
    found = ", ".join(f"{name} ({count})" for name, count in counts.items() if count)
    return f"the matching cost is not finite; numbers that are not: {found or 'in the cost alone'}"
