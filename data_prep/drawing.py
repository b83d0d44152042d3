"""Pictures of textured shapes on noisy gradients: the demo's stand-in for photographs.

Coordinates are (x, y) in pixels, with pixel i covering [i, i + 1]. Polygons are [K, 2] arrays.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

SHAPES = ("circle", "square", "triangle", "star")
SIZES = ((128, 128), (128, 112), (112, 128), (128, 96), (96, 128), (128, 80))  # (width, height)
SIZE_WEIGHTS = (0.4, 0.14, 0.14, 0.12, 0.12, 0.08)
SMALLEST, LARGEST = 14.0, 84.0  # longest side of an ordinary object's box, log-uniform
TURN = 0.2  # radians, the most a shape is turned either way
EMPTY_SHARE, CROWD_SHARE, BIG_SHARE = 0.03, 0.04, 0.10
LEAST_VISIBLE = 0.6
SUPERSAMPLING = 4
MARGIN = 1.0  # shapes keep this far from the border, so that no box is cut


@dataclass(frozen=True)
class DrawnObject:
    """One shape. `polygon` [K, 2] is its whole outline, also where another shape covers it."""

    shape: str
    polygon: Array


@dataclass(frozen=True)
class DrawnCrowd:
    """A cluster of small shapes of one kind. `mask` bool [H, W] is their union."""

    shape: str
    mask: Mask


@dataclass(frozen=True)
class Picture:
    """`pixels` uint8 [H, W, 3], and what was drawn on them."""

    pixels: NDArray[np.uint8]
    objects: tuple[DrawnObject, ...]
    crowd: DrawnCrowd | None


def draw_picture(rng: np.random.Generator) -> Picture:
    """Draw one picture; a pure function of the generator's state."""
    width, height = SIZES[rng.choice(len(SIZES), p=SIZE_WEIGHTS)]
    canvas = _background(rng, width, height)
    kind = rng.random()
    objects: list[DrawnObject] = []
    crowd = None
    if kind >= EMPTY_SHARE:
        visible: list[tuple[Mask, int]] = []  # what is left to see of each shape, its whole area
        if kind < EMPTY_SHARE + BIG_SHARE and min(width, height) >= 112:
            # Only circles and squares fill enough of their box to pass 96 x 96 pixels of area.
            shape = SHAPES[rng.integers(2)]
            longest = min(width, height) - 2 * MARGIN
            side = rng.uniform(110 if shape == "circle" else 99, longest)
            _place(rng, canvas, shape, side, objects, visible, turn=0.05)
        for _ in range(rng.integers(1, 9) - len(objects)):
            shape = SHAPES[rng.integers(len(SHAPES))]
            side = math.exp(rng.uniform(math.log(SMALLEST), math.log(LARGEST)))
            _place(rng, canvas, shape, side, objects, visible)
        if kind > 1 - CROWD_SHARE:
            crowd = _place_crowd(rng, canvas, visible)
    return Picture(np.clip(canvas, 0, 255).astype(np.uint8), tuple(objects), crowd)


def coverage(polygon: Array, width: int, height: int) -> tuple[tuple[int, int, int, int], Array]:
    """Anti-aliased coverage in [0, 1] of a polygon inside a width x height picture.

    Returns the box (x0, y0, x1, y1) of whole pixels it touches, and the coverage
    [y1 - y0, x1 - x0] there.
    """
    x0, y0 = (max(0, math.floor(v)) for v in polygon.min(0))
    x1, y1 = (
        min(limit, math.ceil(v)) for v, limit in zip(polygon.max(0), (width, height), strict=True)
    )
    stencil = Image.new("L", ((x1 - x0) * SUPERSAMPLING, (y1 - y0) * SUPERSAMPLING))
    # Pillow's integer coordinates are pixel centres, hence the half.
    points = (polygon - (x0, y0)) * SUPERSAMPLING - 0.5
    ImageDraw.Draw(stencil).polygon([(float(x), float(y)) for x, y in points], fill=255)
    alpha = np.asarray(stencil.reduce(SUPERSAMPLING), np.float32) / np.float32(255)
    return (x0, y0, x1, y1), alpha


def _place(
    rng: np.random.Generator,
    canvas: Array,
    shape: str,
    side: float,
    objects: list[DrawnObject],
    visible: list[tuple[Mask, int]],
    turn: float = TURN,
) -> None:
    """Draw a shape over what is there, where it hides nothing too much; skip it if that fails."""
    height, width = canvas.shape[:2]
    outline = _outline(rng, shape, turn) * min(side, min(width, height) - 2 * MARGIN)
    room = (width, height) - np.ptp(outline, axis=0)
    for _ in range(12):
        corner = rng.uniform(MARGIN, np.maximum(room - MARGIN, MARGIN + 1e-3))
        polygon = np.round(outline - outline.min(0) + corner, 2).astype(np.float32)
        box, alpha = coverage(polygon, width, height)
        mask = _paste(alpha >= 0.5, box, width, height)
        if not _hides_too_much(mask, visible):
            _hide(mask, visible)
            visible.append((mask, int(mask.sum())))
            objects.append(DrawnObject(shape, polygon))
            _paint(canvas, box, alpha, _texture(rng, box))
            return


