"""Augmentation: boxes stay on their objects, sizes are DETR's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline import pillow_loader
from pipeline.config import AugmentConfig
from pipeline.data.augment import (
    Example,
    Geometry,
    choose,
    crop,
    flip,
    largest,
    resize,
    resize_for_evaluation,
    resized_hw,
    transform,
    transpose,
)
from pipeline.data.order import random_stream


def painted(height: int, width: int, *boxes: tuple[int, int, int, int]) -> Example:
    """Black with white boxes, so that the boxes can be found again in the pixels."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x0, y0, x1, y1 in boxes:
        image[:, y0:y1, x0:x1] = 255
    return Example(
        image, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.arange(len(boxes))
    )


def augment(example: Example, config: AugmentConfig, random: np.random.Generator) -> Example:
    """As the loader does it, for which the choices come before the image is decoded."""
    height, width = example.image.shape[-2:]
    return transform(example, choose((height, width), config, random))


def white_area(image: torch.Tensor) -> list[float]:
    ys, xs = torch.nonzero(image[0] > 127, as_tuple=True)
    return [xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1]


# height, width, short side, max side -> as DETR's get_size_with_aspect_ratio computes by hand
@pytest.mark.parametrize(
    ("height", "width", "short", "longest", "expected"),
    [
        (480, 640, 800, 1333, (800, 1066)),  # 800 * 640 / 480 = 1066.67, cut off
        (640, 480, 800, 1333, (1066, 800)),
        (375, 1242, 800, 1333, (402, 1331)),  # bounded: round(1333 * 375 / 1242) = 402
        (800, 1000, 800, 1333, (800, 1000)),
        (100, 100, 50, 60, (50, 50)),
    ],
)
def test_sizes_are_detrs(height, width, short, longest, expected):
    assert resized_hw(height, width, short, longest) == expected


def test_flip_and_transpose_move_boxes_with_their_pixels():
    example = painted(40, 60, (5, 10, 25, 18))
    assert flip(example, 60).boxes.tolist() == [[35, 10, 55, 18]]
    assert transpose(example).boxes.tolist() == [[10, 5, 18, 25]]
    for moved in (flip(example, 60), transpose(example)):
        assert white_area(moved.image) == moved.boxes[0].tolist()
    assert torch.equal(flip(flip(example, 60), 60).image, example.image)


def test_crop_cuts_boxes_and_drops_those_outside():
    example = painted(50, 50, (0, 0, 20, 20), (30, 30, 50, 50), (18, 18, 22, 40))
    cropped = crop(example, top=10, left=20, size=(30, 25))
    assert cropped.boxes.tolist() == [[10, 20, 25, 30], [0, 8, 2, 30]]
    assert cropped.labels.tolist() == [1, 2]
    assert cropped.image.shape == (3, 30, 25)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(40, 120), st.integers(40, 120),
    st.integers(2, 30), st.integers(2, 30), st.integers(8, 30), st.integers(8, 30),
)  # fmt: skip
def test_boxes_lie_on_their_objects_after_any_augmentation(seed, height, width, x, y, w, h):
    config = AugmentConfig(
        short_sides=(50, 80), max_side=120, crop_probability=0.5, crop_short_sides=(60, 90),
        crop_sides=(30, 70), transpose_probability=0.5,
    )  # fmt: skip
    box = (min(x, width - 9), min(y, height - 9), min(x + w, width), min(y + h, height))
    result = augment(painted(height, width, box), config, random_stream(seed))
    if len(result.boxes) == 0:
        return  # cropped away
    x0, y0, x1, y1 = result.boxes[0].tolist()
    if x1 - x0 < 4 or y1 - y0 < 4:
        return  # a sliver: antialiasing may leave nothing over the threshold
    for found, expected in zip(white_area(result.image), (x0, y0, x1, y1), strict=True):
        assert abs(found - expected) <= 2  # interpolation blurs the edge


