"""convert then export gives the annotation file back, for COCO files as nasty as JSON allows."""

import json
import shutil
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.convert import convert
from data_prep.export import export
from data_prep.verify import verify

numbers = st.one_of(
    st.integers(-(10**20), 10**20), st.floats(allow_nan=False, allow_infinity=False)
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
extra = st.dictionaries(st.text(max_size=6).map("x_".__add__), values, max_size=3)
names = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20
).map(lambda name: f"sub dir/{name}.jpg")
segmentations = st.one_of(
    st.just([]),
    st.lists(st.lists(st.floats(0, 20), min_size=6, max_size=8), max_size=2),
    st.fixed_dictionaries(
        {"size": st.just([10, 20]), "counts": st.lists(st.integers(0, 200), max_size=4)}
    ),
    st.fixed_dictionaries({"size": st.just([10, 20]), "counts": st.text(max_size=10)}),
)
annotations = st.builds(
    lambda known, more: more | known,
    st.fixed_dictionaries(
        {},
        optional={
            "category_id": st.integers(-3, 5),
            "bbox": st.lists(numbers, max_size=5),
            "area": numbers,
            "iscrowd": st.integers(0, 1),
            "segmentation": segmentations,
            "keypoints": st.lists(st.integers(0, 20), max_size=6),
            "num_keypoints": st.integers(0, 2),
        },
    ),
    extra,
)


@st.composite
def coco_files(draw):
    ids = draw(st.lists(st.integers(-5, 2**63 - 1), min_size=1, max_size=4, unique=True))
    files = draw(st.lists(names, min_size=len(ids), max_size=len(ids), unique=True))
    images = [
        draw(extra)
        | {"id": number, "file_name": name}
        | draw(st.sampled_from([{}, {"width": 20, "height": 10}, {"width": 20.0, "height": 10}]))
        for number, name in zip(ids, files, strict=True)
    ]
    rows = []
    for i, row in enumerate(draw(st.lists(annotations, max_size=5))):
        rows.append(row | {"id": i, "image_id": draw(st.sampled_from([*ids, -99]))})
    content = draw(extra) | {
        "categories": [{"id": 1, "name": "é 猫\ud800", "skeleton": [[1, 2]]} | draw(extra)],
        "annotations": rows,
        "images": images,
    }
    if not rows and draw(st.booleans()):
        del content["annotations"]
    return {key: content[key] for key in draw(st.permutations(list(content)))}


def canonical(content):
    """Up to the order of the two lists; JSON text, so that 1, 1.0 and true stay apart."""
    lists = {"images", "annotations"} & set(content)
    ordered = content | {key: sorted(content[key], key=lambda row: row["id"]) for key in lists}
    return json.dumps(ordered, sort_keys=True)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=coco_files(),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 2]),
    samples_per_shard=st.integers(1, 3),
)
def test_round_trip(encoded, content, ascii_only, indent, samples_per_shard):
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "images" / "sub dir").mkdir(parents=True)
        for image in content["images"]:
            (folder / "images" / image["file_name"]).write_bytes(encoded(20, 10))
        text = json.dumps(content, ensure_ascii=ascii_only, indent=indent)
        # A lone surrogate exists in JSON as an escape only.
        text = text.replace("\ud800", "\\ud800")
        try:
            raw = text.encode()
        except UnicodeEncodeError:
            raw = json.dumps(content, indent=indent).encode()
        (folder / "in.json").write_bytes(raw)
        result = convert(
            folder / "images",
            folder / "in.json",
            folder / "shards",
            samples_per_shard=samples_per_shard,
        )
        assert result.manifest.num_images == len(content["images"])
        export(folder / "shards", folder / "out.json")
        exported = json.loads((folder / "out.json").read_text())
        assert canonical(exported) == canonical(json.loads(raw))


