"""Query formulations without a first stage. N batch, Q queries, C model width."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.parts import Memory, Queries, References
from model.precision import FullPrecisionLinear


class Formulation(nn.Module, ABC):
    """Where queries come from; their position stays the same through the layers unless `at` is
    written anew."""

    @abstractmethod
    def forward(self, memory: Memory, heads: Any) -> Queries:
        """The queries that detect, with the heads that are to read them."""

    def at(
        self, layer: int, queries: Queries, content: Tensor, references: References | None
    ) -> Any:
        """The position that decoder layer `layer` is given, with the content [N, Q, C] and the
        references that enter it."""
        return queries.position


class LearnedQueries(Formulation):
    """Deformable DETR's: position and content are learned, reference points come from position."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.embed = nn.Parameter(torch.randn(config.num_queries, 2 * width))
        self.reference_points = FullPrecisionLinear(width, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory: Memory, heads: Any) -> Queries:
        """The same queries for each image, with references [N, Q, 2]."""
        batch = memory.tokens.shape[0]
        position, content = self.embed.chunk(2, dim=-1)
        points = self.reference_points(position).sigmoid().expand(batch, -1, -1)
        return Queries(
            content.expand(batch, -1, -1),
            position.expand(batch, -1, -1),
            References(attend=points, correct=points),
        )


class PlacelessQueries(Formulation):
    """DETR's: the position is learned, the content starts at 0, there are no references."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(config.num_queries, config.hidden_dim))

    def forward(self, memory: Memory, heads: Any) -> Queries:
        """The same queries for each image."""
        position = self.embed.expand(memory.tokens.shape[0], -1, -1)
        return Queries(torch.zeros_like(position), position, references=None)
