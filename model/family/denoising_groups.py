"""What the denoising queries of DN-DETR and DINO have in common: groups with a place for each
box of an image, of which none sees another. N batch, Q queries, T boxes of the whole batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.parts import Queries


def box_places(counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Image [T] of each box, and which of the image's it is [T], of images with so many."""
    # Made on the device: a copy from the host would wait for all that it has to do.
    image = torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(counts)])
    return image, torch.cat([torch.arange(n, device=device) for n in counts])


def denoising_mask(queries: Queries, groups: int, size: int) -> Tensor:
    """[Q, Q] bool of all queries there are and `groups` of `size` behind them, True where the first
    may not see the second: nobody sees a denoising group but itself, for it knows where boxes are,
    and it sees those that detect."""
    device, before = queries.content.device, queries.content.shape[1]
    detecting = before - sum(group.queries for group in queries.groups)
    mask = queries.mask
    if mask is None:
        mask = torch.zeros(before, before, dtype=torch.bool, device=device)
    others = torch.arange(before, device=device) >= detecting
    group = torch.arange(groups, device=device).repeat_interleave(size)
    behind = torch.cat((others.expand(len(group), -1), group[:, None] != group), dim=1)
    return torch.cat((F.pad(mask, (0, len(group)), value=True), behind))
