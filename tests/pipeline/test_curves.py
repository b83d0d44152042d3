"""Precision over recall against hand-computed numbers and COCO's own summary."""

import contextlib
import csv
import io

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from pipeline.curves import MOST_BARS, curves, draw_curves, save_curves
from pipeline.errors import UserError
from pipeline.evaluate import summarize


def made_up(names, boxes):
    """COCO's ground truth of one 200 x 200 image; boxes: (category id, box)."""
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 1, "width": 200, "height": 200}],
        "categories": [{"id": i, "name": name} for i, name in names.items()],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": c, "bbox": box, "area": box[2] * box[3],
             "iscrowd": 0}
            for n, (c, box) in enumerate(boxes, 1)
        ],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def detection(category, box, score):
    return {"image_id": 1, "category_id": category, "bbox": box, "score": score}


A, B, C = [0, 0, 40, 40], [100, 100, 40, 40], [60, 0, 30, 30]
# Of 4 objects of class 3 and 2 of class 7, none of class 9. Class 3: right, wrong, right; class 7:
# one whose IoU is 32 / 40, so right up to a threshold of 0.80.
TRUTH = ({3: "a", 7: "costs $5 and $6", 9: "none"}, [(3, A), (3, B), (7, A), (7, B)])
FOUND = [
    detection(3, A, 0.9), detection(3, C, 0.8), detection(3, B, 0.7),
    detection(7, [0, 0, 40, 32], 0.6),
]  # fmt: skip


def test_precision_and_recall_by_hand():
    of = curves(made_up(*TRUTH), FOUND)
    # Class 3: both halves of recall, up to 0.5 (51 points) and beyond; the best precision from
    # there on. Class 7: the first half alone.
    a = np.where(of.recall <= 0.5, 1.0, 2 / 3)
    b = np.where(of.recall <= 0.5, 1.0, 0.0)
    np.testing.assert_allclose(of.mean(0), (a + b) / 2)
    np.testing.assert_allclose(of.mean(5), (a + b) / 2)  # 0.75
    np.testing.assert_allclose(of.mean(None), (a + 0.7 * b) / 2)  # 0.50 to 0.80 of 10
    assert of.class_ap(0) == pytest.approx([a.mean(), b.mean(), np.nan], nan_ok=True)
    assert of.class_ap() == pytest.approx([a.mean(), 0.7 * b.mean(), np.nan], nan_ok=True)


def test_they_are_coco_numbers():
    truth = made_up(*TRUTH)
    of, evaluation = curves(truth, FOUND), summarize(truth, FOUND)
    assert of.mean(None).mean() == pytest.approx(evaluation.summary["AP"])
    assert of.mean(0).mean() == pytest.approx(evaluation.summary["AP50"])
    assert of.mean(5).mean() == pytest.approx(evaluation.summary["AP75"])
    for name, ap in zip(of.names, of.class_ap(), strict=True):
        assert evaluation.per_class[name] == pytest.approx(np.nan_to_num(ap, nan=-1.0))


def test_files(tmp_path):
    saved = save_curves(curves(made_up(*TRUTH), FOUND), tmp_path)
    assert [path.name for path in saved] == [
        "precision_recall.csv", "class_ap.csv", "precision_recall.png",
    ]  # fmt: skip
    points = list(csv.DictReader(saved[0].open()))
    assert len(points) == 101
    assert points[0] == {
        "recall": "0", "IoU 0.50": "1", "IoU 0.75": "1", "IoU 0.50:0.95": "0.85",
    }  # fmt: skip
    classes = list(csv.DictReader(saved[1].open()))
    assert [row["class"] for row in classes] == ["a", "costs $5 and $6", "none"]
    assert classes[2] == {"class": "none", "AP": "", "AP50": "", "AP75": ""}
    assert float(classes[0]["AP"]) == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-5)
    with Image.open(saved[2]) as picture:
        assert picture.size == (1200, 504)


def test_without_detections_all_is_zero():
    of = curves(made_up(*TRUTH), [])
    assert of.mean(None).tolist() == [0.0] * 101
    assert of.class_ap()[:2].tolist() == [0.0, 0.0]
    draw_curves(of)


def test_nothing_to_find_is_a_users_mistake():
    with pytest.raises(UserError, match="no object that counts"):
        curves(made_up({3: "a"}, []), [detection(3, A, 0.5)])


def test_of_many_classes_the_best_and_the_worst_have_bars():
    count = MOST_BARS + 5
    names = {i: f"class {i}" for i in range(1, count + 1)}
    truth = made_up(names, [(i, A) for i in names])
    # Class i is found with an IoU that falls with i.
    found = [detection(i, [0, 0, 40, 40 - 20 * i / count], 0.5) for i in names]
    of = curves(truth, found)
    bars = draw_curves(of).axes[1]
    labels = [label.get_text() for label in bars.get_yticklabels()]
    assert len(labels) == MOST_BARS
    assert "(5 in the middle left out)" in bars.get_title()
    aps = [of.class_ap()[int(label.split()[1]) - 1] for label in labels]
    assert aps == sorted(aps)
    assert aps[0] == min(of.class_ap())
    assert aps[-1] == max(of.class_ap())
