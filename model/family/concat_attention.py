"""The decoder layer of Conditional DETR (arXiv:2108.06152, section 3.3), which DAB-DETR has too:
content and position have projections of their own, concatenated in the cross-attention.

N batch, Q queries, S tokens, M heads, C model width, D = C / M.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention import attend
from model.config import ModelConfig
from model.parts import Memory, References
from model.transformer import FeedForward

LAYER_NAMES = [
    (r"\.self_attention\.query_content_proj\.", ".sa_qcontent_proj."),
    (r"\.self_attention\.query_position_proj\.", ".sa_qpos_proj."),
    (r"\.self_attention\.key_content_proj\.", ".sa_kcontent_proj."),
    (r"\.self_attention\.key_position_proj\.", ".sa_kpos_proj."),
    (r"\.self_attention\.value_proj\.", ".sa_v_proj."),
    (r"\.self_attention\.output_proj\.", ".self_attn.out_proj."),
    (r"\.cross_attention\.query_content_proj\.", ".ca_qcontent_proj."),
    (r"\.cross_attention\.query_position_proj\.", ".ca_qpos_proj."),
    (r"\.cross_attention\.query_sine_proj\.", ".ca_qpos_sine_proj."),
    (r"\.cross_attention\.key_content_proj\.", ".ca_kcontent_proj."),
    (r"\.cross_attention\.key_position_proj\.", ".ca_kpos_proj."),
    (r"\.cross_attention\.value_proj\.", ".ca_v_proj."),
    (r"\.cross_attention\.output_proj\.", ".cross_attn.out_proj."),
]
"""Ours to the published names, in a decoder layer; what DETR names alike is left to its rules."""


class ConditionalPosition(NamedTuple):
    """What a decoder layer knows of where its queries are."""

    learned: Tensor
    """[N, Q, C], for the self-attention and the first cross-attention."""
    sine: Tensor
    """[N, Q, C], the encoded reference, scaled, for the cross-attention."""


class SummedSelfAttention(nn.Module):
    """Multi-head attention among queries; queries and keys are the sum of a projection of the
    content and one of the position."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_content_proj = _input_proj(hidden_dim)
        self.query_position_proj = _input_proj(hidden_dim)
        self.key_content_proj = _input_proj(hidden_dim)
        self.key_position_proj = _input_proj(hidden_dim)
        self.value_proj = _input_proj(hidden_dim)
        self.output_proj = _output_proj(hidden_dim)

    def forward(self, content: Tensor, position: Tensor, mask: Tensor | None = None) -> Tensor:
        """content, position [N, Q, C] to [N, Q, C]; mask [Q, Q] bool, True where the first may not
        see the second."""
        query = self.query_content_proj(content) + self.query_position_proj(position)
        key = self.key_content_proj(content) + self.key_position_proj(position)
        attended = attend(
            query, key, self.value_proj(content), mask, self.num_heads,
            self.dropout if self.training else 0.0,
        )  # fmt: skip
        return self.output_proj(attended)


class ConcatCrossAttention(nn.Module):
    """Conditional cross-attention: in each head content and position are concatenated, so that its
    logits are (content . content + position . position) / sqrt(2 D).

    In the first layer, whose queries have no content yet, positions are added to the contents, too:
    the learned one to the queries', the encoded one to the keys'.
    """

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float, first: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_content_proj = _input_proj(hidden_dim)
        self.query_position_proj = _input_proj(hidden_dim) if first else None
        self.query_sine_proj = _input_proj(hidden_dim)
        self.key_content_proj = _input_proj(hidden_dim)
        self.key_position_proj = _input_proj(hidden_dim)
        self.value_proj = _input_proj(hidden_dim)
        self.output_proj = _output_proj(hidden_dim)

    def forward(self, content: Tensor, position: ConditionalPosition, memory: Memory) -> Tensor:
        """content [N, Q, C] to [N, Q, C]; padded tokens are not looked at."""
        query = self.query_content_proj(content)
        key = self.key_content_proj(memory.tokens)
        place = self.key_position_proj(memory.position)
        sine = self.query_sine_proj(position.sine)
        if self.query_position_proj is not None:
            query = query + self.query_position_proj(position.learned)
            key = key + place
        attended = attend(
            self._concatenated(query, sine), self._concatenated(key, place),
            self.value_proj(memory.tokens), memory.padding[:, None, None], self.num_heads,
            self.dropout if self.training else 0.0,
        )  # fmt: skip
        return self.output_proj(attended)

    def _concatenated(self, content: Tensor, position: Tensor) -> Tensor:
        """Two [N, X, C] to [N, X, 2 C]: D numbers of the one and D of the other for each head."""
        heads = [x.unflatten(-1, (self.num_heads, -1)) for x in (content, position)]
        return torch.cat(heads, dim=-1).flatten(-2)


class ConditionalDecoderLayer(nn.Module):
    """Queries attend to each other, then to all tokens by content and by place; then a
    feed-forward."""

    def __init__(self, config: ModelConfig, first: bool) -> None:
        super().__init__()
        width, heads, dropout = config.hidden_dim, config.num_heads, config.dropout
        self.self_attention = SummedSelfAttention(width, heads, dropout)
        self.self_dropout = nn.Dropout(dropout)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = ConcatCrossAttention(width, heads, dropout, first)
        self.cross_dropout = nn.Dropout(dropout)
        self.cross_norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(width, config.feedforward_dim, dropout)

    def forward(
        self,
        content: Tensor,
        position: ConditionalPosition,
        references: References,
        memory: Memory,
        mask: Tensor | None = None,
    ) -> Tensor:
        """content [N, Q, C]; mask [Q, Q] bool, True where the first may not see the second. Gives
        [N, Q, C]."""
        attended = self.self_attention(content, position.learned, mask)
        content = self.self_norm(content + self.self_dropout(attended))
        attended = self.cross_attention(content, position, memory)
        content = self.cross_norm(content + self.cross_dropout(attended))
        return self.feedforward(content)


def two_layers(inputs: int, output: nn.Linear) -> nn.Sequential:
    """`output` behind a hidden layer with ReLU; both start by Xavier's rule."""
    hidden = nn.Linear(inputs, output.in_features)
    for layer in (hidden, output):
        nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(hidden, nn.ReLU(), output)


def _input_proj(width: int) -> nn.Linear:
    layer = nn.Linear(width, width)
    nn.init.xavier_uniform_(layer.weight)
    return layer


def _output_proj(width: int) -> nn.Linear:
    layer = _input_proj(width)
    nn.init.zeros_(layer.bias)
    return layer
