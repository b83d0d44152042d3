"""SAM-DETR (arXiv:2203.06883): DETR whose queries are re-sampled from the memory in each layer.

N batch, Q queries, S tokens of all levels together, L levels, C model width.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.dense_detr import DenseDetector
from model.family.concat_attention import LAYER_NAMES, SummedSelfAttention
from model.family.semantics_aligner import AlignedAttention, SemanticsAligner
from model.heads import BoxHead, Heads, corrected
from model.multi_scale import MultiScaleDetector
from model.official_names import deformable_detr_names, detr_names, rename
from model.parts import Memory, Prediction, Queries, References
from model.position import encode_boxes, sine_features
from model.precision import FullPrecisionGroupNorm, full_precision
from model.queries import Formulation
from model.transformer import EncoderLayer, FeedForward

_LAYER_NAMES = [
    (r"\.self_norm\.", ".norm1."),
    (r"\.cross_norm\.", ".norm2."),
    (r"\.aligner\.narrow\.", ".point1.0."),
    (r"\.aligner\.hidden\.", ".point2."),
    (r"\.aligner\.points\.", ".point2.6."),
    (r"\.aligner\.content_gate\.", ".attn1."),
    (r"\.aligner\.position_gate\.", ".attn2."),
    (r"\.cross_attention\.(query|key)_proj\.", r".cross_attention.\1_content_proj."),
    (r"\.cross_attention\.query_position\.0\.", ".ca_qpos_sine_proj.layers.0."),
    (r"\.cross_attention\.query_position\.2\.", ".ca_qpos_sine_proj.layers.1."),
    (r"\.cross_attention\.key_position\.0\.", ".ca_kpos_sine_proj.layers.0."),
    (r"\.cross_attention\.key_position\.2\.", ".ca_kpos_sine_proj.layers.1."),
    *LAYER_NAMES,
]
_DENSE_NAMES = [
    *_LAYER_NAMES,
    (r"^input_proj\.(weight|bias)", r"input_proj.0.0.\1"),
    (r"^input_proj\.norm\.", "input_proj.0.1."),
    (r"^heads\.classes\.", "class_embed."),
    (r"^heads\.boxes\.(\d+)\.hidden\.0\.", r"bbox_embed.\1.layers.0."),
    (r"^heads\.boxes\.(\d+)\.hidden\.2\.", r"bbox_embed.\1.layers.1."),
    (r"^heads\.boxes\.(\d+)\.output\.", r"bbox_embed.\1.layers.2."),
]


class BoxQueries(Formulation):
    """A query is a learned reference box, kept as logits, and nothing else: its content starts at
    0, its position is the encoded centre of the box that enters a layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width = config.hidden_dim
        self.embed = nn.Parameter(torch.randn(config.num_queries, 4))

    def forward(self, memory: Memory, heads: Any) -> Queries:
        """The same queries for each image; references as `SamHeads` has them."""
        batch = memory.tokens.shape[0]
        logits = full_precision(self.embed).expand(batch, -1, -1)
        content = memory.tokens.new_zeros(batch, len(self.embed), self.width)
        return Queries(content, None, References(logits.sigmoid(), logits.detach()))

    def at(
        self, layer: int, queries: Queries, content: Tensor, references: References | None
    ) -> Tensor:
        assert references is not None
        centres = references.attend[..., :2].detach().flip(-1)  # (y, x), as tokens are encoded
        return encode_boxes(centres, self.width).to(content.dtype)


