"""Where tokens lie: valid areas, reference points and first-stage proposals of a padded batch.

N batch, L levels, S tokens of all levels together, (H_l, W_l) cells of level l. Coordinates are
float32 whatever the model's precision, as in the published models (see position.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def level_masks(padding_mask: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """[N, H, W] bool, True on padding, sampled at the nearest cell of each level."""
    pixels = padding_mask[:, None].float()
    return [F.interpolate(pixels, size=shape)[:, 0].bool() for shape in shapes]


def valid_sizes(masks: list[Tensor]) -> Tensor:
    """Cells (w, h) inside each image on each level: [N, L, 2] int64."""
    sizes = [
        torch.stack(((~mask[:, 0, :]).sum(1), (~mask[:, :, 0]).sum(1)), dim=-1) for mask in masks
    ]
    return torch.stack(sizes, dim=1)


def valid_ratios(sizes: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """The share of each padded level that its image covers, as (x, y): [N, L, 2]."""
    ratios = [
        torch.stack((sizes[:, level, 0] / width, sizes[:, level, 1] / height), dim=-1)
        for level, (height, width) in enumerate(shapes)
    ]
    return torch.stack(ratios, dim=1)


def cell_references(ratios: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """The encoder's reference points: each token's own centre, on every level.

    Returns [N, S, L, 2] (x, y), normalised by the padded extent of each level.
    """
    centres = []
    for level, (height, width) in enumerate(shapes):
        valid = torch.stack((ratios[:, level, 0] * width, ratios[:, level, 1] * height), dim=-1)
        centres.append(_centres((height, width), ratios) / valid[:, None])
    return torch.cat(centres, dim=1)[:, :, None] * ratios[:, None]


def scale_references(references: Tensor, ratios: Tensor) -> Tensor:
    """References of the valid area [N, Q, 2 or 4] to those of each padded level [N, Q, L, same]."""
    if references.shape[-1] == 4:
        ratios = torch.cat((ratios, ratios), dim=-1)
    return references[:, :, None] * ratios[:, None]


def cell_proposals(
    sizes: Tensor, shapes: list[tuple[int, int]], padding: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """First-stage proposals (A.4): a square box of side `scale` 2^l on each cell of level l.

    padding: [N, S] bool. Returns the boxes' logits [N, S, 4] and whether each may be used
    [N, S, 1]: not on padding, and all four coordinates within (0.01, 0.99). Those that may not
    have logits of +inf.
    """
    boxes = []
    for level, shape in enumerate(shapes):
        centres = _centres(shape, sizes) / sizes[:, level, None]
        sides = torch.ones_like(centres) * scale * 2.0**level
        boxes.append(torch.cat((centres, sides), dim=-1))
    proposals = torch.cat(boxes, dim=1)
    usable = ((proposals > 0.01) & (proposals < 0.99)).all(-1, keepdim=True)
    usable &= ~padding[..., None]
    logits = torch.log(proposals / (1 - proposals))
    return logits.masked_fill(~usable, float("inf")), usable


def _centres(shape: tuple[int, int], like: Tensor) -> Tensor:
    """Centres (x, y) of a level's cells, in cells: [H W, 2] float32."""
    height, width = shape
    y = torch.arange(height, dtype=torch.float32, device=like.device) + 0.5
    x = torch.arange(width, dtype=torch.float32, device=like.device) + 0.5
    return torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1).flatten(
        0, 1
    )
