"""The query formulation of two-stage Deformable DETR (A.4): encoder tokens to queries.

N batch, S tokens, Q queries kept, C model width.
"""

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.geometry import cell_proposals
from model.heads import Heads
from model.parts import Memory, Queries, References
from model.position import encode_boxes
from model.queries import Formulation


class ProposalQueries(Formulation):
    """Scores every encoder token as a proposal and turns the best into decoder queries."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.width = width
        self.scale = config.proposal_scale
        self.num_queries = config.num_queries
        self.one_to_many_queries = config.one_to_many_queries
        self.memory_proj = nn.Linear(width, width)
        self.memory_norm = nn.LayerNorm(width)
        self.query_proj = nn.Linear(2 * width, 2 * width)
        self.query_norm = nn.LayerNorm(2 * width)
        nn.init.xavier_uniform_(self.memory_proj.weight)
        nn.init.xavier_uniform_(self.query_proj.weight)

    def forward(self, memory: Memory, heads: Heads) -> Queries:
        """Column 0 of the first stage's logits alone ranks the proposals. References [N, Q, 4] are
        detached: no gradient passes from the second stage into the first's boxes.

        In training those of one-to-many supervision follow the ones that detect. An image with
        fewer tokens than queries gives a query for each of them; an exported graph, whose number
        of queries is fixed, refuses it.
        """
        base, usable = cell_proposals(memory.sizes, memory.shapes, memory.padding, self.scale)
        tokens = self.memory_norm(self.memory_proj(memory.tokens.masked_fill(~usable, 0.0)))
        logits = heads.classes[-1](tokens)
        box_logits = heads.boxes[-1](tokens) + base
        kept = self.num_queries + (self.one_to_many_queries if self.training else 0)
        best = best_tokens(logits[..., 0], kept)
        boxes = box_logits.detach().gather(1, best[..., None].expand(-1, -1, 4)).sigmoid()
        position, content = self.encoded(boxes, memory.tokens.dtype)
        return Queries(
            content,
            position,
            References(attend=boxes, correct=boxes),
            first_stage={"pred_logits": logits, "pred_boxes": box_logits.sigmoid()},
        )

    def encoded(self, boxes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Position and content [N, Q, C] of proposals [N, Q, 4]."""
        encoded = encode_boxes(boxes, self.width).to(dtype)
        position, content = self.query_norm(self.query_proj(encoded)).split(self.width, dim=-1)
        return position, content

    def position_of(self, boxes: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, Q, C] of queries with references [N, Q, 4]."""
        return self.encoded(boxes, dtype)[0]


def best_tokens(scores: Tensor, queries: int) -> Tensor:
    """The tokens [N, Q] of the best scores [N, S], best first; all of them where there are fewer
    than `queries`, which an exported graph refuses."""
    tokens = scores.shape[1]
    if torch.compiler.is_exporting():
        torch._check(tokens >= queries)
    else:
        queries = min(queries, tokens)
    return scores.topk(queries, dim=1).indices