def test_drawn_data_comes_back_and_images_are_the_same_bytes(drawn, tmp_path):
    source = drawn / "annotations" / "instances_train.json"
    result = convert(drawn / "train", source, tmp_path / "s", samples_per_shard=70)
    assert not result.problems
    assert [shard["samples"] for shard in result.manifest.shards] == [70, 70, 70, 20]
    export(tmp_path / "s", tmp_path / "out.json")
    content = json.loads(source.read_text())
    assert canonical(json.loads((tmp_path / "out.json").read_text())) == canonical(content)
    files = {image["id"]: image["file_name"] for image in content["images"]}
    seen = 0
    for path in sorted((tmp_path / "s").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                if extension == "jpg":
                    original = (drawn / "train" / files[int(key)]).read_bytes()
                    assert tar.extractfile(member).read() == original
                    seen += 1
    assert seen == len(files)


# Each a part of a file as COCO publishes it: instances, person_keypoints and image_info.
POLYGON = {"segmentation": [[1.5, 2, 9.25, 2, 9.25, 8]], "area": 23.25, "iscrowd": 0}
CROWD = {"segmentation": {"counts": [272, 2, 4, 922], "size": [30, 40]}, "area": 6, "iscrowd": 1}
COMPRESSED = {"segmentation": {"counts": "`0n1<N2N\\\\2O1", "size": [30, 40]}, "iscrowd": 1}
KEYPOINTS = {"num_keypoints": 2, "keypoints": [3, 4, 2, 5, 6, 1, 0, 0, 0], **POLYGON}
PERSON = {
    "supercategory": "person",
    "id": 3,
    "name": "person",
    "keypoints": ["nose", "left_eye", "right_eye"],
    "skeleton": [[1, 2], [2, 3]],
}


@pytest.mark.parametrize("with_annotations", [True, False])
def test_the_kinds_of_files_that_coco_has(small, encoded, tmp_path, with_annotations):
    content = {
        "info": {"description": "COCO 2017 Dataset", "year": 2017, "version": "1.0"},
        "licenses": [{"url": "http://x", "id": 2, "name": "b"}, {"id": 1, "name": "a"}],
        "videos": [{"id": 9}],
        "images": [],
        "annotations": [],
        "categories": [PERSON, {"id": 1, "name": "é 猫"}],
    }
    for i, name in enumerate(("naïve 猫 😀.jpg", "e\u0301.jpg", "%41#?&.jpg", "a b'\"\\.jpg")):
        (small.images / name).write_bytes(encoded(seed=i))
        times = {"date_captured": "2013-11-14 17:02:52", "license": 2 - i % 2}
        record = {"file_name": name, "height": 30, "width": 40, "id": 7 * i, **times}
        content["images"].append(record)
    for i, kind in enumerate((POLYGON, CROWD, COMPRESSED, KEYPOINTS)):
        known = {"image_id": 7 * (i % 3), "bbox": [1.5, 2, 7.75, 6], "category_id": 3, "id": 50 - i}
        content["annotations"].append(kind | known)
    if not with_annotations:
        del content["annotations"]
    small.save(content)
    result = convert(*small.arguments)
    assert result.problems == []
    assert result.manifest.num_annotations == 4 * with_annotations
    export(small.output, tmp_path / "out.json")
    exported = json.loads((tmp_path / "out.json").read_text())
    assert canonical(exported) == canonical(content)
    assert list(exported) == list(content)
    for key in ("info", "licenses", "categories", "videos"):
        assert json.dumps(exported[key]) == json.dumps(content[key])
    with tarfile.open(small.output / "shard-000000.tar") as tar:
        for image in content["images"]:
            stored = tar.extractfile(f"{image['id']:012d}.jpg").read()
            assert stored == (small.images / image["file_name"]).read_bytes()
    assert verify(small.output, decode=True) == []


def test_a_manifest_from_before_there_were_keys_is_read(small, tmp_path):
    content = small()
    convert(*small.arguments)
    path = small.output / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("keys") == ["info", "categories", "images", "annotations"]
    path.write_text(json.dumps(manifest))
    export(small.output, tmp_path / "out.json")
    assert canonical(json.loads((tmp_path / "out.json").read_text())) == canonical(content)
    assert not convert(*small.arguments).fresh


def test_records_pass_as_text(small, tmp_path):
    """Number formats and repeated keys, which a JSON parser would not keep."""
    content = small(1)
    text = json.dumps(content).replace('"area": 90.5', '"area": 9.050e1, "x": 1, "x": NaN')
    small.annotations.write_text(text)
    convert(*small.arguments)
    with tarfile.open(small.output / "shard-000000.tar") as tar:
        record = tar.extractfile("000000000010.json").read().decode()
    assert '"area": 9.050e1, "x": 1, "x": NaN' in record
    export(small.output, tmp_path / "out.json")
    assert '"area": 9.050e1, "x": 1, "x": NaN' in (tmp_path / "out.json").read_text()


def test_export_leaves_out_quarantined_images_and_keeps_orphans(small, tmp_path, command):
    content = small(3)
    content["annotations"].append({"id": 7, "image_id": 4711, "category_id": 3, "bbox": [0] * 4})
    small.save(content)
    (small.images / "1.jpg").unlink()
    convert(*small.arguments)
    result = command("export", small.output, "--output", tmp_path / "out.json")
    assert result.returncode == 0
    assert "1 images that conversion left out, with their annotations (ids 11)" in result.stdout
    exported = json.loads((tmp_path / "out.json").read_text())
    content["images"].pop(1)
    content["annotations"].pop(1)
    assert canonical(exported) == canonical(content)


def test_export_overwrites_nothing_and_names_damage(small, tmp_path):
    small()
    convert(*small.arguments)
    (tmp_path / "mine.json").write_text("keep")
    with pytest.raises(ValueError, match="exists already"):
        export(small.output, tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == "keep"
    shard = small.output / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[100:108] = b"garbage!"  # in the first member's header
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-000000.tar: image 1\d is damaged"):
        export(small.output, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    shutil.rmtree(small.output)
    with pytest.raises(ValueError, match="does not exist"):
        export(small.output, tmp_path / "out.json")
