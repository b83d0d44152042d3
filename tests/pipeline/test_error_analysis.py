"""TIDE's numbers: by hand, and those that its authors' package gave."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from pipeline.error_analysis import BACKGROUND_ERROR, KINDS, LOCALISATION, RIGHT, analyse, judge
from pipeline.image_boxes import by_image

CASES = json.loads(Path(__file__).with_name("tide_cases.json").read_text())["cases"]
A, B, FAR = [0, 0, 40, 40], [100, 100, 40, 40], [200, 200, 30, 30]
LOW = [0, 0, 40, 16]  # IoU 0.4 with A


def images(objects, detections, count=1, most=100):
    """objects: (image, category, x, y, w, h, crowd); detections: the same with a score."""
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in range(1, count + 1)],
        "categories": [],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": box, "iscrowd": crowd}
            for n, (i, c, *box, crowd) in enumerate(objects, 1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    found = [
        {"image_id": i, "category_id": c, "bbox": box, "score": score}
        for i, c, *box, score in detections
    ]
    return by_image(truth, found, most)


def errors(objects, detections):
    """Of one image; objects: (category, box), detections: (category, box, score)."""
    return analyse(
        images([(1, c, *box, 0) for c, box in objects], [(1, c, *b, s) for c, b, s in detections])
    )


def only(kind, d_ap):
    return {name: pytest.approx(d_ap if name == kind else 0.0, abs=1e-12) for name in KINDS}


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_numbers_of_tidecv(case):
    found = analyse(images(case["objects"], case["detections"], case["images"]))
    assert found.ap == pytest.approx(case["ap"], abs=1e-12)
    assert found.d_ap == pytest.approx(case["d_ap"], abs=1e-12)
    assert found.counts == case["counts"]
    assert found.false_positives == pytest.approx(case["false_positives"], abs=1e-12)
    assert found.false_negatives == pytest.approx(case["false_negatives"], abs=1e-12)


def test_the_cases_of_tidecv_hold_every_kind():
    for kind in KINDS:
        assert any(case["d_ap"][kind] > 0.005 for case in CASES)
        assert any(case["counts"][kind] > 1 for case in CASES)
    assert any(crowd for case in CASES for *_, crowd in case["objects"])


def test_wrong_class():
    """Class 1 finds nothing (0); class 2 has a wrong one before the right one (1/2)."""
    found = errors([(1, A), (2, B)], [(2, A, 0.9), (2, B, 0.8)])
    assert found.ap == pytest.approx(0.25)
    assert found.d_ap == only("classification", 0.75)
    assert found.false_positives == pytest.approx(0.25)  # class 2 alone becomes 1
    assert found.false_negatives == pytest.approx(0.25)  # class 1 is no longer asked for


def test_wrong_place_and_of_two_the_better_counts():
    found = errors([(1, A)], [(1, LOW, 0.9), (1, [0, 0, 40, 12], 0.8)])
    assert found.ap == 0
    assert found.d_ap == only("localisation", 1.0)
    assert found.counts["localisation"] == 2
    assert found.counts["missed"] == 0


def test_both_wrong():
    """Class 2 has no objects: a detection of it makes a class of AP 0."""
    found = errors([(1, A)], [(2, LOW, 0.9), (1, A, 0.8)])
    assert found.ap == pytest.approx(0.5)
    assert found.d_ap == only("both", 0.5)


def test_duplicate():
    """Precision 1 up to recall 0.5 (51 of 101 points), then 2/3."""
    found = errors([(1, A), (1, B)], [(1, A, 0.9), (1, A, 0.8), (1, B, 0.7)])
    assert found.ap == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert found.d_ap == only("duplicate", 50 / 3 / 101)


def test_background():
    found = errors([(1, A)], [(1, FAR, 0.9), (1, A, 0.8)])
    assert found.ap == pytest.approx(0.5)
    assert found.d_ap == only("background", 0.5)
    assert found.false_positives == pytest.approx(0.5)


def test_missed():
    found = errors([(1, A), (1, B)], [(1, A, 0.9)])
    assert found.ap == pytest.approx(51 / 101)
    assert found.d_ap == only("missed", 50 / 101)
    assert found.false_negatives == pytest.approx(50 / 101)


def test_nothing_detected_is_all_missed():
    found = errors([(1, A), (2, B)], [])
    assert found.ap == 0
    assert found.d_ap == only("missed", 1.0)


def test_bounds_of_overlap():
    """An IoU of 0.5 is right, of 0.1 a wrong place, of less background."""
    for height, kind in ((20, RIGHT), (19, LOCALISATION), (4, LOCALISATION), (3, BACKGROUND_ERROR)):
        (image,) = images([(1, 1, *A, 0)], [(1, 1, 0, 0, 40, height, 0.5)])
        assert judge(image).kind.tolist() == [kind]


def test_inside_a_crowd_of_its_class_a_detection_costs_nothing():
    inside = (1, 1, 10, 10, 20, 20, 0.9)
    crowd, single = (1, 1, *A, 1), (1, 1, *B, 0)
    found = analyse(images([crowd, single], [inside, (1, 1, *B, 0.8)]))
    assert found.ap == 1
    other = analyse(images([(1, 2, *A, 1), single], [inside, (1, 1, *B, 0.8)]))
    assert other.ap == 0.5


def test_only_the_best_detections_of_an_image_count():
    many = [(1, 1, *FAR, 0.9)] * 5 + [(1, 1, *A, 0.1)]
    assert analyse(images([(1, 1, *A, 0)], many, most=5)).counts["missed"] == 1
    assert analyse(images([(1, 1, *A, 0)], many, most=6)).counts["missed"] == 0


def test_counts_by_class():
    found = errors([(3, A), (5, B)], [(5, A, 0.9), (3, FAR, 0.8)])
    assert found.categories == (3, 5)
    of = dict(zip(found.categories, found.class_counts.tolist(), strict=True))
    assert of[3] == [0, 0, 0, 0, 1, 0]
    assert of[5] == [1, 0, 0, 0, 0, 1]  # the object of 3 would be found, that of 5 is missed


def test_without_objects_there_is_nothing_to_analyse():
    with pytest.raises(ValueError, match="none with an object"):
        analyse(images([(1, 1, *A, 1)], [(1, 1, *A, 0.5)]))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6))
def test_every_detection_and_object_is_accounted_for(seed):
    random = np.random.default_rng(seed)

    def box():
        return (random.random(4) * [60, 60, 60, 60] + [0, 0, 5, 5]).tolist()

    objects = [(int(random.integers(1, 4)), int(random.integers(3)), *box(), 0) for _ in range(9)]
    found = [
        (int(random.integers(1, 4)), int(random.integers(3)), *box(), random.random())
        for _ in range(30)
    ]
    of_images = images(objects, found, count=3)
    whole = analyse(of_images)
    verdicts = [judge(image) for image in of_images]
    right = sum(int((v.kind == RIGHT).sum()) for v in verdicts)
    assert right == sum(int(v.found.sum()) for v in verdicts)
    assert right + sum(whole.counts.values()) - whole.counts["missed"] == len(found)
    assert all(0 <= d <= 1 - whole.ap + 1e-12 for d in whole.d_ap.values())
    for verdict in verdicts:  # each object is mended once at most, and then it was not found
        mended = verdict.of[verdict.mends]
        assert len(set(mended)) == len(mended)
        assert not verdict.found[mended].any()
        assert not verdict.missed[mended].any()
    # Scores differ, so that nothing depends on an order.
    again = analyse(images(objects, found[::-1], count=3)[::-1])
    assert again.d_ap == pytest.approx(whole.d_ap)
    assert again.counts == whole.counts
