"""The operators in plain PyTorch: the definition that every kernel is tested against.

Shapes: N batch, S tokens of all levels, M heads, D channels per head, Q queries, L levels,
K points per head and level. Slow and memory-hungry on purpose: nothing here is shared with the
kernels. Coordinates, softmax and sums are float32 for 16-bit inputs, float64 for float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the operators take."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the operators compute: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sampling_locations(
    reference_points: Tensor,
    sampling_offsets: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
) -> Tensor:
    """Normalised sampling locations of the fused operator.

    Paper, section 4.1: the offsets of 2-d reference points are in pixels of their level.
    Section A.4 (iterative refinement): those of 4-d ones (cx, cy, w, h) are in units of half the
    box divided by K.

    Args:
        reference_points: [N, Q, L, 2 or 4], normalised.
        sampling_offsets: [N, Q, M, L, K, 2] as (x, y).
        spatial_shapes: (h, w) of each level.

    Returns:
        [N, Q, M, L, K, 2] as (x, y) in [0, 1] inside the image.
    """
    reference = reference_points[:, :, None, :, None, :]
    if reference_points.shape[-1] == 2:
        sizes = sampling_offsets.new_tensor([(w, h) for h, w in spatial_shapes])
        return reference + sampling_offsets / sizes[:, None, :]
    points = sampling_offsets.shape[4]
    return reference[..., :2] + sampling_offsets / points * reference[..., 2:] / 2


def multi_scale_deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention of the paper's equation 3, before the output projection.

    A point with pixel coordinates (x, y) = location * (w, h) - 0.5 is the bilinear mean of its
    four neighbours, those outside of the level counting as zero. A point outside of
    -1 < x < w, -1 < y < h contributes nothing.

    Args:
        value: [N, S, M, D].
        spatial_shapes: (h, w) of each level.
        sampling_locations: [N, Q, M, L, K, 2] as (x, y) in [0, 1] inside the image.
        attention_weights: [N, Q, M, L, K].

    Returns:
        [N, Q, M * D], in the dtype of `value`.
    """
    accumulate = accumulation_dtype(value.dtype)
    samples = value.to(accumulate)
    locations = sampling_locations.to(accumulate)
    weights = attention_weights.to(accumulate)
    batch, queries, heads, _, _, _ = locations.shape
    channels = value.shape[3]
    n = torch.arange(batch, device=value.device)[:, None, None, None]
    m = torch.arange(heads, device=value.device)[None, None, :, None]

    output = samples.new_zeros(batch, queries, heads, channels)
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        x = locations[:, :, :, level, :, 0] * width - 0.5  # [N, Q, M, K]
        y = locations[:, :, :, level, :, 1] * height - 0.5
        touches = (x > -1) & (x < width) & (y > -1) & (y < height)
        x = torch.where(touches, x, 0)
        y = torch.where(touches, y, 0)
        left, top = x.floor(), y.floor()
        for corner_x, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
            for corner_y, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
                inside = touches & (corner_x >= 0) & (corner_x < width)
                inside = inside & (corner_y >= 0) & (corner_y < height)
                column = corner_x.clamp(0, width - 1).long()
                row = corner_y.clamp(0, height - 1).long()
                pixels = samples[n, start + row * width + column, m]  # [N, Q, M, K, D]
                pixels = torch.where(inside[..., None], pixels, 0)
                share = torch.where(touches, weights[:, :, :, level] * weight_x * weight_y, 0)
                output = output + (share[..., None] * pixels).sum(3)
        start += height * width
    return output.flatten(2).to(value.dtype)


def fused_deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Deformable attention from raw offsets and logits: softmax and locations included.

    Args:
        value: [N, S, M, D].
        spatial_shapes: (h, w) of each level.
        reference_points: [N, Q, L, 2 or 4], normalised (x, y) or (cx, cy, w, h).
        sampling_offsets: [N, Q, M, L, K, 2] as (x, y).
        attention_logits: [N, Q, M, L * K]; the softmax runs over the last dimension.

    Returns:
        [N, Q, M * D], in the dtype of `value`.
    """
    accumulate = accumulation_dtype(value.dtype)
    locations = sampling_locations(
        reference_points.to(accumulate), sampling_offsets.to(accumulate), spatial_shapes
    )
    weights = attention_logits.to(accumulate).softmax(-1).view(sampling_offsets.shape[:-1])
    # The sampler would round 16-bit weights once more: hand it the wide dtype throughout.
    output = multi_scale_deformable_attention(
        value.to(accumulate), spatial_shapes, locations, weights
    )
    return output.to(value.dtype)


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """Modulated deformable convolution, equation 1 of DCNv2 (arXiv:1811.11168).

    Args:
        input: [N, C, H, W].
        offset: [N, 2 * G * kh * kw, out_h, out_w], (y, x) pairs, for G deformable groups.
        mask: [N, G * kh * kw, out_h, out_w].
        weight: [C_out, C / groups, kh, kw].
        bias: [C_out].

    Returns:
        [N, C_out, out_h, out_w], in the dtype of `input`.
    """
    wide = accumulation_dtype(input.dtype)
    batch, channels, height, width = input.shape
    outputs, per_group, kernel_h, kernel_w = weight.shape
    out_h, out_w = offset.shape[2:]
    taps = kernel_h * kernel_w
    deformable = mask.shape[1] // taps
    columns = input.new_zeros(batch, channels, taps, out_h, out_w, dtype=wide)
    for g in range(deformable):
        mine = slice(g * channels // deformable, (g + 1) * channels // deformable)
        for tap in range(taps):
            at = g * taps + tap
            y = torch.arange(out_h, device=input.device)[:, None] * stride - padding
            x = torch.arange(out_w, device=input.device) * stride - padding
            y = y + tap // kernel_w * dilation + offset[:, 2 * at].to(wide)
            x = x + tap % kernel_w * dilation + offset[:, 2 * at + 1].to(wide)
            grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
            sampled = grid_sample(input[:, mine].to(wide), grid, align_corners=False)
            columns[:, mine, tap] = sampled * mask[:, at : at + 1].to(wide)
    groups = channels // per_group
    output = torch.einsum(
        "ngctyx,goct->ngoyx",
        columns.unflatten(1, (groups, per_group)),
        weight.to(wide).flatten(2).unflatten(0, (groups, outputs // groups)),
    )
    return (output.flatten(1, 2) + bias.to(wide)[:, None, None]).to(input.dtype)
