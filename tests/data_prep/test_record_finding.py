"""Records found in parallel and on speculation are those of one pass over the file."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import records
from data_prep.checks import annotation_problems, non_finite
from data_prep.coco import read_coco
from data_prep.parallel import worker_processes

# What looks like the space between two records, where it is none.
TRAPS = ("}, {", '"},{"', "\\", "}  ,\n{", "]", "é 猫", '{"id": 7}, {"id": 8}')


def hostile(count, seed):
    source = random.Random(seed)

    def text():
        return "".join(source.choices(TRAPS, k=source.randrange(4)))

    images = [
        {"id": i, "file_name": f"{i}{text()}.jpg".replace("\\", ""), "note": text()}
        for i in range(count)
    ]
    rows = [
        {
            "id": i,
            "image_id": source.randrange(count + 1),
            "category_id": 1,
            "bbox": [1, 2, 3, 4],
            "x": [{"a": text()}, {"b": [{}, {"c": text()}]}] * source.randrange(4),
            "segmentation": [[round(source.uniform(-9, 99), 2) for _ in range(8)], [1, -0, 3]],
            "[1, 2, 3, 4, 5, 6]": "[1,2,3,4,5,6]",
        }
        for i in range(4 * count)
    ]
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": text()}]}
    keys = list(content)
    source.shuffle(keys)
    return {key: content[key] for key in keys}


def require_same_as_json(path, content, ordered):
    found = read_coco(path, ordered)
    assert [image.id for image in found.images] == [image["id"] for image in content["images"]]
    assert found.keys == list(content)
    lengths = found.sample_lengths()
    for i, image in enumerate(content["images"]):
        own = [row for row in content["annotations"] if row["image_id"] == image["id"]]
        record = found.sample_json(i)
        assert json.loads(record) == {"image": image, "annotations": own}
        assert len(record) == lengths[i]
        assert found.annotation_count(i) == len(own)
        assert found.images[i].file_name == image["file_name"]
    known = {image["id"] for image in content["images"]}
    assert found.orphans == [r for r in content["annotations"] if r["image_id"] not in known]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    chunk=st.integers(1, 600),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 0, 2]),
)
def test_any_size_of_chunks_finds_the_same(tmp_path_factory, seed, chunk, ascii_only, indent):
    path = tmp_path_factory.mktemp("hostile") / "a.json"
    content = hostile(8, seed)
    path.write_text(json.dumps(content, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK", chunk)
        require_same_as_json(path, content, map)


def test_processes_find_the_same(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    content = hostile(60, 1)
    path.write_text(json.dumps(content))
    monkeypatch.setattr(records, "CHUNK", 2000)
    with worker_processes(2) as ordered:
        require_same_as_json(path, content, ordered)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), chunk=st.integers(1, 300))
def test_damage_is_found_at_any_size_of_chunks(tmp_path_factory, seed, chunk):
    path = tmp_path_factory.mktemp("damaged") / "a.json"
    source = random.Random(seed)
    text = json.dumps(hostile(4, seed))
    place = source.randrange(len(text))
    text = text[:place] + source.choice('{}[]",:0-eN\\') * source.randrange(2) + text[place + 1 :]
    path.write_text(text)
    results = []
    for size in (chunk, 2**23):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(records, "CHUNK", size)
            try:
                found = read_coco(path)
                results.append([found.sample_json(i) for i in range(len(found.images))])
            except ValueError as error:
                results.append(str(error))
    assert results[0] == results[1]
    assert "\n" not in results[0]
    if "not valid JSON" in results[0]:
        with pytest.raises(ValueError, match=r".+"):
            json.loads(text)


@pytest.mark.parametrize(
    "numbers",
    [
        "01, 2, 3, 4, 5, 6", "1., 2, 3, 4, 5, 6", "1, 2, 3, 4, 5, .6", "1, 2,, 3, 4, 5, 6",
        "1, 2, 3, 4, 5, 6,", "1, 2, 3, 4 5, 6, 7, 8", "1, 2, --3, 4, 5, 6", "1.2.3, 4, 5, 6, 7, 8",
        ", 1, 2, 3, 4, 5, 6", "+1, 2, 3, 4, 5, 6", "1, 2, 3, 4, 5, 6-", "1, 2, 3, 4, 5, 6e",
    ],
)  # fmt: skip
def test_long_lists_must_be_json_though_they_are_skipped(tmp_path, numbers):
    path = tmp_path / "a.json"
    path.write_text(f'{{"annotations": [{{"id": 1, "segmentation": [[{numbers}]]}}]}}')
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_coco(path)


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ([10**400, -(10**400)], True), ([1, -(10**400), 0.5, 10**400], True),
        ([[5, 10**400, -(10**400)]], True), ([2**1023, -(2**1023), True], False),
        ([1e308, 1e308, -1e308], False), ([float("inf"), -float("inf")], True),
    ],
)  # fmt: skip
def test_numbers_beyond_the_floats_do_not_cancel_out(value, wrong):
    assert non_finite(value) == wrong


def test_suspects_are_those_with_a_problem(tmp_path):
    """The arithmetic on columns agrees with the look at each record."""
    source = random.Random(0)
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in range(200)]
    odd = (-5, -1.5, -0.5, 0, 3, 10, 39, 41.5, 1e308, 10**400, None, "1", True, float("inf"))
    rows = []
    for i in range(200):
        box = [source.choice((1, 2, 5, 5, 5, 5, 10)) for _ in range(4)]
        if i % 3 == 0:
            box[source.randrange(4)] = source.choice(odd)
        category = source.choice((1, 1, 1, 1, 1, 2, True, "1", None))
        polygon = [source.uniform(0, 9) for _ in range(6)]
        if i % 4 == 0:
            polygon[source.randrange(6)] = source.choice((1, 2, 0.5, 1e9, *odd[-6:]))
        rest = {"bbox": box, "segmentation": [polygon]}
        rows.append({"id": i, "image_id": i, "category_id": category, **rest})
    path = tmp_path / "a.json"
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "a"}]}
    path.write_text(json.dumps(content))
    found = read_coco(path)
    wrong = [any(annotation_problems(row, (40, 30), {1})) for row in rows]
    assert [found.is_suspect(i) for i in range(200)] == wrong
    assert 20 < np.sum(wrong) < 190
