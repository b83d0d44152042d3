"""Queries that are boxes: what DAB-DETR (arXiv:2201.12329, section 4), its deformable variant and
their denoising share. N batch, Q queries, C model width."""

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.heads import BoxHead, corrected, start_at_prior
from model.parts import Prediction, References
from model.position import encode_boxes

ANCHOR_EPS = 1e-3
"""How near to 0 and 1 a coordinate counts as it is: as in the published code, not 1e-5."""


def encode_anchors(boxes: Tensor, hidden_dim: int) -> Tensor:
    """[..., 4] boxes (cx, cy, w, h) to [..., 2 C]: C / 2 features each of y, x, w and h."""
    x, y, width, height = boxes.unbind(-1)
    return encode_boxes(torch.stack((y, x, width, height), dim=-1), hidden_dim)


class AnchorHeads(nn.Module):
    """One pair of heads for all layers, which predicts from normed states and corrects the anchors
    for the next layer from states that are not.

    The next layer's prediction starts at those anchors and passes its gradient on to them, its
    attention does not.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.classes = nn.Linear(config.hidden_dim, config.num_classes)
        start_at_prior(self.classes)
        self.boxes = BoxHead(config.hidden_dim)

    def forward(
        self, layer: int, state: Tensor, references: References
    ) -> tuple[Prediction, References]:
        """The prediction from state [N, Q, C] of any decoder layer, and the next references."""
        normed = self.norm(state)
        boxes = corrected(references.correct, self.boxes(normed), ANCHOR_EPS)
        moved = corrected(references.attend, self.boxes(state), ANCHOR_EPS)
        return (self.classes(normed), boxes), References(attend=moved.detach(), correct=moved)
