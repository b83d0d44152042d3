"""DAB-Deformable-DETR (arXiv:2201.12329, appendix C): Deformable DETR with box refinement, whose
queries are anchor boxes and contents. N batch, Q queries, C model width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.family.anchors import ANCHOR_EPS, encode_anchors
from model.family.concat_attention import two_layers
from model.family.denoising import DenoisingQueries
from model.heads import Heads
from model.multi_scale import MultiScaleDetector
from model.official_names import deformable_detr_names, rename
from model.parts import Memory, Queries, References
from model.precision import full_precision
from model.queries import Formulation
from model.transformer import DecoderLayer

# Ours to the names of IDEA-Research/DAB-DETR and DN-DETR; the others are Deformable DETR's.
_NAMES = [
    (r"^queries\.content$", "tgt_embed.weight"),
    (r"^queries\.anchors$", "refpoint_embed.weight"),
    (r"^queries\.labels\.", "label_enc."),
    (r"^queries\.scale\.", "transformer.decoder.query_scale."),
    (r"^queries\.position\.", "transformer.decoder.ref_point_head."),
    (r"(query_scale|_head)\.0\.", r"\1.layers.0."),
    (r"(query_scale|_head)\.2\.", r"\1.layers.1."),
]


class AnchorAndContentQueries(Formulation):
    """Learned anchors and contents.

    With denoising (DN-DETR) the last number of a content is 1 in denoising queries,
    whose others are of their label, and 0 in those that detect.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.width = width
        denoised = config.denoising_groups > 0
        self.content = nn.Parameter(torch.randn(config.num_queries, width - int(denoised)))
        self.anchors = nn.Parameter(torch.randn(config.num_queries, 4))
        self.labels = nn.Embedding(config.num_classes + 1, width - 1) if denoised else None
        self.position = two_layers(2 * width, nn.Linear(width, width))
        if config.decoder_layers > 1:
            self.scale = two_layers(width, nn.Linear(width, width))

    def forward(self, memory: Memory, heads: nn.Module) -> Queries:
        """The same queries for each image."""
        batch = memory.tokens.shape[0]
        content = self.content if self.labels is None else F.pad(self.content, (0, 1))
        anchors = full_precision(self.anchors).sigmoid().expand(batch, -1, -1)
        return Queries(
            content.expand(batch, -1, -1),
            None,
            References(attend=anchors, correct=anchors),
            finest=memory.ratios[:, 0],
        )

    def content_of(self, labels: Tensor) -> Tensor:
        """Labels [X] int64 to the contents [X, C] of denoising queries."""
        assert self.labels is not None
        return F.pad(self.labels(labels), (0, 1), value=1.0)

    def at(
        self, layer: int, queries: Queries, content: Tensor, references: References | None
    ) -> Tensor:
        """[N, Q, C] from the anchors that enter the layer, on the padded finest level; scaled by
        the content from the second layer on."""
        assert references is not None
        assert queries.finest is not None
        anchors = references.attend * torch.cat((queries.finest, queries.finest), dim=-1)[:, None]
        position = self.position(encode_anchors(anchors, self.width).to(content.dtype))
        return position if layer == 0 else position * self.scale(content)


class DABDeformableDETR(MultiScaleDetector):
    """DAB-Deformable-DETR, with `denoising_groups` DN-Deformable-DETR, numerically the published
    implementations."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.heads = Heads(config, ANCHOR_EPS)
        self.queries = AnchorAndContentQueries(config)
        if config.denoising_groups:
            self.training_queries.append(DenoisingQueries(config, self.queries.content_of))

    def official_names(self, key: str) -> list[str]:
        renamed = rename(key, _NAMES)
        return [renamed] if renamed != key else deformable_detr_names(key, self.config)
