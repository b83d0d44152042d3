"""The label check of a run: its model, early in training, beside the labels of some images."""

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.checkpoint_store import Progress, load_model
from pipeline.config import RunConfig
from pipeline.data.labels import Labels
from pipeline.data.objects import objects
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.evaluate import detect, gather
from pipeline.run import Run
from pipeline.sanity_detections import Compared, check_detections, check_training
from pipeline.tracking import read_lines

IMAGES = 64  # spread over the training set


def label_check(run: Run, progress: Progress) -> None:
    """Writes to the log what looks wrong (collective); see docs/own_data.md."""
    if not run.config.engine.check_after:
        return
    # Not the average of the weights, which this early is still close to where they began.
    model = replace(run.state, ema=None).model
    images = compare(
        model, run.dataset.train, run.dataset.labels, run.config, run.device,
        run.rank, run.world,
    )  # fmt: skip
    if images is None:
        return
    names, pretrained = run.dataset.labels.names, bool(run.config.init.weights)
    if progress.step == 0:
        findings = check_detections(images, names, same_classes=same_classes(run))
    else:
        lines = read_lines(run.log.path)
        losses = [line["loss"] for line in lines if line["kind"] == "train" and "loss" in line]
        findings = check_training(images, names, losses, progress.step, pretrained)
    epoch = progress.step / run.steps_per_epoch
    for finding in findings:
        run.log.write("event", progress.step, epoch, event="message", text=str(finding))


def same_classes(run: Run) -> bool:
    """Whether the class columns of init.weights mean the run's classes. One class head fits any
    classes of the same number."""
    try:
        labels = load_model(Path(run.config.init.weights)).get("labels")
    except UserError:  # a published file, which does not name its classes
        return False
    return labels is not None and tuple(labels["names"]) == run.dataset.labels.names


def compare(
    model: nn.Module,
    shards: ShardSet,
    labels: Labels,
    config: RunConfig,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> list[Compared] | None:
    """Labels and detections of some images (collective); on rank 0 of all of them, else None."""
    some = sample(shards, IMAGES)
    # Processes that decode would take longer to start than these images to decode.
    config = replace(config, engine=replace(config.engine, loader_workers=0))
    found = gather(detect(model, some, labels, config, device, rank, world))
    if found is None:
        return None
    of_image: dict[int, list[dict[str, Any]]] = {}
    for record in found:
        of_image.setdefault(record["image_id"], []).append(record)
    return [
        _compared(some, i, labels, of_image.get(int(some.image_id[i]), []))
        for i in range(len(some))
    ]


def sample(shards: ShardSet, count: int) -> ShardSet:
    """At most `count` images, spread over the set, as a set of their own."""
    count = min(count, len(shards))
    index = np.arange(count) * len(shards) // count
    some = copy(shards)
    for name in ("shard", "offset", "length", "annotations", "image_id", "size"):
        setattr(some, name, getattr(shards, name)[index])
    some._files = shards._files.__class__()  # each closes what it opened
    return some


def _compared(
    shards: ShardSet, index: int, labels: Labels, found: list[dict[str, Any]]
) -> Compared:
    column_of = labels.column_of()
    annotations = [
        a for a in objects(shards.read(index).annotations, column_of) if not a.get("iscrowd")
    ]
    box = np.array([d["bbox"] for d in found], np.float64).reshape(-1, 4)
    return Compared(
        shards.size[index].astype(np.float64),
        np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4),
        np.array([column_of[a["category_id"]] for a in annotations], np.int64),
        np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1),
        np.array([column_of[d["category_id"]] for d in found], np.int64),
        np.array([d["score"] for d in found], np.float64),
    )