def test_the_same_key_gives_the_same_pixels():
    config = AugmentConfig(short_sides=(40, 50, 60), max_side=90)
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 64, 64), np.uint8))
    example = Example(noise, torch.tensor([[1.0, 2, 30, 40]]), torch.tensor([0]))
    results = [augment(example, config, random_stream(1, 2, 3)) for _ in range(2)]
    assert torch.equal(results[0].image, results[1].image)
    assert torch.equal(results[0].boxes, results[1].boxes)


def test_nothing_is_resized_where_no_size_is_given():
    config = AugmentConfig(short_sides=(), crop_probability=0.0, val_short_side=0)
    example = painted(33, 47, (1, 2, 9, 9))
    assert augment(example, config, random_stream(0)).image.shape == (3, 33, 47)
    assert torch.equal(resize_for_evaluation(example, config).image, example.image)


def test_an_image_without_objects_passes_through():
    config = AugmentConfig(short_sides=(40,), max_side=90, crop_sides=(20, 30))
    for seed in range(10):
        result = augment(painted(64, 64), config, random_stream(seed))
        assert result.boxes.shape == (0, 4)


def test_a_one_pixel_image_can_be_resized():
    config = AugmentConfig(val_short_side=4, max_side=10)
    assert min(resize_for_evaluation(painted(1, 200), config).image.shape) >= 1


@pytest.mark.parametrize("order", ["decoded", "flipped", "cropped", "transposed"])
def test_a_resize_keeps_channels_last_order_in_which_all_else_is_fast(order):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    example = Example(torch.from_numpy(pixels).permute(2, 0, 1), torch.zeros(0, 4), torch.zeros(0))
    example = {
        "decoded": lambda e: e,
        "flipped": lambda e: flip(e, 80),
        "cropped": lambda e: crop(e, 3, 5, (40, 50)),
        "transposed": transpose,
    }[order](example)
    size = tuple(example.image.shape[1:])
    image = resize(example, size, (90, 110)).image
    assert image.permute(1, 2, 0).is_contiguous()
    planes = replace(example, image=example.image.contiguous())
    torch.testing.assert_close(image, resize(planes, size, (90, 110)).image, rtol=0, atol=0)


def test_evaluation_resizes_to_the_short_side():
    config = replace(AugmentConfig(), val_short_side=80, max_side=133)
    assert resize_for_evaluation(painted(48, 64), config).image.shape == (3, 80, 106)


