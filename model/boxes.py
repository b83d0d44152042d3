"""Box arithmetic. Boxes are [..., 4]; all functions broadcast and keep the leading axes."""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(centre x, centre y, width, height) to (x0, y0, x1, y1)."""
    centre, half = boxes[..., :2], 0.5 * boxes[..., 2:]
    return torch.cat((centre - half, centre + half), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(x0, y0, x1, y1) to (centre x, centre y, width, height)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def generalized_iou(first: Tensor, second: Tensor, eps: float = 0.0) -> Tensor:
    """Generalised IoU (Rezatofighi et al., 2019) of boxes (x0, y0, x1, y1), in [-1, 1].

    Elementwise over the broadcast leading axes: [..., 4] and [..., 4] give [...]. Boxes without
    area give a finite value: an empty union counts as IoU 0, an empty hull as no waste. eps: what
    is added to the areas that are divided by.
    """
    tiny = torch.finfo(first.dtype).tiny
    inner_low = torch.max(first[..., :2], second[..., :2])
    inner_high = torch.min(first[..., 2:], second[..., 2:])
    outer_low = torch.min(first[..., :2], second[..., :2])
    outer_high = torch.max(first[..., 2:], second[..., 2:])
    intersection = _area((inner_high - inner_low).clamp(min=0))
    hull = _area((outer_high - outer_low).clamp(min=0))
    first_area = _area(first[..., 2:] - first[..., :2])
    second_area = _area(second[..., 2:] - second[..., :2])
    union = first_area + second_area - intersection
    waste = (hull - union) / (hull + eps).clamp(min=tiny)
    return intersection / (union + eps).clamp(min=tiny) - waste


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) of x in [0, 1], with x and 1 - x held at `eps` at the least."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def _area(sides: Tensor) -> Tensor:
    return sides[..., 0] * sides[..., 1]
