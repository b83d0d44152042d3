"""The operators that the model calls: checks, dtype rules, fake kernels and gradients around the
compiled kernels.

Shapes: N batch, S tokens of all levels, M heads, D channels per head, Q queries, L levels,
K points per head and level. Definitions in PyTorch: `cuda_ops.reference`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import pad

from cuda_ops.library import REMEDY, library_path, load
from cuda_ops.reference import accumulation_dtype

SpatialShapes = Sequence[tuple[int, int]] | Tensor

load("cpu")
_HAS_CUDA = library_path("cuda").exists()
if _HAS_CUDA and torch.version.cuda is not None:
    load("cuda")

_plain: Callable[..., Tensor] = torch.ops.cuda_ops.multi_scale_deformable_attention.default
_fused: Callable[..., Tensor] = torch.ops.cuda_ops.fused_deformable_attention.default
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def multi_scale_deformable_attention(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention (paper, equation 3) from given locations and weights.

    A drop-in for the official operator. Prefer `fused_deformable_attention`, which needs neither
    locations nor weights in memory. Under autocast, `value` and `attention_weights` take the
    autocast dtype. Second derivatives and forward mode are refused.

    Args:
        value: [N, S, M, D], any strides.
        spatial_shapes: (h, w) of each level, coarse or fine first, in the order of the tokens; an
            int64 tensor [L, 2] on the CPU is taken too, though not under torch.compile.
        sampling_locations: [N, Q, M, L, K, 2] as (x, y) in [0, 1] inside the image; float32, or
            the dtype of `value`. Points outside of the image read zeros.
        attention_weights: [N, Q, M, L, K], in the dtype of `value`.

    Returns:
        [N, Q, M * D], in the dtype of `value`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; says got and expected.
        ImportError: the tensors are on a GPU and the CUDA library is not built.
    """
    sizes = _flat(spatial_shapes)
    if not value.is_meta and torch.is_autocast_enabled(value.device.type):
        value, attention_weights = _autocast(value, attention_weights)
    _check_value(value, sizes)
    if sampling_locations.dim() != 6:
        raise ValueError(
            f"sampling_locations has shape {list(sampling_locations.shape)}, "
            "expected [N, Q, M, L, K, 2]"
        )
    batch, _, heads, _ = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    shape = (batch, queries, heads, len(sizes) // 2, points)
    _check_points(points)
    _check("sampling_locations", sampling_locations, (*shape, 2), value, wide=True)
    _check("attention_weights", attention_weights, shape, value)
    _refuse_forward_mode(value, sampling_locations, attention_weights)
    locations = sampling_locations.to(accumulation_dtype(value.dtype))
    return _plain(value, sizes, locations, attention_weights)


def fused_deformable_attention(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Deformable attention from raw offsets and logits: softmax, sampling locations, bilinear
    gather and weighted sum in one kernel (paper, equation 3 and section A.4).

    Locations are reference + offset / (w, h) for 2-d reference points, and
    (cx, cy) + offset / K * (w, h) / 2 for 4-d ones. The backward recomputes: nothing but the
    inputs is saved. Under autocast, `value`, `sampling_offsets` and `attention_logits` take the
    autocast dtype; reference points keep theirs. Second derivatives and forward mode are
    refused.

    Args:
        value: [N, S, M, D], any strides.
        spatial_shapes: (h, w) of each level, in the order of the tokens; an int64 tensor [L, 2] on
            the CPU is taken too, though not under torch.compile.
        reference_points: [N, Q, L, 2 or 4], normalised (x, y) or (cx, cy, w, h); float32, or the
            dtype of `value`.
        sampling_offsets: [N, Q, M, L, K, 2] as (x, y), in the dtype of `value`.
        attention_logits: [N, Q, M, L * K], in the dtype of `value`.

    Returns:
        [N, Q, M * D], in the dtype of `value`. Coordinates, softmax and sums are float32 for
        16-bit inputs.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; says got and expected.
        ImportError: the tensors are on a GPU and the CUDA library is not built.
    """
    sizes = _flat(spatial_shapes)
    if not value.is_meta and torch.is_autocast_enabled(value.device.type):
        value, sampling_offsets, attention_logits = _autocast(
            value, sampling_offsets, attention_logits
        )
    _check_value(value, sizes)
    if sampling_offsets.dim() != 6:
        raise ValueError(
            f"sampling_offsets has shape {list(sampling_offsets.shape)}, "
            "expected [N, Q, M, L, K, 2]"
        )
    batch, _, heads, _ = value.shape
    levels = len(sizes) // 2
    queries, points = sampling_offsets.shape[1], sampling_offsets.shape[4]
    _check_points(points)
    numbers = 4 if reference_points.shape[-1] == 4 else 2
    _check("reference_points", reference_points, (batch, queries, levels, numbers), value, True)
    _check("sampling_offsets", sampling_offsets, (batch, queries, heads, levels, points, 2), value)
    _check("attention_logits", attention_logits, (batch, queries, heads, levels * points), value)
    _refuse_forward_mode(value, reference_points, sampling_offsets, attention_logits)
    reference = reference_points.to(accumulation_dtype(value.dtype))
    return _fused(value, sizes, reference, sampling_offsets, attention_logits)


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
    """Modulated deformable convolution (DCNv2, arXiv:1811.11168, equation 1).

    The arguments are torchvision's `deform_conv2d`'s, and so is the result; a sample at exactly -1
    has no derivative by its offset on the CPU, as in the published code. On CUDA it is
    torchvision's operator. On the CPU that one is the slower (docs/log.md, "Deformable
    convolution"): there the samples are taken by `multi_scale_deformable_attention`'s kernels and
    multiplied with the weights as in a convolution by im2col; the samples, taps times the size of
    `input`, are kept for the backward. The same is done on CUDA under
    `torch.use_deterministic_algorithms(True)`, where torchvision's has no backward.

    16-bit inputs are computed in float32, whatever autocast says, and the output is rounded once:
    coordinates in float16 would be quarters of a pixel from 256 on.

    Args:
        input: [N, C, H, W].
        offset: [N, 2 * G * kh * kw, out_h, out_w], (y, x) pairs, for G deformable groups.
        mask: [N, G * kh * kw, out_h, out_w].
        weight: [C_out, C / groups, kh, kw]; groups and G follow from the shapes.
        bias: [C_out].
        stride, padding, dilation: one number, or (y, x).

    Returns:
        [N, C_out, out_h, out_w], in the dtype of `input`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; says got and expected.
        ImportError: the tensors are on a GPU and torchvision is not installed.
    """
    strides, paddings, dilations = _pair(stride), _pair(padding), _pair(dilation)
    _check_convolution(input, offset, mask, weight, bias, strides, paddings, dilations)
    _refuse_forward_mode(input, offset, mask, weight)
    wide = accumulation_dtype(input.dtype)
    samples, at, shares, kernel = (x.to(wide) for x in (input, offset, mask, weight))
    shift = None if bias is None else bias.to(wide)
    # Autocast knows no meta device, and there is nothing to cast on it.
    with torch.autocast("cpu" if input.is_meta else input.device.type, enabled=False):
        if input.is_cuda and not torch.are_deterministic_algorithms_enabled():
            # Here, not above: everything else must run where torchvision is not installed.
            from torchvision.ops import deform_conv2d

            output = deform_conv2d(samples, at, kernel, shift, strides, paddings, dilations, shares)
        else:
            columns = _deformed_columns(
                samples, at, shares, kernel.shape[2:], strides, paddings, dilations
            )
            output = _convolved(columns, kernel, shift, offset.shape[2:])
    return output.to(input.dtype)


def _deformed_columns(
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
    columns = _plain(value, sides, locations[:, :, :, None, None], shares[..., None, None])
    return columns.unflatten(1, (out_h * out_w, kernel_h * kernel_w))


def _convolved(columns: Tensor, weight: Tensor, bias: Tensor | None, out: Sequence[int]) -> Tensor:
    """[N, P, taps, C] times [C_out, C / groups, kh, kw]: [N, C_out, out_h, out_w]."""
    batch, pixels, taps, channels = columns.shape
    groups = channels // weight.shape[1]
    rows = columns.unflatten(3, (groups, weight.shape[1])).permute(3, 0, 1, 2, 4)
    rows = rows.reshape(groups, batch * pixels, taps * weight.shape[1])
    matrix = weight.flatten(2).unflatten(0, (groups, -1)).permute(0, 3, 2, 1).flatten(1, 2)
    output = torch.bmm(rows, matrix).unflatten(1, (batch, pixels))
    output = output.permute(1, 0, 3, 2).reshape(batch, weight.shape[0], *out)
    return output if bias is None else output + bias[:, None, None]


def _pair(numbers: int | tuple[int, int]) -> tuple[int, int]:
    return (numbers, numbers) if isinstance(numbers, int) else numbers


def _check_convolution(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
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
    if input.dtype not in _FLOATS:
        raise ValueError(
            f"input has dtype {input.dtype}, expected float64, float32, bfloat16 or float16"
        )
    narrow = [dtype for dtype in _FLOATS if dtype != torch.float64]
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


def _refuse_forward_mode(*tensors: Tensor) -> None:
    """torch would compute on and drop the tangents, which then count as zero."""
    if forward_ad._current_level < 0:  # no dual numbers about
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "forward-mode derivatives (jvp) of the compiled operators are not implemented; use "
            "reverse mode, or the definitions in cuda_ops.reference"
        )


def _flat(spatial_shapes: SpatialShapes) -> list[int]:
    """(h_0, w_0, h_1, w_1, ...), the form of the operators' schemas."""
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.device.type != "cpu" or spatial_shapes.dtype != torch.int64:
            raise ValueError(
                f"spatial_shapes is a {spatial_shapes.dtype} tensor on {spatial_shapes.device}, "
                "expected torch.int64 on cpu (reading it from a GPU would wait for the GPU); "
                "pass a list of (h, w)"
            )
        spatial_shapes = spatial_shapes.tolist()
    sizes: list[int] = []
    for shape in spatial_shapes:
        if len(shape) != 2:
            raise ValueError(f"spatial_shapes holds {shape}, expected (h, w) for each level")
        sizes.extend(shape)
    return sizes


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype; float64 stays, as in autocast's own rules."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check_value(value: Tensor, sizes: list[int]) -> None:
    if value.dim() != 4:
        raise ValueError(f"value has shape {list(value.shape)}, expected [N, S, M, D]")
    if value.dtype not in _FLOATS:
        raise ValueError(
            f"value has dtype {value.dtype}, expected float64, float32, bfloat16 or float16"
        )
    if value.shape[2] < 1 or value.shape[3] < 1 or not sizes:
        raise ValueError(
            f"value has shape {list(value.shape)} and spatial_shapes {len(sizes) // 2} levels, "
            "expected at least one head, channel and level"
        )
    tokens = 0
    for height, width in zip(sizes[::2], sizes[1::2], strict=True):
        if height < 1 or width < 1:
            raise ValueError(f"spatial_shapes holds ({height}, {width}), expected 1 or more")
        tokens = tokens + height * width
    if value.shape[1] != tokens:
        shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
        raise ValueError(
            f"value has {value.shape[1]} tokens, expected {tokens} from spatial_shapes {shapes}"
        )
    if value.is_cuda and not _HAS_CUDA:
        raise ImportError(f"the cuda operators are not built; {REMEDY}")


def _check_points(points: int) -> None:
    if points < 1:
        raise ValueError(f"got {points} points per head and level, expected at least one")


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], value: Tensor, wide: bool = False
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype != value.dtype and not (
        wide and tensor.dtype == accumulation_dtype(value.dtype)
    ):
        also = f" or {accumulation_dtype(value.dtype)}" if wide else ""
        raise ValueError(
            f"{name} has dtype {tensor.dtype}, expected {value.dtype}{also} as value has"
        )
    if tensor.device != value.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {value.device} as value is")


@torch.library.register_fake("cuda_ops::multi_scale_deformable_attention")
def _(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.register_fake("cuda_ops::multi_scale_deformable_attention_backward")
def _(
    grad_output: Tensor,
    value: Tensor,
    sizes: list[int],
    locations: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape),
        locations.new_empty(locations.shape),
        weights.new_empty(weights.shape),
    )


@torch.library.register_fake("cuda_ops::fused_deformable_attention")
def _(
    value: Tensor, sizes: list[int], reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    return value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


@torch.library.register_fake("cuda_ops::fused_deformable_attention_backward")
def _(
    grad_output: Tensor,
    value: Tensor,
    sizes: list[int],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    reference_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape),
        reference.new_empty(reference.shape if reference_gradient else (0,)),
        offsets.new_empty(offsets.shape),
        logits.new_empty(logits.shape),
    )


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.sizes, *others = inputs
    ctx.save_for_backward(value, *others)


def _plain_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = (
        torch.ops.cuda_ops.multi_scale_deformable_attention_backward.default(
            grad_output,
            value,
            ctx.sizes,
            locations,
            weights,
        )
    )
    return grad_value, None, grad_locations, grad_weights


def _fused_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, reference, offsets, logits = ctx.saved_tensors
    wanted = ctx.needs_input_grad[2]
    grad_value, grad_reference, grad_offsets, grad_logits = (
        torch.ops.cuda_ops.fused_deformable_attention_backward.default(
            grad_output,
            value,
            ctx.sizes,
            reference,
            offsets,
            logits,
            wanted,
        )
    )
    return grad_value, None, grad_reference if wanted else None, grad_offsets, grad_logits


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "the attention operators can be differentiated once, but a gradient of their gradient was "
        "asked for (create_graph=True); use the definitions in cuda_ops.reference"
    )


torch.library.register_autograd(
    "cuda_ops::multi_scale_deformable_attention", _plain_backward, setup_context=_save_inputs
)
torch.library.register_autograd(
    "cuda_ops::fused_deformable_attention", _fused_backward, setup_context=_save_inputs
)
# Without these, torch warns and takes second derivatives for zero.
torch.library.register_autograd(
    "cuda_ops::multi_scale_deformable_attention_backward", _refuse_second_derivative
)
torch.library.register_autograd(
    "cuda_ops::fused_deformable_attention_backward", _refuse_second_derivative
)
