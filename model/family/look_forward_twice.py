"""Look forward twice (DINO, arXiv:2203.03605, section 3.5), in Deformable DETR with refinement.

A layer's boxes are corrections of the boxes of the layer before. The gradient of the corrected
ones here passes into those they correct, so that a layer is trained by its own boxes and by the
next layer's; what the next layer attends to stays detached.

Published gain: 0.4 AP (47.0 to 47.4 after 12 epochs; DINO, Table 4, ResNet-50).
"""

from torch import Tensor

from model.heads import Heads
from model.parts import Prediction, References


class LookForwardTwice(Heads):
    """Refining heads, whose boxes the next layer corrects with their gradient."""

    def forward(
        self, layer: int, state: Tensor, references: References
    ) -> tuple[Prediction, References]:
        (logits, boxes), following = super().forward(layer, state, references)
        return (logits, boxes), following._replace(correct=boxes)
