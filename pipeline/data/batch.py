"""From samples to a padded batch on the training device.

Images travel as uint8 and are normalised on the device: a quarter of the bytes, and the loader's
cores do less. N images, H x W padded size, n objects of an image.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from model.config import ModelConfig
from pipeline.data.augment import Example, Geometry
from pipeline.data.images import decode_image
from pipeline.data.objects import objects
from pipeline.data.shards import Sample
from pipeline.errors import UserError

# Per-channel mean and deviation of ImageNet, which torchvision's weights expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Batch:
    """The images of a micro-batch, padded to the largest, and what is known of them."""

    images: Tensor  # uint8 [N, 3, H, W], channels last
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

    def training_inputs(self, model: ModelConfig) -> tuple[Any, ...]:
        """What the model's forward takes in training."""
        targets = (self.targets,) if model.wants_targets else ()
        return (self.normalized_images(), self.padding_mask, *targets)

    def tensors(self) -> Iterator[Tensor]:
        """Those that `to` moves."""
        yield from (self.images, self.padding_mask)
        for target in self.targets:
            yield from target.values()

    def __getstate__(self) -> dict[str, Any]:
        # Between processes a tensor takes shared memory and a file descriptor; small ones are
        # sent as arrays, all images' boxes in one.
        return {
            "images": self.images,
            "padding_mask": self.padding_mask,
            "image_ids": self.image_ids,
            "sizes": self.sizes.numpy(),
            "counts": [len(target["labels"]) for target in self.targets],
            "labels": torch.cat([target["labels"] for target in self.targets]).numpy(),
            "boxes": torch.cat([target["boxes"] for target in self.targets]).numpy(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.images, self.padding_mask = state["images"], state["padding_mask"]
        self.image_ids, self.sizes = state["image_ids"], torch.from_numpy(state["sizes"])
        labels = torch.from_numpy(state["labels"]).split(state["counts"])
        boxes = torch.from_numpy(state["boxes"]).split(state["counts"])
        pairs = zip(labels, boxes, strict=True)
        self.targets = [{"labels": of_image, "boxes": box} for of_image, box in pairs]

    def normalized_images(self) -> Tensor:
        """float32 [N, 3, H, W], channels last, with exact zeros on padding."""
        n, _, height, width = self.images.shape
        rows = self.images.permute(0, 2, 3, 1).reshape(n, height, width * 3).float()
        # A row of the constants, made on the device: a tensor of the host would have to be copied
        # there, which waits for all that it has to do. Broadcasting three is slow on a CPU.
        for apply, values in ((rows.sub_, MEAN), (rows.div_, STD)):
            pixel = [torch.full((1,), value * 255, device=rows.device) for value in values]
            apply(torch.cat(pixel).repeat(width))
        images = rows.view(n, height, width, 3).masked_fill_(self.padding_mask[..., None], 0.0)
        return images.permute(0, 3, 1, 2)


def decode(sample: Sample, column_of: dict[int, int], geometry: Geometry | None = None) -> Example:
    """The image and its trainable objects: not crowds, not empty boxes, cut to the image.

    geometry: what is done with it next; an image that is much larger than needed is then decoded
    smaller, its boxes still in pixels of the file. Raises `UserError` naming the image when its
    bytes cannot be decoded, or not to the size that was expected.
    """
    name = f"image {sample.image.get('id')} ({sample.image.get('file_name')})"
    try:
        needed = geometry.first_size() if geometry else None
        image, height, width = decode_image(
            sample.image_bytes, needed, lambda words: _warn(name, words)
        )
    except ValueError as error:
        raise UserError(f"{name} cannot be decoded: {error}") from None
    if geometry and geometry.source != (height, width):
        expected = "x".join(map(str, geometry.source[::-1]))
        raise UserError(
            f"{name}: got {width}x{height} pixels, expected {expected} as the manifest says; "
            f"convert the data anew"
        )
    kept_objects = [a for a in objects(sample.annotations, column_of) if not a.get("iscrowd")]
    labels = [column_of[a["category_id"]] for a in kept_objects]
    boxes = torch.tensor([a["bbox"] for a in kept_objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return Example(image, boxes[kept], torch.tensor(labels, dtype=torch.int64)[kept])


def _warn(name: str, words: str) -> None:
    text = f"{name} is damaged, and some of its pixels are wrong: {words}; get the file anew"
    print(text, file=sys.stderr, flush=True)


def collate(examples: list[Example], records: list[dict[str, Any]]) -> Batch:
    """Pads to the largest height and width in the batch, at the right and the bottom.

    records: the COCO image records; `height` and `width` of the original image are taken there.
    """
    height = max(e.image.shape[-2] for e in examples)
    width = max(e.image.shape[-1] for e in examples)
    # Rows of interleaved channels, as images are decoded: copying them is copying memory.
    images = _new((len(examples), height, width, 3), torch.uint8).permute(0, 3, 1, 2)
    padding_mask = _new((len(examples), height, width), torch.bool)
    targets = []
    for i, example in enumerate(examples):
        h, w = example.image.shape[-2:]
        images[i, :, :h, :w] = example.image
        images[i, :, h:] = 0
        images[i, :, :h, w:] = 0
        padding_mask[i, :h, :w] = False
        padding_mask[i, h:] = True
        padding_mask[i, :h, w:] = True
        x0, y0, x1, y1 = example.boxes.unbind(-1)
        boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)
        targets.append({"labels": example.labels, "boxes": boxes / torch.tensor([w, h, w, h])})
    return Batch(
        images,
        padding_mask,
        targets,
        [int(r["id"]) for r in records],
        torch.tensor([[int(r["height"]), int(r["width"])] for r in records], dtype=torch.int64),
    )


def _new(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory to be filled; in a worker of a loader, shared with the process that it is for, as
    torch's own collate does it: a tensor made elsewhere would be copied there."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    strides = torch.empty(shape, device="meta").stride()
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)
