"""One-to-many supervision: more queries in training, several of which find the same object.

DETRs with Hybrid Matching (arXiv 2207.13080), the hybrid branch. One-to-one matching tells few of
300 queries that they see an object; here a second set learns each object from `repeats` queries at
once. The two share all weights of the decoder and its heads, and neither attends to the other, so
that the queries that detect are the same with and without. Evaluation has the first set alone: no
cost, no other result.

Published for two-stage with ResNet-50 on COCO, 1500 queries, 6 repeats, both losses of weight 1:
47.0 to 48.7 AP after 12 epochs, 49.0 to 50.0 after 36 (github.com/HDETR/H-Deformable-DETR). Not a
gain that adds to every other: in DINO, whose denoising gives each object more queries, too, a user
found 46.5 in place of 48.7 (issue 16 there), and its authors had expected the two to conflict.
"""

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.parts import Group, Memory, Queries, Targets


class OneToMany(nn.Module):
    """Makes the proposals behind the first `num_queries` a group, "o2m", of training alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_queries = config.num_queries
        self.repeats = config.one_to_many_repeats

    def forward(self, queries: Queries, memory: Memory, targets: Targets | None) -> Queries:
        """Queries of a first stage that has kept more than detect, the best first. Images with few
        tokens leave the group with fewer queries, or none."""
        assert not queries.groups, "the first group of all"
        total = queries.content.shape[1]
        detecting = min(self.num_queries, total)
        group = Group("o2m", total - detecting, repeats=self.repeats)
        return queries._replace(mask=apart(detecting, queries.content), groups=(group,))


def apart(detecting: int, content: Tensor) -> Tensor:
    """The mask [Q, Q] that hides the first `detecting` of the queries with content [N, Q, C] and
    the others from each other."""
    behind = torch.arange(content.shape[1], device=content.device) >= detecting
    return behind[:, None] != behind
