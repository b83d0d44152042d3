"""The evaluator's numbers are pycocotools', on data that invites every difference."""

import contextlib
import io
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.coco_scores import score


def quietly(make):
    with contextlib.redirect_stdout(io.StringIO()):
        return make()


def hostile(seed: int) -> tuple[COCO, list[dict]]:
    """Crowds, zero areas, areas that are not the box's, images and categories without objects or
    detections, ids of 0, equal scores, equal boxes, more than a hundred detections of a class."""
    random = np.random.default_rng(seed)
    images = [int(i) for i in random.choice(20, random.integers(1, 6), replace=False)]
    categories = int(random.integers(1, 5))
    grid = random.choice([1, 10, 50])

    def box():
        corner = np.round(random.random(4) * [200, 200, 150, 150] / grid) * grid
        return [*corner[:3].tolist(), 0.0 if random.random() < 0.1 else float(corner[3])]

    objects = []
    for image in images:
        for _ in range(random.choice([0, 1, 5, 20])):
            mine = box()
            given_area = float(random.choice([0, 500, 1024, 9216, 1e10, 1e11]))
            objects.append({
                "id": len(objects) + 1, "image_id": image, "bbox": mine,
                "category_id": int(random.integers(categories)),
                "area": mine[2] * mine[3] if random.random() < 0.7 else given_area,
                "iscrowd": int(random.random() < 0.2),
            })  # fmt: skip
    found = []
    for image in images:
        for _ in range(random.choice([0, 3, 40, 320])):
            mine = box()
            if objects and random.random() < 0.5:
                near = objects[random.integers(len(objects))]["bbox"]
                mine = (near + np.round(random.normal(0, 8, 4))).clip(0).tolist()
            coarse = random.random() < 0.4
            found.append({
                "image_id": image, "bbox": mine, "category_id": int(random.integers(categories)),
                "score": float(random.choice([0, 0.5, 1]) if coarse else random.random()),
            })  # fmt: skip
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "width": 300, "height": 300} for i in images],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(categories)],
        "annotations": objects,
    }
    quietly(truth.createIndex)
    return truth, found


def by_pycocotools(truth: COCO, found: list[dict], most: int) -> COCOeval:
    def run():
        results = truth.loadRes([dict(d) for d in found])
        by_hand = COCOeval(truth, results, "bbox")
        by_hand.params.maxDets = [1, 10, most]
        by_hand.evaluate()
        by_hand.accumulate()
        if most == 100:  # for others it asks for 100 all the same, and finds none
            by_hand.summarize()
        return by_hand

    return quietly(run)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([100, 300]))
def test_all_numbers_are_those_of_pycocotools(seed, most):
    truth, found = hostile(seed)
    if not found:  # pycocotools refuses an empty list
        assert set(score(truth, []).summary().values()) <= {0.0, -1.0}
        return
    before = [dict(d) for d in found]
    mine, theirs = score(truth, found, most), by_pycocotools(truth, found, most)
    assert found == before
    # Sums of the same numbers, divided in another order: an ulp.
    np.testing.assert_allclose(
        mine.precision, theirs.eval["precision"][..., -1], rtol=0, atol=1e-12
    )
    np.testing.assert_array_equal(mine.recall, theirs.eval["recall"])
    if most == 100:
        summary = list(mine.summary().values())
        np.testing.assert_allclose(summary, theirs.stats, rtol=0, atol=1e-12)
        one_by_one = [mine.of_class(k)["AP"] for k in range(len(mine.names))]
        defined = [ap for ap in one_by_one if ap >= 0]
        assert (np.mean(defined) if defined else -1) == pytest.approx(theirs.stats[0])


def test_the_hostile_cases_hold_what_they_are_for():
    """A generator that has lost a case would make the test above blind to it."""
    cases = [hostile(seed) for seed in range(40)]
    objects = [a for truth, _ in cases for a in truth.dataset["annotations"]]
    assert any(a["iscrowd"] for a in objects)
    assert any(a["area"] == 0 for a in objects)
    assert any(a["category_id"] == 0 and a["image_id"] == 0 for a in objects)
    assert any(not found for _, found in cases)
    of_a_class = [Counter((d["image_id"], d["category_id"]) for d in found) for _, found in cases]
    assert any(max(counts.values(), default=0) > 300 for counts in of_a_class)
    assert any(len({d["score"] for d in found}) < len(found) for _, found in cases)
    assert any(set(t.cats) - {a["category_id"] for a in t.dataset["annotations"]} for t, _ in cases)


def test_twice_is_the_same_to_the_last_bit():
    truth, found = hostile(7)
    first, second = score(truth, found), score(truth, found)
    np.testing.assert_array_equal(first.precision, second.precision)
    assert first.summary() == second.summary()


def test_names_follow_the_number_of_detections():
    truth, found = hostile(7)
    assert list(score(truth, found, 300).summary())[6:9] == ["AR_1", "AR_10", "AR_300"]
    assert "AR_300" in score(truth, found, 300).of_class(0)
