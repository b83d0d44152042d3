"""SAM-DETR's semantics aligner (arXiv:2203.06883, sections 3.2 to 3.4) and the attention behind it.

N batch, Q queries, S tokens of one level of (H, W) cells, M heads, C model width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from model.boxes import cxcywh_to_xyxy
from model.family.concat_attention import two_layers
from model.parts import Memory
from model.position import encode_boxes
from model.precision import FullPrecisionLinear, full_precision, without_autocast

ROI_CELLS = 7
"""Side of a reference box's region after RoIAlign."""


class AlignedQueries(NamedTuple):
    """What looks for the objects, in the semantics of the tokens: a query for each head."""

    content: Tensor
    """[N, Q, M, C], features of the salient points."""
    position: Tensor
    """[N, Q, M, C], encodings of their places."""
    gaussian: Tensor | None
    """[N, M, Q, S], what is added to the attention's logits."""


class SemanticsAligner(nn.Module):
    """Re-samples queries from the memory itself, so that matching them with it becomes easy.

    RoIAlign cuts each reference box out of the memory; from the region a small network finds a
    salient point for each head, whose feature and place are the head's query. What the query knew
    weighs both, number by number, in (0, 1).

    With `gaussians` (SMCA) the network gives two scales more for each head, and a token's logit
    falls with its distance from the salient point: by ((s_x d_x)^2 + (s_y d_y)^2) / 8, in cells.
    """

    def __init__(self, hidden_dim: int, num_heads: int, gaussians: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.gaussians = gaussians
        narrow = hidden_dim // 4
        self.narrow = nn.Conv2d(hidden_dim, narrow, 1)
        self.hidden = nn.Sequential(
            nn.Linear(narrow * ROI_CELLS**2, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, 2 * hidden_dim),
            nn.ReLU(),
            nn.Linear(2 * hidden_dim, 2 * hidden_dim),
            nn.ReLU(),
        )
        self.points = FullPrecisionLinear(2 * hidden_dim, num_heads * (4 if gaussians else 2))
        self.content_gate = nn.Linear(hidden_dim, num_heads * hidden_dim)
        self.position_gate = nn.Linear(hidden_dim, num_heads * hidden_dim)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.zeros_(self.points.bias)

    def forward(self, state: Tensor, boxes: Tensor, memory: Memory) -> AlignedQueries:
        """state [N, Q, C]; boxes [N, Q, 4] as (cx, cy, w, h), normalised by each image's valid
        area; memory of one level."""
        batch, queries, width = state.shape
        regions = self._regions(boxes, memory)
        numbers = self._salient(regions.to(memory.tokens.dtype))
        points, *scales = numbers.view(batch, queries, -1, self.num_heads, 2).unbind(2)
        points = points.tanh()  # in the region, whose corners are (-1, -1) and (1, 1)
        features = _sampled(regions, points.flatten(0, 1)).unflatten(0, (batch, queries))
        places = boxes[:, :, None, :2] + 0.5 * boxes[:, :, None, 2:] * points
        sine = encode_boxes(places.detach().flip(-1), width)
        return AlignedQueries(
            features.to(state.dtype) * self._gate(self.content_gate, state),
            sine.to(state.dtype) * self._gate(self.position_gate, state),
            _gaussian(_in_cells(places, memory), scales[0], memory) if self.gaussians else None,
        )

    def _regions(self, boxes: Tensor, memory: Memory) -> Tensor:
        """[N Q, C, 7, 7], in float32 at the least: RoIAlign knows no bfloat16. On a CPU it refuses
        a box of NaN as too large a region; the matcher has better words for it."""
        corners = _in_cells(cxcywh_to_xyxy(boxes).unflatten(-1, (2, 2)), memory).flatten(2)
        image = torch.arange(boxes.shape[0], device=boxes.device)[:, None, None]
        rois = torch.cat((image.expand_as(corners[..., :1]), corners), dim=-1).flatten(0, 1)
        cells = full_precision(memory.tokens).transpose(1, 2).unflatten(-1, memory.shapes[0])
        return roi_align(cells, rois.to(cells.dtype).nan_to_num(), ROI_CELLS, aligned=True)

    def _salient(self, regions: Tensor) -> Tensor:
        """[N Q, C, 7, 7] to the points (x, y) of all heads and, with `gaussians`, their scales."""
        return self.points(self.hidden(self.narrow(regions).relu().flatten(1)))

    def _gate(self, gate: nn.Linear, state: Tensor) -> Tensor:
        return gate(state).sigmoid().unflatten(-1, (self.num_heads, -1))


class AlignedAttention(nn.Module):
    """Attention of a level's tokens by one query for each head, C numbers wide.

    Heads share the keys, have C / M of the value's numbers each, and differ in their queries alone.
    """

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_proj = nn.Linear(hidden_dim, hidden_dim)
        self.key_proj = nn.Linear(hidden_dim, hidden_dim)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)
        for layer in (self.query_proj, self.key_proj, self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.output_proj.bias)
        self.query_position = two_layers(hidden_dim, nn.Linear(hidden_dim, hidden_dim))
        self.key_position = two_layers(hidden_dim, nn.Linear(hidden_dim, hidden_dim))

    def forward(self, queries: AlignedQueries, memory: Memory) -> Tensor:
        """Queries and the memory of their level to [N, Q, C]; no one looks at padding."""
        query = self.query_proj(queries.content) + self.query_position(queries.position)
        key = self.key_proj(memory.tokens) + self.key_position(memory.position)
        value = self.value_proj(memory.tokens).unflatten(-1, (self.num_heads, -1))
        hidden = memory.padding[:, None, None]
        mask = ~hidden
        if queries.gaussian is not None:
            mask = queries.gaussian.to(query.dtype).masked_fill(hidden, float("-inf"))
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key[:, None].expand(-1, self.num_heads, -1, -1),
            value.transpose(1, 2),
            mask,
            self.dropout if self.training else 0.0,
        )
        return self.output_proj(attended.transpose(1, 2).flatten(2))


