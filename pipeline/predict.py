"""A trained detector from a checkpoint, and what it finds in images.

from pipeline.predict import Detector
detector = Detector.load("runs/r50")
for objects in detector.predict(["street.jpg"], threshold=0.5):
    print(objects.labels, objects.scores, objects.boxes)
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from model.detr import build_model
from model.postprocess import postprocess
from pipeline.checkpoint_store import load_model
from pipeline.config import RunConfig
from pipeline.data.batch import collate
from pipeline.data.labels import Labels
from pipeline.data.shards import ShardSet
from pipeline.dataset import open_shards
from pipeline.engine import AUTOCAST, choose_device, naming_inference_memory
from pipeline.errors import UserError
from pipeline.predict_images import Prepared, prepare


@contextmanager
def naming_checkpoint(path: str | Path) -> Iterator[None]:
    """Makes a `UserError` of predictions that are not finite, which names the checkpoint."""
    try:
        yield
    except FloatingPointError as error:
        raise UserError(
            f"checkpoint {path}: {error}; no object can be found with these weights, give others, "
            f"such as an earlier checkpoint's"
        ) from error


@dataclass(frozen=True)
class Detections:
    """The n objects found in one image, by falling score.

    boxes: float64 [n, 4] as (x0, y0, x1, y1) in pixels of the image as a viewer shows it, `width` x
    `height`, and within it. scores: float64 [n], 0 to 1. labels: names of the categories.
    """

    labels: tuple[str, ...]
    category_ids: tuple[int, ...]
    scores: np.ndarray
    boxes: np.ndarray
    width: int
    height: int

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Detector:
    """A trained model on its device, in evaluation mode, with the categories of its columns and the
    settings it was trained with."""

    model: nn.Module
    labels: Labels
    config: RunConfig
    device: torch.device

    @staticmethod
    def load(path: str | Path, device: Any = "auto", precision: Any = "") -> "Detector":
        """From a run folder (its best checkpoint), a checkpoint folder or a model.pt.

        device: auto (a GPU where there is one), cpu or cuda. precision: fp32, bf16 or fp16; empty:
        as the run was trained, on a CPU fp32 for fp16. Raises `UserError` when there is no
        checkpoint, for one whose labels are not the model's, or for a device or precision that is
        not there."""
        path = Path(path)
        if device not in ("auto", "cpu", "cuda"):
            raise UserError(f"device: got {device!r}, expected auto, cpu or cuda")
        if precision not in ("", "fp32", *AUTOCAST):
            raise UserError(f"precision: got {precision!r}, expected fp32, bf16 or fp16")
        if not path.exists():
            raise UserError(f"checkpoint {str(path)!r} does not exist")
        content = load_model(path)
        try:
            config = RunConfig.from_json(content["config"])
        except ValueError as error:
            raise UserError(f"checkpoint {path}: {error}") from None
        config = replace(config, engine=replace(config.engine, device=device))
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        if precision == "fp16" and on_cpu:
            raise UserError("precision: got fp16, which needs a GPU; use bf16 or fp32 on a CPU")
        if on_cpu and config.engine.precision == "fp16":
            precision = precision or "fp32"
        if precision:
            config = replace(config, engine=replace(config.engine, precision=precision))
        chosen = choose_device(config.engine, "--device")
        labels = Labels(tuple(content["labels"]["category_of"]), tuple(content["labels"]["names"]))
        if labels.num_classes != config.model.num_classes:
            raise UserError(
                f"checkpoint {path}: got labels of {labels.num_classes} classes and "
                f"model.num_classes {config.model.num_classes}, expected the same; it was edited, "
                f"take it as training wrote it"
            )
        model = build_model(config.model)
        model.load_state_dict(content["model"])
        return Detector(model.to(chosen).eval(), labels, config, chosen)

    def predict(
        self, images: Iterable[Any], threshold: float = 0.0, most: int = 100, batch_size: int = 0
    ) -> Iterator[Detections]:
        """What is found in each image, in their order; they are taken as they are needed, a batch
        at a time.

        images: paths, encoded images as bytes, Pillow images, or uint8 arrays [H, W, 3] in RGB or
        [H, W] in grey. EXIF orientation is applied to the first three. threshold: smallest score.
        most: objects of an image. batch_size: images in one forward pass, 0: as in the run's
        evaluations. It changes results by no more than padding does: images of a batch are padded
        to one size. Raises `ValueError` that names the image for one that is none, and `OSError`
        for a file that cannot be read; images of the batches before have been given then.
        """
        if isinstance(images, (str, Path, bytes, bytearray, np.ndarray, Image.Image)):
            raise ValueError(
                f"images: got one {type(images).__name__}, expected several: put it in a list"
            )
        remaining = enumerate(images)
        size = batch_size or self.config.engine.evaluation_batch
        while part := list(islice(remaining, size)):
            prepared = []
            for index, image in part:
                try:
                    prepared.append(self.prepare(image))
                except ValueError as error:
                    name = f" ({image})" if isinstance(image, (str, Path)) else ""
                    raise ValueError(f"image {index}{name}: {error}") from None
            yield from self.detect(prepared, threshold, most)

    def prepare(self, image: Any) -> Prepared:
        """An image decoded, turned and resized for `detect`; takes and raises what
        `pipeline.predict_images.prepare` does. Safe on any thread, with any number of others."""
        return prepare(image, self.config.augment)

    @torch.no_grad()
    def detect(
        self, images: Sequence[Prepared], threshold: float = 0.0, most: int = 100
    ) -> list[Detections]:
        """One forward pass over a batch of one image or more. Raises `UserError` where it needs
        more memory than there is, `FloatingPointError` where predictions are not finite."""
        records = [{"id": i, "height": p.height, "width": p.width} for i, p in enumerate(images)]
        batch = collate([p.example for p in images], records)
        dtype = AUTOCAST.get(self.config.engine.precision)
        autocast = torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)
        with naming_inference_memory(tuple(batch.images.shape)), autocast:
            batch = batch.to(self.device)
            outputs = self.model(batch.normalized_images(), batch.padding_mask)
        results = postprocess(outputs, batch.sizes.to(self.device), most)
        return [
            self._detections(image, result, threshold)
            for image, result in zip(images, results, strict=True)
        ]

    def _detections(
        self, image: Prepared, result: dict[str, torch.Tensor], threshold: float
    ) -> Detections:
        """Without columns that have no category: in a model that has learned little they score."""
        columns = result["labels"].tolist()
        scores = result["scores"].double().cpu().numpy()
        categories = np.array([self.labels.category_of[column] for column in columns], dtype=int)
        kept = (categories >= 0) & (scores >= threshold)
        boxes = result["boxes"].double().cpu().numpy()[kept]
        return Detections(
            tuple(self.labels.names[columns[i]] for i in np.flatnonzero(kept)),
            tuple(categories[kept].tolist()),
            scores[kept],
            np.clip(boxes, 0, [image.width, image.height] * 2),
            image.width,
            image.height,
        )

    def open(self, location: str | Path) -> ShardSet:
        """A shard folder, or its URL, whose categories are among the detector's."""
        shards = open_shards(str(location), self.config.data)
        unknown = {int(c["id"]) for c in shards.categories} - set(self.labels.category_of)
        if unknown:
            raise UserError(
                f"{location} has categories that the checkpoint lacks: {sorted(unknown)}"
            )
        return shards
