"""What `cuda_ops.ops.modulated_deform_conv2d` is made of where it is not torchvision's.

Shapes: N batch, C channels, G deformable groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from cuda_ops.reference import FLOATS


def deformed_columns(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel: Sequence[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """The modulated samples of every output pixel and tap: [N, out_h * out_w, kh * kw, C].

    To the attention kernels a pair of output pixel and tap is a query with one point, whose
    attention weight is the mask; channels are heads of a width that suits them.
    """
    channels, height, width = input.shape[1:]
    (kernel_h, kernel_w), (out_h, out_w) = kernel, offset.shape[2:]
    groups = mask.shape[1] // (kernel_h * kernel_w)

    def grid(out: int, taps: int, axis: int) -> Tensor:
        pixels = torch.arange(out, device=input.device) * stride[axis] - padding[axis]
        within = torch.arange(taps, device=input.device) * dilation[axis]
        return (pixels[:, None] + within).to(input.dtype)  # [out, taps]

    # Sides of a power of two: going through normalised locations then loses nothing, and a point
    # on a pixel, as all are where offsets are zero, stays on it.
    sides = [1, 1]
    for axis, size in enumerate((height, width)):
        while sides[axis] < size:
            sides[axis] *= 2
    offsets = offset.unflatten(1, (groups, kernel_h, kernel_w, 2)).permute(0, 5, 6, 2, 3, 1, 4)
    y = offsets[..., 0] + (grid(out_h, kernel_h, 0) + 0.5)[:, None, :, None, None]
    x = offsets[..., 1] + (grid(out_w, kernel_w, 1) + 0.5)[None, :, None, :, None]
    locations = torch.stack([x / sides[1], y / sides[0]], -1)  # [N, out_h, out_w, kh, kw, G, 2]
    locations = locations.flatten(1, 4)
    shares = mask.unflatten(1, (groups, -1)).permute(0, 3, 4, 2, 1).flatten(1, 3)  # [N, Q, G]

    per_group = channels // groups
    head = next((size for size in (64, 32, 16) if per_group % size == 0), per_group)
    copies = per_group // head
    locations = locations[:, :, :, None].expand(-1, -1, -1, copies, -1).flatten(2, 3)
    shares = shares[..., None].expand(-1, -1, -1, copies).flatten(2, 3)
    tokens = pad(input.permute(0, 2, 3, 1), (0, 0, 0, sides[1] - width, 0, sides[0] - height))
    value = tokens.flatten(1, 2).unflatten(2, (groups * copies, head))
    attention = torch.ops.cuda_ops.multi_scale_deformable_attention.default
    columns = attention(value, sides, locations[:, :, :, None, None], shares[..., None, None])
    return columns.unflatten(1, (out_h * out_w, kernel_h * kernel_w))


def convolved(columns: Tensor, weight: Tensor, bias: Tensor | None, out: Sequence[int]) -> Tensor:
    """[N, P, taps, C] times [C_out, C / groups, kh, kw]: [N, C_out, out_h, out_w]."""
    batch, pixels, taps, channels = columns.shape
    groups = channels // weight.shape[1]
    rows = columns.unflatten(3, (groups, weight.shape[1])).permute(3, 0, 1, 2, 4)
    rows = rows.reshape(groups, batch * pixels, taps * weight.shape[1])
    matrix = weight.flatten(2).unflatten(0, (groups, -1)).permute(0, 3, 2, 1).flatten(1, 2)
    output = torch.bmm(rows, matrix).unflatten(1, (batch, pixels))
    output = output.permute(1, 0, 3, 2).reshape(batch, weight.shape[0], *out)
    return output if bias is None else output + bias[:, None, None]


def pair(numbers: int | tuple[int, int]) -> tuple[int, int]:
    """(vertical, horizontal) of a number for both, or of two."""
    return (numbers, numbers) if isinstance(numbers, int) else numbers


def check_convolution(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    """Raises `ValueError`, saying got and expected, where shapes, types or devices do not fit."""
    if input.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"input and weight have shapes {list(input.shape)} and {list(weight.shape)}, expected "
            "[N, C, H, W] and [C_out, C / groups, kh, kw]"
        )
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f"stride, padding and dilation are {stride}, {padding} and {dilation}, expected at "
            "least 1, 0 and 1"
        )
    channels, outputs, per_group = input.shape[1], weight.shape[0], weight.shape[1]
    if min(*input.shape[1:], *weight.shape) < 1:
        raise ValueError(
            f"input and weight have shapes {list(input.shape)} and {list(weight.shape)}, expected "
            "no size but N to be zero"
        )
    if channels % per_group != 0 or outputs % (channels // per_group) != 0:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, expected [C_out, C / groups, kh, kw] with "
            f"groups dividing C_out and C = {channels}"
        )
    kernel_h, kernel_w = weight.shape[2:]
    taps = kernel_h * kernel_w
    groups = mask.shape[1] // taps if mask.dim() == 4 else 0
    if groups == 0 or mask.shape[1] != groups * taps or channels % groups != 0:
        raise ValueError(
            f"mask has shape {list(mask.shape)}, expected [N, G * {taps}, out_h, out_w] with G "
            f"dividing C = {channels}"
        )
    out = [
        (size + 2 * padding[axis] - dilation[axis] * (weight.shape[2 + axis] - 1) - 1)
        // stride[axis]
        + 1
        for axis, size in enumerate(input.shape[2:])
    ]
    if min(out) < 1:
        raise ValueError(
            f"input has shape {list(input.shape)}, expected one that the kernel of {kernel_h} x "
            f"{kernel_w} taps with stride {stride}, padding {padding} and dilation {dilation} fits"
        )
    for name, tensor, shape in (
        ("offset", offset, (input.shape[0], 2 * groups * taps, *out)),
        ("mask", mask, (input.shape[0], groups * taps, *out)),
        ("bias", bias, (outputs,)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if input.dtype not in FLOATS:
        raise ValueError(
            f"input has dtype {input.dtype}, expected float64, float32, bfloat16 or float16"
        )
    narrow = [dtype for dtype in FLOATS if dtype != torch.float64]
    expected = [torch.float64] if input.dtype == torch.float64 else narrow
    for name, tensor in (("offset", offset), ("mask", mask), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in expected:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}, expected one of {expected} as input has "
                f"{input.dtype}"
            )
        if tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {input.device} as input is")
