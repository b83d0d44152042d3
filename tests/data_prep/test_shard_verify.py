import json

import numpy as np
import pytest
from PIL import Image

from data_prep.convert import convert
from data_prep.manifest import data_digest, read_manifest, write_manifest
from data_prep.shards import encode_member, member_length, read_sample, sample_key
from data_prep.stats import collect, save_plots, tables
from data_prep.storage import folder_at
from data_prep.verify import DAMAGE, verify


@pytest.fixture
def shards(small):
    small(6)
    convert(*small.arguments, samples_per_shard=2)
    return small.output


def kinds(shards, **options):
    return {problem.kind for problem in verify(shards, **options)}


def test_good_shards_have_no_findings(shards, drawn, tmp_path):
    assert verify(shards, decode=True) == []
    annotations = drawn / "annotations" / "instances_val.json"
    convert(drawn / "val", annotations, tmp_path / "val", samples_per_shard=15)
    assert verify(tmp_path / "val", decode=True, workers=2) == []


def test_any_flipped_byte_is_detected(shards):
    path = shards / "shard-000001.tar"
    whole = path.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 60).astype(int):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        (first, *_) = verify(shards)
        assert first.kind == "damaged shard"
        assert "shard-000001.tar: expected SHA-256" in first.detail
    path.write_bytes(whole)
    assert verify(shards) == []


def test_missing_and_cut_shards_are_detected(shards):
    (shards / "shard-000000.tar").unlink()
    cut = shards / "shard-000002.tar"
    cut.write_bytes(cut.read_bytes()[:1000])
    found = verify(shards)
    assert [p.kind for p in found[:2]] == ["damaged shard", "damaged shard"]
    assert "No such file" in found[0].detail
    assert "bytes, got 1000" in found[1].detail
    # Both samples of the cut shard are named too.
    ids = read_manifest(shards).samples["id"][-2:]
    assert [p.image_id for p in found[2:]] == ids
    assert {p.kind for p in found[2:]} == {"damaged sample"}


def test_findings_in_the_data_are_no_damage(small):
    content = small()
    content["annotations"][0]["bbox"] = [0, 0, 0, 0]
    small.save(content)
    convert(*small.arguments)
    (problem,) = verify(small.output)
    assert (problem.kind, problem.annotation_id) == ("degenerate box", 100)
    assert problem.kind not in DAMAGE


def test_records_nested_more_deeply_than_convert_takes_are_findings(small):
    content = small()
    content["annotations"][0]["note"] = "x" * 1398
    small.save(content)
    convert(*small.arguments)
    (shard,) = small.output.glob("*.tar")
    note = b'"' + b"x" * 1398 + b'"'
    assert note in shard.read_bytes()
    shard.write_bytes(shard.read_bytes().replace(note, b"[" * 700 + b"]" * 700))
    damage, found = verify(small.output)
    assert (damage.kind, found.kind) == ("damaged shard", "damaged sample")
    assert found.image_id == content["annotations"][0]["image_id"]
    assert "nested too deeply" in found.detail


def test_a_header_nested_more_deeply_than_convert_takes_is_refused(shards):
    path = shards / "manifest.json"
    content = json.loads(path.read_text())
    content["header"]["info"] = json.loads("[" * 700 + "]" * 700)
    digests = [shard["sha256"] for shard in content["shards"]]
    content["digest"] = data_digest(content["header"], digests)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: it is nested too deeply"):
        verify(shards)


def test_decoding_finds_what_headers_do_not_show(small, encoded):
    small()
    png = bytearray(encoded(kind="PNG"))
    place = png.index(b"IDAT") + 40
    png[place : place + 8] = b"\0" * 8
    (small.images / "0.jpg").write_bytes(png)
    convert(*small.arguments)
    assert verify(small.output) == []
    (problem,) = verify(small.output, decode=True)
    assert problem.kind == "corrupt image"
    # The line names the sample: a shard holds a thousand.
    assert f"shard-000000.tar: {problem.image_id:012d}.png: " in problem.detail


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="x"), "its format is not"),
        (lambda m: m.update(version=2), "has version 2, expected 1"),
        (lambda m: m.pop("samples"), "it has no samples"),
        (lambda m: m.update(samples=[]), "samples must have the columns"),
        (lambda m: m["samples"]["id"].pop(), "column id must have 6 entries"),
        (lambda m: m["samples"]["width"].__setitem__(0, "40"), "column width must hold integers"),
        (lambda m: m["samples"]["offset"].__setitem__(1, 0), "has no sample at bytes 0"),
        (lambda m: m["samples"]["shard"].reverse(), "column shard does not match"),
        (lambda m: m["samples"]["id"].__setitem__(0, m["samples"]["id"][1]), "two samples"),
        (lambda m: m["samples"]["annotations"].__setitem__(0, 9), "do not sum to 6"),
        (lambda m: m["shards"][0].pop("sha256"), "shards must have"),
        (lambda m: m["shards"][0].update(name="../x"), "plain file name"),
        (lambda m: m["shards"][0].update(bytes=5), "do not fill its 5 bytes"),
        (lambda m: m["shards"][0].update(sha256="0"), "the digest does not match"),
        (lambda m: m["header"].update(info={}), "the digest does not match"),
        (lambda m: m["categories"].pop(), "categories differ"),
        (lambda m: m["header"].pop("categories"), "header must have categories"),
    ],
)
def test_a_wrong_manifest_is_refused(shards, change, message):
    path = shards / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="manifest") as error:
        read_manifest(shards)
    assert message in str(error.value)