def _place_crowd(
    rng: np.random.Generator, canvas: Array, visible: list[tuple[Mask, int]]
) -> DrawnCrowd | None:
    """A cluster of 6 to 12 like shapes of 8 to 11 pixels in one patch of the picture."""
    height, width = canvas.shape[:2]
    shape = SHAPES[rng.integers(len(SHAPES))]
    patch = rng.uniform(26, 38, 2)
    corner = rng.uniform(MARGIN, (width, height) - patch - MARGIN)
    union = np.zeros((height, width), bool)
    members = []
    for _ in range(rng.integers(6, 13)):
        outline = _outline(rng, shape, TURN) * rng.uniform(8, 11)
        polygon = outline - outline.min(0) + corner
        polygon = (polygon + rng.uniform(0, patch - np.ptp(outline, axis=0))).astype(np.float32)
        box, alpha = coverage(polygon, width, height)
        union |= _paste(alpha >= 0.5, box, width, height)
        members.append((box, alpha))
    if _hides_too_much(union, visible):
        return None
    _hide(union, visible)
    for box, alpha in members:
        _paint(canvas, box, alpha, _texture(rng, box))
    return DrawnCrowd(shape, union)


def _outline(rng: np.random.Generator, shape: str, turn: float) -> Array:
    """[K, 2] outline at a random angle within +-turn, the longest side of its box being 1."""
    if shape == "circle":
        angles, radii = np.arange(48) * (2 * np.pi / 48), np.ones(48)
    elif shape == "square":
        angles, radii = np.pi / 4 + np.arange(4) * (np.pi / 2), np.ones(4)
    elif shape == "triangle":
        angles, radii = np.arange(3) * (2 * np.pi / 3), np.ones(3)
    else:
        assert shape == "star", shape
        angles, radii = np.arange(10) * (np.pi / 5), np.where(np.arange(10) % 2, 0.45, 1.0)
    angles = angles + rng.uniform(-turn, turn)
    points = np.stack((np.cos(angles), np.sin(angles)), 1) * radii[:, None]
    return (points / np.ptp(points, axis=0).max()).astype(np.float32)


def _paste(part: Mask, box: tuple[int, int, int, int], width: int, height: int) -> Mask:
    x0, y0, x1, y1 = box
    whole = np.zeros((height, width), bool)
    whole[y0:y1, x0:x1] = part
    return whole


def _hides_too_much(mask: Mask, visible: Iterable[tuple[Mask, int]]) -> bool:
    return any((left & ~mask).sum() < LEAST_VISIBLE * area for left, area in visible)


def _hide(mask: Mask, visible: Iterable[tuple[Mask, int]]) -> None:
    for left, _ in visible:
        left &= ~mask


def _paint(canvas: Array, box: tuple[int, int, int, int], alpha: Array, colours: Array) -> None:
    x0, y0, x1, y1 = box
    under = canvas[y0:y1, x0:x1]
    under += alpha[..., None] * (colours - under)


def _texture(rng: np.random.Generator, box: tuple[int, int, int, int]) -> Array:
    """[h, w, 3] colours in 0..255: a two-coloured pattern, lit from one side, a little grainy."""
    x0, y0, x1, y1 = box
    width, height = x1 - x0, y1 - y0
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, light_angle = rng.uniform(0, 2 * np.pi, 2)
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    wave = 2 * np.pi / rng.uniform(4, 10)
    pattern = rng.integers(4)
    if pattern == 0:  # stripes
        mix = 0.5 + 0.5 * np.sin(u * wave)
    elif pattern == 1:  # checks
        mix = (np.sin(u * wave) * np.sin(v * wave) > 0).astype(np.float32)
    elif pattern == 2:  # dots
        mix = (np.sin(u * wave) + np.sin(v * wave) > 0.8).astype(np.float32)
    else:  # blotches
        blotches = rng.random((height // 4 + 2, width // 4 + 2), dtype=np.float32)
        mix = np.asarray(
            Image.fromarray(blotches).resize((width, height), Image.Resampling.BILINEAR)
        )
    first = _colour(rng, (0.55, 1.0), (0.55, 1.0))
    second = first * rng.uniform(0.7, 0.9)
    colours = first + mix[..., None] * (second - first)
    light = x / width * math.cos(light_angle) + y / height * math.sin(light_angle)
    grain = rng.standard_normal((height, width), dtype=np.float32) * 5
    return (colours * (1 + 0.2 * light[..., None]) + grain[..., None]).astype(np.float32)


def _background(rng: np.random.Generator, width: int, height: int) -> Array:
    """[height, width, 3]: a gradient between two dull colours, with soft and fine noise."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    slope = x / width * math.cos(angle) + y / height * math.sin(angle)
    slope = (slope - slope.min()) / np.ptp(slope)
    first, second = (_colour(rng, (0.05, 0.35), (0.2, 0.95)) for _ in range(2))
    soft = Image.fromarray(rng.standard_normal((5, 5), dtype=np.float32) * 14)
    clouds = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC))
    fine = rng.standard_normal((height, width, 3), dtype=np.float32) * rng.uniform(3, 9)
    gradient = first + slope[..., None] * (second - first)
    return (gradient + clouds[..., None] + fine).astype(np.float32)


def _colour(
    rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]
) -> Array:
    """[3] red, green, blue in 0..255 of a random hue."""
    hue, s, v = rng.uniform(0, 6), rng.uniform(*saturation), rng.uniform(*value)
    sector = (np.array([5, 3, 1]) + hue) % 6
    rgb = v - v * s * np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return (rgb * 255).astype(np.float32)
