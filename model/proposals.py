"""The first stage of two-stage Deformable DETR (A.4): encoder tokens to queries.

N batch, S tokens, Q queries kept, C model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.position import encode_boxes


class Proposals(NamedTuple):
    """The first stage's predictions on all tokens, and the queries made from the best of them."""

    logits: Tensor
    """[N, S, classes]; column 0 alone ranks the proposals."""
    boxes: Tensor
    """[N, S, 4] normalised (cx, cy, w, h)."""
    references: Tensor
    """[N, Q, 4], detached: no gradient passes from the second stage into the first's boxes."""
    position: Tensor
    """[N, Q, C] position part of the queries."""
    content: Tensor
    """[N, Q, C] content part of the queries."""


class ProposalStage(nn.Module):
    """Scores every encoder token as a proposal and turns the best into decoder queries."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.width = width
        self.num_queries = config.num_queries
        self.memory_proj = nn.Linear(width, width)
        self.memory_norm = nn.LayerNorm(width)
        self.query_proj = nn.Linear(2 * width, 2 * width)
        self.query_norm = nn.LayerNorm(2 * width)
        nn.init.xavier_uniform_(self.memory_proj.weight)
        nn.init.xavier_uniform_(self.query_proj.weight)

    def forward(
        self,
        memory: Tensor,
        base: Tensor,
        usable: Tensor,
        class_head: nn.Module,
        box_head: nn.Module,
    ) -> Proposals:
        """memory [N, S, C]; base [N, S, 4] box logits and usable [N, S, 1] of the proposals.

        An image with fewer than `num_queries` tokens gives a query for each of them; an exported
        graph, whose number of queries is fixed, refuses it.
        """
        tokens = self.memory_norm(self.memory_proj(memory.masked_fill(~usable, 0.0)))
        logits = class_head(tokens)
        box_logits = box_head(tokens) + base
        if torch.compiler.is_exporting():
            kept = self.num_queries
            torch._check(tokens.shape[1] >= kept)
        else:
            kept = min(self.num_queries, tokens.shape[1])
        best = logits[..., 0].topk(kept, dim=1).indices
        best_boxes = box_logits.detach().gather(1, best[..., None].expand(-1, -1, 4)).sigmoid()
        encoded = encode_boxes(best_boxes, self.width).to(memory.dtype)
        queries = self.query_norm(self.query_proj(encoded))
        position, content = queries.split(self.width, dim=-1)
        return Proposals(logits, box_logits.sigmoid(), best_boxes, position, content)
