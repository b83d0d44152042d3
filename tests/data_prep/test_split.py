import json
import random
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.split import split, stratified


def coco(images, **header):
    """A file of (file name, category ids) for each image; `images` may give records' fields."""
    records, annotations = [], []
    for i, (name, categories, *more) in enumerate(images):
        records.append(
            {"id": 10 * i + 7, "file_name": name, "width": 40, "height": 30, **(more or [{}])[0]}
        )
        for c in categories:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 * i + 7,
                    "category_id": c,
                    "bbox": [1, 2, 10, 10],
                    "area": 100.0,
                    "iscrowd": 0,
                }
            )
    ids = sorted({c for _, categories, *_ in images for c in categories})
    return {"images": records, "annotations": annotations,
            "categories": [{"id": c, "name": f"class {c}"} for c in ids], **header}  # fmt: skip


def saved(tmp_path, content):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(content))
    return path


def parts(folder):
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("train", "val")]


def test_nothing_is_lost_doubled_or_changed(tmp_path):
    random.seed(1)
    content = coco(
        [(f"{i}.jpg", random.sample([7, 3, 100], random.randint(0, 3))) for i in range(60)],
        info={"año": 2020},
        licenses=[],
    )
    result = split(saved(tmp_path, content), tmp_path / "parts", share=0.25, seed=3)
    train, val = parts(tmp_path / "parts")
    assert (result.train, result.val) == (len(train["images"]), len(val["images"]))
    assert abs(result.val - 15) <= 2
    for key in ("info", "licenses", "categories"):
        assert train[key] == val[key] == content[key]
    for key in ("images", "annotations"):
        assert sorted(train[key] + val[key], key=lambda r: r["id"]) == content[key]
    for part in (train, val):
        assert {a["image_id"] for a in part["annotations"]} <= {i["id"] for i in part["images"]}


def test_equal_seeds_give_equal_files_and_others_do_not(tmp_path):
    path = saved(tmp_path, coco([(f"{i}.jpg", [1 + i % 3]) for i in range(40)]))
    written = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        split(path, tmp_path / folder, seed=seed)
        written.append((tmp_path / folder / "val.json").read_bytes())
    assert written[0] == written[1] != written[2]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=60),
    st.floats(0.05, 0.6),
    st.integers(0, 9),
)
def test_with_one_class_an_image_each_part_has_its_share_of_every_class(classes, share, seed):
    val = stratified([frozenset([c]) for c in classes], share, seed)
    for label, count in Counter(classes).items():
        inside = sum(classes[i] == label for i in val)
        wanted = min(max(round(share * count), 1), count - 1)
        # Where each class has a single image, validation still gets some.
        assert inside <= 1 if count == 1 else inside <= wanted and inside >= 1


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.frozensets(st.integers(0, 9), max_size=4), min_size=2, max_size=40),
    st.floats(0.01, 0.99),
)
def test_no_part_is_empty(units, share):
    val = stratified(units, share, 0)
    assert 0 < len(val) < len(units)


def complete(units, val):
    """Whether both parts have every label that two units have."""
    total = Counter(x for unit in units for x in unit)
    inside = Counter(x for i in val for x in units[i])
    return all(0 < inside[x] < n for x, n in total.items() if n >= 2)


def possible(units):
    masks = product((0, 1), repeat=len(units))
    return any(complete(units, [i for i, m in enumerate(mask) if m]) for mask in masks)


def test_with_several_classes_an_image_every_class_is_in_both_where_that_can_be():
    """Against all possible splits of small sets."""
    found = feasible = 0
    for seed in range(400):
        dice = random.Random(seed)
        units = [frozenset(dice.sample(range(5), dice.randint(0, 3))) for _ in range(8)]
        if possible(units):
            feasible += 1
            found += complete(units, stratified(units, 0.25, seed))
    assert feasible > 300
    assert found >= 0.98 * feasible


def test_three_classes_that_cannot_all_be_in_both_are_named(tmp_path):
    path = saved(tmp_path, coco([("a", [1, 3]), ("b", [1, 2]), ("c", [2, 3])]))
    result = split(path, tmp_path / "parts")
    assert result.only_in_train or result.only_in_val


def test_a_class_of_one_image_is_named(tmp_path):
    path = saved(tmp_path, coco([("a", [1]), ("b", [1]), ("c", [1]), ("d", [9])]))
    result = split(path, tmp_path / "parts")
    assert [*result.only_in_train, *result.only_in_val] == ["class 9"]


def test_a_name_that_cannot_be_printed_is_named_as_far_as_it_can(tmp_path):
    content = coco([("a", [1]), ("b", [1]), ("c", [1]), ("d", [9])])
    content["categories"][1]["name"] = "cup \ud800"
    result = split(saved(tmp_path, content), tmp_path / "parts")
    assert [*result.only_in_train, *result.only_in_val] == ["cup ?"]


@pytest.mark.parametrize("by", ["video_id", "folder"])
def test_frames_of_a_video_stay_together(tmp_path, by):
    images = [(f"v{i // 10}/{i}.jpg", [1 + i % 2], {"video_id": i // 10}) for i in range(80)]
    split(saved(tmp_path, coco(images)), tmp_path / "parts", by=by)
    train, val = ({i["video_id"] for i in part["images"]} for part in parts(tmp_path / "parts"))
    assert not train & val
    assert len(val) == 2


def test_crowds_and_faulty_annotations_are_kept_and_do_not_count(tmp_path):
    content = coco([(f"{i}.jpg", [1]) for i in range(10)])
    content["categories"].append({"id": 2, "name": "rare"})
    for i, (changes) in enumerate(({"iscrowd": 1}, {"bbox": [0, 0, 0, 5]}, {"category_id": 77})):
        content["annotations"][i].update({"category_id": 2} | changes)
    result = split(saved(tmp_path, content), tmp_path / "parts")
    train, val = parts(tmp_path / "parts")
    assert len(train["annotations"] + val["annotations"]) == 10
    assert result.only_in_train == result.only_in_val == []


def test_annotations_without_image_and_repeated_images_stay_for_the_report(tmp_path):
    content = coco([(f"{i}.jpg", [1]) for i in range(5)])
    content["annotations"].append({"id": 99, "image_id": 1234, "category_id": 1})
    content["images"].append(dict(content["images"][0], file_name="again.jpg"))
    split(saved(tmp_path, content), tmp_path / "parts")
    train, val = parts(tmp_path / "parts")
    assert [a["id"] for a in train["annotations"]].count(99) == 1
    assert len(train["images"] + val["images"]) == 6


@pytest.mark.parametrize(
    ("images", "options", "said"),
    [
        ([("a", [1])], {}, "got 1 images, expected two or more"),
        ([("a", [1]), ("b", [1])], {"share": 1.5}, "share: got 1.5"),
        ([("a", [1]), ("b", [1])], {"by": "video"}, "no field 'video'; expected one of id, file_n"),
        ([("x/a", [1]), ("x/b", [1])], {"by": "folder"}, "got 1 groups by 'folder'"),
    ],
)
def test_what_cannot_be_split_says_why(tmp_path, images, options, said):
    with pytest.raises(ValueError, match=said):
        split(saved(tmp_path, coco(images)), tmp_path / "parts", **options)
