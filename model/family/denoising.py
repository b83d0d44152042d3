"""The denoising queries of DN-DETR (arXiv:2203.01305): in training, boxes of the ground
truth with noise on them are queries, too, each of which has to find its own box again.

N batch, Q queries that detect, G groups, T boxes of the whole batch, B boxes of the fullest image,
C model width. The queries of a group are B slots for each image, of which it fills the first.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.boxes import inverse_sigmoid
from model.config import ModelConfig
from model.family.anchors import ANCHOR_EPS
from model.family.denoising_groups import box_places, denoising_mask
from model.parts import Group, Known, Memory, Queries, References, Targets


class Noise(NamedTuple):
    """What is drawn for each box in each group, in this order, from torch's default generator."""

    flip: Tensor
    """[G, T] uniform in [0, 1): below `denoising_label_noise` the label is another."""
    label: Tensor
    """[G, T] int64, that other label, of any class."""
    shift: Tensor
    """[G, T, 4] uniform in [-1, 1): how far centre and size are moved, 1 being the most."""


def draw_noise(groups: int, boxes: Tensor, num_classes: int) -> Noise:
    """Noise for boxes [T, 4], on their device."""
    shape, device = (groups, len(boxes)), boxes.device
    return Noise(
        flip=torch.rand(shape, device=device),
        label=torch.randint(num_classes, shape, device=device),
        shift=torch.rand((*shape, 4), dtype=boxes.dtype, device=device) * 2 - 1,
    )


def noised_boxes(boxes: Tensor, shift: Tensor, scale: float) -> Tensor:
    """Boxes [T, 4] moved by shift [G, T, 4], and cut to [0, 1]: the centre by up to `scale` times
    half the size, so that below 1 it stays inside the box, the size by up to `scale` times
    itself."""
    sizes = boxes[:, 2:]
    reach = torch.cat((sizes / 2, sizes), dim=-1)
    return (boxes + shift * reach * scale).clamp(0, 1)


class DenoisingQueries(nn.Module):
    """Appends `denoising_groups` groups of noised boxes to the queries, as the group "dn"."""

    def __init__(self, config: ModelConfig, content_of: Callable[[Tensor], Tensor]) -> None:
        """content_of: labels [X] int64 to what a denoising query is told of them, [X, C]."""
        super().__init__()
        self.config = config
        self.content_of = content_of

    def forward(self, queries: Queries, memory: Memory, targets: Targets | None) -> Queries:
        """The queries with the noised boxes of `targets` behind them, which may be none.

        Slots that an image does not fill have content 0 and a box over the middle; they are seen
        by their group, as in the published code, but have no part in the loss. Raises `ValueError`
        without targets.
        """
        if targets is None:
            raise ValueError("targets: got none in training, expected them for denoising_groups")
        config, references = self.config, queries.references
        assert references is not None
        groups, like = config.denoising_groups, references.attend
        labels = torch.cat([target["labels"] for target in targets]).to(like.device)
        boxes = torch.cat([target["boxes"] for target in targets]).to(like)
        counts = [len(target["labels"]) for target in targets]
        slots = max(counts)
        image, place = box_places(counts, like.device)
        slot = (torch.arange(groups, device=like.device)[:, None] * slots + place).flatten()
        image = image.repeat(groups)

        noise = draw_noise(groups, boxes, config.num_classes)
        labels = torch.where(noise.flip < config.denoising_label_noise, noise.label, labels)
        told = self.content_of(labels.flatten()).to(queries.content.dtype)
        moved = noised_boxes(boxes, noise.shift, config.denoising_box_noise)
        moved = inverse_sigmoid(moved, ANCHOR_EPS).sigmoid().flatten(0, 1)
        size = (len(counts), groups * slots)
        content = queries.content.new_zeros(*size, told.shape[-1]).index_put((image, slot), told)
        anchors = like.new_full((*size, 4), 0.5).index_put((image, slot), moved)
        filled = torch.ones_like(slot, dtype=torch.bool)
        counted = filled.new_zeros(size).index_put((image, slot), filled)
        target = torch.arange(len(boxes), device=like.device).repeat(groups)
        group = Group(
            "dn", groups * slots, known=Known(slot, target), counted=counted, repeats=groups
        )
        return queries._replace(
            content=torch.cat((queries.content, content), dim=1),
            references=References(*(torch.cat((x, anchors), dim=1) for x in references)),
            mask=denoising_mask(queries, groups, slots),
            groups=(*queries.groups, group),
        )
