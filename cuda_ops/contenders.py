"""What the fused operator is timed against: functions with its arguments and result."""

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from cuda_ops import ops
from cuda_ops.reference import sampling_locations

Shapes = Sequence[tuple[int, int]]
Contender = Callable[[Tensor, Shapes, Tensor, Tensor, Tensor], Tensor]

IM2COL_STEP = 64  # images per launch: the official model's


def contender(spec: str) -> Contender:
    """ "fused", "grid_sample", or MODULE:FUNCTION (see `beside`).

    Raises:
        ValueError: there is no such module or function.
    """
    if spec == "fused":
        return ops.fused_deformable_attention
    if spec == "grid_sample":
        return grid_sample_attention
    return beside(spec)


def grid_sample_attention(
    value: Tensor,
    shapes: Shapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Attention as it is written without a kernel of one's own, and as transformers ships it:
    softmax and locations in separate operations, one `grid_sample` per level, a stack, a weighted
    sum. Arguments and result as `fused_deformable_attention`, for 2-d reference points."""
    batch, queries, heads, levels, points, _ = sampling_offsets.shape
    channels = value.shape[3]
    locations = sampling_locations(reference_points, sampling_offsets, shapes)
    grids = (2 * locations - 1).to(value.dtype)
    weights = attention_logits.softmax(-1).view(batch, queries, heads, 1, levels * points)
    sampled = []
    tokens = value.split([h * w for h, w in shapes], 1)
    for level, (height, width) in enumerate(shapes):
        image = tokens[level].permute(0, 2, 3, 1).reshape(-1, channels, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(grid_sample(image, grid, align_corners=False))
    stacked = torch.stack(sampled, -2).flatten(-2)  # [N * M, D, Q, L * K]
    weights = weights.permute(0, 2, 3, 1, 4).reshape(-1, 1, queries, levels * points)
    summed = (stacked * weights).sum(-1).view(batch, heads * channels, queries)
    return summed.transpose(1, 2).contiguous()


def beside(spec: str) -> Contender:
    """Another implementation, MODULE:FUNCTION, called as the official one is:
    `function(value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
    im2col_step)` with int64 tensors on the device of `value` and all else in its dtype. Softmax
    and locations, which it lacks, are computed in torch, as the official model does.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, name = spec.partition(":")
    try:
        function = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--beside got {spec!r}, expected MODULE:FUNCTION ({error})") from error
    call: Callable[..., Tensor] = function  # type: ignore[assignment]

    def attend(
        value: Tensor,
        shapes: Shapes,
        reference_points: Tensor,
        sampling_offsets: Tensor,
        attention_logits: Tensor,
    ) -> Tensor:
        sizes, starts = _level_tensors(tuple(shapes), value.device)
        locations = sampling_locations(reference_points, sampling_offsets, shapes)
        weights = attention_logits.softmax(-1).view(sampling_offsets.shape[:-1])
        return call(value, sizes, starts, locations.to(value.dtype), weights, IM2COL_STEP)

    return attend


@lru_cache
def _level_tensors(
    shapes: tuple[tuple[int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Sizes and first tokens of the levels; kept, as a model makes them once for all layers."""
    sizes = torch.tensor(shapes, device=device)
    tokens = sizes.prod(1)
    return sizes, tokens.cumsum(0) - tokens
