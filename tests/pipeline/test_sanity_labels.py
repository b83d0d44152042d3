"""Each mistake of labelling, made on a right data set, is found and named; on the right one nothing
is said."""

import json
import random
from copy import deepcopy
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.checks import size_mismatch
from pipeline.data.shards import ShardSet
from pipeline.recipes import recipe
from pipeline.sanity_labels import check_labels, left_out, shared_images

CONFIG = recipe("demo")
PAPERS = recipe("deformable_detr_r50")


def made(images: int, seed: int, first: int = 0) -> dict:
    """Objects of three classes in pictures of 640x480 and 480x640."""
    dice = random.Random(seed)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": n} for i, n in ((7, "cat"), (3, "dog"), (100, "cow"))],
    }
    for i in range(first, first + images):
        width, height = dice.choice([(640, 480), (480, 640)])
        content["images"].append(
            {"id": i, "file_name": f"{i}.jpg", "width": width, "height": height}
        )
        for _ in range(dice.randint(0, 6)):
            w, h = dice.uniform(20, 200), dice.uniform(20, 200)
            x, y = dice.uniform(0, width - w), dice.uniform(0, height - h)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]),
                    "image_id": i,
                    "category_id": dice.choice([7, 3, 100]),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    return content


@pytest.fixture
def data():
    return made(60, 1), made(20, 2, first=1000)


def kinds(train, val, config=PAPERS):
    return [finding.kind for finding in check_labels(train, val, config)]


def test_nothing_is_said_of_right_labels(data):
    assert kinds(*data) == []


def test_nothing_is_said_of_the_drawn_pictures(drawn):
    assert kinds(drawn.annotations("train"), drawn.annotations("val"), CONFIG) == []


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_nothing_is_said_of_other_right_labels(seed):
    assert kinds(made(80, seed), made(40, seed + 1, first=1000)) == []


def boxes(write):
    """A mistake in every box: `write(x, y, w, h, width, height)`."""

    def change(part):
        size = {i["id"]: (i["width"], i["height"]) for i in part["images"]}
        for a in part["annotations"]:
            a["bbox"] = [*write(*a["bbox"], *size[a["image_id"]])]

    return change


def every(**fields):
    def change(part):
        for a in part["annotations"]:
            a.update(fields)

    return change


