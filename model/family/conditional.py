"""Conditional DETR (arXiv:2108.06152): DETR whose queries look for a place apart from a content.

N batch, Q queries, C model width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.dense_detr import DenseDetector
from model.family.concat_attention import (
    LAYER_NAMES,
    ConditionalDecoderLayer,
    ConditionalPosition,
    two_layers,
)
from model.heads import DirectHeads, corrected
from model.official_names import detr_names, rename
from model.parts import Memory, Prediction, Queries, References
from model.position import encode_boxes
from model.precision import FullPrecisionLinear
from model.queries import Formulation

_NAMES = [
    *LAYER_NAMES,
    (r"^queries\.reference\.0\.", "transformer.decoder.ref_point_head.layers.0."),
    (r"^queries\.reference\.2\.", "transformer.decoder.ref_point_head.layers.1."),
    (r"^queries\.scale\.0\.", "transformer.decoder.query_scale.layers.0."),
    (r"^queries\.scale\.2\.", "transformer.decoder.query_scale.layers.1."),
]


class ConditionalQueries(Formulation):
    """Learned queries, each with a reference point of its own for all layers (sections 3.2, 3.3).

    A layer's spatial query is the encoded point times a diagonal that the content before the layer
    predicts; the first layer's is the encoded point itself.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.width = width
        self.embed = nn.Parameter(torch.randn(config.num_queries, width))
        self.reference = two_layers(width, FullPrecisionLinear(width, 2))
        if config.decoder_layers > 1:
            self.scale = two_layers(width, nn.Linear(width, width))

    def forward(self, memory: Memory, heads: Any) -> Queries:
        """The same queries for each image, with references [N, Q, 2]; the content starts at 0."""
        batch = memory.tokens.shape[0]
        position = self.embed.expand(batch, -1, -1)
        points = self.reference(self.embed).sigmoid().expand(batch, -1, -1)
        return Queries(
            torch.zeros_like(position), position, References(attend=points, correct=points)
        )

    def at(
        self, layer: int, queries: Queries, content: Tensor, references: References | None
    ) -> ConditionalPosition:
        assert queries.position is not None
        assert references is not None
        points = references.attend.flip(-1)  # (y, x), the order of the tokens' encoding
        sine = encode_boxes(points, self.width).to(content.dtype)
        return ConditionalPosition(queries.position, self.scale(content) * sine if layer else sine)


class PointHeads(DirectHeads):
    """DETR's heads, whose boxes are centred on the reference points of all layers alike."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        nn.init.zeros_(self.boxes.output.weight)
        nn.init.zeros_(self.boxes.output.bias)

    def forward(
        self, layer: int, state: Tensor, references: References | None
    ) -> tuple[Prediction, References | None]:
        """The prediction from state [N, Q, C] of any decoder layer."""
        assert references is not None
        state = self.norm(state)
        boxes = corrected(references.correct, self.boxes(state))
        return (self.classes(state), boxes), references


class ConditionalDETR(DenseDetector):
    """Conditional DETR, numerically the published implementation (Atten4Vis/ConditionalDETR)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.queries = ConditionalQueries(config)
        self.decoder = nn.ModuleList(
            ConditionalDecoderLayer(config, first=index == 0)
            for index in range(config.decoder_layers)
        )
        self.heads = PointHeads(config)

    def official_names(self, key: str) -> list[str]:
        return detr_names(rename(key, _NAMES))
