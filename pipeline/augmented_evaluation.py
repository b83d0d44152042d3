"""Test-time augmentation (Table 3): each image at several sizes, plain and flipped, merged.

The paper names flip and multi-scale and not how it merged them; ours is `fuse`. N images, D
detections of one image in all views together, V views.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from pipeline.config import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.labels import Labels
from pipeline.data.loader import evaluation_batches
from pipeline.data.shards import ShardSet
from pipeline.engine import AUTOCAST
from pipeline.evaluate import evaluating, predict, records

Result = dict[str, Tensor]
SAME_OBJECT_IOU = 0.65
"""Boxes of two views with more than this overlap are taken for one object."""


def detect_augmented(
    model: nn.Module,
    shards: ShardSet,
    labels: Labels,
    config: RunConfig,
    device: torch.device,
    sides: tuple[int, ...] = (),
    flip: bool = True,
) -> list[dict[str, Any]]:
    """COCO result records as `pipeline.evaluate.detect` gives them, merged from all views.

    sides: the shorter side of the image in each view, the longest side bounded in proportion;
    empty: the config's own size alone. flip: each size mirrored, too.
    """
    dtype = AUTOCAST.get(config.engine.precision)
    detections = []
    with evaluating(model):
        for batches in _sizes(shards, labels, config, sides, device):
            views: list[list[Result]] = []
            for batch in batches:
                batch = batch.to(device)
                views.append(predict(model, batch, dtype))
                if flip:
                    mirrored = predict(model, mirror(batch), dtype)
                    widths = batch.sizes[:, 1].tolist()
                    views.append(list(map(mirror_back, mirrored, widths)))
            of_images = zip(*views, strict=True)
            for image_id, results in zip(batches[0].image_ids, of_images, strict=True):
                detections += records(image_id, fuse(list(results)), labels)
    return detections


def _sizes(
    shards: ShardSet,
    labels: Labels,
    config: RunConfig,
    sides: tuple[int, ...],
    device: torch.device,
) -> Iterator[tuple[Batch, ...]]:
    """Batches of the same images in all sizes; each size has a share of the loader's workers."""
    augments = [at_size(config, side).augment for side in sides] or [config.augment]
    workers = -(-config.engine.loader_workers // len(augments))
    engine = replace(config.engine, loader_workers=workers)
    size, pin_memory = config.engine.evaluation_batch, device.type == "cuda"
    # Batches are made of images of like original shape, so that they are the same in all sizes.
    loaders = [
        evaluation_batches(
            shards, labels, replace(config, augment=augment, engine=engine), 0, 1, size, pin_memory
        )
        for augment in augments
    ]
    return zip(*loaders, strict=True)


def at_size(config: RunConfig, side: int) -> RunConfig:
    """The config with images evaluated at a shorter side of `side`. Where the config keeps the
    images' own size, the bound on the longer one is as for the usual 800."""
    usual = config.augment.val_short_side or 800
    longest = round(config.augment.max_side * side / usual)
    return replace(config, augment=replace(config.augment, val_short_side=side, max_side=longest))


def mirror(batch: Batch) -> Batch:
    """Each image of the batch flipped left to right within its own width; targets left out."""
    images = batch.images.clone()
    for image, padding in zip(images, batch.padding_mask, strict=True):
        width = int((~padding[0]).sum())
        image[..., :width] = image[..., :width].flip(-1)
    return replace(batch, images=images, targets=[])


def mirror_back(result: Result, width: int) -> Result:
    """Detections in the mirrored image, `width` pixels wide, to those in the image itself."""
    x0, y0, x1, y1 = result["boxes"].unbind(-1)
    return {**result, "boxes": torch.stack((width - x1, y0, width - x0, y1), dim=-1)}


def fuse(views: list[Result], top: int = 100) -> Result:
    """The detections of V views of one image as one set, best first, at most `top`.

    Weighted boxes fusion (arXiv:1910.13302), each view counting once: from the best on, each
    detection joins the object of its class that it overlaps most, or is a new one; where its view
    has found that object already, it is a duplicate and left out. An object's box is the mean by
    score, its score the sum over V. One view is returned as it is.
    """
    if len(views) == 1:
        return views[0]
    device = views[0]["boxes"].device
    view = torch.cat([torch.full((len(v["scores"]),), i) for i, v in enumerate(views)])
    boxes, scores, labels = (
        torch.cat([v[name] for v in views]).cpu() for name in ("boxes", "scores", "labels")
    )
    order = scores.argsort(descending=True, stable=True)
    view, boxes, scores, labels = view[order], boxes[order], scores[order], labels[order]

    # Overlaps are with the first, best detection of an object, so that they are known at once.
    overlap = box_iou(boxes, boxes)
    overlap[labels[:, None] != labels] = 0.0
    object_of, kept = _join(overlap, view.tolist())
    boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
    count = max(object_of, default=-1) + 1
    index = torch.tensor(object_of, dtype=torch.int64)
    total = scores.new_zeros(count).index_add(0, index, scores)
    weighted = boxes.new_zeros(count, 4).index_add(0, index, boxes * scores[:, None])
    first = torch.full((count,), len(index)).scatter_reduce(
        0, index, torch.arange(len(index)), "amin"
    )
    # An object without any score keeps its first box.
    mean = torch.where(total[:, None] > 0, weighted / total[:, None], boxes[first])
    best = total.argsort(descending=True, stable=True)[:top]
    merged = {
        "scores": (total / len(views))[best],
        "labels": labels[first][best],
        "boxes": mean[best],
    }
    return {name: value.to(device) for name, value in merged.items()}


def _join(overlap: Tensor, view: list[int]) -> tuple[list[int], list[int]]:
    """Of D detections, best first, the objects: numbers from 0, and the detections they are of,
    duplicates left out.

    overlap: [D, D], 0 for other classes. view: of each detection.
    """
    # For each detection the better ones it may be joined with, most overlapping first.
    later, earlier = (overlap > SAME_OBJECT_IOU).tril(-1).nonzero(as_tuple=True)
    order = overlap[later, earlier].argsort(descending=True, stable=True)
    near: list[list[int]] = [[] for _ in view]
    for i, j in zip(later[order].tolist(), earlier[order].tolist(), strict=True):
        near[i].append(j)
    found_by: dict[int, set[int]] = {}  # of the first detection of each object, the views
    number: dict[int, int] = {}
    object_of, kept = [], []
    for i, candidates in enumerate(near):
        leader = next((j for j in candidates if j in found_by), i)
        views = found_by.setdefault(leader, set())
        if view[i] not in views:
            views.add(view[i])
            object_of.append(number.setdefault(leader, len(number)))
            kept.append(i)
    return object_of, kept
