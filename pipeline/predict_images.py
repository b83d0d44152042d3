"""Images from anywhere, made ready for a detector: files, encoded bytes, Pillow images, arrays."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from pipeline.config import AugmentConfig
from pipeline.data.augment import Example, for_evaluation, transform
from pipeline.data.colours import to_rgb
from pipeline.data.images import decode_as_shown


@dataclass(frozen=True)
class Prepared:
    """Pixels in the size that the model sees, and the size in pixels in which boxes are wanted."""

    example: Example
    width: int
    height: int
    damage: str = ""
    """libjpeg's words on a file of which some pixels are wrong."""


def prepare(image: Any, config: AugmentConfig) -> Prepared:
    """Decodes, turns as EXIF says, and resizes as in evaluation. Safe on any thread.

    image: a path, an encoded image as bytes, a Pillow image, or a uint8 array [H, W, 3] in RGB or
    [H, W] in grey. Raises `ValueError` for any other, and `OSError` for a file that cannot be read.
    """
    damage: list[str] = []
    if isinstance(image, (str, Path)):
        image = Path(image).read_bytes()
    if isinstance(image, (bytes, bytearray, memoryview)):
        pixels, height, width = decode_as_shown(
            bytes(image), lambda size: for_evaluation(size, config).size, damage.append
        )
    else:
        pixels = torch.from_numpy(_array(image)).permute(2, 0, 1)
        height, width = pixels.shape[-2:]
    example = Example(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    example = transform(example, for_evaluation((height, width), config))
    return Prepared(example, width, height, "".join(damage))


def _array(image: Any) -> np.ndarray:
    """uint8 [H, W, 3]."""
    if isinstance(image, Image.Image):
        # Turned already, it has no orientation left.
        return np.array(to_rgb(ImageOps.exif_transpose(image)))
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"got {type(image).__name__}, expected a path, bytes of an image file, a Pillow image, "
            f"or a uint8 array [H, W, 3]"
        )
    grey = image.ndim == 2
    if image.dtype != np.uint8 or not (grey or image.shape[2:] == (3,)) or not image.size:
        raise ValueError(
            f"got an array of {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3] in RGB, "
            f"or [H, W] in grey"
        )
    # A copy: torch does not take memory that cannot be written, or that is read backwards.
    return np.repeat(image[..., None], 3, axis=2) if grey else np.array(image, order="C")
