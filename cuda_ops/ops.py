"""The operators that the model calls: checks, dtype rules, fake kernels and gradients around the
compiled kernels.

Shapes: N batch, S tokens of all levels, M heads, D channels per head, Q queries, L levels,
K points per head and level. Definitions in PyTorch: `cuda_ops.reference`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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
    autocast dtype. Twice differentiable it is not.

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
    _check("sampling_locations", sampling_locations, (*shape, 2), value, wide=True)
    _check("attention_weights", attention_weights, shape, value)
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
    autocast dtype; reference points keep theirs. Twice differentiable it is not.

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
    numbers = 4 if reference_points.shape[-1] == 4 else 2
    _check("reference_points", reference_points, (batch, queries, levels, numbers), value, True)
    _check("sampling_offsets", sampling_offsets, (batch, queries, heads, levels, points, 2), value)
    _check("attention_logits", attention_logits, (batch, queries, heads, levels * points), value)
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

    This is torchvision's `deform_conv2d` with a mask: its kernels run on CPU and CUDA, and a
    second implementation would have to be maintained for one backbone. Those kernels have no
    bfloat16, and in float16 they would round coordinates to 1/4 pixel from 256 on; so 16-bit
    inputs are computed in float32 and the output is rounded once, to the dtype of `input`.

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
        ValueError: offset or mask do not have the shapes above.
    """
    # Here, not above: the attention operators must run where torchvision is not installed.
    from torchvision.ops import deform_conv2d

    taps = weight.shape[-2] * weight.shape[-1]
    groups = mask.shape[1] // taps
    if groups == 0 or mask.shape[1] != groups * taps or offset.shape[1] != 2 * mask.shape[1]:
        raise ValueError(
            f"offset and mask have {offset.shape[1]} and {mask.shape[1]} channels, expected "
            f"2 * G * {taps} and G * {taps} for a {weight.shape[-2]}x{weight.shape[-1]} kernel"
        )
    wide = accumulation_dtype(input.dtype)
    output = deform_conv2d(
        input.to(wide),
        offset.to(wide),
        weight.to(wide),
        None if bias is None else bias.to(wide),
        stride,
        padding,
        dilation,
        mask.to(wide),
    )
    return output.to(input.dtype)


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
    deterministic: bool,
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
    deterministic: bool,
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
            torch.are_deterministic_algorithms_enabled(),
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
            torch.are_deterministic_algorithms_enabled(),
        )
    )
    return grad_value, None, grad_reference if wanted else None, grad_offsets, grad_logits


torch.library.register_autograd(
    "cuda_ops::multi_scale_deformable_attention", _plain_backward, setup_context=_save_inputs
)
torch.library.register_autograd(
    "cuda_ops::fused_deformable_attention", _fused_backward, setup_context=_save_inputs
)
