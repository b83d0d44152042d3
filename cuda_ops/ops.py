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

from cuda_ops.convolution import check_convolution, convolved, deformed_columns, pair
from cuda_ops.library import REMEDY, library_path, load
from cuda_ops.reference import FLOATS, accumulation_dtype

SpatialShapes = Sequence[tuple[int, int]] | Tensor

load("cpu")
_HAS_CUDA = library_path("cuda").exists()
if _HAS_CUDA and torch.version.cuda is not None:
    load("cuda")

_plain: Callable[..., Tensor] = torch.ops.cuda_ops.multi_scale_deformable_attention.default
_fused: Callable[..., Tensor] = torch.ops.cuda_ops.fused_deformable_attention.default


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
    strides, paddings, dilations = pair(stride), pair(padding), pair(dilation)
    check_convolution(input, offset, mask, weight, bias, strides, paddings, dilations)
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
            columns = deformed_columns(
                samples, at, shares, kernel.shape[2:], strides, paddings, dilations
            )
            output = convolved(columns, kernel, shift, offset.shape[2:])
    return output.to(input.dtype)


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
    if value.dtype not in FLOATS:
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