def shifted(by):
    def change(part):
        names = ["cat", "dog", "cow"]
        part["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
        for a in part["annotations"]:
            a["category_id"] = [7, 3, 100].index(a["category_id"]) + 1 + by

    return change


def unknown(part):
    for a in part["annotations"][::3]:
        a["category_id"] = 8


def sizes_turned(part):
    for image in part["images"]:
        image["width"], image["height"] = image["height"], image["width"]


def repeated(part):
    part["annotations"] += [dict(a, id=10_000 + a["id"]) for a in part["annotations"]]


def one_class(part):
    for i, a in enumerate(part["annotations"]):
        a["category_id"] = 7 if i % 20 else (3 if i % 40 else 100)


def other_pictures(part):
    boxes(lambda x, y, w, h, *_: (1.7 * x, 1.7 * y, 1.7 * w, 1.7 * h))(part)


def crowded(part):
    part["annotations"] += [
        {"id": 10**6 + i, "image_id": part["images"][0]["id"], "category_id": 7,
         "bbox": [i % 30 * 10, i // 30 * 30, 9, 25]}
        for i in range(310)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mistake", "kind", "words"),
    [
        (boxes(lambda x, y, w, h, *_: (x, y, x + w, y + h)), "boxes are corners", "x0, y0, x1, y1"),
        (
            boxes(lambda x, y, w, h, *_: (x + w / 2, y + h / 2, w, h)),
            "boxes are centres",
            "centre x",
        ),
        (
            boxes(lambda x, y, w, h, W, H: (x / W, y / H, w / W, h / H)),
            "boxes are fractions of the image",
            "100% of",
        ),
        (
            boxes(lambda x, y, w, h, W, H: ((x + w / 2) / W, (y + h / 2) / H, w / W, h / H)),
            "boxes are fractions of the image",
            "above 1",
        ),
        (boxes(lambda x, y, w, h, *_: (y, x, h, w)), "x and y are swapped", "exchanged"),
        (sizes_turned, "x and y are swapped", "EXIF"),
        (other_pictures, "boxes leave their images", "different sizes"),
        (boxes(lambda x, y, w, h, W, H: (0, 0, W, H)), "boxes are whole images", "100% of"),
        (boxes(lambda x, y, w, h, *_: (x, y, 3, 4)), "objects are tiny", "below 5.8 pixels"),
        (shifted(1), "category ids are off by one", "with -1 all are in it"),
        (shifted(-1), "category ids are off by one", "with +1 all are in it"),
        (unknown, "category ids without category", "lacks: 8"),
        (every(category_id="7"), "category ids without category", "lacks: '7'"),
        (every(iscrowd=1), "everything is a crowd", "iscrowd 1"),
        (repeated, "annotations are repeated", "of another one"),
        (one_class, "one class dominates", "95% of"),
        (crowded, "more objects than can be found", "2 images have more than 100, the most 31"),
    ],
)
def test_each_mistake_is_found(data, mistake, kind, words):
    for part in data:
        mistake(part)
    found = {f.kind: str(f) for f in check_labels(*data, PAPERS)}
    assert kind in found
    assert words in found[kind]
    assert "\n" not in found[kind]
    about_boxes = [k for k in found if k.startswith(("boxes", "x and y", "objects are"))]
    assert len(about_boxes) <= 1


def test_a_mistake_in_some_of_the_boxes_is_found_too(data):
    for part in data:
        half = dict(part, annotations=part["annotations"][::2])
        boxes(lambda x, y, w, h, *_: (3 * x, y, w, h))(half)
    assert kinds(*data) == ["boxes leave their images"]


def test_classes_that_one_part_lacks(data):
    train, val = data
    lacking = deepcopy(val)
    lacking["annotations"] = [a for a in val["annotations"] if a["category_id"] != 3]
    (finding,) = check_labels(train, lacking, PAPERS)
    assert finding.kind == "classes missing in val"
    assert "dog" in finding.evidence
    (finding,) = check_labels(lacking, train, PAPERS)
    assert finding.kind == "classes missing in train"
    assert "never learned" in finding.remedy


def test_a_category_without_objects(data):
    for part in data:
        part["categories"].append({"id": 0, "name": "group"})
    (finding,) = check_labels(*data, PAPERS)
    assert finding.kind == "categories without objects"
    assert finding.evidence.endswith("group")


def test_tiny_is_by_the_size_in_training(data):
    """Boxes of 12 pixels in images of 480 on the shorter side: 20 at 800, 6 at 240."""
    for part in data:
        boxes(lambda x, y, w, h, *_: (x, y, 12, 12))(part)
    assert kinds(*data) == []
    small = replace(PAPERS, augment=replace(PAPERS.augment, val_short_side=240))
    assert kinds(*data, small) == ["objects are tiny"]


def test_of_few_queries_there_may_be_fewer_objects(data):
    few = replace(PAPERS, model=replace(PAPERS.model, num_queries=5))
    (finding,) = check_labels(*data, few)
    assert finding.kind == "more objects than can be found"
    assert "has 5 queries" in finding.evidence


@pytest.mark.parametrize(
    "annotation",
    [
        {},
        {"bbox": None, "category_id": 7, "image_id": 0},
        {"bbox": [1, 2, 3], "category_id": 7, "image_id": 0},
        {"bbox": [1, 2, float("nan"), 4], "category_id": 7, "image_id": 0},
        {"bbox": [1, 2, 3, 4], "category_id": [7], "image_id": 0},
        {"bbox": [1, 2, 3, 4], "category_id": 7, "image_id": "nowhere"},
        {"bbox": [1, 2, 3, 4], "category_id": 7},
    ],
)
def test_faulty_annotations_are_no_obstacle(data, annotation):
    for part in data:
        part["annotations"].append(annotation)
    assert set(kinds(*data)) <= {"category ids without category"}


@pytest.mark.parametrize("size", [{"width": None}, {"width": "640"}, {"height": 0}])
def test_images_without_a_size_are_no_obstacle(data, size):
    for part in data:
        for image in part["images"]:
            image.update(size)
    assert kinds(*data) == []


def test_images_that_the_conversion_left_out():
    turned = size_mismatch((4, 3), (3, 4), "a.jpg")
    other = size_mismatch((4, 3), (8, 6), "b.jpg")
    sizes = [{"reason": f"size mismatch: {detail}"} for detail in (turned, turned, turned, other)]
    missing = {"reason": "missing image: no file 'c.jpg' in the image folder"}
    wrong, out = left_out([missing, *sizes], 50, "train")
    assert wrong.kind == "image sizes are wrong"
    assert "4 of 50 train images" in wrong.evidence
    assert "3 of them width and height exchanged: record says 4x3, 'a.jpg' is 3x4" in wrong.evidence
    assert wrong.evidence.endswith(" and 1 more")
    assert "turn the files (exiftran -ai, or jpegtran), the labels can stay" in wrong.remedy
    assert out.kind == "images are left out"
    assert "1 of 50 train images" in out.evidence
    assert "(1 missing image): missing image: no file 'c.jpg'" in out.evidence
    (alone,) = left_out(sizes[3:], 50, "val")
    assert "exiftran" not in alone.remedy
    assert list(left_out([], 50, "val")) == []


def test_pictures_in_both_parts(drawn, tmp_path, run_command):
    content = drawn.annotations("train")
    twice = tmp_path / "twice"
    twice.mkdir()
    for i, image in enumerate(content["images"][:3]):
        name = image["file_name"]
        (twice / f"copy-{i}.jpg").write_bytes((drawn.coco / "train" / name).read_bytes())
        image |= {"file_name": f"copy-{i}.jpg", "id": 10**6 + i}
    content |= {"images": content["images"][:3], "annotations": []}
    (tmp_path / "twice.json").write_text(json.dumps(content))
    done = run_command(
        "data_prep", "convert", "--images", twice, "--annotations", tmp_path / "twice.json",
        "--output", tmp_path / "shards", "--workers", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    train, val = ShardSet(drawn.shards / "train"), ShardSet(drawn.shards / "val")
    (finding,) = shared_images(train, ShardSet(tmp_path / "shards"))
    assert "3 of 3 val images" in finding.evidence
    assert "1000000" in finding.evidence
    assert list(shared_images(train, val)) == []
