"""The bootstrap over images against pycocotools on data sets that have images several times."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jobs.bootstrap import (
    METRICS,
    average_precision,
    bootstrap_ap,
    interval,
    match,
    resampled,
)


def quiet(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def indexed(images, annotations, categories):
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in images],
        "annotations": [{**a, "id": n} for n, a in enumerate(annotations, 1)],
        "categories": [{"id": c, "name": f"class {c}"} for c in categories],
    }
    quiet(truth.createIndex)
    return truth


def made_up(seed, images=12, categories=3):
    """Objects of all sizes, some crowds; detections near them, of a wrong class, and anywhere."""
    random = np.random.default_rng(seed)
    annotations, detections = [], []

    def detected(image, category, box):
        score = float(random.random())
        detections.append(
            {"image_id": image, "category_id": category, "bbox": list(box), "score": score}
        )

    for image in range(1, images + 1):
        for _ in range(random.integers(0, 6)):
            # Small, medium and large, and about as large as where one range ends (32, 96 pixels).
            size = random.choice([12.0, 32.0, 50.0, 96.0, 150.0]) * (0.8 + 0.4 * random.random(2))
            box = np.concatenate([random.random(2) * 300, size])
            category = int(random.integers(1, categories + 1))
            crowd = int(random.random() < 0.15)
            annotations.append(
                {
                    "image_id": image, "category_id": category, "bbox": box.tolist(),
                    "area": float(size.prod()), "iscrowd": crowd,
                }
            )  # fmt: skip
            for _ in range(random.integers(0, 4)):
                near = box + random.normal(size=4) * size.mean() * 0.08
                wrong = random.random() < 0.2
                other = int(random.integers(1, categories + 1)) if wrong else category
                detected(image, other, np.maximum(near, 1.0))
        for _ in range(random.integers(0, 4)):
            box = np.concatenate([random.random(2) * 300, 5 + random.random(2) * 150])
            detected(image, int(random.integers(1, categories + 1)), box)
    return indexed(range(1, images + 1), annotations, range(1, categories + 1)), detections


def by_pycocotools(truth, detections):
    coco_eval = quiet(lambda: COCOeval(truth, truth.loadRes(detections), "bbox"))
    for stage in (coco_eval.evaluate, coco_eval.accumulate, coco_eval.summarize):
        quiet(stage)
    return np.where(coco_eval.stats[:6] < 0, np.nan, coco_eval.stats[:6])


def with_copies(truth, detections, draws):
    """The data set that has image i `draws[i]` times, under ids of its own."""
    annotations, records, images = [], [], []
    for image, times in zip(sorted(truth.imgs), draws, strict=True):
        for _ in range(times):
            images.append(len(images) + 1)
            of_image = [a for a in truth.dataset["annotations"] if a["image_id"] == image]
            annotations += [{**a, "image_id": images[-1]} for a in of_image]
            found = [d for d in detections if d["image_id"] == image]
            records += [{**d, "image_id": images[-1]} for d in found]
    return indexed(images, annotations, sorted(truth.cats)), records


@pytest.mark.parametrize("seed", range(6))
def test_every_image_once_is_pycocotools_ap(seed):
    truth, detections = made_up(seed)
    matches = match(truth, detections)
    got = average_precision(matches, np.ones((1, len(matches.image_ids)), dtype=int))[0]
    np.testing.assert_allclose(got, by_pycocotools(truth, detections), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_a_resample_is_pycocotools_ap_of_the_images_it_drew(seed):
    truth, detections = made_up(seed)
    matches = match(truth, detections)
    draws = resampled(len(matches.image_ids), 5, seed)
    got = average_precision(matches, draws)
    for row, drawn in zip(got, draws, strict=True):
        expected = by_pycocotools(*with_copies(truth, detections, drawn))
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-12)


def test_more_than_100_detections_of_a_class_in_an_image_are_cut_as_pycocotools_does():
    truth, detections = made_up(3)
    best = max(detections, key=lambda d: d["score"])
    detections += [{**best, "score": 0.5 + i / 1000} for i in range(150)]
    matches = match(truth, detections)
    got = average_precision(matches, np.ones((1, len(matches.image_ids)), dtype=int))[0]
    np.testing.assert_allclose(got, by_pycocotools(truth, detections), rtol=0, atol=1e-12)


def test_by_hand():
    """One object in each of two images: one found perfectly, one missed but for a false alarm
    with a better score. AP is (51 recalls at precision 1/2) / 101."""
    box = [10.0, 10.0, 50.0, 50.0]
    objects = [
        {"image_id": i, "category_id": 1, "bbox": box, "area": 2500.0, "iscrowd": 0} for i in (1, 2)
    ]
    truth = indexed([1, 2], objects, [1])
    detections = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.6},
        {"image_id": 2, "category_id": 1, "bbox": [200.0, 200.0, 50.0, 50.0], "score": 0.9},
    ]
    matches = match(truth, detections)
    draws = np.array([[1, 1], [2, 0], [0, 2], [1, 3]])
    ap = average_precision(matches, draws)[:, METRICS.index("AP")]
    expected = [51 / 101 / 2, 1.0, 0.0, 26 / 101 / 4]
    np.testing.assert_allclose(ap, expected, atol=1e-12)


def test_nothing_detected_is_zero_and_nothing_to_find_is_not_a_number():
    truth, _ = made_up(0)
    assert np.all(bootstrap_ap(truth, [], 3, seed=0)[:, 0] == 0)
    empty = indexed([1, 2], [], [1])
    assert np.isnan(bootstrap_ap(empty, [], 3, seed=0)).all()
    assert all(np.isnan(interval(np.full(4, np.nan), 0.5)))


def test_resamples_follow_from_the_seed_alone_and_are_paired():
    truth, detections = made_up(1)
    again = bootstrap_ap(truth, detections, 40, seed=5)
    np.testing.assert_array_equal(bootstrap_ap(truth, detections, 40, seed=5), again)
    assert not np.array_equal(bootstrap_ap(truth, detections, 40, seed=6), again)
    # The same detector twice: every paired difference is 0, whatever the images.
    shuffled = bootstrap_ap(truth, detections[::-1], 40, seed=5)
    np.testing.assert_allclose(shuffled, again, atol=1e-12)
    assert again[:, 0].std() > 0.005


def test_each_resample_draws_as_many_images_as_there_are():
    draws = resampled(7, 50, seed=1)
    assert draws.shape == (50, 7)
    assert (draws.sum(1) == 7).all()
    assert draws.max() > 1


def test_the_interval_covers_the_mean_of_a_known_population():
    """A class's AP on images that are either found or not is a mean of coins: the interval's width
    is that of the binomial, 2 * 1.96 * sqrt(p (1 - p) / n)."""
    random = np.random.default_rng(0)
    box, images = [10.0, 10.0, 50.0, 50.0], range(1, 401)
    objects = [
        {"image_id": i, "category_id": 1, "bbox": box, "area": 2500.0, "iscrowd": 0} for i in images
    ]
    found = [i for i in images if random.random() < 0.4]
    detections = [
        {"image_id": i, "category_id": 1, "bbox": box, "score": float(random.random())}
        for i in found
    ]
    values = bootstrap_ap(indexed(images, objects, [1]), detections, 400, seed=2)[:, 0]
    p = len(found) / 400
    low, high = interval(values, p)
    width = 2 * 1.96 * np.sqrt(p * (1 - p) / 400)
    assert low < p < high
    assert width * 0.8 < high - low < width * 1.2


def test_the_interval_lies_around_what_was_measured_and_takes_no_notice_of_nan():
    values = np.concatenate([np.linspace(0.6, 0.8, 1001), [np.nan]])
    np.testing.assert_allclose(interval(values, 0.5), (0.405, 0.595), atol=1e-12)
