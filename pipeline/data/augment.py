"""Training augmentation and evaluation resize, as in DETR, on uint8 images.

Shapes: image uint8 [3, H, W]; boxes float32 [n, 4] absolute (x0, y0, x1, y1); labels int64 [n].
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from pipeline.config import AugmentConfig


@dataclass(frozen=True)
class Example:
    image: Tensor
    boxes: Tensor
    labels: Tensor


def resized_hw(height: int, width: int, short_side: int, max_side: int) -> tuple[int, int]:
    """(height, width) with the shorter side at `short_side` unless the longer would pass
    `max_side`; rounded as DETR rounds (truncation), so that published AP is comparable."""
    short, long = min(height, width), max(height, width)
    if long / short * short_side > max_side:
        short_side = round(max_side * short / long)
    if short == short_side:
        return height, width
    if width < height:
        return int(short_side * height / width), short_side
    return short_side, int(short_side * width / height)


def resize(example: Example, short_side: int, max_side: int) -> Example:
    height, width = example.image.shape[-2:]
    new_h, new_w = resized_hw(height, width, short_side, max_side)
    if (new_h, new_w) == (height, width):
        return example
    image = F.resize(example.image, [max(1, new_h), max(1, new_w)], antialias=True)
    scale = torch.tensor([new_w / width, new_h / height] * 2)
    return replace(example, image=image, boxes=example.boxes * scale)


def flip(example: Example) -> Example:
    width = example.image.shape[-1]
    x0, y0, x1, y1 = example.boxes.unbind(-1)
    boxes = torch.stack([width - x1, y0, width - x0, y1], dim=-1)
    return replace(example, image=example.image.flip(-1), boxes=boxes)


def transpose(example: Example) -> Example:
    return replace(
        example,
        image=example.image.transpose(-1, -2).contiguous(),
        boxes=example.boxes[:, [1, 0, 3, 2]],
    )


def crop(example: Example, top: int, left: int, height: int, width: int) -> Example:
    """The part of the image; boxes are cut to it, and those with nothing left are dropped."""
    image = example.image[:, top : top + height, left : left + width]
    boxes = example.boxes - torch.tensor([left, top, left, top])
    boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return Example(image, boxes[kept], example.labels[kept])


def augment(example: Example, config: AugmentConfig, random: np.random.Generator) -> Example:
    """Flip and transpose, then a random resize, of the whole image or of a random crop."""
    if random.random() < config.flip_probability:
        example = flip(example)
    if random.random() < config.transpose_probability:
        example = transpose(example)
    if random.random() < config.crop_probability:
        first = int(random.choice(config.crop_short_sides))
        # The intermediate resize is not bounded by max_side, as in DETR.
        example = resize(example, first, max_side=10**9)
        image_h, image_w = example.image.shape[-2:]
        low, high = config.crop_sides
        height = int(random.integers(min(low, image_h), min(image_h, high) + 1))
        width = int(random.integers(min(low, image_w), min(image_w, high) + 1))
        top = int(random.integers(0, image_h - height + 1))
        left = int(random.integers(0, image_w - width + 1))
        example = crop(example, top, left, height, width)
    if config.short_sides:
        example = resize(example, int(random.choice(config.short_sides)), config.max_side)
    return example


def resize_for_evaluation(example: Example, config: AugmentConfig) -> Example:
    if not config.val_short_side:
        return example
    return resize(example, config.val_short_side, config.max_side)
