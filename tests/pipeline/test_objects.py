"""What is an object: an annotation with whose category and box `data_prep` finds nothing wrong."""

import pytest

from data_prep.checks import annotation_problems, non_finite
from pipeline.data.objects import objects

INFINITE = float("inf")
CATEGORIES = {0, 1, 3}
IDS = [
    1, 3, 0, 2, -1, 3.0, 1.0, 0.0, -0.0, True, False, None, "1", [1], {}, 10**400, INFINITE,
    float("nan"),
]  # fmt: skip
BOXES = [
    [0, 0, 5, 5], [0.5, 1e-9, 2.0, 3], [-4, -4, 5, 5], [0, 0, 0, 0], [0, 0, -1, 5], [1e308] * 4,
    [True, 0, 5, 5], [0, 0, 5, True], [False] * 4, [0, 0, 5, "5"], [0, 0, 5, None], [[0, 0, 5, 5]],
    [0, 0, 5, [5]], [], [0, 0, 5], [0, 0, 5, 5, 5], (0, 0, 5, 5), None, "0055", 5,
    {"0": 0, "1": 0, "2": 5, "3": 5}, [float("nan"), 0, 5, 5], [0, 0, INFINITE, 5],
    [-INFINITE, 0, INFINITE, 5], [10**400, 0, 5, 5], [0, 0, 5, -(10**400)],
]  # fmt: skip


def reported(annotation: dict) -> bool:
    """Whether a reason to leave it aside is among what `data_prep convert` reports."""
    kinds = {kind for kind, _ in annotation_problems(annotation, categories=CATEGORIES)}
    return bool(kinds & {"unknown category", "no box"}) or non_finite(annotation.get("bbox"))


@pytest.mark.parametrize("category", IDS, ids=lambda value: f"{value!r:.20}")
def test_a_category_is_one_for_both_or_for_neither(category):
    annotation = {"category_id": category, "bbox": [0, 0, 5, 5]}
    assert (objects([annotation], CATEGORIES) == []) == reported(annotation)


@pytest.mark.parametrize("box", BOXES, ids=lambda value: f"{value!r:.40}")
def test_a_box_is_one_for_both_or_for_neither(box):
    annotation = {"category_id": 1, "bbox": box}
    assert (objects([annotation], CATEGORIES) == []) == reported(annotation)


def test_what_is_no_object_is_left_aside():
    assert objects([{"bbox": [0, 0, 5, 5]}, {"category_id": 1}, {}], CATEGORIES) == []
    odd = [{"category_id": 3.0, "bbox": [0, 0, 5, 5]}, {"category_id": 3, "bbox": [True, 0, 5, 5]}]
    good = {"category_id": 3, "bbox": [-4, 0, 0, 5]}
    assert objects([*odd, good], CATEGORIES) == [good]
