"""Sine position encoding of image cells and of proposal boxes.

Cells are encoded in float32 whatever the model's precision, which is also what the published
models do: in a float64 model the two then agree to the last bit.
"""

import math

import torch
from torch import Tensor


def sine_features(x: Tensor, count: int, temperature: float = 10000.0) -> Tensor:
    """[...] of angles to [..., count]: sine and cosine, interleaved, at count / 2 frequencies."""
    exponent = 2 * torch.arange(count // 2, dtype=torch.float32, device=x.device) / count
    angle = x[..., None] / temperature**exponent
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def encode_cells(
    masks: list[Tensor], hidden_dim: int, shift: float = 0.5, temperature: float = 10000.0
) -> Tensor:
    """Encode each cell by its place in its image's valid area.

    masks: [N, H_l, W_l] bool, True on padding, one for each level. Returns [N, S, C] float32,
    S = sum of H_l W_l, the first half of C for y, the second for x. Cells lie at
    (index + 1 - shift) / valid size: at their centres, or with `shift` 0, as DETR has them, at
    their far corners.
    """
    angles = torch.cat([_cell_angles(~mask, shift) for mask in masks], dim=1)
    return sine_features(angles, hidden_dim // 2, temperature).flatten(-2)


def encode_boxes(boxes: Tensor, hidden_dim: int) -> Tensor:
    """[..., 4] normalised boxes to [..., 2 C]: C / 2 features for each coordinate."""
    return sine_features(boxes * (2 * math.pi), hidden_dim // 2).flatten(-2)


def _cell_angles(valid: Tensor, shift: float) -> Tensor:
    """[N, H, W] valid cells to [N, H W, 2] angles (y, x) in (0, 2 pi)."""
    y = valid.cumsum(1, dtype=torch.float32)
    x = valid.cumsum(2, dtype=torch.float32)
    y = (y - shift) / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
    x = (x - shift) / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    return torch.stack((y, x), dim=-1).flatten(1, 2)