def test_a_torn_manifest_is_refused(shards):
    path = shards / "manifest.json"
    path.write_text(path.read_text()[:-10])
    with pytest.raises(ValueError, match="cannot be read"):
        read_manifest(shards)


def test_manifest_writes_and_reads_back_equal(shards, tmp_path):
    manifest = read_manifest(shards)
    write_manifest(folder_at(tmp_path), manifest)
    assert (tmp_path / "manifest.json").read_bytes() == (shards / "manifest.json").read_bytes()
    digests = [shard["sha256"] for shard in manifest.shards]
    assert data_digest(manifest.header, digests) == manifest.digest
    assert data_digest(manifest.header, digests[::-1]) != manifest.digest


def test_a_sample_is_an_image_and_its_json():
    assert sample_key(139) == "000000000139"
    good = encode_member("1.jpg", b"abc"), encode_member("1.json", b'{"image":{},"annotations":[]}')
    assert [len(member) for member in good] == [member_length(3), member_length(30)] == [1024] * 2
    sample = read_sample(b"".join(good))
    assert (sample.key, sample.extension, sample.image) == ("1", "jpg", b"abc")
    for members, message in (
        (good[:1], "got 1 tar members"),
        (good[::-1], "followed by '1.jpg'"),
        ((good[0], encode_member("2.json", b"{}")), "expected '1.json'"),
        ((good[0], encode_member("1.json", b"{")), "is not JSON"),
        ((good[0], encode_member("1.json", b"[]")), "does not hold an image"),
        ((good[0], encode_member("1.json", b'{"image":{},"annotations":[1]}')), "does not hold"),
        ((good[0][:700],), "got 1 tar members"),
        ((b"x" * 1024,), "not a tar"),
    ):
        with pytest.raises(ValueError, match=message):
            read_sample(b"".join(members))


def test_statistics_by_hand(small, tmp_path):
    content = small(4)
    rows = content["annotations"]
    rows[0] |= {"bbox": [0, 0, 20, 10], "area": 32.0**2}
    rows[1] |= {"bbox": [0, 0, 10, 20], "area": 96.0**2, "category_id": 90}
    rows[2] |= {"iscrowd": 1}
    rows[3] |= {"bbox": [0, 0, 0, 10]}
    rows.append(rows[0] | {"id": 1, "area": 5})
    content["categories"][0]["name"] = "cat \ud800 $x$"
    small.save(content)
    convert(*small.arguments)
    stats = collect(small.output)
    assert dict(stats.objects) == {3: 2, 90: 1}
    assert dict(stats.images) == {3: 1, 90: 1}
    assert dict(stats.crowds) == {3: 1}
    assert stats.faulty == 1
    # In the order of the shards, which is that of the seed.
    assert sorted(stats.areas) == [5.0, 1024.0, 9216.0]
    assert sorted(stats.aspects) == [0.5, 2.0, 2.0]
    assert sorted(stats.per_image) == [0, 0, 1, 2]
    assert stats.relative == pytest.approx([(200 / 1200) ** 0.5] * 3)
    text = tables(stats)
    assert [line.count("#") for line in text.splitlines() if line.startswith(("cat", "brush"))] == [
        24,
        12,
    ]
    lines = [line.replace("#", "").split() for line in text.splitlines()]
    assert ["brush", "90", "1", "33.3%", "1", "0"] in lines
    assert ["small", "<", "32x32", "1", "33.3%"] in lines
    assert ["medium", "1", "33.3%"] in lines
    assert ["large", ">=", "96x96", "1", "33.3%"] in lines
    assert ["2", "to", "4", "2", "66.7%"] in lines
    assert ["width", "40", "40", "40.0", "40"] in lines
    paths = save_plots(stats, tmp_path / "plots")
    for path in paths:
        with Image.open(path) as plot:
            assert min(plot.size) > 300
            assert len(plot.convert("RGB").getcolors(2**24)) > 10


def test_statistics_without_any_annotation(small, tmp_path):
    content = small(2)
    content["annotations"] = []
    small.save(content)
    convert(*small.arguments)
    stats = collect(small.output)
    assert "2 images, 2 without objects; 0 objects" in tables(stats)
    assert len(save_plots(stats, tmp_path / "plots")) == 3
