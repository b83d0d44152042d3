"""DETR (arXiv:2005.12872), the baseline of Table 1: dense attention over one map, set prediction.

N batch, Q queries, S tokens, C model width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import CrossAttention, SelfAttention
from model.backbone import build_backbone
from model.config import ModelConfig
from model.geometry import level_masks
from model.heads import DirectHeads
from model.position import encode_cells
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
        self, content: Tensor, position: Tensor, keys: Tensor, memory: Tensor, padding: Tensor
    ) -> Tensor:
        """content, position [N, Q, C]; keys (tokens with their positions), memory [N, S, C];
        padding [N, S] bool. Gives [N, Q, C]."""
        attended = self.self_attention(content, position)
        content = self.self_norm(content + self.self_dropout(attended))
        attended = self.cross_attention(content + position, keys, memory, padding)
        content = self.cross_norm(content + self.cross_dropout(attended))
        return self.feedforward(content)


class DenseDETR(nn.Module):
    """DETR on the backbone's last map, numerically the published implementation.

    With `classification="focal"` and 300 queries it is the paper's DETR-DC5+ (section 5).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_dim
        self.backbone = build_backbone(config)
        self.input_proj = nn.Conv2d(self.backbone.channels[-1], width, 1)
        self.input_proj.to(memory_format=torch.channels_last)
        self.query_embed = nn.Parameter(torch.randn(config.num_queries, width))
        self.encoder = nn.ModuleList(
            DenseEncoderLayer(config) for _ in range(config.encoder_layers)
        )
        self.decoder = nn.ModuleList(
            DenseDecoderLayer(config) for _ in range(config.decoder_layers)
        )
        self.decoder_norm = nn.LayerNorm(width)
        self.heads = DirectHeads(config)

    def forward(self, images: Tensor, padding_mask: Tensor) -> dict[str, Any]:
        """Detect objects in a padded batch; arguments and result as `DeformableDETR.forward`.

        With softmax classification `pred_logits` has one more column, the last, for no object,
        and `classification` says so.
        """
        x = self.input_proj(self.backbone(images.to(self.query_embed.dtype))[-1])
        masks = level_masks(padding_mask, [(x.shape[-2], x.shape[-1])])
        padding = masks[0].flatten(1)
        memory = x.flatten(2).transpose(1, 2)
        position = encode_cells(masks, self.config.hidden_dim, shift=0.0).to(memory.dtype)
        for layer in self.encoder:
            memory = self._run(layer, memory, position, padding)

        queries = self.query_embed.expand(images.shape[0], -1, -1)
        content = torch.zeros_like(queries)
        keys = memory + position
        predictions = []
        for layer in self.decoder:
            content = self._run(layer, content, queries, keys, memory, padding)
            logits, boxes = self.heads(self.decoder_norm(content))
            predictions.append({"pred_logits": logits, "pred_boxes": boxes})
        outputs: dict[str, Any] = dict(predictions[-1])
        if self.config.classification == "softmax":
            outputs["classification"] = "softmax"
        if self.config.auxiliary_loss:
            outputs["aux_outputs"] = predictions[:-1]
        return outputs

    def _run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        if self.config.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)
