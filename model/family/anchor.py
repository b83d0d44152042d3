"""Anchor DETR (arXiv:2109.07107): queries are points of the image, each with several patterns.

N batch, P points, Q = P times the patterns, (H, W) cells, S = H W, C model width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import SelfAttention
from model.backbone import build_backbone
from model.config import ModelConfig
from model.family.row_column_attention import RowColumnAttention
from model.geometry import level_masks, valid_ratios, valid_sizes
from model.heads import Heads
from model.neck import build_neck
from model.official_names import official_name
from model.parts import Memory, Queries, References
from model.position import sine_features
from model.precision import full_precision
from model.queries import Formulation
from model.set_detector import SetDetector
from model.transformer import FeedForward


class AnchorQueries(Formulation):
    """Every pattern at every point (section 3.2): query `pattern P + point`.

    The network that encodes places along an axis is the encoder's, too.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.rand(config.num_queries, 2))
        self.patterns = nn.Parameter(torch.randn(config.num_patterns, config.hidden_dim))
        self.plane = _two_linear_layers(config.hidden_dim)
        self.axis = _two_linear_layers(config.hidden_dim)

    def forward(self, memory: Memory, heads: Any) -> Queries:
        """The same queries for each image, with references [N, Q, 2]. The position [N, Q, 3 C] has
        three parts: in the plane, for attention among queries; along x; along y."""
        batch, (patterns, width) = memory.tokens.shape[0], self.patterns.shape
        points = full_precision(self.points)
        in_plane = sine_features(points.flip(-1) * (2 * math.pi), width // 2).flatten(-2)
        in_plane = self.plane(in_plane.to(self.points.dtype))
        position = torch.cat((in_plane, *self.along_axis(points.T)), dim=-1)
        points = points.repeat(patterns, 1).expand(batch, -1, -1)
        return Queries(
            self.patterns.repeat_interleave(len(self.points), dim=0).expand(batch, -1, -1),
            position.repeat(patterns, 1).expand(batch, -1, -1),
            References(attend=points, correct=points),
        )

    def along_axis(self, places: Tensor) -> Tensor:
        """places [...] from 0 to 1 to [..., C]."""
        features = sine_features(places * (2 * math.pi), self.patterns.shape[-1])
        return self.axis(features.to(self.points.dtype))


class AnchorEncoderLayer(nn.Module):
    """Every token attends to the columns and rows of its map; then a feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = RowColumnAttention(config.hidden_dim, config.num_heads, config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.feedforward = _feedforward(config)

    def forward(self, memory: Memory) -> Tensor:
        """The tokens [N, S, C] of the next layer."""
        height, width = memory.shapes[0]
        cells = memory.tokens.unflatten(1, (height, width))
        columns, rows = memory.position.split((width, height), dim=1)
        along_x, along_y = cells + columns[:, None], cells + rows[:, :, None]
        attended = self.attention(along_x.flatten(1, 2), along_y.flatten(1, 2), memory)
        return self.feedforward(self.norm(memory.tokens + self.dropout(attended)))


class AnchorDecoderLayer(nn.Module):
    """Queries attend to each other, then to columns and rows; then a feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, heads, dropout = config.hidden_dim, config.num_heads, config.dropout
        self.self_attention = SelfAttention(width, heads, dropout)
        self.self_attention.output_proj.reset_parameters()
        nn.init.zeros_(self.self_attention.output_proj.bias)
        self.self_dropout = nn.Dropout(dropout)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = RowColumnAttention(width, heads, dropout)
        self.cross_dropout = nn.Dropout(dropout)
        self.cross_norm = nn.LayerNorm(width)
        self.feedforward = _feedforward(config)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        references: References,
        memory: Memory,
        mask: Tensor | None = None,
    ) -> Tensor:
        """content [N, Q, C]; position [N, Q, 3 C]; mask [Q, Q] bool, True where the first may not
        see the second. Gives [N, Q, C]."""
        in_plane, along_x, along_y = position.chunk(3, dim=-1)
        attended = self.self_attention(content, in_plane, mask=mask)
        content = self.self_norm(content + self.self_dropout(attended))
        attended = self.cross_attention(content + along_x, content + along_y, memory)
        content = self.cross_norm(content + self.cross_dropout(attended))
        return self.feedforward(content)


