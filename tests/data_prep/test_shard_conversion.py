import argparse
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from data_prep.checks import FORMATS, TruncatedImage, decode_image, read_image_header
from data_prep.convert import convert
from data_prep.export import export
from data_prep.manifest import COLUMNS, read_manifest
from data_prep.verify import verify

ROOT = Path(__file__).parents[2]


def contents(folder):
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def arguments(drawn, output):
    return (drawn / "train", drawn / "annotations" / "instances_train.json", output)


@pytest.fixture(scope="module")
def shards(drawn, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "train"
    convert(*arguments(drawn, output), samples_per_shard=50)
    return output


def test_webdataset_reads_the_shards_unaided(drawn, shards):
    source = json.loads((drawn / "annotations" / "instances_train.json").read_text())
    records = {image["id"]: image for image in source["images"]}
    urls = [str(path) for path in sorted(shards.glob("shard-*.tar"))]
    assert len(urls) == 5
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert {int(sample["__key__"]) for sample in samples} == set(records)
    assert len(samples) == len(records)
    for sample in samples:
        record = records[int(sample["__key__"])]
        assert sample["json"]["image"] == record
        assert sample["json"]["annotations"] == [
            a for a in source["annotations"] if a["image_id"] == record["id"]
        ]
        assert sample["jpg"].size == (record["width"], record["height"])


def test_index_gives_each_sample_by_one_pread(shards):
    manifest = read_manifest(shards)
    assert set(manifest.samples) == set(COLUMNS)
    for row in zip(*(manifest.samples[name] for name in COLUMNS), strict=True):
        shard, offset, length, width, height, image_id, annotations = row
        descriptor = os.open(shards / manifest.shards[shard]["name"], os.O_RDONLY)
        data = os.pread(descriptor, length, offset)
        os.close(descriptor)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            image, record = tar.getmembers()
            assert (image.name, record.name) == (f"{image_id:012d}.jpg", f"{image_id:012d}.json")
            parsed = json.load(tar.extractfile(record))
            assert parsed["image"]["id"] == image_id
            assert len(parsed["annotations"]) == annotations
            with Image.open(tar.extractfile(image)) as decoded:
                assert decoded.size == (width, height)


def test_manifest_describes_the_folder(drawn, shards):
    manifest = json.loads((shards / "manifest.json").read_text())
    source = json.loads((drawn / "annotations" / "instances_train.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("coco-webdataset", 1)
    assert manifest["header"] == {
        key: source[key] for key in source if key not in ("images", "annotations")
    }
    assert manifest["categories"] == source["categories"]
    assert manifest["num_images"] == len(source["images"])
    assert manifest["num_annotations"] == len(source["annotations"])
    assert manifest["quarantined"] == []
    assert {shard["name"] for shard in manifest["shards"]} | {"manifest.json", "report.json"} == {
        path.name for path in shards.iterdir()
    }
    for shard in manifest["shards"]:
        data = (shards / shard["name"]).read_bytes()
        assert len(data) == shard["bytes"]
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(drawn, shards, tmp_path, workers):
    convert(*arguments(drawn, tmp_path / "again"), samples_per_shard=50, workers=workers)
    assert contents(tmp_path / "again") == contents(shards)


def test_seed_and_limits_change_order_not_content(drawn, shards, tmp_path):
    other = convert(*arguments(drawn, tmp_path / "other"), samples_per_shard=50, seed=1).manifest
    base = read_manifest(shards)
    assert other.samples["id"] != base.samples["id"]
    assert sorted(other.samples["id"]) == sorted(base.samples["id"])
    assert base.samples["id"] != sorted(base.samples["id"])
    assert other.digest != base.digest
    # A shard is closed only when the next sample would not fit.
    by_size = convert(*arguments(drawn, tmp_path / "size"), shard_size_mb=1).manifest
    assert len(by_size.shards) >= 2
    assert all(shard["bytes"] <= 2**20 for shard in by_size.shards)
    first, second = by_size.shards[:2]
    next_length = by_size.samples["length"][first["samples"]]
    assert first["bytes"] + next_length > 2**20
    assert second["samples"] > 0


def test_again_is_a_no_op_that_says_so(drawn, shards, command):
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    result = command(
        *("convert", "--images", drawn / "train", "--output", shards),
        *("--annotations", drawn / "annotations" / "instances_train.json"),
        *("--samples-per-shard", 50),
    )
    assert result.returncode == 0
    assert "nothing to do" in result.stdout
    assert before == {path: path.stat().st_mtime_ns for path in shards.iterdir()}


def test_other_input_or_a_foreign_folder_is_refused(small, tmp_path, encoded):
    content = small()
    convert(*small.arguments)
    before = contents(small.output)
    content["annotations"][0]["area"] = 1
    small.save(content)
    with pytest.raises(ValueError, match=r"other input.*annotations"):
        convert(*small.arguments)
    small()
    with pytest.raises(ValueError, match=r"other input.*options"):
        convert(*small.arguments, seed=9)
    (small.images / "0.jpg").write_bytes(encoded(seed=7, width=50))
    with pytest.raises(ValueError, match=r"other input.*images"):
        convert(*small.arguments)
    assert contents(small.output) == before
    for name in ("thesis.txt", "shard-000000.tar"):
        foreign = tmp_path / f"foreign {name}"
        foreign.mkdir()
        (foreign / name).write_text("keep")
        with pytest.raises(ValueError, match="something else"):
            convert(small.images, small.annotations, foreign)
        assert contents(foreign) == {name: b"keep"}


def test_a_lost_shard_is_not_taken_for_complete(small):
    small()
    convert(*small.arguments)
    (small.output / "shard-000000.tar").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"shard-000000.tar is missing or not of"):
        convert(*small.arguments)


def test_killed_and_run_again_gives_the_same_bytes(drawn, shards, tmp_path):
    output = tmp_path / "killed"
    images, annotations, _ = arguments(drawn, output)
    code = (
        "import os, sys, signal\n"
        "from pathlib import Path\n"
        "import data_prep.write as w\n"
        "from data_prep.convert import convert\n"
        "header, count = w.member_header, 0\n"
        "def counted(*a):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 250: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return header(*a)\n"
        "w.member_header = counted\n"
        "convert(*map(Path, sys.argv[1:]), samples_per_shard=50)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, images, annotations, output], cwd=ROOT, timeout=600
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    # Two members a sample: two shards of fifty are complete, the third is half written.
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    assert sorted(kept) == ["shard-000000.tar", "shard-000001.tar"]
    with pytest.raises(ValueError, match="unfinished conversion of other input or options"):
        convert(images, annotations, output, samples_per_shard=51)
    time.sleep(0.01)
    convert(images, annotations, output, samples_per_shard=50)
    assert contents(output) == contents(shards)
    assert all((output / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())


def test_killed_with_its_workers_at_work_and_run_again_gives_the_same_bytes(drawn, tmp_path):
    """Killed from outside as soon as a shard is finished, twice; each time by other workers."""
    images, annotations, output = arguments(drawn, tmp_path / "killed")
    convert(images, annotations, tmp_path / "whole", samples_per_shard=2)
    for kill, workers in enumerate((2, 3), start=1):
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "data_prep", "convert", "--images", images),
                *("--annotations", annotations, "--output", output),
                *("--samples-per-shard", "2", "--workers", str(workers)),
            ],
            cwd=ROOT,
        )
        while len(list(output.glob(".convert/shard-*.json"))) < 5 * kill:
            assert process.poll() is None
        process.kill()
        process.wait()
        assert not (output / "manifest.json").exists()
    # What a power cut may leave: a shard of the right size without its content.
    kept = sorted(output.glob("shard-*.tar"))
    kept[0].write_bytes(bytes(kept[0].stat().st_size))
    convert(images, annotations, output, samples_per_shard=2, workers=2)
    assert contents(output) == contents(tmp_path / "whole")


def test_workers_end_with_a_killed_parent(tmp_path):
    """Or they would write into the shards of the run that continues."""
    code = (
        "import sys, time\n"
        "from data_prep.parallel import ordered_map\n"
        "if __name__ == '__main__':\n"
        "    list(ordered_map(time.sleep, [60] * 4, 2))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    parent = subprocess.Popen(
        [sys.executable, script], env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True
    )

    def state(process):
        """One letter and the parent's id, from proc(5); None if there is no such process."""
        try:
            stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return stat[0], int(stat[1])

    def children():
        every = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        return [number for number in every if (state(number) or ("", 0))[1] == parent.pid]

    def wait_for(condition):
        deadline = time.monotonic() + 200
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    started = []
    try:
        # Two workers and multiprocessing's resource tracker.
        wait_for(lambda: len(children()) == 3)
        time.sleep(1)  # until the workers have started their sleep
        started = children()
        assert len(started) == 3
        parent.kill()
        parent.wait()
        wait_for(lambda: all((state(number) or "Z")[0] == "Z" for number in started))
    finally:
        with suppress(ProcessLookupError):  # the session has processes of this test only
            os.killpg(parent.pid, signal.SIGKILL)


def test_two_conversions_into_one_folder_are_refused(small):
    small()
    (small.output / ".convert").mkdir(parents=True)
    with (small.output / ".convert" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another conversion is writing"):
            convert(*small.arguments)
    assert convert(*small.arguments).fresh


def test_image_formats_keep_their_extension(small, encoded):
    content = small(1)
    for i, (kind, name) in enumerate(
        (("PNG", "a.PNG"), ("JPEG", "b.JPEG"), ("WEBP", "c.webp"), ("BMP", "d.bmp")), start=50
    ):
        (small.images / name).write_bytes(encoded(kind=kind))
        content["images"].append({"id": i, "file_name": name, "width": 40, "height": 30})
    small.save(content)
    result = convert(*small.arguments)
    assert result.problems == []
    with tarfile.open(small.output / "shard-000000.tar") as tar:
        assert {n for n in tar.getnames() if not n.endswith("json")} == {
            "000000000010.jpg",
            "000000000050.png",
            "000000000051.jpg",
            "000000000052.webp",
            "000000000053.bmp",
        }


def test_every_kind_of_problem_is_reported_and_only_unusable_images_are_left_out(small):
    content = small(19)
    jpeg = (small.images / "2.jpg").read_bytes()
    (small.images / "0.jpg").unlink()
    (small.images / "1.jpg").write_bytes(b"")
    (small.images / "2.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (small.images / "3.jpg").write_text("<html>404</html>")
    content["images"][4]["width"], content["images"][4]["height"] = 30, 40
    content["images"].append(content["images"][5] | {"file_name": "other.jpg"})
    content["images"].append({"id": 60, "file_name": "../annotations.json"})
    rows = content["annotations"]
    rows[6]["bbox"] = [1, 1, 0, 5]
    rows[7]["bbox"] = [1, 1, float("nan"), 5]
    rows[8]["bbox"] = [35, 1, 10, 5]
    rows[9]["bbox"] = None
    rows[10]["category_id"] = 4
    rows[11]["id"] = rows[10]["id"]
    rows[12]["bbox"] = [20, 20, -5, 5]
    rows[13]["segmentation"] = [[1, 2, float("nan"), 4, 5, 6]]
    rows[14]["bbox"] = [-3, 1, 10, 5]
    content["images"][15]["width"] = float("nan")
    content["images"][16]["height"] = -30
    content["images"][17]["width"] = "40"
    content["images"][18]["exposure"] = float("-inf")
    rows.append(rows[5] | {"id": 200, "image_id": 999})
    rows.append(rows[5] | {"id": None})
    rows.append(rows[5] | {"id": 201, "area": float("inf"), "bbox": [35, 25, 5.9, 5.9]})
    small.save(content)
    result = convert(*small.arguments)
    found = {(p.kind, p.image_id, p.annotation_id) for p in result.problems}
    assert found == {
        ("missing image", 10, None),
        ("corrupt image", 11, None),
        ("truncated image", 12, None),
        ("unsupported image", 13, None),
        ("size mismatch", 14, None),
        ("duplicate image id", 15, None),
        ("missing image", 60, None),
        ("degenerate box", 16, 106),
        ("non-finite number", 17, 107),
        ("box outside image", 18, 108),
        ("no box", 19, 109),
        ("unknown category", 20, 110),
        ("degenerate box", 22, 112),
        ("non-finite number", 23, 113),
        ("box outside image", 24, 114),
        ("size mismatch", 25, None),
        ("size mismatch", 26, None),
        ("size mismatch", 27, None),
        ("non-finite number", 28, None),
        ("duplicate annotation id", 21, 110),
        ("annotation without image", None, 200),
        ("invalid annotation id", 15, None),
        ("non-finite number", 15, 201),
    }
    details = {p.image_id: p.detail for p in result.problems if p.image_id in (12, 13, 14)}
    assert "no end-of-image marker" in details[12]
    assert "not an image" in details[13]
    assert "turned" in details[14]
    manifest = read_manifest(small.output)
    assert sorted(manifest.samples["id"]) == [15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 28]
    assert [q["image_id"] for q in manifest.quarantined] == [11, 15, 10, 60, 14, 25, 26, 27, 12, 13]
    assert manifest.num_annotations == 13
    # Every annotation is in a shard, left out with its image, or an orphan.
    lost = sum(q["annotations"] for q in manifest.quarantined)
    orphans = len(manifest.orphan_annotations)
    assert manifest.num_annotations + lost + orphans == len(content["annotations"])
    report = json.loads((small.output / "report.json").read_text())
    assert len(report["problems"]) == len(result.problems)
    assert report["counts"]["corrupt image"] == 1
    assert {"kind", "image_id", "annotation_id", "detail"} == set(report["problems"][0])
    # Verifying finds what is in the shards again, and says what is not.
    again = {(p.kind, p.image_id, p.annotation_id) for p in verify(small.output)}
    left_out = {("image left out", q["image_id"], None) for q in manifest.quarantined}
    reasons = {
        "missing image", "corrupt image", "truncated image", "unsupported image", "size mismatch"
    }  # fmt: skip
    assert again == left_out | {row for row in found if row[0] not in reasons} - {
        ("duplicate image id", 15, None)
    }


def test_numbers_at_the_top_of_the_file_that_are_none_are_reported(small, tmp_path):
    content = small(1)
    content["info"]["version"] = float("nan")
    content["categories"][1]["weight"] = [1.0, float("-inf")]
    content["mean"] = [0.5, float("nan")]
    content["scale"] = 1
    small.save(content)
    expected = [
        ("in categories: weight is [1.0, -inf]", None, None),
        ("in info: version is nan", None, None),
        ("in mean: mean is nan", None, None),
    ]
    for problems in (convert(*small.arguments).problems, verify(small.output)):
        assert {p.kind for p in problems} == {"non-finite number"}
        assert sorted((p.detail, p.image_id, p.annotation_id) for p in problems) == expected
    export(small.output, tmp_path / "out.json")
    assert repr(json.loads((tmp_path / "out.json").read_text())) == repr(content)


def test_findings_with_text_that_cannot_be_printed_are_told(small, command, tmp_path):
    """A lone surrogate, which JSON may have as an escape."""
    content = small(2)
    content["info"]["\ud800"] = float("nan")
    content["annotations"][0] |= {"id": "\udfff", "bbox": [1, 1, 0, 0]}
    small.save(content)
    options = ("--images", small.images, "--annotations", small.annotations, "--workers", 1)
    converted = command("convert", *options, "--output", small.output)
    verified = command("verify", small.output, "--workers", 1, "--output", tmp_path / "found.json")
    for result in (converted, verified):
        assert (result.returncode, result.stderr) == (0, "")
        assert "annotation \\udfff\n" in result.stdout
        assert "in info: \\ud800 is nan\n" in result.stdout
    assert (tmp_path / "found.json").exists()


def script(name):
    """A file beside this one that is no test, as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_measurement_at_cocos_size_works_at_a_small_one(tmp_path):
    folder = tmp_path / "input"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "tests/data_prep/coco_size.py", folder, "--images", "30"),
            *("--kilobytes", "400", "--rounds", "2", "--cold"),
            *("--most-gib", "0.001", "--most-ratio", "0.01"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"peak memory: got 0\.\d\d GiB, expected 0\.00 or less\n"
        r"convert / tar: got \d+\.\d\d, expected 0\.01 or less\n",
        done.stderr,
    )
    assert "30 images, 0.01 GB; annotations 0 MB" in done.stdout
    assert re.search(r"round 2: convert \d+\.\d s, \d+\.\d s of CPU, peak 0\.\d\d GiB", done.stdout)
    assert re.search(r"convert / tar: median \d+\.\d+ of (\d+\.\d\d(, )?){2}", done.stdout)
    assert {path.name for path in folder.iterdir()} == {"images", "pool", "instances.json"}
    content = json.loads((folder / "instances.json").read_text())
    assert len(content["images"]) == 30
    assert len(content["annotations"]) == 30 * 860_001 // 118_287
    assert {path.stat().st_nlink for path in (folder / "images").iterdir()} == {2}


def test_the_measurement_says_each_limit_that_is_passed():
    complaints = script("coco_size").complaints
    limits = argparse.Namespace(most_gib=3.0, most_ratio=1.5)
    assert complaints(3.0, 1.5, {b"a"}, limits) == ""
    assert complaints(3.01, 1.51, {b"a", b"b"}, limits).splitlines() == [
        "peak memory: got 3.01 GiB, expected 3.00 or less",
        "convert / tar: got 1.51, expected 1.50 or less",
        "convert again: got 2 different results, expected the same",
    ]


def test_the_two_faulty_annotations_of_train2017_are_reported(small):
    """As published; see tests/data_prep/coco_size.py."""
    coco_size = script("coco_size")
    spec = importlib.util.spec_from_file_location(
        "coco_size", ROOT / "tests/data_prep/coco_size.py"
    )
    coco_size = importlib.util.module_from_spec(spec)
    sys.modules["coco_size"] = coco_size
    spec.loader.exec_module(coco_size)
    content = small(2)
    pool = coco_size.pictures(400)
    for i, row in enumerate(coco_size.FAULTY):
        data, width, height = pool[i]
        (small.images / f"{i}.jpg").write_bytes(data)
        size = {"width": width, "height": height, "id": row["image_id"]}
        content["images"][i] |= size
    content["annotations"] = list(coco_size.FAULTY)
    content["categories"] = [{"id": i, "name": str(i)} for i in coco_size.CATEGORIES]
    small.save(content)
    expected = {("degenerate box", 200365, 918), ("degenerate box", 550395, 2206849)}
    for problems in (convert(*small.arguments).problems, verify(small.output)):
        assert {(p.kind, p.image_id, p.annotation_id) for p in problems} == expected


def test_strict_fails_and_without_it_the_work_is_kept(small):
    small()
    (small.images / "0.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"--strict: 1 problems, the first: unsupported image"):
        convert(*small.arguments, strict=True)
    assert not (small.output / "manifest.json").exists()
    report = json.loads((small.output / "report.json").read_text())
    assert report["counts"] == {"unsupported image": 1}
    assert convert(*small.arguments).manifest.num_images == 3
    with pytest.raises(ValueError, match="--strict"):
        convert(*small.arguments, strict=True)


def test_a_shard_of_corrupt_images_only_does_not_stop_readers(small):
    small(3)
    convert(*small.arguments, samples_per_shard=1)
    first = read_manifest(small.output).samples["id"][0]
    (small.images / f"{first - 10}.jpg").write_bytes(b"")
    output = small.output.with_name("second")
    manifest = convert(small.images, small.annotations, output, samples_per_shard=1).manifest
    assert [shard["samples"] for shard in manifest.shards] == [0, 1, 1]
    urls = [str(output / shard["name"]) for shard in manifest.shards]
    assert len(list(webdataset.WebDataset(urls, shardshuffle=False))) == 2
    assert read_manifest(output) == manifest


def test_truncation_is_seen_behind_a_thumbnail(encoded):
    thumbnail = encoded(16, 16)
    whole = encoded(60, 60, seed=1)
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2) + thumbnail
    data = whole[:2] + segment + whole[2:]
    assert read_image_header(data) == ("jpg", 60, 60)
    assert read_image_header(data + b"trailing bytes") == ("jpg", 60, 60)
    for cut in (len(data) - 2, len(data) // 2):
        with pytest.raises(TruncatedImage):
            read_image_header(data[:cut])
    png = encoded(kind="PNG")
    assert read_image_header(png + b"trailing" * 99) == read_image_header(png)
    for cut in (png[:-20], png[:-20] + bytes(99)):
        with pytest.raises(TruncatedImage):
            read_image_header(cut)


def test_damaged_images_raise_nothing_but_value_error(encoded):
    """Each file flipped and cut at many places: accepted or refused, never a crash."""
    refused = 0
    for kind in FORMATS:
        whole = encoded(24, 18, kind)
        decode_image(whole)
        for step in range(150):
            place = step * 7919 % len(whole)
            damaged = bytearray(whole[: place if step % 3 == 0 else None])
            if step % 3:
                damaged[place] ^= 1 << step % 8
            for check in (read_image_header, decode_image):
                try:
                    check(bytes(damaged))
                except ValueError:
                    refused += 1
    assert refused > 300
