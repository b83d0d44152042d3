"""COCO evaluation, spread over the ranks: every image exactly once."""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from torch import Tensor, nn

from model.postprocess import postprocess
from pipeline.coco_scores import Scores, score, summary_names
from pipeline.config import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.labels import Labels
from pipeline.data.loader import evaluation_batches
from pipeline.data.objects import objects
from pipeline.data.shards import ShardSet
from pipeline.engine import AUTOCAST, naming_inference_memory

NAMES = summary_names()


@dataclass(frozen=True)
class Evaluation:
    """`summary`: the 12 COCO numbers (-1 where undefined); `per_class`: AP by category name;
    `detections`: COCO result records."""

    summary: dict[str, float]
    per_class: dict[str, float]
    detections: list[dict[str, Any]]


def ground_truth(shards: ShardSet) -> COCO:
    """The shards' objects as pycocotools holds them.

    What it needs and a data set may lack is filled in: `iscrowd` 0, `area` of the box. Ids are
    counted from 1, because pycocotools takes a match with id 0 for none.
    """
    truth = COCO()
    categories = [int(c["id"]) for c in shards.categories]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(len(shards)):
        sample = shards.read(index)
        images.append(sample.image)
        for annotation in objects(sample.annotations, categories):
            width, height = annotation["bbox"][2:]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": sample.image["id"],
                    "category_id": annotation["category_id"],
                    "bbox": annotation["bbox"],
                    "area": annotation.get("area", width * height),
                    "iscrowd": annotation.get("iscrowd", 0),
                }
            )
    truth.dataset = {
        "images": images,
        "annotations": annotations,
        "categories": shards.categories,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def detect(
    model: nn.Module,
    shards: ShardSet,
    labels: Labels,
    config: RunConfig,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    between: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """COCO result records of this rank's images: image_id, category_id, bbox (x, y, w, h), score;
    the 100 best of each, best first.

    `between` is called before each batch that all ranks have one like, so it may be collective. The
    model's mode is restored afterwards. Raises FloatingPointError, on all ranks alike (collective),
    where predictions are not finite.
    """
    return detect_best(model, shards, labels, config, device, rank, world, between, (100,))[0]


def detect_best(
    model: nn.Module,
    shards: ShardSet,
    labels: Labels,
    config: RunConfig,
    device: torch.device,
    rank: int,
    world: int,
    between: Callable[[], None],
    tops: tuple[int, ...],
) -> list[list[dict[str, Any]]]:
    """Records as of `detect`, of one pass over the images, for each number of best detections.

    Which of several with the same score are among 100 is not told by the best 300: torch's topk
    leaves their order open, and in bf16 they are many.
    """
    dtype = AUTOCAST.get(config.engine.precision)
    detections: list[list[dict[str, Any]]] = [[] for _ in tops]
    loader = evaluation_batches(
        shards, labels, config, rank, world, config.engine.evaluation_batch, device.type == "cuda"
    )
    size = config.engine.evaluation_batch
    common = -(-len(shards) // size) // world
    refused = ""
    with evaluating(model):
        for i, batch in enumerate(loader):
            if i < common:
                between()
            if refused:
                continue  # for the others, who meet this rank in `between`
            batch = batch.to(device)
            outputs = infer(model, batch, dtype)
            try:
                for top, found in zip(tops, detections, strict=True):
                    results = postprocess(outputs, batch.sizes.to(device), top)
                    for image_id, result in zip(batch.image_ids, results, strict=True):
                        found += records(image_id, result, labels)
            except FloatingPointError as error:
                refused = f"{error}, in images {batch.image_ids}"
    refuse_together(refused)
    return detections


def refuse_together(refused: str) -> None:
    """Raises `FloatingPointError` on all ranks where one has refused something (collective)."""
    of_all = [refused]
    if dist.is_initialized():
        of_all = [""] * dist.get_world_size()
        dist.all_gather_object(of_all, refused)
    if any(of_all):
        raise FloatingPointError(next(filter(None, of_all)))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode without gradients; its own mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def infer(model: nn.Module, batch: Batch, dtype: torch.dtype | None) -> dict[str, Any]:
    """The model's outputs for a batch on its device. dtype: of autocast, None for none. Raises
    `UserError` where the memory is too small."""
    autocast = torch.autocast(batch.images.device.type, dtype=dtype, enabled=dtype is not None)
    with naming_inference_memory(tuple(batch.images.shape)), autocast:
        return model(batch.normalized_images(), batch.padding_mask)


def predict(model: nn.Module, batch: Batch, dtype: torch.dtype | None) -> list[dict[str, Tensor]]:
    """The detections of each image of a batch on the model's device, as `postprocess` gives them,
    in pixels of the original images. dtype: of autocast, None for none."""
    return postprocess(infer(model, batch, dtype), batch.sizes.to(batch.images.device))


def records(image_id: int, result: dict[str, Tensor], labels: Labels) -> list[dict[str, Any]]:
    """One image's detections as COCO result records; columns without a category are left out."""
    x0y0, x1y1 = result["boxes"].double().cpu().split(2, dim=1)
    boxes = torch.cat([x0y0, x1y1 - x0y0], dim=1).tolist()
    scores, columns = result["scores"].double().tolist(), result["labels"].tolist()
    return [
        {"image_id": image_id, "category_id": labels.category_of[c], "bbox": box, "score": score}
        for box, score, c in zip(boxes, scores, columns, strict=True)
        if labels.category_of[c] >= 0
    ]


def gather(detections: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """All ranks' records on rank 0 (collective), in an order that does not depend on the number of
    ranks; None elsewhere."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        every: list[Any] = [detections]
    else:
        every = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
        dist.gather_object(detections, every if dist.get_rank() == 0 else None, dst=0)
        if dist.get_rank() != 0:
            return None
    return merged(every)


def merged(parts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The records of all ranks by image; within one as they were, for they come from one rank."""
    return sorted((d for part in parts for d in part), key=lambda d: d["image_id"])


def summarize(truth: COCO, detections: list[dict[str, Any]]) -> Evaluation:
    """COCO's numbers for result records."""
    return _evaluation_of(score(truth, detections), detections)


def _evaluation_of(scores: Scores, detections: list[dict[str, Any]]) -> Evaluation:
    per_class = {name: scores.of_class(k)["AP"] for k, name in enumerate(scores.names)}
    return Evaluation(scores.summary(), per_class, detections)


def table(evaluation: Evaluation) -> str:
    """The 12 numbers and AP by class, as text."""
    return "\n".join([numbers_table(evaluation.summary), *_class_lines(evaluation.per_class)])


def numbers_table(summary: dict[str, float]) -> str:
    """12 numbers in two rows of six, below their names."""
    names = list(summary)
    shown = ["  n/a" if v < 0 else f"{v:.3f}" for v in summary.values()]
    rows = [names[:6], shown[:6], names[6:], shown[6:]]
    return "\n".join("  ".join(f"{cell:>6}" for cell in row) for row in rows)


def _class_lines(per_class: dict[str, float]) -> list[str]:
    if not per_class:
        return []
    width = max(len(name) for name in per_class)
    return ["AP by class"] + [
        f"  {name:<{width}}  {'n/a' if v < 0 else f'{v:.3f}'}" for name, v in per_class.items()
    ]
