"""DAB-DETR (arXiv:2201.12329): queries are anchor boxes, which each decoder layer corrects, and
whose width and height shape where it looks.

N batch, Q queries, C model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.dense_detr import DenseDetector
from model.family.anchors import AnchorHeads, encode_anchors
from model.family.concat_attention import (
    LAYER_NAMES,
    ConditionalDecoderLayer,
    ConditionalPosition,
    two_layers,
)
from model.family.denoising import DenoisingQueries
from model.official_names import detr_names, rename
from model.parts import Memory, Queries, References
from model.position import encode_cells
from model.precision import full_precision
from model.queries import Formulation

TEMPERATURE = 20.0
"""Of the cells' position encoding (section 4, temperature tuning); the anchors' is 10000."""

# Ours to the names of IDEA-Research/DAB-DETR and DN-DETR; the others are DETR's.
_NAMES = [
    *LAYER_NAMES,
    (r"^queries\.anchors$", "refpoint_embed.weight"),
    (r"^queries\.labels\.", "label_enc."),
    (r"^queries\.patterns$", "transformer.patterns.weight"),
    (r"^encoder_scale\.", "transformer.encoder.query_scale."),
    (r"^queries\.scale\.", "transformer.decoder.query_scale."),
    (r"^queries\.position\.", "transformer.decoder.ref_point_head."),
    (r"^queries\.size\.", "transformer.decoder.ref_anchor_head."),
    (r"(query_scale|_head)\.0\.", r"\1.layers.0."),
    (r"(query_scale|_head)\.2\.", r"\1.layers.1."),
]


class AnchorQueries(Formulation):
    """Learned anchors (section 4). Their content starts at 0, or with `num_patterns` at each of
    as many learned patterns, query p Q + q being anchor q with pattern p.

    With denoising (DN-DETR) the content is that of a label, the one behind all classes
    for queries that detect; its last number is 1 in denoising queries and 0 in those.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, patterns = config.hidden_dim, config.num_patterns
        self.width, self.num_patterns = width, patterns
        self.anchors = nn.Parameter(torch.randn(config.num_queries, 4))
        self.patterns = nn.Parameter(torch.randn(patterns, width)) if patterns else None
        self.labels: nn.Embedding | None = None
        if config.denoising_groups:
            self.labels = nn.Embedding(config.num_classes + 1, width - 1)
        self.position = two_layers(2 * width, nn.Linear(width, width))
        if config.decoder_layers > 1:
            self.scale = two_layers(width, nn.Linear(width, width))
        self.size = two_layers(width, nn.Linear(width, 2))

    def forward(self, memory: Memory, heads: nn.Module) -> Queries:
        """The same queries for each image."""
        batch, copies = memory.tokens.shape[0], max(self.num_patterns, 1)
        anchors = full_precision(self.anchors).sigmoid().repeat(copies, 1).expand(batch, -1, -1)
        content = self._content().expand(batch, -1, -1)
        return Queries(content, None, References(attend=anchors, correct=anchors))

    def _content(self) -> Tensor:
        """[Q, C]."""
        content = self.anchors.new_zeros(self.anchors.shape[0], self.width)
        if self.labels is not None:
            none = torch.full((1,), self.labels.num_embeddings - 1, device=content.device)
            content = content + F.pad(self.labels(none), (0, 1))
        if self.patterns is not None:
            content = (self.patterns[:, None] + content).flatten(0, 1)
        return content

    def content_of(self, labels: Tensor) -> Tensor:
        """Labels [X] int64 to the contents [X, C] of denoising queries."""
        assert self.labels is not None
        return F.pad(self.labels(labels), (0, 1), value=1.0)

    def at(
        self, layer: int, queries: Queries, content: Tensor, references: References | None
    ) -> ConditionalPosition:
        """Both from the anchors that enter the layer. The sine, scaled by the content from the
        second layer on, is modulated in x by w_c / w and in y by h_c / h, (w_c, h_c) the size that
        the content asks for (section 4, modulated Gaussian kernel)."""
        assert references is not None
        anchors = references.attend
        encoded = encode_anchors(anchors, self.width)
        sine = encoded[..., : self.width]
        if layer > 0:
            sine = sine * self.scale(content)
        stretch = full_precision(self.size(content)).sigmoid() / anchors[..., 2:]
        by_x, by_y = stretch.split(1, dim=-1)
        in_y, in_x = sine.chunk(2, dim=-1)
        sine = torch.cat((in_y * by_y, in_x * by_x), dim=-1)
        return ConditionalPosition(
            learned=self.position(encoded.to(content.dtype)), sine=sine.to(content.dtype)
        )


class DABDETR(DenseDetector):
    """DAB-DETR, with `denoising_groups` DN-DETR, numerically the published implementations.

    Feed-forwards have PReLU, with one learned slope each. The encoder scales positions by the
    state that enters a layer.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width = config.hidden_dim
        self.encoder_scale = two_layers(width, nn.Linear(width, width))
        self.decoder = nn.ModuleList(
            ConditionalDecoderLayer(config, first=index == 0)
            for index in range(config.decoder_layers)
        )
        for layer in (*self.encoder, *self.decoder):
            layer.feedforward.activation = nn.PReLU()
        self.heads = AnchorHeads(config)
        self.queries = AnchorQueries(config)
        if config.denoising_groups:
            self.training_queries.append(DenoisingQueries(config, self.queries.content_of))

    def encode_position(self, masks: list[Tensor]) -> Tensor:
        return encode_cells(masks, self.config.hidden_dim, shift=0.0, temperature=TEMPERATURE)

    def encode_tokens(self, tokens: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        for layer in self.encoder:
            scaled = position * self.encoder_scale(tokens)
            tokens = self._run(layer, tokens, scaled, padding)
        return tokens

    def official_names(self, key: str) -> list[str]:
        names = detr_names(rename(key, _NAMES))
        if key.startswith("heads.boxes."):
            names.append(f"transformer.decoder.{names[0]}")
        return names
