"""The two attentions: deformable over feature maps, plain among queries.

N batch, Q queries, S tokens, M heads, L levels, K points, C model width, D = C / M.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cuda_ops.ops import fused_deformable_attention


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (section 4.1, equation 3).

    At the start (A.4) all sampling points of a head weigh the same and lie on a ray from the
    reference point, K steps of one cell, the M heads' rays spread around the circle.
    """

    def __init__(self, hidden_dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(hidden_dim, samples * 2)
        self.attention_logits = nn.Linear(hidden_dim, samples)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)
        self._initialise()

    def _initialise(self) -> None:
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.attention_logits, self.sampling_offsets):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle = torch.arange(self.num_heads) * (2.0 * math.pi / self.num_heads)
        ray = torch.stack((angle.cos(), angle.sin()), dim=-1)
        ray = ray / ray.abs().amax(-1, keepdim=True)
        step = torch.arange(1, self.num_points + 1)
        offsets = ray[:, None, None, :] * step[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())

    def forward(
        self,
        query: Tensor,
        references: Tensor,
        tokens: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding: Tensor,
    ) -> Tensor:
        """query [N, Q, C], references [N, Q, L, 2 or 4], tokens [N, S, C], padding [N, S] bool,
        True where a token's value counts as zero. Returns [N, Q, C]."""
        batch, queries, _ = query.shape
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        value = self.value_proj(tokens).masked_fill(padding[..., None], 0.0)
        offsets = self.sampling_offsets(query).view(batch, queries, heads, levels, points, 2)
        logits = self.attention_logits(query).view(batch, queries, heads, levels * points)
        sampled = fused_deformable_attention(
            value.unflatten(-1, (heads, -1)), shapes, references, offsets, logits
        )
        return self.output_proj(sampled)


class SelfAttention(nn.Module):
    """Multi-head attention among queries or tokens; positions enter queries and keys alone."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_key_proj = nn.Linear(hidden_dim, 2 * hidden_dim)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)
        _initialise((self.query_key_proj, self.value_proj), self.output_proj)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        padding: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x and position [N, Q, C] to [N, Q, C]; padding [N, Q] bool, True where no one looks, or
        mask [Q, Q] bool, True where the first may not look at the second."""
        query, key = self.query_key_proj(x + position).chunk(2, dim=-1)
        hidden = mask if padding is None else padding[:, None, None]
        attended = attend(
            query, key, self.value_proj(x), hidden, self.num_heads,
            self.dropout if self.training else 0.0,
        )  # fmt: skip
        return self.output_proj(attended)


class CrossAttention(nn.Module):
    """Multi-head attention of queries over all tokens."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_proj = nn.Linear(hidden_dim, hidden_dim)
        self.key_proj = nn.Linear(hidden_dim, hidden_dim)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)
        _initialise((self.query_proj, self.key_proj, self.value_proj), self.output_proj)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
        """query [N, Q, C]; key, value [N, S, C]; padding [N, S] bool, True where no one looks."""
        attended = attend(
            self.query_proj(query), self.key_proj(key), self.value_proj(value),
            padding[:, None, None], self.num_heads, self.dropout if self.training else 0.0,
        )  # fmt: skip
        return self.output_proj(attended)


def _initialise(inputs: Sequence[nn.Linear], output: nn.Linear) -> None:
    """Xavier's rule, for the input projections that of one matrix [3 C, C]."""
    width = output.in_features
    bound = math.sqrt(6 / (4 * width))
    for layer in inputs:
        nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.zeros_(layer.bias)
    nn.init.xavier_uniform_(output.weight)
    nn.init.zeros_(output.bias)


def attend(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, heads: int, dropout: float
) -> Tensor:
    """Scaled dot-product attention of `heads` heads: [N, Q, C], [N, S, C], [N, S, D] to
    [N, Q, D]; hidden, which broadcasts to [N, heads, Q, S], is True where no one looks."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    mask = None if hidden is None else ~hidden
    attended = F.scaled_dot_product_attention(query, key, value, mask, dropout)
    return attended.transpose(1, 2).flatten(2)
