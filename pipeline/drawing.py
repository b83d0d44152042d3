"""Boxes with names, drawn into a picture."""

import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageColor, ImageDraw, ImageFont

from pipeline.machine_errors import naming

# Colours that stay apart for people who see few of them (Okabe and Ito's palette).
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
GOLDEN = 0.6180339887498949
SMALLEST = 480  # pixels, longer side of a picture with legible names

Area = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in pixels."""


@dataclass(frozen=True)
class Label:
    """A box (x0, y0, x1, y1) in pixels, its class column, which gives the colour, and its text."""

    box: Area
    column: int
    text: str

    def scaled(self, times: float) -> "Label":
        x0, y0, x1, y1 = (value * times for value in self.box)
        return Label((x0, y0, x1, y1), self.column, self.text)


def colour_of(column: int) -> tuple[int, int, int]:
    """RGB, the same for a class in every picture."""
    if column < len(COLOURS):
        return ImageColor.getrgb(COLOURS[column])[:3]
    # Hues a golden angle apart do not come near each other for long.
    lightness = (0.45, 0.65, 0.3)[column % 3]
    red, green, blue = colorsys.hls_to_rgb(column * GOLDEN % 1, lightness, 0.8)
    return round(red * 255), round(green * 255), round(blue * 255)


def with_boxes(image: Image.Image, labels: Sequence[Label]) -> Image.Image:
    """A copy of an RGB image with its labels, in lines and letters that grow with it. A small image
    is enlarged by a whole number, else names would cover it."""
    times = -(-SMALLEST // max(image.size))
    width, height = (side * times for side in image.size)
    picture = image.resize((width, height), Image.Resampling.BICUBIC)
    letters = min(72, max(13, max(width, height) // 55))
    draw_labels(picture, [label.scaled(times) for label in labels], letters)
    return picture


def save(picture: Image.Image, path: Path, **options: Any) -> None:
    """Writes a picture in the format that the ending of `path` says. Raises `OSError` naming
    `path`.

    By way of memory: Pillow does not notice that a disk takes a part of what it writes, and leaves
    a picture that is cut off."""
    encoded = io.BytesIO()
    picture.save(encoded, Image.registered_extensions()[path.suffix.lower()], **options)
    with naming(path):
        path.write_bytes(encoded.getvalue())


def draw_labels(image: Image.Image, labels: Sequence[Label], letters: int = 12) -> None:
    """Draws into an RGB image: the first label over the others, each name where it hides no other
    one if there is such a place. letters: height in pixels."""
    pen = ImageDraw.Draw(image)
    font, line = font_of(letters), max(2, letters // 6)
    for label in reversed(labels):
        x0, y0, x1, y1 = label.box
        area = (x0, y0, max(x0, x1), max(y0, y1))
        pen.rectangle(area, outline=colour_of(label.column), width=line)
    placed: list[Area] = []
    for label in labels:
        width, height = pen.textbbox((0, 0), label.text, font=font)[2:]
        placed.append(_place(label.box, (width + line, height + line), image.size, placed))
    for label, area in reversed(list(zip(labels, placed, strict=True))):
        colour = colour_of(label.column)
        pen.rectangle(area, fill=colour)
        luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        at = (area[0] + line / 2, area[1])
        pen.text(at, label.text, fill="black" if luminance > 110 else "white", font=font)


def _place(box: Area, size: tuple[float, float], image: tuple[int, int], taken: list[Area]) -> Area:
    """Where the name goes: above the box, else in it, below it, or at its right edge; the first of
    these where no other name is, else above."""
    (x0, y0, x1, y1), (width, height) = box, size
    corners = [
        (x0, y0 - height), (x0, y0), (x0, y1), (x1 - width, y0 - height), (x1 - width, y1 - height),
    ]  # fmt: skip
    areas = []
    for x, y in corners:
        left = max(0, min(x, image[0] - width))
        top = max(0, min(y, image[1] - height))
        areas.append((left, top, left + width, top + height))
    free = (area for area in areas if not any(_overlap(area, other) for other in taken))
    return next(free, areas[0])


def _overlap(a: Area, b: Area) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@cache
def font_of(letters: int) -> ImageFont.FreeTypeFont:
    """matplotlib's; Pillow's own has no letters beyond ASCII."""
    path = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    return ImageFont.truetype(path, letters)
