"""Where deformable attention samples, and how much each point weighs (A.6, Figure 6).

N images, Q queries, S tokens, M heads, L levels, K points, C model width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cuda_ops.reference import sampling_locations
from model.attention import DeformableAttention
from model.geometry import valid_ratios, valid_sizes
from model.precision import full_precision, without_autocast


@dataclass(frozen=True)
class Sampling:
    """One call of a deformable attention."""

    locations: Tensor
    """[N, Q, M, L, K, 2] (x, y) as the operator takes them: fractions of the padded levels."""
    weights: Tensor
    """[N, Q, M, L, K], of sum 1 for each head."""
    references: Tensor
    """[N, Q, L, 2 or 4], as `locations`."""
    ratios: Tensor
    """[N, L, 2] (x, y): the share of each padded level that its image covers."""
    shapes: Sequence[tuple[int, int]]
    """(h, w) of the padded levels."""

    def points(self) -> Tensor:
        """`locations` as fractions of each image's own width and height."""
        return self.locations / self.ratios[:, None, None, :, None]

    @torch.no_grad()
    def reference_points(self) -> Tensor:
        """The centres [N, Q, 2] of the references, as fractions of each image."""
        return self.references[:, :, 0, :2] / self.ratios[:, None, 0]


def deformable_attention_of(
    model: nn.Module,
) -> tuple[DeformableAttention | None, DeformableAttention | None]:
    """That of the last encoder layer, and of the last decoder layer; None where a detector by
    queries attends otherwise."""
    encoder, decoder = (_last_in(model.get_submodule(part)) for part in ("encoder", "decoder"))
    return encoder, decoder


def _last_in(layers: nn.Module) -> DeformableAttention | None:
    inside = [module for module in layers.modules() if isinstance(module, DeformableAttention)]
    return inside[-1] if inside else None


@contextmanager
def sampling_recorded(model: nn.Module) -> Iterator[tuple[list[Sampling], list[Sampling]]]:
    """While the context lasts, notes the calls of `deformable_attention_of` a detector by queries:
    the encoder's, and the decoder's.

    A forward pass gives one call each; an encoder whose tokens attend to their own level alone
    gives one a level, the finest first; an encoder or decoder without deformable attention none.
    """
    encoder, decoder = deformable_attention_of(model)
    with _recorded(encoder) as of_encoder, _recorded(decoder) as of_decoder:
        yield of_encoder, of_decoder


@contextmanager
def _recorded(attention: DeformableAttention | None) -> Iterator[list[Sampling]]:
    calls: list[Sampling] = []
    if attention is None:
        yield calls
        return

    def note(module: Any, inputs: tuple[Any, ...]) -> None:
        calls.append(sampling_of(module, *inputs))

    handle = attention.register_forward_pre_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


@torch.no_grad()
def sampling_of(
    attention: DeformableAttention,
    query: Tensor,
    references: Tensor,
    tokens: Tensor,
    shapes: Sequence[tuple[int, int]],
    padding: Tensor,
) -> Sampling:
    """What `attention` samples when called with the other arguments, which see there. It is
    computed anew by the module's own layers: the fused operator does not give it away."""
    heads, levels, points = attention.num_heads, attention.num_levels, attention.num_points
    with without_autocast(query):
        wide = query.to(attention.sampling_offsets.weight.dtype)
        offsets = attention.sampling_offsets(wide).unflatten(-1, (heads, levels, points, 2))
        logits = attention.attention_logits(wide).unflatten(-1, (heads, levels * points))
    references, offsets = full_precision(references), full_precision(offsets)
    weights = full_precision(logits).softmax(-1)
    sizes = [height * width for height, width in shapes]
    masks = [
        part.unflatten(1, shape)
        for part, shape in zip(padding.split(sizes, dim=1), shapes, strict=True)
    ]
    return Sampling(
        sampling_locations(references, offsets, shapes),
        weights.unflatten(-1, (levels, points)),
        references,
        valid_ratios(valid_sizes(masks), list(shapes)).to(references),
        shapes,
    )
