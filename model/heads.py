"""Prediction heads with their refinement rules: classes and boxes of queries (A.3).

N batch, Q queries, C model width.
"""

import copy
import math

import torch
from torch import Tensor, nn

from model.boxes import inverse_sigmoid
from model.config import ModelConfig
from model.parts import Prediction, References
from model.precision import FullPrecisionLinear

PRIOR_PROBABILITY = 0.01
"""Foreground probability at the start (focal loss paper, section 3.3)."""


class BoxHead(nn.Module):
    """Three linear layers to the four numbers of a box, which start at 0."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
        )
        self.output = FullPrecisionLinear(hidden_dim, 4)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def start_sizes_at(self, logit: float) -> None:
        """Let width and height start at sigmoid(`logit`) of the image."""
        nn.init.constant_(self.output.bias[2:], logit)

    def forward(self, x: Tensor) -> Tensor:
        """[N, Q, C] to [N, Q, 4] in float32 at the least."""
        return self.output(self.hidden(x))


class DirectHeads(nn.Module):
    """DETR's heads: one pair for all layers, behind a layer norm, and boxes that correct nothing.

    Classification with no object as a class has a column more for it, the last.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_dim)
        columns = config.num_classes + int(config.classification != "focal")
        self.classes = nn.Linear(config.hidden_dim, columns)
        if config.classification != "softmax":
            start_at_prior(self.classes)
        self.boxes = BoxHead(config.hidden_dim)
        self.boxes.output.reset_parameters()

    def forward(
        self, layer: int, state: Tensor, references: References | None
    ) -> tuple[Prediction, References | None]:
        """The prediction from state [N, Q, C] of any decoder layer."""
        state = self.norm(state)
        return (self.classes(state), self.boxes(state).sigmoid()), references


class Heads(nn.Module):
    """A class and a box head for each decoder layer, and for the first stage after them.

    Without refinement all decoder layers share one pair and correct the same references. With it
    each corrects the boxes of the one before, through which no gradient passes. Pairs start as
    copies of each other, but for a head that gives whole boxes rather than corrections: w and h
    start at sigmoid(-2).
    """

    def __init__(self, config: ModelConfig, eps: float = 1e-5) -> None:
        """eps: see `corrected`."""
        super().__init__()
        self.eps = eps
        copies = config.decoder_layers if config.refines else 1
        copies += int(config.two_stage)
        classes = nn.Linear(config.hidden_dim, config.num_classes)
        start_at_prior(classes)
        boxes = BoxHead(config.hidden_dim)
        self.classes = nn.ModuleList(copy.deepcopy(classes) for _ in range(copies))
        self.boxes = nn.ModuleList(copy.deepcopy(boxes) for _ in range(copies))
        self.shared = not config.refines
        if not config.two_stage:
            first = self.boxes[0]
            assert isinstance(first, BoxHead)
            first.start_sizes_at(-2.0)

    def forward(
        self, layer: int, state: Tensor, references: References
    ) -> tuple[Prediction, References]:
        """The prediction of decoder layer `layer` from its state [N, Q, C], and the references of
        the next one."""
        index = 0 if self.shared else layer
        boxes = corrected(references.correct, self.boxes[index](state), self.eps)
        if not self.shared:
            references = References(attend=boxes.detach(), correct=boxes.detach())
        return (self.classes[index](state), boxes), references


def corrected(references: Tensor, change: Tensor, eps: float = 1e-5) -> Tensor:
    """Boxes [N, Q, 4] of references [N, Q, 2 or 4] in [0, 1] moved by `change` [N, Q, 4] as logits;
    the width and height of a point are those of `change` alone. References nearer to 0 or 1 than
    `eps` count as at it."""
    base = inverse_sigmoid(references, eps)
    if references.shape[-1] == 2:
        change = torch.cat((change[..., :2] + base, change[..., 2:]), dim=-1)
    else:
        change = change + base
    return change.sigmoid()


def start_at_prior(classes: nn.Linear) -> None:
    """Let every class start out as improbable as it is."""
    nn.init.constant_(classes.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
