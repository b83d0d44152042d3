"""Each mistake of labels is seen in what a detector of moderate skill finds; none on right ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from model.detr import build_model
from pipeline import sanity_check
from pipeline.data.shards import ShardSet
from pipeline.dataset import open_dataset
from pipeline.evaluate import detect
from pipeline.recipes import recipe
from pipeline.sanity_detections import Compared, check_detections, check_training, iou

NAMES = ("coin", "tile", "flag", "spark")


def images(seed: int = 0, count: int = 40, sure: bool = True) -> list[Compared]:
    """Right labels, and a detector that misses a quarter of them, errs by a few pixels and in one
    class of ten, and sees things that are not there. Not `sure`: all its scores are low."""
    dice = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        size = dice.choice([[640.0, 480.0], [480.0, 640.0]])
        n = int(dice.integers(1, 7))
        extent = dice.uniform(30, 200, (n, 2))
        corner = dice.uniform(0, 1, (n, 2)) * (size - extent)
        label = np.concatenate([corner, extent], axis=1)
        label_class = dice.integers(0, 4, n)
        seen = dice.random(n) > 0.25
        found = np.concatenate([corner, corner + extent], axis=1)[seen]
        found += dice.normal(0, 0.04, found.shape) * np.tile(extent[seen], 2)
        found_class = np.where(dice.random(n) < 0.1, dice.integers(0, 4, n), label_class)[seen]
        extra = dice.uniform(0, 300, (20, 4))
        extra[:, 2:] += extra[:, :2]
        score = np.concatenate([dice.uniform(0.35, 0.9, len(found)), dice.uniform(0.01, 0.2, 20)])
        if not sure:
            score = dice.uniform(0.01, 0.02, len(score))
        made.append(
            Compared(
                size,
                label,
                label_class,
                np.concatenate([found, extra]),
                np.concatenate([found_class, dice.integers(0, 4, 20)]),
                score,
            )
        )
    return made


def boxes(write):
    def change(image):
        rows = [write(*box, *image.size) for box in image.label]
        return replace(image, label=np.array(rows).reshape(-1, 4))

    return change


def classes(write):
    return lambda image: replace(image, label_class=write(image.label_class))


def detected_classes(write):
    return lambda image: replace(image, found_class=write(image.found_class))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_nothing_is_said_of_right_labels(seed, sure):
    assert check_detections(images(seed, sure=sure), NAMES) == []
    assert check_training(images(seed), NAMES, [9, 8, 7, 6, 5, 5], 300, True) == []


FORMATS = [
    (lambda x, y, w, h, W, H: (x, y, x + w, y + h), "[x0, y0, x1, y1]"),
    (lambda x, y, w, h, W, H: (x + w / 2, y + h / 2, w, h), "[centre x, centre y"),
    (lambda x, y, w, h, W, H: (y, x, h, w), "[y, x, height, width]"),
    (lambda x, y, w, h, W, H: (x / W, y / H, w / W, h / H), "height] as fractions"),
    (
        lambda x, y, w, h, W, H: ((x + w / 2) / W, (y + h / 2) / H, w / W, h / H),
        "[centre x, centre y, width, height] as fractions",
    ),
    (lambda x, y, w, h, W, H: (W - x - w, y, w, h), "mirrored"),
    (lambda x, y, w, h, W, H: (x, H - y - h, w, h), "y counted from below"),
    (lambda x, y, w, h, W, H: (1.5 * x, 1.5 * y, 1.5 * w, 1.5 * h), "picture 1.5 times as large"),
    (lambda x, y, w, h, W, H: (x / 2, y / 2, w / 2, h / 2), "picture 0.5 times as large"),
    (lambda x, y, w, h, W, H: (H - y - h, x, h, w), "turned to the right"),
    (lambda x, y, w, h, W, H: (y, W - x - w, h, w), "turned to the left"),
]


@pytest.mark.parametrize("sure", [True, False])
@pytest.mark.parametrize(("write", "words"), FORMATS)
def test_boxes_in_another_format(write, words, sure):
    """Also of a detector with a fresh class head, whose scores say nothing yet."""
    (finding,) = check_detections([boxes(write)(i) for i in images(sure=sure)], NAMES)
    assert finding.kind == "boxes are in another format"
    assert words in finding.evidence
    assert "\n" not in str(finding)


def test_a_detector_from_scratch_says_nothing_while_its_scores_are_low():
    wrong = [boxes(FORMATS[0][0])(i) for i in images(sure=False)]
    assert check_detections(wrong, NAMES, pretrained=False) == []
    assert check_training(wrong, NAMES, [5, 5, 5, 5], 300, False) == []
    sure = [boxes(FORMATS[0][0])(i) for i in images()]
    assert len(check_detections(sure, NAMES, pretrained=False)) == 1


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (classes(lambda c: np.minimum(c + 1, 3)), "class ids are shifted", "the class 1 before it"),
        (classes(lambda c: np.maximum(c - 1, 0)), "class ids are shifted", "the class 1 after it"),
        (
            classes(lambda c: np.array([1, 0, 3, 2])[c]),
            "classes are exchanged",
            "'coin' is 'tile', 'tile' is 'coin', 'flag' is 'spark'",
        ),
        (
            classes(lambda c: np.random.default_rng(len(c)).integers(0, 4, len(c))),
            "classes are at chance",
            "by chance",
        ),
        (detected_classes(lambda c: 0 * c + 2), "everything is detected as one class", "'flag'"),
    ],
)
def test_classes_that_are_not_those_of_the_boxes(change, kind, words):
    wrong = [change(image) for image in images(count=80)]
    (finding,) = check_detections(wrong, NAMES)
    assert finding.kind == kind
    assert words in str(finding)
    # A detector of other classes cannot tell.
    assert check_detections(wrong, NAMES, same_classes=False) == []


def test_nothing_is_detected():
    low = [replace(i, score=0.1 * i.score) for i in images(sure=False)]
    (finding,) = check_training(low, NAMES, [9, 5], 300, True)
    assert finding.kind == "nothing is detected"
    assert "after 300 steps no score of 40" in finding.evidence


def test_a_loss_that_does_not_fall():
    lost = [replace(i, found=i.found + 500.0) for i in images()]
    findings = check_training(lost, NAMES, [9.0, 9.1, 9.0, 8.9, 9.0, 9.1], 300, True)
    assert [f.kind for f in findings] == ["the loss does not fall"]
    assert "9.05 at first" in findings[0].evidence
    assert check_training(lost, NAMES, [9.0, 9.1, 8, 7, 6, 5], 300, True) == []
    assert check_training(images(), NAMES, [1.0, 1.1, 1, 1, 1, 1.1], 300, True) == []


@pytest.mark.parametrize("keep", [0, 3])
def test_of_few_labels_nothing_is_said(keep):
    few = [boxes(FORMATS[0][0])(i) for i in images(count=keep)]
    assert check_training(few, NAMES, [1, 1, 1], 300, True) == []


def test_images_without_labels_or_detections_are_no_obstacle():
    none = Compared(
        np.array([64.0, 48.0]), np.zeros((0, 4)), np.zeros(0, np.int64),
        np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0),
    )  # fmt: skip
    assert check_detections([none, *images()], NAMES) == []
    (finding,) = check_detections([none, *map(boxes(FORMATS[0][0]), images())], NAMES)
    assert finding.kind == "boxes are in another format"


def test_overlap_is_torchvisions():
    dice = np.random.default_rng(0)
    a, b = (dice.uniform(0, 50, (n, 4)) for n in (30, 20))
    a[:, 2:] += a[:, :2]
    b[:, 2:] += b[:, :2]
    expected = box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    np.testing.assert_allclose(iou(a, b), expected, atol=1e-9)


def test_what_is_compared_is_what_the_model_finds_and_the_file_says(drawn):
    config = recipe("demo")
    config = replace(
        config,
        data=replace(config.data, train=str(drawn.shards / "train"), val=str(drawn.shards / "val")),
        engine=replace(config.engine, loader_workers=0, precision="fp32"),
    )
    data = open_dataset(config)
    torch.manual_seed(0)
    model = build_model(config.model)
    compared = sanity_check.compare(model, data.val, data.labels, config, torch.device("cpu"))
    assert model.training
    every = detect(model, data.val, data.labels, config, torch.device("cpu"))
    for i, image in enumerate(compared):
        records = [r for r in every if r["image_id"] == int(data.val.image_id[i])]
        np.testing.assert_allclose(image.score, [r["score"] for r in records], rtol=1e-5)
        box = np.array([r["bbox"] for r in records])
        np.testing.assert_allclose(image.found[:, 2:] - image.found[:, :2], box[:, 2:], rtol=1e-4)
        names = {c["id"]: c["name"] for c in data.val.categories}
        sample = data.val.read(i)
        single = [a for a in sample.annotations if not a["iscrowd"]]
        assert image.label.tolist() == [a["bbox"] for a in single]
        told = [data.labels.names[c] for c in image.label_class]
        assert told == [names[a["category_id"]] for a in single]


def test_a_sample_is_spread_over_the_set(drawn):
    shards = ShardSet(drawn.shards / "train")
    some = sanity_check.sample(shards, 10)
    assert [some.read(i).image["id"] for i in range(10)] == shards.image_id[::4].tolist()
    assert len(sanity_check.sample(shards, 1000)) == len(shards)
