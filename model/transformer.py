"""Encoder and decoder layers (section 4.1). N batch, Q queries, S tokens, L levels, C width."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.attention import DeformableAttention, SelfAttention
from model.config import ModelConfig
from model.geometry import scale_references
from model.parts import Memory, References


class FeedForward(nn.Module):
    """Two linear layers with a residual connection and a layer norm."""

    def __init__(self, hidden_dim: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(hidden_dim, feedforward_dim)
        self.activation: nn.Module = nn.ReLU()
        self.linear2 = nn.Linear(feedforward_dim, hidden_dim)
        self.inner_dropout = nn.Dropout(dropout)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner_dropout(self.activation(self.linear1(x)))
        return self.norm(x + self.dropout(self.linear2(hidden)))


class EncoderLayer(nn.Module):
    """Every token attends to points around itself, on all levels or (`level_exchange` off) on its
    own; then a feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.level_exchange = config.level_exchange
        self.attention = _deformable_attention(
            config, config.num_levels if config.level_exchange else 1
        )
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.feedforward = FeedForward(config.hidden_dim, config.feedforward_dim, config.dropout)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        references: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding: Tensor,
    ) -> Tensor:
        """tokens, position [N, S, C]; references [N, S, L, 2]; padding [N, S]. Gives [N, S, C]."""
        queries = tokens + position
        if self.level_exchange:
            attended = self.attention(queries, references, tokens, shapes, padding)
        else:
            attended = self._each_level(queries, references, tokens, shapes, padding)
        return self.feedforward(self.norm(tokens + self.dropout(attended)))

    def _each_level(
        self,
        queries: Tensor,
        references: Tensor,
        tokens: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding: Tensor,
    ) -> Tensor:
        """The attention with shared weights on each level alone."""
        sizes = [height * width for height, width in shapes]
        parts = zip(
            queries.split(sizes, 1),
            references.split(sizes, 1),
            tokens.split(sizes, 1),
            padding.split(sizes, 1),
            strict=True,
        )
        return torch.cat(
            [
                self.attention(q, r[:, :, level : level + 1], t, [shapes[level]], p)
                for level, (q, r, t, p) in enumerate(parts)
            ],
            dim=1,
        )


class DecoderLayer(nn.Module):
    """Queries attend to each other, then to points around their references; then a feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config.hidden_dim, config.num_heads, config.dropout)
        self.self_dropout = nn.Dropout(config.dropout)
        self.self_norm = nn.LayerNorm(config.hidden_dim)
        self.cross_attention = _deformable_attention(config, config.num_levels)
        self.cross_dropout = nn.Dropout(config.dropout)
        self.cross_norm = nn.LayerNorm(config.hidden_dim)
        self.feedforward = FeedForward(config.hidden_dim, config.feedforward_dim, config.dropout)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        references: References,
        memory: Memory,
        mask: Tensor | None = None,
    ) -> Tensor:
        """content, position [N, Q, C]; mask [Q, Q] bool, True where the first may not see the
        second. Gives [N, Q, C]."""
        attended = self.self_attention(content, position, mask=mask)
        content = self.self_norm(content + self.self_dropout(attended))
        attended = self.cross_attention(
            content + position,
            scale_references(references.attend, memory.ratios),
            memory.tokens,
            memory.shapes,
            memory.padding,
        )
        content = self.cross_norm(content + self.cross_dropout(attended))
        return self.feedforward(content)


def _deformable_attention(config: ModelConfig, levels: int) -> DeformableAttention:
    return DeformableAttention(config.hidden_dim, config.num_heads, levels, config.num_points)
