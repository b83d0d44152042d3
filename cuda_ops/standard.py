"""The model's operators in operators that every exporter and runtime knows: `grid_sample`, and
arithmetic. For files that must run where this repository is not; slower than the kernels, and they
keep what they sample in memory.

Shapes: N batch, S tokens of all levels, M heads, D channels per head, Q queries, L levels,
K points per head and level, G deformable groups. Sizes may be symbolic (torch.export).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample

from cuda_ops.convolution import pair
from cuda_ops.reference import accumulation_dtype


def fused_deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`cuda_ops.ops.fused_deformable_attention` by one `grid_sample` for each level.

    Args:
        value: [N, S, M, D].
        spatial_shapes: (h, w) of each level, in the order of the tokens.
        reference_points: [N, Q, L, 2 or 4], normalised (x, y) or (cx, cy, w, h).
        sampling_offsets: [N, Q, M, L, K, 2] as (x, y).
        attention_logits: [N, Q, M, L * K].

    Returns:
        [N, Q, M * D], in the dtype of `value`.
    """
    queries, heads, levels, points = sampling_offsets.shape[1:5]
    channels = value.shape[3]
    wide = accumulation_dtype(value.dtype)
    reference = reference_points.to(wide)[:, :, None, :, None]  # [N, Q, 1, L, 1, 2 or 4]
    if reference_points.shape[-1] == 2:
        # `torch.tensor` knows no symbolic numbers.
        sides = [side for height, width in spatial_shapes for side in (width, height)]
        units = 1 / torch.cat([value.new_full((1,), side, dtype=wide) for side in sides])
        units = units.view(levels, 1, 2)
    else:
        units = reference[..., 2:] / (2 * points)
    grids = 2 * (reference[..., :2] + sampling_offsets.to(wide) * units) - 1
    grids = grids.transpose(1, 2).flatten(0, 1)  # [N M, Q, L, K, 2]
    weights = attention_logits.to(wide).softmax(-1).unflatten(-1, (levels, points))
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # [N M, 1, Q, L, K]
    images = value.to(wide).permute(0, 2, 3, 1).flatten(0, 1)  # [N M, D, S]

    output = None
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        image = images[:, :, start : start + height * width].unflatten(-1, (height, width))
        start += height * width
        sampled = grid_sample(image, grids[:, :, level], align_corners=False)  # [N M, D, Q, K]
        part = (sampled * weights[:, :, :, level]).sum(-1)
        output = part if output is None else output + part
    assert output is not None
    output = output.unflatten(0, (-1, heads)).permute(0, 3, 1, 2)  # [N, Q, M, D]
    return output.reshape(-1, queries, heads * channels).to(value.dtype)


def nearest(
    input: Tensor, size: Sequence[int], mode: str = "nearest", align_corners: None = None
) -> Tensor:
    """`torch.nn.functional.interpolate` to the nearest neighbour, by index: the same cell for every
    size. ONNX's Resize divides by the inverse ratio in float32 and is off by one at every twelfth.

    Args:
        input: [N, C, H, W].
        size: (h, w) of the result.

    Returns:
        [N, C, h, w].
    """
    assert mode == "nearest"
    rows, columns = (
        (torch.arange(new, dtype=torch.float32, device=input.device) * (old / new)).long()
        for old, new in zip(input.shape[-2:], size, strict=True)
    )
    return input[:, :, rows][:, :, :, columns]


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """`cuda_ops.ops.modulated_deform_conv2d` by one `grid_sample` and a 1x1 convolution.

    Args:
        input: [N, C, H, W].
        offset: [N, 2 * G * kh * kw, out_h, out_w], (y, x) pairs.
        mask: [N, G * kh * kw, out_h, out_w].
        weight: [C_out, C / groups, kh, kw]; groups and G follow from the shapes.
        bias: [C_out].
        stride, padding, dilation: one number, or (y, x).

    Returns:
        [N, C_out, out_h, out_w], in the dtype of `input`.
    """
    wide = accumulation_dtype(input.dtype)
    strides, paddings, dilations = pair(stride), pair(padding), pair(dilation)
    channels, height, width = input.shape[1:]
    kernel_h, kernel_w = weight.shape[2:]
    out_h, out_w = offset.shape[2:]
    taps = kernel_h * kernel_w
    deformable = mask.shape[1] // taps

    def places(out: int, kernel: int, axis: int) -> Tensor:
        """Where the taps lie without offsets: [kernel, out] in pixels of the input."""
        first = torch.arange(out, device=input.device) * strides[axis] - paddings[axis]
        within = torch.arange(kernel, device=input.device) * dilations[axis]
        return (within[:, None] + first).to(wide)

    moved = offset.to(wide).unflatten(1, (deformable, kernel_h, kernel_w, 2)).flatten(0, 1)
    y = moved[:, :, :, 0] + places(out_h, kernel_h, 0)[:, None, :, None]
    x = moved[:, :, :, 1] + places(out_w, kernel_w, 1)[None, :, None, :]
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    image = input.to(wide).reshape(-1, channels // deformable, height, width)  # [N G, C / G, H, W]
    # One picture of all taps, one below the other.
    sampled = grid_sample(image, grid.flatten(1, 3), align_corners=False)
    sampled = sampled.unflatten(2, (taps, out_h))  # [N G, C / G, taps, out_h, out_w]
    sampled = sampled * mask.to(wide).unflatten(1, (deformable, 1, taps)).flatten(0, 1)
    columns = sampled.reshape(-1, channels * taps, out_h, out_w)
    matrix = weight.to(wide).flatten(1)[:, :, None, None]
    shift = None if bias is None else bias.to(wide)
    output = conv2d(columns, matrix, shift, groups=channels // weight.shape[1])
    return output.to(input.dtype)
