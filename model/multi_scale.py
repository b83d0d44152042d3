"""The encoder of Deformable DETR and its kin: L feature maps, deformable attention among them.

N batch, S tokens of all levels together, L levels, C model width.
"""

import torch
from torch import Tensor, nn

from model.backbone import build_backbone
from model.config import ModelConfig
from model.geometry import cell_references, level_masks, valid_ratios, valid_sizes
from model.neck import build_neck
from model.parts import Memory
from model.position import encode_cells
from model.set_detector import SetDetector
from model.transformer import EncoderLayer


class MultiScaleDetector(SetDetector):
    """Backbone, neck and deformable encoder (section 4.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config)
        self.neck = build_neck(config, self.backbone.channels)
        self.neck.to(memory_format=torch.channels_last)
        self.level_embed = nn.Parameter(torch.randn(config.num_levels, config.hidden_dim))
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def encode(self, images: Tensor, padding_mask: Tensor) -> Memory:
        maps = self.neck(self.backbone(images.to(self.level_embed.dtype)))
        shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
        masks = level_masks(padding_mask, shapes)
        padding = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        sizes = valid_sizes(masks)
        ratios = valid_ratios(sizes, shapes)
        wide = torch.promote_types(torch.float32, self.level_embed.dtype)
        references = cell_references(ratios, shapes).to(wide)

        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        position = self.encode_position(masks).to(tokens.dtype) + self._level_of_token(shapes)
        for layer in self.encoder:
            tokens = self._run(layer, tokens, position, references, shapes, padding)
        return Memory(tokens, position, masks, padding, shapes, sizes, ratios)

    def encode_position(self, masks: list[Tensor]) -> Tensor:
        """[N, S, C] of the cells of `masks` [N, H_l, W_l]."""
        return encode_cells(masks, self.config.hidden_dim)

    def _level_of_token(self, shapes: list[tuple[int, int]]) -> Tensor:
        """Each token's level embedding [S, C]."""
        return torch.cat(
            [
                embed.expand(height * width, -1)
                for embed, (height, width) in zip(self.level_embed, shapes, strict=True)
            ]
        )
