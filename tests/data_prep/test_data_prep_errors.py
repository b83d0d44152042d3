"""A user's mistake is one line on stderr that names it, and status 2."""

import json
import os
import random
import re
from types import SimpleNamespace

import pytest

from data_prep.coco import read_coco
from data_prep.convert import convert
from data_prep.export import export
from data_prep.parallel import ordered_map


def test_helps_give_purpose_and_example(command):
    for name in ("synthesize", "convert", "export", "verify", "stats"):
        result = command(name, "--help")
        assert result.returncode == 0
        assert f"Example: python -m data_prep {name}" in result.stdout


def test_a_misspelled_command_and_option_fail(command):
    assert command("convrt").returncode == 2
    result = command("synthesize", "--outptu", "x")
    assert result.returncode == 2
    assert "--output" in result.stderr


def test_a_misspelled_option_is_one_line_without_line_characters_too(command, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    fails(command("stats", "x", "--outptu", "y"), "--output")


def test_a_value_that_is_no_number_gets_no_hint_of_the_option_that_was_given(command):
    paths = ["--images", "x", "--annotations", "y", "--output", "z"]
    result = command("convert", *paths, "--seed", "x")
    fails(result, "parsing --seed: invalid literal for int() with base 10: 'x'")
    assert "did you mean" not in result.stderr


def fails(result, message):
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def run_convert(command, small, **changed):
    paths = {"images": small.images, "annotations": small.annotations, "output": small.output}
    flags = [x for name, path in (paths | changed).items() for x in (f"--{name}", path)]
    return command("convert", *flags, "--workers", 1)


def test_missing_paths(small, command, tmp_path):
    small()
    missing = tmp_path / "missing"
    fails(run_convert(command, small, images=missing), "image folder")
    fails(run_convert(command, small, annotations=missing), "No such file")
    fails(run_convert(command, small, output=small.annotations), "is a file")
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(run_convert(command, small, images=empty), "is --images the right folder?")
    fails(command("verify", missing), "does not exist")
    fails(command("stats", empty), "is not a folder of shards")
    fails(command("export", empty, "--output", missing), "is not a folder of shards")
    assert not small.output.exists()


def test_strict_and_damage_at_the_command_line(small, command):
    small()
    (small.images / "0.jpg").unlink()
    result = command(
        *("convert", "--images", small.images, "--annotations", small.annotations),
        *("--output", small.output, "--strict"),
    )
    fails(result, "--strict: 1 problems, the first: missing image")
    result = run_convert(command, small)
    assert result.returncode == 0
    assert "missing image      1  image 10" in result.stdout
    assert (
        "3 images with 3 annotations in 1 shards; left out: 1 images with 1 annotations"
        in result.stdout
    )
    result = command("verify", small.output, "--output", small.output / "v" / "report.json")
    assert result.returncode == 0
    assert "image left out      1  image 10" in result.stdout
    report = json.loads((small.output / "v" / "report.json").read_text())
    assert report["counts"] == {"image left out": 1}
    assert report["problems"][0]["image_id"] == 10
    result = command("verify", small.output, "--strict")
    assert result.returncode == 2
    assert "--strict: 1 findings" in result.stderr
    shard = small.output / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    result = command("verify", small.output)
    assert result.returncode == 2
    assert "damaged shard" in result.stdout
    assert len(result.stderr.splitlines()) == 1


def test_an_unwritable_place_is_named(small, command, tmp_path):
    small()
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "below"
    fails(run_convert(command, small, output=place), f"error: {place}/.convert: Not a directory")


@pytest.mark.parametrize("output", ["", ".", "folder/", "missing/", "folder/.."])
def test_an_export_needs_the_name_of_a_file(small, command, tmp_path, monkeypatch, output):
    small()
    convert(*small.arguments)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    line = f"--output: got {output!r}, expected the name of a file, such as instances.json"
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        export(small.output, output)
    with pytest.raises(ValueError, match=r"^folder exists already; remove it or choose another"):
        export(small.output, "folder")
    if output == "":
        fails(command("export", small.output, "--output", output), line)


def test_verify_names_an_unwritable_report_before_it_starts(small, command, tmp_path):
    small()
    convert(*small.arguments)
    (small.output / "shard-000000.tar").unlink()
    (tmp_path / "file").write_text("")
    for output, message in (
        (tmp_path / "file" / "below", "Not a directory"),
        (tmp_path / "file" / "below" / "there", "Not a directory"),
        (tmp_path, "Is a directory"),
    ):
        fails(command("verify", small.output, "--output", output), message)


def test_verify_changes_no_report_and_leaves_none_where_it_cannot_start(command, tmp_path):
    report = tmp_path / "report.json"
    for before in (False, True):
        if before:
            report.write_text("of yesterday")
        fails(command("verify", tmp_path / "nowhere", "--output", report), "does not exist")
        assert report.exists() == before
    assert report.read_text() == "of yesterday"


def test_verify_prints_its_findings_though_the_report_cannot_be_written(small, command):
    content = small()
    content["annotations"][0]["bbox"] = [0, 0, 0, 0]
    small.save(content)
    convert(*small.arguments)
    result = command("verify", small.output, "--output", "/dev/full")
    assert result.returncode == 2
    assert "degenerate box      1  annotation 100" in result.stdout
    (line,) = result.stderr.splitlines()
    assert "No space left on device" in line


def test_decoding_at_the_command_line(small, command):
    small()
    whole = (small.images / "0.jpg").read_bytes()
    middle = len(whole) // 2
    (small.images / "0.jpg").write_bytes(whole[:middle] + bytes(200) + whole[middle + 200 :])
    flags = ("convert", "--images", small.images, "--annotations", small.annotations)
    assert "corrupt image" not in command(*flags, "--output", small.output).stdout
    result = command("verify", small.output, "--decode")
    assert result.returncode == 2
    assert "corrupt image      1  image 10" in result.stdout
    result = command(*flags, "--output", small.output.with_name("decoded"), "--decode")
    assert result.returncode == 0
    assert "corrupt image      1  image 10" in result.stdout
    assert "left out: 1 images with 1 annotations" in result.stdout


GOOD_IMAGES = '"images": [{"id": 1, "file_name": "a"}]'
GOOD_REST = '"annotations": [], "categories": [{"id": 1, "name": "a"}]'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"images": [', "not valid JSON"),
        ("{" + GOOD_IMAGES + ", " + GOOD_REST + "} more", "not valid JSON: Extra data"),
        ("{" + GOOD_IMAGES + " " + GOOD_REST + "}", "not valid JSON: Expecting ','"),
        ("{" + GOOD_IMAGES + "," + GOOD_REST + ",}", "not valid JSON"),
        ("{1: 2}", "not valid JSON: Expecting a property name"),
        ("[]", "the top level must be an object"),
        ("{}", "no images and no categories"),
        ("{" + GOOD_IMAGES + ', "annotations": []}', "it has no categories"),
        ('{"images": {}, ' + GOOD_REST + "}", "images must be a list"),
        ('{"images": [], ' + GOOD_REST + "}", "lists no images"),
        ('{"images": [1], ' + GOOD_REST + "}", "images must hold objects, got 1"),
        ('{"images": [{"id": "1", "file_name": "a"}], ' + GOOD_REST + "}", "integer id"),
        ('{"images": [{"id": true, "file_name": "a"}], ' + GOOD_REST + "}", "integer id"),
        ('{"images": [{"id": 9223372036854775808}], ' + GOOD_REST + "}", "below 2^63"),
        ('{"images": [{"id": 1}], ' + GOOD_REST + "}", "need a file_name"),
        ("{" + GOOD_IMAGES + "," + GOOD_IMAGES + "," + GOOD_REST + "}", "twice"),
        ('{"a": 1, "a": 2, ' + GOOD_IMAGES + "," + GOOD_REST + "}", 'key "a" is there twice'),
        ("{" + GOOD_IMAGES + ', "annotations": [[]], "categories": []}', "hold objects"),
        ("{" + GOOD_IMAGES + ', "annotations": [], "categories": []}', "non-empty list"),
        ("{" + GOOD_IMAGES + ', "annotations": [], "categories": [{"id": 1}]}', "and a name"),
        (
            "{" + GOOD_IMAGES + ', "annotations": [], "categories": [{"id": 1, "name": "a"}, '
            '{"id": 1, "name": "b"}]}',
            "two categories with id 1",
        ),
        ('{"images": ' + "[" * 100_000, "nested too deeply"),
        (
            "{" + GOOD_IMAGES + ', "info": ' + "[" * 700 + "]" * 700 + "," + GOOD_REST + "}",
            "nested too deeply",
        ),
        ('{"images": [{"id": ' + "1" * 5000 + "}]}", "digits"),
    ],
)
def test_files_that_are_not_coco(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json") as error:
        read_coco(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe{\x00")
    with pytest.raises(ValueError, match="not JSON in UTF-8"):
        read_coco(path)


def test_a_byte_order_mark_and_odd_spacing_are_fine(tmp_path):
    path = tmp_path / "a.json"
    text = "\n {\t" + GOOD_IMAGES + "\r\n,\n" + GOOD_REST + " }\n "
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    coco = read_coco(path)
    assert [image.id for image in coco.images] == [1]
    assert json.loads(coco.sample_json(0)) == {
        "image": {"id": 1, "file_name": "a"},
        "annotations": [],
    }


def test_mutated_files_are_read_or_refused(small):
    """The reader agrees with json.loads on what is JSON, and never crashes."""
    small(2)
    text = small.annotations.read_text()
    source = random.Random(0)
    accepted = refused = 0
    for _ in range(1500):
        mutated = list(text)
        for _ in range(source.randint(1, 3)):
            place = source.randrange(len(mutated))
            mutated[place] = source.choice('{}[]",:0-eN \n\\a')
        small.annotations.write_text("".join(mutated))
        try:
            read_coco(small.annotations)
            json.loads("".join(mutated))
            accepted += 1
        except ValueError as error:
            refused += 1
            if "not valid JSON" in str(error):
                with pytest.raises(ValueError, match=r".+"):
                    json.loads("".join(mutated))
    assert accepted > 50
    assert refused > 500


def test_file_names_that_no_file_can_have(small):
    content = small(2)
    for i, name in enumerate(("nul\0.jpg", "\ud800.jpg", "x" * 5000, "/etc/passwd", "", ".", "..")):
        content["images"].append({"id": 60 + i, "file_name": name})
    small.save(content)
    result = convert(*small.arguments)
    assert {p.image_id for p in result.problems if p.kind == "missing image"} == set(range(60, 67))
    assert result.manifest.num_images == 2


def test_absolute_names_inside_the_folder_are_fine(small):
    content = small(2)
    content["images"][0]["file_name"] = os.path.abspath(small.images / "0.jpg")
    small.save(content)
    assert convert(*small.arguments).problems == []


def test_no_usable_image_is_an_error(small):
    small(2)
    for path in small.images.iterdir():
        path.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"none of the 2 images .* is usable"):
        convert(*small.arguments)
    with pytest.raises(ValueError, match="samples_per_shard must be at least 1, got 0"):
        convert(*small.arguments, samples_per_shard=0)


def test_ordered_map_holds_few_tasks_and_keeps_order():
    drawn = SimpleNamespace(tasks=0)

    def tasks():
        for i in range(40):
            drawn.tasks += 1
            yield -i

    for count, result in enumerate(ordered_map(abs, tasks(), 2)):
        assert result == count
        assert drawn.tasks - count <= 5
    assert drawn.tasks == 40
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        next(ordered_map(abs, [1], 0))
