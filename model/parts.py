"""What the parts of a detector hand to each other.

N batch, Q queries, S tokens of all levels together, L levels, C model width.
"""

from typing import Any, NamedTuple

from torch import Tensor

Targets = list[dict[str, Tensor]]
"""For each image `labels` [n] int64 and `boxes` [n, 4], normalised (cx, cy, w, h)."""


class Memory(NamedTuple):
    """An encoder's output: what the decoder looks at."""

    tokens: Tensor
    """[N, S, C]."""
    position: Tensor
    """[N, S, C] position encoding of the tokens, level embeddings included."""
    masks: list[Tensor]
    """[N, H_l, W_l] bool for each level, True on padding."""
    padding: Tensor
    """[N, S] bool, the same for the tokens."""
    shapes: list[tuple[int, int]]
    """(H_l, W_l) of each level."""
    sizes: Tensor
    """[N, L, 2] int64, the cells (w, h) of each level inside each image."""
    ratios: Tensor
    """[N, L, 2], the share (x, y) of each padded level that its image covers."""
    pixels: Tensor | None = None
    """[N, 2] int64, the pixels (w, h) of each image, of encoders whose decoders ask for them."""


class References(NamedTuple):
    """Where the queries are, [N, Q, 2 or 4] as points (x, y) or boxes (cx, cy, w, h), normalised by
    each image's valid area. The two differ where the gradient may pass through one alone."""

    attend: Tensor
    """What the layer's attention is centred on."""
    correct: Tensor
    """What the layer's heads correct; its logits where they say so (SMCA, SAM-DETR)."""


class Known(NamedTuple):
    """The box that each query of a group has to find, told beforehand: P pairs."""

    query: Tensor
    """[P] int64, counted within the group."""
    target: Tensor
    """[P] int64, among the boxes of the whole batch in the order of the images."""


class Group(NamedTuple):
    """Queries of training alone, behind the ones that detect."""

    name: str
    """Ends the names of its losses: `loss_ce_NAME`, and `loss_ce_0_NAME` of the first layer."""
    queries: int
    known: Known | None = None
    """Without it the group is matched as the others are, each box `repeats` times."""
    counted: Tensor | None = None
    """[N, queries] bool, False for those that have no part in the classification loss."""
    repeats: int = 1
    """The losses are divided by this many times the number of boxes."""


class Queries(NamedTuple):
    """What enters a decoder: the queries that detect, then those of the groups."""

    content: Tensor
    """[N, Q, C]."""
    position: Tensor | None
    """[N, Q, C] where it stays the same through the layers."""
    references: References | None
    """None where queries have no place of their own (DETR)."""
    mask: Tensor | None = None
    """[Q, Q] bool, True where the first may not see the second. None: all see all."""
    first_stage: dict[str, Tensor] | None = None
    """`pred_logits` [N, S, classes] and `pred_boxes` [N, S, 4] of a first stage on all tokens."""
    groups: tuple[Group, ...] = ()
    finest: Tensor | None = None
    """[N, 2], the share (x, y) of the padded finest level that each image covers, where positions
    are taken there."""


Prediction = tuple[Tensor, Tensor]
"""Class logits [N, Q, classes] and boxes [N, Q, 4] as (cx, cy, w, h)."""

Outputs = dict[str, Any]
"""Of a detector; see `SetDetector.forward`."""
