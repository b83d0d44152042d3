"""DETR (arXiv:2005.12872), the baseline of Table 1: dense attention over one map, set prediction.

N batch, Q queries, S tokens, C model width.
"""

import torch
from torch import Tensor, nn

from model.attention import CrossAttention, SelfAttention
from model.backbone import build_backbone
from model.config import ModelConfig
from model.geometry import level_masks, valid_ratios, valid_sizes
from model.heads import DirectHeads
from model.official_names import detr_names
from model.parts import Memory, References
from model.position import encode_cells
from model.queries import PlacelessQueries
from model.set_detector import SetDetector
from model.transformer import FeedForward


class DenseEncoderLayer(nn.Module):
    """Every token attends to every other; then a feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.hidden_dim, config.num_heads, config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.feedforward = FeedForward(config.hidden_dim, config.feedforward_dim, config.dropout)

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        """tokens, position [N, S, C]; padding [N, S] bool. Gives [N, S, C]."""
        attended = self.attention(tokens, position, padding)
        return self.feedforward(self.norm(tokens + self.dropout(attended)))


class DenseDecoderLayer(nn.Module):
    """Queries attend to each other, then to all tokens; then a feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, heads, dropout = config.hidden_dim, config.num_heads, config.dropout
        self.self_attention = SelfAttention(width, heads, dropout)
        self.self_dropout = nn.Dropout(dropout)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = CrossAttention(width, heads, dropout)
        self.cross_dropout = nn.Dropout(dropout)
        self.cross_norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(width, config.feedforward_dim, dropout)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        references: References | None,
        memory: Memory,
        mask: Tensor | None = None,
    ) -> Tensor:
        """content, position [N, Q, C]; mask [Q, Q] bool, True where the first may not see the
        second. Gives [N, Q, C]."""
        attended = self.self_attention(content, position, mask=mask)
        content = self.self_norm(content + self.self_dropout(attended))
        keys = memory.tokens + memory.position
        attended = self.cross_attention(content + position, keys, memory.tokens, memory.padding)
        content = self.cross_norm(content + self.cross_dropout(attended))
        return self.feedforward(content)


class DenseDetector(SetDetector):
    """The backbone's last map, and an encoder with dense attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config)
        self.input_proj = nn.Conv2d(self.backbone.channels[-1], config.hidden_dim, 1)
        self.input_proj.to(memory_format=torch.channels_last)
        self.encoder = nn.ModuleList(
            DenseEncoderLayer(config) for _ in range(config.encoder_layers)
        )

    def encode(self, images: Tensor, padding_mask: Tensor) -> Memory:
        x = self.input_proj(self.backbone(images.to(self.input_proj.weight.dtype))[-1])
        shapes = [(x.shape[-2], x.shape[-1])]
        masks = level_masks(padding_mask, shapes)
        padding = masks[0].flatten(1)
        tokens = x.flatten(2).transpose(1, 2)
        position = self.encode_position(masks).to(tokens.dtype)
        tokens = self.encode_tokens(tokens, position, padding)
        sizes = valid_sizes(masks)
        ratios = valid_ratios(sizes, shapes)
        return Memory(tokens, position, masks, padding, shapes, sizes, ratios)

    def encode_tokens(self, tokens: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        """tokens, position [N, S, C] and padding [N, S] through all layers: [N, S, C]."""
        for layer in self.encoder:
            tokens = self._run(layer, tokens, position, padding)
        return tokens

    def encode_position(self, masks: list[Tensor]) -> Tensor:
        """[N, S, C] of the cells of `masks`, one of [N, H, W]."""
        return encode_cells(masks, self.config.hidden_dim, shift=0.0)


class DenseDETR(DenseDetector):
    """DETR, numerically the published implementation.

    With `classification="focal"` and 300 queries it is the paper's DETR-DC5+ (section 5).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.queries = PlacelessQueries(config)
        self.decoder = nn.ModuleList(
            DenseDecoderLayer(config) for _ in range(config.decoder_layers)
        )
        self.heads = DirectHeads(config)

    def official_names(self, key: str) -> list[str]:
        return detr_names(key)
