"""Deformable DETR: backbone, neck, encoder, queries, decoder, heads.

N batch, Q queries, S tokens of all levels together, L levels, C model width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.backbone import build_backbone
from model.config import ModelConfig
from model.geometry import (
    cell_proposals,
    cell_references,
    level_masks,
    scale_references,
    valid_ratios,
    valid_sizes,
)
from model.heads import Heads
from model.neck import build_neck
from model.position import encode_cells
from model.precision import FullPrecisionLinear
from model.proposals import ProposalStage
from model.transformer import DecoderLayer, EncoderLayer


class DeformableDETR(nn.Module):
    """Deformable DETR (section 4), with iterative refinement and two stages (A.4) by `config`.

    Numerically the published implementation. Every parameter that requires a gradient gets one in
    every step, also from a batch without boxes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_dim
        self.backbone = build_backbone(config)
        self.neck = build_neck(config, self.backbone.channels)
        self.neck.to(memory_format=torch.channels_last)
        self.level_embed = nn.Parameter(torch.randn(config.num_levels, width))
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.heads = Heads(config)
        if config.two_stage:
            self.proposals = ProposalStage(config)
        else:
            self.query_embed = nn.Parameter(torch.randn(config.num_queries, 2 * width))
            self.reference_points = FullPrecisionLinear(width, 2)
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)

    def forward(self, images: Tensor, padding_mask: Tensor) -> dict[str, Any]:
        """Detect objects in a padded batch.

        images [N, 3, H, W]; padding_mask [N, H, W] bool, True on padding, which must leave the
        top left pixel of each image valid. Returns `pred_logits` [N, Q, classes], `pred_boxes`
        [N, Q, 4] as (cx, cy, w, h) normalised by each image's valid area, `aux_outputs` (the same
        two for each earlier decoder layer) if the loss wants them, and in two-stage `enc_outputs`
        (the same two for all S tokens). Boxes are float32 at the least, logits as computed.
        """
        maps = self.neck(self.backbone(images.to(self.level_embed.dtype)))
        shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
        masks = level_masks(padding_mask, shapes)
        padding = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        sizes = valid_sizes(masks)
        ratios = valid_ratios(sizes, shapes)
        wide = torch.promote_types(torch.float32, self.level_embed.dtype)
        references = cell_references(ratios, shapes).to(wide)

        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        position = encode_cells(masks, self.config.hidden_dim).to(tokens.dtype)
        position = position + self._level_of_token(shapes)
        memory = tokens
        for layer in self.encoder:
            memory = self._run(layer, memory, position, references, shapes, padding)

        outputs: dict[str, Any] = {}
        if self.config.two_stage:
            base, usable = cell_proposals(sizes, shapes, padding, self.config.proposal_scale)
            first = self.proposals(
                memory, base, usable, self.heads.classes[-1], self.heads.boxes[-1]
            )
            references, position, content = first.references, first.position, first.content
            outputs["enc_outputs"] = {"pred_logits": first.logits, "pred_boxes": first.boxes}
        else:
            references, position, content = self._learned_queries(images.shape[0])

        predictions = []
        for index, layer in enumerate(self.decoder):
            scaled = scale_references(references, ratios)
            content = self._run(layer, content, position, scaled, memory, shapes, padding)
            logits, boxes = self.heads(index, content, references)
            predictions.append({"pred_logits": logits, "pred_boxes": boxes})
            if self.config.refines:
                references = boxes.detach()
        outputs.update(predictions[-1])
        if self.config.auxiliary_loss:
            outputs["aux_outputs"] = predictions[:-1]
        return outputs

    def _learned_queries(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """References [N, Q, 2], positions and contents [N, Q, C] of the learned queries."""
        position, content = self.query_embed.chunk(2, dim=-1)
        references = self.reference_points(position).sigmoid()
        return (
            references.expand(batch, -1, -1),
            position.expand(batch, -1, -1),
            content.expand(batch, -1, -1),
        )

    def _level_of_token(self, shapes: list[tuple[int, int]]) -> Tensor:
        """Each token's level embedding [S, C]."""
        return torch.cat(
            [
                embed.expand(height * width, -1)
                for embed, (height, width) in zip(self.level_embed, shapes, strict=True)
            ]
        )

    def _run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        if self.config.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)