class SamHeads(Heads):
    """Heads of their own for each layer. The boxes that go on are corrected as logits that nothing
    clamps (`References.correct`), those that are predicted by way of the boxes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        first = self.boxes[0]
        assert isinstance(first, BoxHead)
        first.start_sizes_at(0.0)

    def forward(
        self, layer: int, state: Tensor, references: References
    ) -> tuple[Prediction, References]:
        change = self.boxes[layer](state)
        boxes = corrected(references.attend, change)
        logits = (references.correct + change).detach()
        return (self.classes[layer](state), boxes), References(logits.sigmoid(), logits)


class SamDecoderLayer(nn.Module):
    """Queries attend to each other, are aligned with one level of the memory and attend to it;
    then a feed-forward (section 3.2)."""

    def __init__(self, config: ModelConfig, level: int) -> None:
        super().__init__()
        self.level = level
        width, heads, dropout = config.hidden_dim, config.num_heads, config.dropout
        self.self_attention = SummedSelfAttention(width, heads, dropout)
        self.self_dropout = nn.Dropout(dropout)
        self.self_norm = nn.LayerNorm(width)
        self.aligner = SemanticsAligner(width, heads, config.salient_gaussians)
        self.cross_attention = AlignedAttention(width, heads, dropout)
        self.cross_dropout = nn.Dropout(dropout)
        self.cross_norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(width, config.feedforward_dim, dropout)

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
        attended = self.self_attention(content, position, mask)
        content = self.self_norm(content + self.self_dropout(attended))
        memory = one_level(memory, self.level)
        queries = self.aligner(content, references.attend, memory)
        attended = self.cross_attention(queries, memory)
        content = self.cross_norm(content + self.cross_dropout(attended))
        return self.feedforward(content)


class SamDETR(DenseDetector):
    """SAM-DETR on the backbone's last map, numerically the published implementation
    (ZhangGongjie/SAM-DETR)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.input_norm:
            self.input_proj = NormedProjection(self.backbone.channels[-1], config.hidden_dim)
        self.decoder = _decoder(config)
        self.heads = SamHeads(config)
        self.queries = BoxQueries(config)

    def encode_position(self, masks: list[Tensor]) -> Tensor:
        return encode_cells_in_published_order(masks, self.config.hidden_dim)

    def official_names(self, key: str) -> list[str]:
        names = detr_names(rename(key, _DENSE_NAMES))
        if names[0].startswith("bbox_embed."):
            names.append(f"transformer.decoder.{names[0]}")
        return names


class SamMultiScaleDETR(MultiScaleDetector):
    """SAM-DETR on L maps, numerically the published implementation: a deformable encoder with a
    feed-forward half as wide, and decoder layers that go from the coarsest map to the finest."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        slim = replace(config, feedforward_dim=config.feedforward_dim // 2)
        self.encoder = nn.ModuleList(EncoderLayer(slim) for _ in range(config.encoder_layers))
        self.decoder = _decoder(config)
        self.heads = SamHeads(config)
        self.queries = BoxQueries(config)

    def encode_position(self, masks: list[Tensor]) -> Tensor:
        return encode_cells_in_published_order(masks, self.config.hidden_dim)

    def official_names(self, key: str) -> list[str]:
        return deformable_detr_names(rename(key, _LAYER_NAMES), self.config)


class NormedProjection(nn.Conv2d):
    """A 1x1 convolution with a group norm of 32 groups behind it."""

    def __init__(self, channels: int, hidden_dim: int) -> None:
        super().__init__(channels, hidden_dim, 1)
        self.norm = FullPrecisionGroupNorm(32, hidden_dim)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """[N, c, H, W] to [N, C, H, W]."""
        return self.norm(super().forward(x))


def one_level(memory: Memory, level: int) -> Memory:
    """The part of a memory that belongs to one level."""
    counts = [height * width for height, width in memory.shapes]
    tokens, position, padding = (
        x.split(counts, dim=1)[level] for x in (memory.tokens, memory.position, memory.padding)
    )
    here = slice(level, level + 1)
    return Memory(
        tokens, position, memory.masks[here], padding, memory.shapes[here],
        memory.sizes[:, here], memory.ratios[:, here],
    )  # fmt: skip


def encode_cells_in_published_order(masks: list[Tensor], hidden_dim: int) -> Tensor:
    """As `encode_cells`, but for the order of its additions: [N, H_l, W_l] bool for each level,
    True on padding, to [N, S, C] float32.

    RoIAlign reads padded cells beside the valid area. In a column without a valid cell the places
    are divided by what rounding leaves of -0.5 + 1e-6 + 0.5, which makes some 3e6 radians: their
    sine in another order of operations would be another number.
    """
    angles = torch.cat([_cell_angles(~mask) for mask in masks], dim=1)
    return sine_features(angles, hidden_dim // 2).flatten(-2)


def _cell_angles(valid: Tensor) -> Tensor:
    """[N, H, W] valid cells to [N, H W, 2] angles (y, x)."""
    y = valid.cumsum(1, dtype=torch.float32) - 0.5
    x = valid.cumsum(2, dtype=torch.float32) - 0.5
    y = y / (y[:, -1:, :] + 1e-6 + 0.5) * (2 * math.pi)
    x = x / (x[:, :, -1:] + 1e-6 + 0.5) * (2 * math.pi)
    return torch.stack((y, x), dim=-1).flatten(1, 2)


def _decoder(config: ModelConfig) -> nn.ModuleList:
    """Layers in equal parts to the levels, the coarsest first."""
    levels, layers = config.num_levels, config.decoder_layers
    return nn.ModuleList(
        SamDecoderLayer(config, level=levels - 1 - index * levels // layers)
        for index in range(layers)
    )
