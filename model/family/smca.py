"""SMCA DETR (arXiv:2101.07448) on a single scale: DETR whose queries look around a centre.

N batch, Q queries, S tokens of an H x W map, M heads, C model width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import CrossAttention
from model.config import ModelConfig
from model.dense_detr import DenseDecoderLayer, DenseDetector
from model.geometry import valid_sizes
from model.heads import DirectHeads
from model.official_names import detr_names, rename
from model.parts import Memory, Prediction, Queries, References
from model.precision import FullPrecisionLinear
from model.queries import Formulation

STRIDE = 32
"""Pixels of a cell: the published model takes it for granted."""
BANDWIDTH = 8.0
"""What squared distances in cells are divided by."""

_NAMES = [
    (r"^queries\.reference\.0\.", "transformer.decoder.layers.0.point1.layers.0."),
    (r"^queries\.reference\.2\.", "transformer.decoder.layers.0.point1.layers.1."),
    (r"^queries\.reference\.4\.", "transformer.decoder.layers.0.point1.layers.2."),
    (r"^queries\.foci\.(\d+)\.norm\.", r"transformer.decoder.layers.\1.norm4."),
    (r"^queries\.foci\.(\d+)\.offsets\.", r"transformer.decoder.layers.\1.point2."),
    (r"^queries\.foci\.(\d+)\.scales\.", r"transformer.decoder.layers.\1.point3."),
]


class Focus(NamedTuple):
    """What a decoder layer knows of where its queries are."""

    learned: Tensor
    """[N, Q, C]."""
    offsets: Tensor
    """[N, M, Q, 2], each head's centre in cells (x, y) from the reference."""
    scales: Tensor
    """[N, M, Q, 2 or 3] of the distances in x, in y and, with a third, of their product."""


class FocusHead(nn.Module):
    """Where each head of a layer looks and how closely, from what enters the layer (sections 3.2,
    3.3). Scales start at 1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, heads = config.hidden_dim, config.num_heads
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.offsets = FullPrecisionLinear(width, 2 * heads)
        nn.init.xavier_uniform_(self.offsets.weight)
        self.scales = None
        if config.dynamic_scale != "type1":
            count = {"type2": 1, "type3": 2, "type4": 3}[config.dynamic_scale]
            self.scales = FullPrecisionLinear(width, count * heads)
            nn.init.zeros_(self.scales.weight)
            nn.init.ones_(self.scales.bias)

    def forward(self, content: Tensor, position: Tensor) -> Focus:
        """content, position [N, Q, C]."""
        state = self.norm(content + position)
        offsets = self._by_head(self.offsets(state))
        if self.scales is None:
            return Focus(position, offsets, torch.ones_like(offsets))
        scales = self._by_head(self.scales(state))
        return Focus(
            position, offsets, scales.expand_as(offsets) if scales.shape[-1] == 1 else scales
        )

    def _by_head(self, x: Tensor) -> Tensor:
        """[N, Q, M K] to [N, M, Q, K]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FocusedQueries(Formulation):
    """DETR's queries, each with a reference point that its position gives for all layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.embed = nn.Parameter(torch.randn(config.num_queries, width))
        self.foci = nn.ModuleList(FocusHead(config) for _ in range(config.decoder_layers))
        self.reference = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            FullPrecisionLinear(width, 2),
        )
        for layer in self.reference:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, memory: Memory, heads: Any) -> Queries:
        """The same queries for each image. `References.correct` are the logits of the points, which
        the published heads correct without clamping them."""
        batch = memory.tokens.shape[0]
        position = self.embed.expand(batch, -1, -1)
        first = self.foci[0]
        assert isinstance(first, FocusHead)
        logits = self.reference(first.norm(self.embed)).expand(batch, -1, -1)
        references = References(attend=logits.sigmoid(), correct=logits)
        return Queries(torch.zeros_like(position), position, references)

    def at(
        self, layer: int, queries: Queries, content: Tensor, references: References | None
    ) -> Focus:
        return self.foci[layer](content, queries.position)


class ModulatedCrossAttention(CrossAttention):
    """Attention of queries over all tokens whose logits a Gaussian of each head is added to
    (equation 3)."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, gaussian: Tensor) -> Tensor:
        """query [N, Q, C]; key, value [N, S, C]; gaussian [N, M, Q, S], its logarithm, -inf where
        no one looks."""
        query, key, value = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj, x in (
                (self.query_proj, query), (self.key_proj, key), (self.value_proj, value)
            )
        )  # fmt: skip
        attended = F.scaled_dot_product_attention(
            query, key, value, gaussian.to(query.dtype), self.dropout if self.training else 0.0
        )
        # Not by a view: in a graph for ONNX the strides are others than where it was traced.
        return self.output_proj(torch.cat(attended.unbind(1), dim=-1))


