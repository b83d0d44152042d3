"""Training augmentation and evaluation resize, as in DETR, on uint8 images.

First the random choices, which need only the size of an image, then the pixels and boxes.
Shapes: image uint8 [3, H, W]; boxes float32 [n, 4] absolute (x0, y0, x1, y1); labels int64 [n].
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import AugmentConfig

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class Example:
    """image uint8 [3, H, W]; boxes float32 [n, 4] as (x0, y0, x1, y1) in its pixels; labels int64
    [n]."""

    image: Tensor
    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Crop:
    """A resize to `resized`, of which `size` from (top, left) on is taken."""

    resized: Size
    top: int
    left: int
    size: Size


@dataclass(frozen=True)
class Geometry:
    """What is done with one image, in this order."""

    source: Size
    flip: bool = False
    transpose: bool = False
    crop: Crop | None = None
    size: Size = (0, 0)
    """Of the result."""

    def first_size(self) -> Size | None:
        """The size to which the image is resized first, as it lies in the file; None: it is not."""
        size = self.crop.resized if self.crop else self.size
        size = size[::-1] if self.transpose else size
        return None if size == self.source else size


def resized_hw(height: int, width: int, short_side: int, max_side: int) -> Size:
    """(height, width) with the shorter side at `short_side` unless the longer would pass
    `max_side`; rounded as DETR rounds (truncation), so that published AP is comparable."""
    short, long = min(height, width), max(height, width)
    if long / short * short_side > max_side:
        short_side = round(max_side * short / long)
    if short == short_side:
        return height, width
    if width < height:
        return max(1, int(short_side * height / width)), max(1, short_side)
    return max(1, short_side), max(1, int(short_side * width / height))


def choose(source: Size, config: AugmentConfig, random: np.random.Generator) -> Geometry:
    """Flip and transpose, then a random resize, of the whole image or of a random crop."""
    flip = random.random() < config.flip_probability
    transpose = random.random() < config.transpose_probability
    size = source[::-1] if transpose else source
    crop = None
    if random.random() < config.crop_probability:
        # The intermediate resize is not bounded by max_side, as in DETR.
        resized = resized_hw(*size, _one_of(config.crop_short_sides, random), max_side=10**9)
        low, high = config.crop_sides
        size = (_between(low, min(high, resized[0]), random),
                _between(low, min(high, resized[1]), random))  # fmt: skip
        top = int(random.integers(0, resized[0] - size[0] + 1))
        left = int(random.integers(0, resized[1] - size[1] + 1))
        crop = Crop(resized, top, left, size)
    if config.short_sides:
        size = resized_hw(*size, _one_of(config.short_sides, random), config.max_side)
    return Geometry(source, flip, transpose, crop, size)


def _one_of(values: tuple[int, ...], random: np.random.Generator) -> int:
    return values[int(random.integers(len(values)))]


def _between(low: int, high: int, random: np.random.Generator) -> int:
    """An integer of [low, high], or `high` where that is the smaller."""
    return int(random.integers(min(low, high), high + 1))


def largest(sources: np.ndarray, config: AugmentConfig) -> Size:
    """The size with the most pixels that `choose` can give an image of one of these sizes.

    sources: [n, 2] integers (height, width), n at least 1.
    """
    sizes: list[Size] = []  # without the transposed ones, which have as many pixels
    if config.crop_probability < 1:
        sizes += map(tuple, np.unique(sources, axis=0).tolist())
    if config.crop_probability > 0:
        sizes += _crops(sources, config)
    if config.short_sides:  # the larger the short side, the larger the image
        short = max(config.short_sides)
        sizes = [resized_hw(*size, short, config.max_side) for size in sizes]
    return max(sizes, key=math.prod)


def _crops(sources: np.ndarray, config: AugmentConfig) -> list[Size]:
    """Every size that a crop can have before the last resize."""
    low, high = config.crop_sides
    resized = {
        resized_hw(height, width, short, max_side=10**9)
        for height, width in np.unique(sources, axis=0).tolist()
        for short in config.crop_short_sides
    }
    # The largest sides of a crop; the smallest is `low`, or the largest where that is smaller.
    limits = {(min(high, height), min(high, width)) for height, width in resized}
    possible = np.zeros([max(sides) + 1 for sides in zip(*limits, strict=True)], dtype=bool)
    for height, width in limits:
        possible[min(low, height) : height + 1, min(low, width) : width + 1] = True
    return [(height, width) for height, width in np.argwhere(possible).tolist()]


def for_evaluation(source: Size, config: AugmentConfig) -> Geometry:
    """The resize of evaluation."""
    if not config.val_short_side:
        return Geometry(source, size=source)
    return Geometry(source, size=resized_hw(*source, config.val_short_side, config.max_side))


def transform(example: Example, geometry: Geometry) -> Example:
    """The example with its geometry changed. Boxes are those of `geometry.source`; the image may
    have been decoded smaller, where it is resized anyway."""
    size = geometry.source
    if geometry.flip:
        example = flip(example, size[1])
    if geometry.transpose:
        example, size = transpose(example), size[::-1]
    if geometry.crop:
        example = resize(example, size, geometry.crop.resized)
        example = crop(example, geometry.crop.top, geometry.crop.left, geometry.crop.size)
        size = geometry.crop.size
    return resize(example, size, geometry.size)


def resize(example: Example, size: Size, new: Size) -> Example:
    """From `size`, in which the boxes are, to `new`."""
    image, boxes = example.image, example.boxes
    if tuple(image.shape[-2:]) != new:
        # torch keeps channels-last order, and is fast, where a batch of one has the strides of a
        # longer one.
        batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        image = F.interpolate(batch, new, mode="bilinear", antialias=True)[0]
    if size != new:
        boxes = boxes * torch.tensor([new[1] / size[1], new[0] / size[0]] * 2)
    return replace(example, image=image, boxes=boxes)


def flip(example: Example, width: int) -> Example:
    """Mirrored. width: of the image in which the boxes are."""
    x0, y0, x1, y1 = example.boxes.unbind(-1)
    boxes = torch.stack([width - x1, y0, width - x0, y1], dim=-1)
    return replace(example, image=example.image[None].flip(-1)[0], boxes=boxes)


def transpose(example: Example) -> Example:
    """Swaps x and y, of pixels and boxes."""
    image = example.image.transpose(-1, -2)[None].contiguous(memory_format=torch.channels_last)[0]
    return replace(example, image=image, boxes=example.boxes[:, [1, 0, 3, 2]])


def crop(example: Example, top: int, left: int, size: Size) -> Example:
    """The part of the image; boxes are cut to it, and those with nothing left are dropped."""
    height, width = size
    image = example.image[:, top : top + height, left : left + width]
    image = image[None].contiguous(memory_format=torch.channels_last)[0]  # else a slow resize
    boxes = example.boxes - torch.tensor([left, top, left, top])
    boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return Example(image, boxes[kept], example.labels[kept])


def resize_for_evaluation(example: Example, config: AugmentConfig) -> Example:
    """`for_evaluation` and `transform` of a whole image."""
    height, width = example.image.shape[-2:]
    return transform(example, for_evaluation((height, width), config))
