"""Detections of images from anywhere: files, encoded bytes, arrays."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.augment import Example, resize_for_evaluation
from pipeline.data.batch import collate
from pipeline.data.images import decode_image
from pipeline.engine import AUTOCAST
from pipeline.evaluate import evaluating, predict
from pipeline.predict import Detector


def detections(detector: Detector, images: Sequence[Any]) -> list[dict[str, Any]]:
    """One record for each detection: `image` (index), `label`, `score`, and the box as x, y, w, h
    in pixels; by image, then by falling score, at most a hundred of each.

    images: paths, encoded images as bytes, or uint8 arrays [H, W, 3] in RGB. Raises `ValueError`
    that names the image for any other, and `OSError` for a file that cannot be read.
    """
    found: list[dict[str, Any]] = []
    dtype = AUTOCAST.get(detector.config.engine.precision)
    size = detector.config.engine.evaluation_batch
    remaining = enumerate(images)
    with evaluating(detector.model):
        while part := list(islice(remaining, size)):
            examples, records = [], []
            for index, image in part:
                example = _example(image, index)
                height, width = example.image.shape[-2:]
                records.append({"id": index, "height": height, "width": width})
                examples.append(resize_for_evaluation(example, detector.config.augment))
            batch = collate(examples, records).to(detector.device)
            for (index, _), result in zip(part, predict(detector.model, batch, dtype), strict=True):
                found += _records(detector, index, result)
    return found


def _example(image: Any, index: int) -> Example:
    """Pixels without objects."""
    if isinstance(image, (str, Path)):
        image = Path(image).read_bytes()
    if isinstance(image, (bytes, bytearray)):
        try:
            pixels = decode_image(bytes(image))[0]
        except ValueError as error:
            raise ValueError(f"image {index}: {error}") from None
    elif isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(
                f"image {index}: got an array of {image.dtype} {list(image.shape)}, expected uint8 "
                f"[H, W, 3] in RGB"
            )
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    else:
        raise ValueError(
            f"image {index}: got {type(image).__name__}, expected a path, bytes of an image file, "
            f"or a uint8 array [H, W, 3]"
        )
    return Example(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def _records(detector: Detector, index: int, result: dict[str, torch.Tensor]) -> Any:
    boxes, scores = result["boxes"].double().cpu().tolist(), result["scores"].double().tolist()
    for (x0, y0, x1, y1), score, column in zip(
        boxes, scores, result["labels"].tolist(), strict=True
    ):
        if detector.labels.category_of[column] >= 0:
            label = detector.labels.names[column]
            yield {
                "image": index, "label": label, "score": score,
                "x": x0, "y": y0, "w": x1 - x0, "h": y1 - y0,
            }  # fmt: skip
