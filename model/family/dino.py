"""DINO (arXiv:2203.03605): Deformable DETR whose queries are anchors from a first stage of its own
classes, with learned contents, looked forward twice, and contrastive denoising.

N batch, S tokens, Q queries, C model width.
"""

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.family.anchors import AnchorHeads, encode_anchors
from model.family.concat_attention import two_layers
from model.family.contrastive_denoising import ContrastiveDenoising
from model.geometry import cell_proposals
from model.heads import BoxHead, start_at_prior
from model.multi_scale import MultiScaleDetector
from model.official_names import deformable_detr_names, rename
from model.parts import Memory, Queries, References
from model.position import encode_cells
from model.proposals import best_tokens
from model.queries import Formulation
from model.transformer import DecoderLayer

TEMPERATURE = 20.0
"""Of the cells' position encoding; the anchors' is 10000."""

# Ours to the names of IDEA-Research/DINO; the others are Deformable DETR's.
_NAMES = [
    (r"^queries\.content$", "transformer.tgt_embed.weight"),
    (r"^queries\.classes\.", "transformer.enc_out_class_embed."),
    (r"^queries\.boxes\.", "transformer.enc_out_bbox_embed."),
    (r"^queries\.position\.0\.", "transformer.decoder.ref_point_head.layers.0."),
    (r"^queries\.position\.2\.", "transformer.decoder.ref_point_head.layers.1."),
    (r"^heads\.norm\.", "transformer.decoder.norm."),
    (r"^heads\.classes\.", "class_embed."),
    (r"^heads\.boxes\.", "bbox_embed."),
    (r"(bbox_embed)\.hidden\.0\.", r"\1.layers.0."),
    (r"(bbox_embed)\.hidden\.2\.", r"\1.layers.1."),
    (r"(bbox_embed)\.output\.", r"\1.layers.2."),
    (r"^training_queries\.0\.labels\.", "label_enc."),
]


class SelectedAnchors(Formulation):
    """Mixed query selection (section 3.4): the boxes of the tokens that most look like any one
    class, with contents that are learned and know nothing of the tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.width = width
        self.scale = config.proposal_scale
        self.memory_proj = nn.Linear(width, width)
        self.memory_norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, config.num_classes)
        self.boxes = BoxHead(width)
        self.content = nn.Parameter(torch.randn(config.num_queries, width))
        self.position = two_layers(2 * width, nn.Linear(width, width))
        nn.init.xavier_uniform_(self.memory_proj.weight)
        start_at_prior(self.classes)

    def forward(self, memory: Memory, heads: nn.Module) -> Queries:
        """Anchors [N, Q, 4] are detached; `first_stage` has the Q tokens alone, best first.

        An image with fewer tokens than queries gives a query for each of them, as in two-stage
        Deformable DETR.
        """
        base, usable = cell_proposals(memory.sizes, memory.shapes, memory.padding, self.scale)
        tokens = self.memory_norm(self.memory_proj(memory.tokens.masked_fill(~usable, 0.0)))
        logits = self.classes(tokens)
        best = best_tokens(logits.amax(-1), len(self.content))
        batch, queries = best.shape
        logits, chosen, base = (
            x.gather(1, best[..., None].expand(-1, -1, x.shape[-1])) for x in (logits, tokens, base)
        )
        boxes = (self.boxes(chosen) + base).sigmoid()
        anchors = boxes.detach()
        return Queries(
            self.content[:queries].expand(batch, -1, -1),
            None,
            References(attend=anchors, correct=anchors),
            first_stage={"pred_logits": logits, "pred_boxes": boxes},
            finest=memory.ratios[:, 0],
        )

    def at(
        self, layer: int, queries: Queries, content: Tensor, references: References | None
    ) -> Tensor:
        """[N, Q, C] from the anchors that enter the layer, on the padded finest level."""
        assert references is not None
        assert queries.finest is not None
        anchors = references.attend * torch.cat((queries.finest, queries.finest), dim=-1)[:, None]
        return self.position(encode_anchors(anchors, self.width).to(content.dtype))


class DINO(MultiScaleDetector):
    """DINO with four or more levels, numerically the published implementation.

    Its heads look forward twice (section 3.5): boxes are corrections of the anchors from the layer
    before, whose gradient they pass on.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.heads = AnchorHeads(config)
        self.queries = SelectedAnchors(config)
        if config.denoising_pairs:
            self.training_queries.append(ContrastiveDenoising(config))

    def encode_position(self, masks: list[Tensor]) -> Tensor:
        return encode_cells(masks, self.config.hidden_dim, shift=0.0, temperature=TEMPERATURE)

    def official_names(self, key: str) -> list[str]:
        name = rename(key, _NAMES)
        if key.startswith("heads.") and not key.startswith("heads.norm."):
            # One pair of heads, under the name of each decoder layer.
            each = [
                name.replace("_embed.", f"_embed.{layer}.", 1)
                for layer in range(self.config.decoder_layers)
            ]
            return each + [f"transformer.decoder.{name}" for name in each]
        return [name] if name != key else deformable_detr_names(key, self.config)
