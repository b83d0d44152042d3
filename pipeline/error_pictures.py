"""The images with the most errors, drawn: what was missed, and what was found that is not there."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.shards import ShardSet
from pipeline.drawing import save
from pipeline.error_analysis import KINDS, RIGHT, judge
from pipeline.image_boxes import ImageBoxes

# Okabe and Ito's palette, which people who see few colours tell apart.
COLOURS = {
    "right": "#009e73", "classification": "#cc79a7", "localisation": "#f0e442",
    "both": "#0072b2", "duplicate": "#56b4e9", "background": "#e69f00", "missed": "#d55e00",
}  # fmt: skip
SIDE = 640  # pixels, of the longer side
BAND = 22  # pixels, above each half for its title


@dataclass(frozen=True)
class Picture:
    """One drawn image: where it is, and how many errors of each kind it has."""

    path: Path
    image_id: int
    errors: dict[str, int]

    def said(self) -> str:
        return ", ".join(f"{n} {kind}" for kind, n in self.errors.items() if n)


def errors_of(image: ImageBoxes) -> dict[str, int]:
    """By kind; a missed object is any that no detection found, whatever came near it."""
    verdicts = judge(image)
    kinds = verdicts.kind[~verdicts.ignored]
    counts = {name: int((kinds == i).sum()) for i, name in enumerate(KINDS)}
    return {**counts, "missed": int((~verdicts.found).sum())}


def worst(images: Sequence[ImageBoxes], count: int) -> list[int]:
    """Places of the images with the most errors, the worst first; none without an error."""
    totals = np.asarray([sum(errors_of(image).values()) for image in images])
    order = np.argsort(-totals, kind="stable")[:count]
    return order[totals[order] > 0].tolist()


def draw_worst(
    shards: ShardSet,
    images: Sequence[ImageBoxes],
    names: dict[int, str],
    folder: Path,
    count: int,
) -> list[Picture]:
    """Saves pictures of the `count` worst images into `folder`. names: of category ids."""
    index_of = {image_id: i for i, image_id in enumerate(shards.image_id.tolist())}
    pictures = []
    for rank, place in enumerate(worst(images, count), 1):
        image = images[place]
        sample = shards.read(index_of[image.image_id])
        path = folder / f"{rank:03d}-image-{image.image_id}.jpg"
        with Image.open(io.BytesIO(sample.image_bytes)) as opened:
            save(draw_errors(opened.convert("RGB"), image, names), path, quality=88)
        pictures.append(Picture(path, image.image_id, errors_of(image)))
    return pictures


def draw_errors(pixels: Image.Image, image: ImageBoxes, names: dict[int, str]) -> Image.Image:
    """On the left the objects, those missed marked; on the right the detections by what they are,
    the best drawn last."""
    verdicts = judge(image)
    objects = [
        (box, "right" if found else "missed", names[category] + ("" if found else " missed"))
        for box, category, found in zip(
            image.object_boxes, image.object_classes.tolist(), verdicts.found, strict=True
        )
    ]
    detections = [
        (box, "right" if kind == RIGHT else KINDS[kind], f"{names[category]} {score:.2f}")
        for box, category, score, kind, ignored in zip(
            image.boxes, image.classes.tolist(), image.scores, verdicts.kind, verdicts.ignored,
            strict=True,
        )
        if not ignored
    ]  # fmt: skip
    scale = SIDE / max(pixels.size)
    size = max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale))
    plain = pixels.resize(size)
    found = sum(verdicts.found)
    halves = [
        _half(plain, objects, f"objects: {len(objects)}, {found} found", scale),
        _half(plain, detections[::-1], f"detections: {len(detections)}", scale),
    ]
    whole = Image.new("RGB", (2 * size[0] + 6, size[1] + BAND), "white")
    for i, half in enumerate(halves):
        whole.paste(half, (i * (size[0] + 6), 0))
    return whole


def _half(
    plain: Image.Image, boxes: Sequence[tuple[np.ndarray, str, str]], title: str, scale: float
) -> Image.Image:
    image = plain.copy()
    pen = ImageDraw.Draw(image)
    # Pillow's own font has no letters beyond ASCII.
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 12)
    corners = [
        (x * scale, y * scale, (x + w) * scale, (y + h) * scale) for (x, y, w, h), *_ in boxes
    ]
    for (x0, y0, x1, y1), (_, kind, _) in zip(corners, boxes, strict=True):
        width = 2 if kind == "right" else 3
        pen.rectangle([x0, y0, max(x0, x1), max(y0, y1)], outline=COLOURS[kind], width=width)
    for (x0, y0, *_), (_, kind, text) in zip(corners, boxes, strict=True):  # over all lines
        at = (
            min(max(0.0, x0), max(0.0, image.width - pen.textlength(text, font) - 3)),
            min(max(0.0, y0 - 15), image.height - 16),
        )
        left, top, right, bottom = pen.textbbox(at, text, font=font)
        pen.rectangle([left, top, right + 2, bottom + 1], fill=COLOURS[kind])
        pen.text(at, text, fill="white" if kind in ("both", "missed") else "black", font=font)
    half = Image.new("RGB", (image.width, image.height + BAND), "white")
    half.paste(image, (0, BAND))
    ImageDraw.Draw(half).text((4, 3), title, fill="black", font=font)
    return half