def by_pillow(image: Image.Image, boxes: np.ndarray, geometry: Geometry):
    """What DETR's transforms do with these choices, in Pillow and float32 numpy."""
    width, height = image.size
    if geometry.flip:
        image = ImageOps.mirror(image)
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)

    def resize_to(new_height, new_width):
        ratio = np.float32([new_width / image.width, new_height / image.height] * 2)
        return image.resize((new_width, new_height), Image.Resampling.BILINEAR), boxes * ratio

    labels = np.arange(len(boxes))
    if geometry.crop:
        image, boxes = resize_to(*geometry.crop.resized)
        top, left, (height, width) = geometry.crop.top, geometry.crop.left, geometry.crop.size
        image = image.crop((left, top, left + width, top + height))
        boxes = boxes - np.float32([left, top, left, top])
        boxes = np.minimum(boxes.reshape(-1, 2, 2), np.float32([width, height])).clip(0)
        kept = (boxes[:, 1] > boxes[:, 0]).all(axis=1)
        boxes, labels = boxes[kept].reshape(-1, 4), labels[kept]
    image, boxes = resize_to(*geometry.size)
    return np.asarray(image, dtype=float), boxes, labels


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(150, 420), st.integers(150, 420))
def test_boxes_are_those_of_detrs_transforms_and_pixels_next_to_them(seed, height, width):
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    corners = np.sort(random.uniform(0, 1, (6, 2, 2)), axis=1) * (width, height)
    boxes = corners.reshape(6, 4).astype(np.float32)
    geometry = choose((height, width), AugmentConfig(), random_stream(seed))
    expected, expected_boxes, labels = by_pillow(image, boxes, geometry)

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    example = transform(Example(pixels, torch.from_numpy(boxes), torch.arange(6)), geometry)
    assert example.boxes.numpy().tolist() == expected_boxes.tolist()
    assert example.labels.tolist() == labels.tolist()
    difference = np.abs(example.image.permute(1, 2, 0).numpy() - expected)
    assert difference.mean() < 0.1
    assert difference.max() <= 2
    # The official way of pipeline.pillow_loader, with which speed is compared, is this one, too.
    theirs, their_boxes = pillow_loader.augment(image, torch.from_numpy(boxes), geometry)
    np.testing.assert_array_equal(np.asarray(theirs), expected)
    assert their_boxes.tolist() == expected_boxes.tolist()


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 2000), st.integers(1, 2000))
def test_choices_keep_to_the_config(seed, height, width):
    config = AugmentConfig()
    geometry = choose((height, width), config, random_stream(seed))
    assert min(geometry.size) >= 1
    # DETR rounds the shorter side, which may push the longer a little over the bound.
    long, short = max(geometry.size), min(geometry.size)
    assert long <= config.max_side + long / short
    assert min(geometry.size) <= max(config.short_sides)
    if geometry.crop:
        crop = geometry.crop
        assert min(crop.resized) in config.crop_short_sides
        for side, whole, start in zip(crop.size, crop.resized, (crop.top, crop.left), strict=True):
            assert 0 <= start <= whole - side
            assert min(384, whole) <= side <= 600
    assert geometry == choose((height, width), config, random_stream(seed))


class Scripted:
    """A generator that makes given choices, then the first of each, and counts what there are."""

    def __init__(self, choices: list[int]) -> None:
        self.choices, self.counts = choices, []

    def _next(self, count: int) -> int:
        self.counts.append(count)
        return self.choices[i] if (i := len(self.counts) - 1) < len(self.choices) else 0

    def random(self) -> float:
        return (0.0, 1 - 1e-9)[self._next(2)]

    def integers(self, low: int, high: int | None = None) -> int:
        low, high = (0, low) if high is None else (low, high)
        return low + self._next(high - low)


def every_size(source: tuple[int, int], config: AugmentConfig) -> set[tuple[int, int]]:
    """Of all that `choose` can make, going through all its random choices."""
    sizes, choices = set(), []
    while True:
        random = Scripted(choices)
        sizes.add(choose(source, config, random).size)
        choices = choices + [0] * (len(random.counts) - len(choices))
        while choices and choices[-1] == random.counts[len(choices) - 1] - 1:
            choices.pop()
        if not choices:
            return sizes
        choices[-1] += 1


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=2),
    st.sampled_from([(), (7,), (5, 8)]),
    st.integers(8, 14),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([(2, 4), (3, 3), (5, 6)]),
)
def test_the_largest_image_is_that_of_all_choices(sources, sides, longest, crops, turns, cropped):
    config = AugmentConfig(
        short_sides=sides, max_side=longest, crop_probability=crops, crop_short_sides=(3, 5),
        crop_sides=cropped, transpose_probability=turns, flip_probability=0,
    )  # fmt: skip
    sizes = set().union(*(every_size(source, config) for source in sources))
    height, width = largest(np.array(sources), config)
    assert (height, width) in sizes
    assert height * width == max(h * w for h, w in sizes)


def test_the_largest_image_of_the_paper_s_augmentation():
    assert sorted(largest(np.array([(120, 200)]), AugmentConfig())) == [800, 1333]
    # 800 * 600 / 384: the longest crop, where all images are square.
    assert sorted(largest(np.array([(100, 100)]), AugmentConfig())) == [800, 1250]