def _sampled(regions: Tensor, points: Tensor) -> Tensor:
    """[R, C, 7, 7] at points (x, y) [R, M, 2] between the corners (-1, -1) and (1, 1), bilinearly
    with 0 outside: [R, M, C]. By weights of all cells, whose gradient is the same bits in every
    run: `grid_sample` has none on a GPU."""
    cell = torch.arange(ROI_CELLS, device=points.device)
    place = ((ROI_CELLS * (points + 1) - 1) / 2)[..., None]
    low = place.detach().floor()
    part = place - low
    # Of the two cells around the point; one in the middle of a cell learns from that and the next.
    along = (cell == low) * (1 - part) + (cell == low + 1) * part
    x, y = along.to(regions.dtype).unbind(-2)
    weights = (y[..., :, None] * x[..., None, :]).flatten(2)
    with without_autocast(regions):
        return weights @ regions.flatten(2).transpose(1, 2)


def _in_cells(places: Tensor, memory: Memory) -> Tensor:
    """Places [N, Q, X, 2] as (x, y), normalised by each image's valid area, in cells of the one
    level of `memory`."""
    height, width = memory.shapes[0]
    x, y = places.unbind(-1)
    return torch.stack((x * width, y * height), dim=-1) * memory.ratios[:, None]


def _gaussian(centres: Tensor, scales: Tensor, memory: Memory) -> Tensor:
    """Logits [N, M, Q, S]: centres [N, Q, M, 2] as (x, y) in cells, scales alike. 0 at the nearest
    cell inside the image."""
    height, width = memory.shapes[0]
    along_x, along_y = (
        _falling(centres[..., axis], scales[..., axis], cells, memory.sizes[:, 0, axis])
        for axis, cells in enumerate((width, height))
    )
    return (along_y[..., :, None] + along_x[..., None, :]).flatten(-2)


def _falling(centre: Tensor, scale: Tensor, cells: int, valid: Tensor) -> Tensor:
    """One coordinate's part of the Gaussian, [N, M, Q, cells], of centre and scale [N, Q, M].

    Softmax does not see that the nearest of the `valid` cells [N] has 0. Without it 16 bits could
    not tell cells apart that are all far away, nor hold them.
    """
    index = torch.arange(cells, device=centre.device)
    logits = ((index + 0.5 - centre[..., None]) * scale[..., None]).square() / -8
    inside = index < valid[:, None, None, None]
    nearest = logits.masked_fill(~inside, float("-inf")).amax(-1, keepdim=True)
    return (logits - nearest.detach()).transpose(1, 2)