class AnchorDETR(SetDetector):
    """Anchor DETR on the backbone's last map, numerically the published implementation.

    Memory's `position` is [N, W + H, C]: the columns' places, then the rows'.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config)
        self.neck = build_neck(config, self.backbone.channels)
        self.neck.to(memory_format=torch.channels_last)
        self.encoder = nn.ModuleList(
            AnchorEncoderLayer(config) for _ in range(config.encoder_layers)
        )
        self.decoder = nn.ModuleList(
            AnchorDecoderLayer(config) for _ in range(config.decoder_layers)
        )
        self.heads = Heads(config)
        self.queries: AnchorQueries = AnchorQueries(config)

    def encode(self, images: Tensor, padding_mask: Tensor) -> Memory:
        (x,) = self.neck(self.backbone(images.to(self.queries.points.dtype)))
        shapes = [(x.shape[-2], x.shape[-1])]
        masks = level_masks(padding_mask, shapes)
        places = torch.cat((_centres(masks[0][:, 0, :]), _centres(masks[0][:, :, 0])), dim=1)
        sizes = valid_sizes(masks)
        memory = Memory(
            tokens=x.flatten(2).transpose(1, 2),
            position=self.queries.along_axis(places),
            masks=masks,
            padding=masks[0].flatten(1),
            shapes=shapes,
            sizes=sizes,
            ratios=valid_ratios(sizes, shapes),
        )
        for layer in self.encoder:
            memory = memory._replace(tokens=self._run(layer, memory))
        return memory

    def official_names(self, key: str) -> list[str]:
        """One pair of heads has a name for each decoder layer."""
        name = official_name(key, _OFFICIAL)
        if not key.startswith("heads."):
            return [name]
        return [name.replace(".0.", f".{layer}.", 1) for layer in range(len(self.decoder))]


# Ours to the names of megvii-research/AnchorDETR.
_OFFICIAL = [
    (r"^backbone\.", "backbone.body."),
    (r"^neck\.levels\.", "input_proj."),
    (r"^queries\.points$", "transformer.position.weight"),
    (r"^queries\.patterns$", "transformer.pattern.weight"),
    (r"^queries\.plane\.", "transformer.adapt_pos2d."),
    (r"^queries\.axis\.", "transformer.adapt_pos1d."),
    (r"^(encoder|decoder)\.", r"transformer.\1_layers."),
    (r"\.feedforward\.norm\.", ".ffn.norm2."),
    (r"\.feedforward\.", ".ffn."),
    (r"(encoder_layers\.\d+)\.attention\.", r"\1.self_attn."),
    (r"(encoder_layers\.\d+)\.norm\.", r"\1.norm1."),
    (r"\.self_attention\.", ".self_attn."),
    (r"\.cross_attention\.", ".cross_attn."),
    (r"_attn\.(query_key|query_x|query_y|key_x|key_y|value)_proj\.", "_attn.in_proj_"),
    (r"_attn\.output_proj\.", "_attn.out_proj."),
    (r"\.self_norm\.", ".norm2."),
    (r"\.cross_norm\.", ".norm1."),
    (r"^heads\.classes\.", "transformer.class_embed."),
    (r"^heads\.boxes\.0\.hidden\.0\.", "transformer.bbox_embed.0.layers.0."),
    (r"^heads\.boxes\.0\.hidden\.2\.", "transformer.bbox_embed.0.layers.1."),
    (r"^heads\.boxes\.0\.output\.", "transformer.bbox_embed.0.layers.2."),
]


def _two_linear_layers(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def _feedforward(config: ModelConfig) -> FeedForward:
    """As nn.Linear starts, which the published code leaves as it is."""
    feedforward = FeedForward(config.hidden_dim, config.feedforward_dim, config.dropout)
    feedforward.linear1.reset_parameters()
    feedforward.linear2.reset_parameters()
    return feedforward


def _centres(padding: Tensor) -> Tensor:
    """Cells of an axis [N, n], True on padding, to their centres [N, n] float32, 0 to 1 over the
    valid ones; those of padding are the last valid one's."""
    count = (~padding).cumsum(1, dtype=torch.float32)
    return (count - 0.5) / count[:, -1:]
