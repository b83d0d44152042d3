"""The detector as a deployment of Ray Serve: a replica decodes images as they come, and has the
model look at them in batches."""

import asyncio
import io
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError
from ray import serve

from pipeline.predict import Detections, Detector
from pipeline.predict_images import Prepared

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is taken from the network, fewer than from a disk: readers of others are little tested."""

DECODERS = 2  # images decoded at once; each can need several times its pixels in memory
FAILURES = 3  # of the model in a row, after which Ray Serve is to start the replica anew

log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Settings:
    """What a replica needs to know: the checkpoint, device and precision as `Detector.load` takes
    them, the most images of a batch, and the limits of an image."""

    checkpoint: str
    device: str
    precision: str
    max_batch: int
    max_wait: float
    """Seconds that an image waits for others to share its batch."""
    megapixels: float
    longest_side: int
    """In pixels. 0: any."""


class DetectorReplica:
    """A detector in a process of its own. Its start ends with a first forward pass."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.detector = Detector.load(settings.checkpoint, settings.device, settings.precision)
        self.decoders = ThreadPoolExecutor(DECODERS, "decode")
        self.model = ThreadPoolExecutor(1, "model")
        self.failures = 0
        self._look([self.detector.prepare(Image.new("RGB", (640, 480)))])  # the first is slow
        self._together.set_max_batch_size(settings.max_batch)
        self._together.set_batch_wait_timeout_s(settings.max_wait)

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        if self.failures >= FAILURES:
            raise RuntimeError(f"the model failed {self.failures} times in a row")

    async def __call__(self, data: bytes, threshold: float, most: int) -> dict[str, Any]:
        """As `jobs.serve_app.Detect` says."""
        loop = asyncio.get_running_loop()
        try:
            prepared = await loop.run_in_executor(self.decoders, self._prepare, data)
        except ValueError as error:
            return {"error": _one_line(error)}
        found, batch = await self._together(prepared)
        if isinstance(found, Exception):
            raise found
        damage = {"damage": prepared.damage} if prepared.damage else {}
        return {**as_json(found, threshold, most), **damage, "batch": batch}

    def _prepare(self, data: bytes) -> Prepared:
        check_image(data, self.settings.megapixels, self.settings.longest_side)
        return self.detector.prepare(data)

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=0.0)
    async def _together(self, images: list[Prepared]) -> list[tuple[Detections | Exception, int]]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.model, self._look, images)

    def _look(self, images: list[Prepared]) -> list[tuple[Detections | Exception, int]]:
        """What is found in each image, and the number of images that were looked at with it, for
        one of them; 0 for the others.

        Images of one size are looked at together. Others would be padded, and what is found in an
        image would depend on what other clients send.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault(tuple(image.example.image.shape), []).append(i)
        found: dict[int, tuple[Detections | Exception, int]] = {}
        for group in groups.values():
            results = self._detect([images[i] for i in group])
            counts = [len(group), *[0] * (len(group) - 1)]
            found.update(zip(group, zip(results, counts, strict=True), strict=True))
        return [found[i] for i in range(len(images))]

    def _detect(self, images: list[Prepared]) -> list[Detections | Exception]:
        """A batch that fails is taken an image at a time, so that only what is at fault does."""
        try:
            found: list[Detections | Exception] = list(self.detector.detect(images))
            self.failures = 0
            return found
        except Exception as error:
            if len(images) > 1:
                log.exception("a batch of %d images failed; each is tried alone", len(images))
                return [self._detect([image])[0] for image in images]
            self.failures += 1
            return [error]


def check_image(data: bytes, megapixels: float, longest_side: int) -> None:
    """Raises `ValueError` unless the header is an image's, of a kind and size that is taken."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except UnidentifiedImageError:
        raise ValueError("not an image: expected JPEG, PNG, WebP, GIF, BMP or TIFF") from None
    except Image.DecompressionBombError:  # beyond Pillow's own limit
        raise ValueError(
            f"the image has too many pixels, expected at most {megapixels:g} million in all"
        ) from None
    except Exception:  # a damaged header trips Pillow in every way there is
        raise ValueError("the image is damaged") from None
    if width * height > megapixels * 1e6:
        raise ValueError(
            f"got {width} x {height} pixels, expected at most {megapixels:g} million in all"
        )
    if longest_side and max(width, height) > longest_side:
        raise ValueError(
            f"got {width} x {height} pixels, expected sides of at most {longest_side}, because "
            f"this model takes images in their own size"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or "the image is damaged"


def as_json(found: Detections, threshold: float, most: int) -> dict[str, Any]:
    """Detections in the service's answer: those that score `threshold` or more, the best `most`."""
    kept = [i for i in range(len(found)) if found.scores[i] >= threshold][:most]
    return {
        "width": found.width,
        "height": found.height,
        "detections": [
            {
                "label": found.labels[i],
                "category_id": found.category_ids[i],
                "score": round(float(found.scores[i]), 6),
                "box": [round(float(x), 2) for x in found.boxes[i]],
            }
            for i in kept
        ],
    }
