"""The way from bytes to a batch that DETR's code and Deformable DETR's take, to compare with.

Pillow decodes, flips, resizes and crops; torchvision makes float tensors and normalises them; the
batch is padded in float. Sizes and random choices are ours, so that both do the same.
"""

import io

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from pipeline.data.augment import Geometry
from pipeline.data.batch import MEAN, STD

FLIP, TRANSPOSE = Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.TRANSPOSE


def decode(image_bytes: bytes) -> Image.Image:
    """Pillow's decoder, in RGB."""
    return Image.open(io.BytesIO(image_bytes)).convert("RGB")


def augment(image: Image.Image, boxes: Tensor, geometry: Geometry) -> tuple[Image.Image, Tensor]:
    """boxes: float32 [n, 4] absolute (x0, y0, x1, y1). Those with nothing left are dropped."""
    if geometry.flip:
        image = image.transpose(FLIP)
        boxes = torch.tensor([image.width, 0, image.width, 0]) + boxes[:, [2, 1, 0, 3]] * (
            torch.tensor([-1, 1, -1, 1])
        )
    if geometry.transpose:
        image, boxes = image.transpose(TRANSPOSE), boxes[:, [1, 0, 3, 2]]
    if geometry.crop:
        image, boxes = resize(image, boxes, geometry.crop.resized)
        top, left, (height, width) = geometry.crop.top, geometry.crop.left, geometry.crop.size
        image = F.crop(image, top, left, height, width)
        boxes = boxes - torch.tensor([left, top, left, top])
        boxes = boxes.minimum(torch.tensor([width, height, width, height])).clamp(min=0)
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)]
    return resize(image, boxes, geometry.size)


def resize(image: Image.Image, boxes: Tensor, size: tuple[int, int]) -> tuple[Image.Image, Tensor]:
    """torchvision's resize of a Pillow image to (height, width); boxes [n, 4] in pixels follow."""
    ratios = torch.tensor([size[1] / image.width, size[0] / image.height] * 2)
    return F.resize(image, list(size)), boxes * ratios


def normalize(image: Image.Image, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 [3, H, W] with ImageNet's statistics, and boxes as relative (cx, cy, w, h)."""
    pixels = F.normalize(F.to_tensor(image), mean=list(MEAN), std=list(STD))
    x0, y0, x1, y1 = boxes.unbind(-1)
    boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)
    return pixels, boxes / torch.tensor([image.width, image.height] * 2, dtype=torch.float32)


def collate(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Images padded to float32 [N, 3, H, W], and bool [N, H, W], True on padding."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[1], : image.shape[2]].copy_(image)
        mask[i, : image.shape[1], : image.shape[2]] = False
    return batch, mask
