"""Evaluation agrees with pycocotools used by hand, and with itself over any number of ranks."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model.detr import build_model
from pipeline.data.labels import build_labels
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.evaluate import (
    NAMES,
    detect,
    detect_best,
    gather,
    ground_truth,
    merged,
    summarize,
    table,
)
from pipeline.recipes import recipe


@pytest.fixture(scope="module")
def val(drawn):
    return ShardSet(drawn.shards / "val")


def perfect(drawn) -> list[dict]:
    return [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in drawn.annotations("val")["annotations"]
        if not a["iscrowd"]
    ]


def test_perfect_detections_score_one(drawn, val):
    evaluation = summarize(ground_truth(val), perfect(drawn))
    assert evaluation.summary["AP"] == pytest.approx(1.0)
    assert set(evaluation.per_class.values()) == {1.0}


def test_numbers_are_those_of_pycocotools_on_the_annotation_file(drawn, val, tmp_path):
    random = np.random.default_rng(3)
    detections = []
    for d in perfect(drawn):
        box = (np.array(d["bbox"]) + random.normal(0, 3, 4)).clip(1).tolist()
        detections.append({**d, "bbox": box, "score": float(random.random())})
    file = drawn.coco / "annotations" / "instances_val.json"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        (tmp_path / "results.json").write_text(json.dumps(detections))
        by_hand = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
        by_hand.evaluate()
        by_hand.accumulate()
        by_hand.summarize()
    evaluation = summarize(ground_truth(val), detections)
    assert 0.05 < evaluation.summary["AP"] < 0.95
    np.testing.assert_allclose(
        [evaluation.summary[n] for n in NAMES], by_hand.stats, rtol=0, atol=1e-12
    )
    mean = np.mean([v for v in evaluation.per_class.values() if v >= 0])
    assert mean == pytest.approx(evaluation.summary["AP"])


def test_data_without_area_crowd_flag_or_positive_ids_can_be_evaluated(
    drawn, tmp_path, run_command
):
    content = drawn.annotations("val")
    for i, annotation in enumerate(content["annotations"]):
        annotation["id"] = i  # from 0, which pycocotools would take for "no match"
        del annotation["area"]
        if not annotation["iscrowd"]:
            del annotation["iscrowd"], annotation["segmentation"]
    content["annotations"].append({"id": 10**6, "image_id": content["images"][0]["id"],
                                   "category_id": 999, "bbox": [1, 1, 5, 5]})  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(content))
    done = run_command("data_prep", "convert", "--images", drawn.coco / "val", "--annotations",
                       tmp_path / "a.json", "--output", tmp_path / "shards")  # fmt: skip
    assert done.returncode == 0, done.stderr
    evaluation = summarize(ground_truth(ShardSet(tmp_path / "shards")), perfect(drawn))
    assert evaluation.summary["AP"] == pytest.approx(1.0)


def test_nothing_detected_scores_zero(val):
    evaluation = summarize(ground_truth(val), [])
    # No drawn object is large.
    undefined = {"AP_L", "AR_L"}
    assert evaluation.summary == {n: -1.0 if n in undefined else 0.0 for n in NAMES}
    assert set(evaluation.per_class.values()) == {0.0}
    assert "0.000" in table(evaluation)


def test_detections_in_unknown_images_are_refused(drawn, val):
    found = [*perfect(drawn), {**perfect(drawn)[0], "image_id": 12345678}]
    with pytest.raises(UserError, match="image id 12345678"):
        summarize(ground_truth(val), found)


def test_the_table_shows_undefined_numbers_as_such(drawn, val):
    evaluation = summarize(ground_truth(val), perfect(drawn))
    evaluation.summary["AP_L"] = -1.0
    text = table(evaluation)
    assert "n/a" in text
    assert all(name in text for name in NAMES)


def test_ranks_together_detect_what_one_process_detects(val):
    torch.manual_seed(0)
    config = recipe("demo")
    model = build_model(config.model).train()
    labels = build_labels(val.categories, "contiguous")
    device = torch.device("cpu")
    alone = gather(detect(model, val, labels, config, device))
    assert model.training
    assert {d["image_id"] for d in alone} == set(val.image_id.tolist())
    for world in (2, 3):
        parts = [detect(model, val, labels, config, device, rank, world) for rank in range(world)]
        assert merged(parts) == alone
        images = [{d["image_id"] for d in part} for part in parts]
        assert sum(map(len, images)) == len(set.union(*images))


def test_the_hundred_best_are_the_same_beside_more(val):
    torch.manual_seed(0)
    config = recipe("demo")
    model = build_model(config.model)
    labels = build_labels(val.categories, "contiguous")
    given = (model, val, labels, config, torch.device("cpu"))
    best, more = detect_best(*given, 0, 1, lambda: None, (100, 120))
    assert best == detect(*given)
    assert len(more) == 120 * len(val)


def test_records_are_in_coco_form(val):
    torch.manual_seed(0)
    config = recipe("demo")
    labels = build_labels(val.categories, "contiguous")
    detections = detect(build_model(config.model), val, labels, config, torch.device("cpu"))
    ids = {c["id"] for c in val.categories}
    for d in detections[:50]:
        assert d["category_id"] in ids
        assert 0 <= d["score"] <= 1
        assert len(d["bbox"]) == 4
        assert d["bbox"][2] >= 0
        assert isinstance(d["image_id"], int)