class SMCADecoderLayer(DenseDecoderLayer):
    """DETR's, with a modulated cross-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.cross_attention = ModulatedCrossAttention(
            config.hidden_dim, config.num_heads, config.dropout
        )

    def forward(  # type: ignore[override]
        self,
        content: Tensor,
        position: Focus,
        references: References,
        memory: Memory,
        mask: Tensor | None = None,
    ) -> Tensor:
        attended = self.self_attention(content, position.learned, mask=mask)
        content = self.self_norm(content + self.self_dropout(attended))
        attended = self.cross_attention(
            content + position.learned,
            memory.tokens + memory.position,
            memory.tokens,
            _gaussian_of(position, references, memory),
        )
        content = self.cross_norm(content + self.cross_dropout(attended))
        return self.feedforward(content)


def _gaussian_of(focus: Focus, references: References, memory: Memory) -> Tensor:
    """[N, M, Q, S] as `ModulatedCrossAttention` takes it."""
    assert memory.pixels is not None
    cells = references.attend * memory.pixels[:, None] / STRIDE
    gaussian = log_gaussian(cells[:, None] + focus.offsets, focus.scales, memory.shapes[0])
    gaussian = gaussian.masked_fill(memory.padding[:, None, None], float("-inf"))
    # Softmax does not see it, but what is then rounded to 16 bits is small where it matters.
    return gaussian - gaussian.detach().amax(-1, keepdim=True)


def log_gaussian(centres: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """The logarithm of each head's weight of each cell (section 3.2): -(s_x^2 dx^2 + s_y^2 dy^2 +
    s_xy^2 dx^2 dy^2) / 8, the last term with three scales alone.

    centres [N, M, Q, 2] in cells (x, y), a cell lying at its index; scales [N, M, Q, 2 or 3];
    shape (H, W). Returns [N, M, Q, H W].
    """
    height, width = shape
    dx = (centres[..., :1] - torch.arange(width, device=centres.device)).square()
    dy = (centres[..., 1:] - torch.arange(height, device=centres.device)).square()
    sharpness = scales.square()
    distance = (sharpness[..., 1:2] * dy)[..., :, None] + (sharpness[..., :1] * dx)[..., None, :]
    if scales.shape[-1] == 3:
        distance = distance + (sharpness[..., 2:] * dy)[..., :, None] * dx[..., None, :]
    return distance.flatten(-2) / -BANDWIDTH


class CentredHeads(DirectHeads):
    """DETR's heads, whose boxes are centred on the reference points of all layers alike."""

    def forward(
        self, layer: int, state: Tensor, references: References | None
    ) -> tuple[Prediction, References | None]:
        """The prediction from state [N, Q, C] of any decoder layer; `references.correct` are
        logits."""
        assert references is not None
        state = self.norm(state)
        change = self.boxes(state)
        centre = change[..., :2] + references.correct
        boxes = torch.cat((centre, change[..., 2:]), dim=-1).sigmoid()
        return (self.classes(state), boxes), references


class SMCADETR(DenseDetector):
    """SMCA DETR on one map, numerically the published implementation (gaopengcuhk/SMCA-DETR).

    Its post-processing gives detections of the class for no object, too, which COCO's evaluation
    passes over; ours leaves them out.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.queries = FocusedQueries(config)
        self.decoder = nn.ModuleList(SMCADecoderLayer(config) for _ in range(config.decoder_layers))
        self.heads = CentredHeads(config)

    def encode(self, images: Tensor, padding_mask: Tensor) -> Memory:
        pixels = valid_sizes([padding_mask])[:, 0]
        return super().encode(images, padding_mask)._replace(pixels=pixels)

    def official_names(self, key: str) -> list[str]:
        return detr_names(rename(key, _NAMES))
