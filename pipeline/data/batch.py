"""From samples to a padded batch on the training device.

Images travel as uint8 and are normalised on the device: a quarter of the bytes, and the loader's
cores do less. N images, H x W padded size, n objects of an image.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pipeline.data.augment import Example
from pipeline.data.objects import objects
from pipeline.data.shards import Sample
from pipeline.errors import UserError

# Per-channel mean and deviation of ImageNet, which torchvision's weights expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Batch:
    images: Tensor  # uint8 [N, 3, H, W]
    padding_mask: Tensor  # bool [N, H, W], True on padding
    targets: list[dict[str, Tensor]]  # labels int64 [n], boxes float32 [n, 4] normalised cxcywh
    image_ids: list[int]
    sizes: Tensor  # int64 [N, 2] (height, width) of the original images

    def pin_memory(self) -> "Batch":
        self.images = self.images.pin_memory()
        self.padding_mask = self.padding_mask.pin_memory()
        self.targets = [{k: v.pin_memory() for k, v in t.items()} for t in self.targets]
        return self

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            self.images.to(device, non_blocking=True),
            self.padding_mask.to(device, non_blocking=True),
            [{k: v.to(device, non_blocking=True) for k, v in t.items()} for t in self.targets],
            self.image_ids,
            self.sizes,
        )

    def normalized_images(self) -> Tensor:
        """float32 [N, 3, H, W], channels last, with exact zeros on padding."""
        # Numbers of the host, channel by channel: a tensor of them would have to be copied to the
        # device, which waits for all that it has to do.
        images = torch.empty_like(self.images, dtype=torch.float32)
        for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
            images[:, channel] = (self.images[:, channel].float() - mean * 255) / (std * 255)
        images = images.masked_fill(self.padding_mask[:, None], 0.0)
        return images.contiguous(memory_format=torch.channels_last)


def decode(sample: Sample, column_of: dict[int, int]) -> Example:
    """The image and its trainable objects: not crowds, not empty boxes, cut to the image.

    Raises `UserError` naming the image when its bytes cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(sample.image_bytes)) as opened:
            pixels = np.array(opened.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        name = f"{sample.image.get('id')} ({sample.image.get('file_name')})"
        raise UserError(f"image {name} cannot be decoded: {error}") from None
    image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    kept_objects = [a for a in objects(sample.annotations, column_of) if not a.get("iscrowd")]
    labels = [column_of[a["category_id"]] for a in kept_objects]
    boxes = torch.tensor([a["bbox"] for a in kept_objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    height, width = image.shape[-2:]
    boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return Example(image, boxes[kept], torch.tensor(labels, dtype=torch.int64)[kept])


def collate(examples: list[Example], records: list[dict[str, Any]]) -> Batch:
    """Pads to the largest height and width in the batch, at the right and the bottom.

    records: the COCO image records; `height` and `width` of the original image are taken there.
    """
    height = max(e.image.shape[-2] for e in examples)
    width = max(e.image.shape[-1] for e in examples)
    images = torch.zeros(len(examples), 3, height, width, dtype=torch.uint8)
    padding_mask = torch.ones(len(examples), height, width, dtype=torch.bool)
    targets = []
    for i, example in enumerate(examples):
        h, w = example.image.shape[-2:]
        images[i, :, :h, :w] = example.image
        padding_mask[i, :h, :w] = False
        x0, y0, x1, y1 = (example.boxes / torch.tensor([w, h, w, h])).unbind(-1)
        boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)
        targets.append({"labels": example.labels, "boxes": boxes})
    return Batch(
        images,
        padding_mask,
        targets,
        [int(r["id"]) for r in records],
        torch.tensor([[int(r["height"]), int(r["width"])] for r in records], dtype=torch.int64),
    )
