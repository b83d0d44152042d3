"""Augmentation: boxes stay on their objects, sizes are DETR's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import AugmentConfig
from pipeline.data.augment import (
    Example,
    augment,
    crop,
    flip,
    resize_for_evaluation,
    resized_hw,
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


def test_evaluation_resizes_to_the_short_side():
    config = replace(AugmentConfig(), val_short_side=80, max_side=133)
    assert resize_for_evaluation(painted(48, 64), config).image.shape == (3, 80, 106)
