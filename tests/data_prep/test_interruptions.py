"""What comes between a conversion and its end: other ones, failing disks, kills, power cuts."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import data_prep.convert
from data_prep.convert import convert
from data_prep.storage import LocalFolder

ROOT = Path(__file__).parents[2]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(small, tmp_path):
    """What an undisturbed conversion of nine images leaves, three in a shard."""
    small(9)
    convert(small.images, small.annotations, tmp_path / "whole", samples_per_shard=3)
    return contents(tmp_path / "whole")


@pytest.fixture
def before_writing(monkeypatch):
    """`before_writing(action)`: done once, when the images are listed and none is written yet."""
    todo = []
    plan_shards = data_prep.convert.plan_shards

    def planned(*arguments):
        while todo:
            todo.pop()()
        return plan_shards(*arguments)

    monkeypatch.setattr(data_prep.convert, "plan_shards", planned)
    return todo.append


@pytest.mark.parametrize("seed", [0, 1])
def test_a_conversion_that_ends_while_another_reads_is_not_overwritten(
    small, monkeypatch, seed, whole
):
    """The first one begins and ends while the second, by then past its first look, is reading."""
    read_coco = data_prep.convert.read_coco

    def slow(*arguments):
        monkeypatch.undo()
        convert(*small.arguments, samples_per_shard=3)
        return read_coco(*arguments)

    monkeypatch.setattr(data_prep.convert, "read_coco", slow)
    if seed == 0:
        assert not convert(*small.arguments, samples_per_shard=3).fresh
    else:
        with pytest.raises(ValueError, match=r"holds shards of other input .*options"):
            convert(*small.arguments, samples_per_shard=3, seed=seed)
    assert contents(small.output) == whole


def test_a_conversion_that_ends_as_another_begins_leaves_it_a_folder(small, monkeypatch, whole):
    """It removes what it kept of itself, just as the other has made sure that this is there."""
    opened = Path.open

    def too_late(path, *arguments, **options):
        if path == small.output / ".convert" / "lock":
            monkeypatch.undo()
            convert(*small.arguments, samples_per_shard=3)
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", too_late)
    assert not convert(*small.arguments, samples_per_shard=3).fresh
    assert contents(small.output) == whole


@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_that_vanishes_stops_the_conversion(small, before_writing, whole, workers):
    picture = small.images / "4.jpg"
    away = picture.with_suffix(".away")
    before_writing(lambda: picture.rename(away))
    line = rf"^{picture} vanished after the images were listed: put it back and run the same .*"
    with pytest.raises(OSError, match=line) as error:
        convert(*small.arguments, samples_per_shard=3, workers=workers)
    assert f"remove {small.output} and convert without it" in str(error.value)
    with pytest.raises(ValueError, match="unfinished conversion of other input"):
        convert(*small.arguments, samples_per_shard=3)
    away.rename(picture)
    kept = {path: path.stat().st_mtime_ns for path in small.output.glob("*.tar")}
    assert convert(*small.arguments, samples_per_shard=3).problems == []
    assert contents(small.output) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_disk_that_fails_at_an_image_stops_the_conversion(small, before_writing, whole):
    """/proc/self/mem is a plain file of no bytes whose first byte the kernel cannot read: EIO."""
    picture = small.images / "4.jpg"
    data = picture.read_bytes()
    assert os.path.isfile("/proc/self/mem")

    def broken():
        picture.unlink()
        picture.symlink_to("/proc/self/mem")

    before_writing(broken)
    line = rf"cannot read {picture}: Input/output error; .* same command goes on where it stopped"
    with pytest.raises(OSError, match=line):
        convert(*small.arguments, samples_per_shard=3)
    picture.unlink()
    picture.write_bytes(data)
    assert convert(*small.arguments, samples_per_shard=3).problems == []
    assert contents(small.output) == whole


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EMFILE, errno.ENOMEM, errno.ETIMEDOUT])
@pytest.mark.parametrize("call", ["open", "stat"])
def test_passing_errors_leave_no_image_out(small, monkeypatch, whole, number, call):
    """As a network file system gives them, when it lists an image and when it opens it."""
    system = getattr(os, call)

    def fails(path, *arguments, **options):
        if str(path).endswith("images/4.jpg"):
            raise OSError(number, os.strerror(number), str(path))
        return system(path, *arguments, **options)

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match=r"images/4\.jpg.*") as error:
        convert(*small.arguments, samples_per_shard=3)
    assert os.strerror(number) in str(error.value)
    monkeypatch.undo()
    assert convert(*small.arguments, samples_per_shard=3).problems == []
    assert contents(small.output) == whole


def test_what_an_image_file_is_itself_leaves_it_out(small, before_writing, monkeypatch):
    small(9)
    picture = small.images / "4.jpg"

    def turned_into_a_folder():
        picture.unlink()
        picture.mkdir()

    before_writing(turned_into_a_folder)
    system = os.open

    def forbidden(path, *arguments, **options):
        if str(path).endswith("images/5.jpg"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return system(path, *arguments, **options)

    monkeypatch.setattr(os, "open", forbidden)
    result = convert(*small.arguments)
    assert [(p.kind, p.image_id, p.detail) for p in result.problems] == [
        ("corrupt image", 14, "'4.jpg': Is a directory"),
        ("corrupt image", 15, "'5.jpg': Permission denied"),
    ]


@pytest.mark.parametrize("left", [None, b"short"])
def test_shards_that_are_not_where_they_were_written_are_noticed(small, monkeypatch, left, whole):
    """As where a path names another disk on another machine."""
    write_shard = data_prep.convert.write_shard

    def elsewhere(task):
        shard = write_shard(task)
        if shard.name == "shard-000001.tar":
            path = small.output / shard.name
            path.unlink()
            if left is not None:
                path.write_bytes(left)
        return shard

    monkeypatch.setattr(data_prep.convert, "write_shard", elsewhere)
    got = "no file" if left is None else "5 bytes"
    line = rf"shard-000001\.tar: got {got}, expected the \d+ bytes .* do all nodes see the same"
    with pytest.raises(ValueError, match=line):
        convert(*small.arguments, samples_per_shard=3)
    assert not (small.output / "manifest.json").exists()
    monkeypatch.undo()
    convert(*small.arguments, samples_per_shard=3)
    assert contents(small.output) == whole


@pytest.mark.parametrize("at", ["report.json", "manifest.json", "remove"])
def test_killed_at_the_end_leaves_nothing_behind(small, whole, at):
    """By a kill before a small file gets its name, and before the state is removed."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from data_prep.convert import convert\n"
        "from data_prep.storage import LocalFolder\n"
        "at = sys.argv.pop()\n"
        "replace = os.replace\n"
        "def die(*a):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "def replaced(source, target):\n"
        "    die() if os.path.basename(target) == at else replace(source, target)\n"
        "os.replace = replaced\n"
        "if at == 'remove': LocalFolder.remove = die\n"
        "convert(*map(Path, sys.argv[1:]), samples_per_shard=3)\n"
    )
    words = [sys.executable, "-c", code, *small.arguments, at]
    assert subprocess.run(words, cwd=ROOT, timeout=600).returncode == -signal.SIGKILL
    assert contents_differ(small.output, whole)
    assert convert(*small.arguments, samples_per_shard=3).fresh == (at != "remove")
    assert contents(small.output) == whole


def contents_differ(folder, expected):
    return {path.name for path in folder.iterdir()} != set(expected)


def test_the_content_of_a_small_file_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """After a power cut in between there is the old file, or none, but no empty one."""
    events = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        events.append(("on the disk", os.pread(descriptor, 100, 0)))
        fsync(descriptor)

    def renamed(source, target):
        events.append(("renamed", Path(source).read_bytes()))
        replace(source, target)

    # The descriptor that is given is one to write to only.
    monkeypatch.setattr(os, "fsync", lambda n: synced(os.open(f"/proc/self/fd/{n}", os.O_RDONLY)))
    monkeypatch.setattr(os, "replace", renamed)
    LocalFolder(tmp_path).write("plan.json", b"{}")
    assert events == [("on the disk", b"{}"), ("renamed", b"{}")]
    assert contents(tmp_path) == {"plan.json": b"{}"}


@pytest.fixture
def unfinished(small, whole):
    """A conversion that wrote all shards and failed after them."""
    (small.images / "0.jpg").rename(small.images / "away")
    with pytest.raises(ValueError, match="--strict: 1 problems"):
        convert(*small.arguments, samples_per_shard=3, strict=True)
    return small.output / ".convert"


@pytest.mark.parametrize("text", ["", "{", "nonsense"])
def test_a_damaged_plan_is_named(small, unfinished, text):
    (unfinished / "plan.json").write_text(text)
    line = rf"^{unfinished}/plan\.json is damaged; remove {small.output} and convert again$"
    with pytest.raises(ValueError, match=line):
        convert(*small.arguments, samples_per_shard=3)


def test_a_damaged_report_is_named(small, whole):
    convert(*small.arguments, samples_per_shard=3)
    (small.output / "report.json").write_text("{}")
    with pytest.raises(ValueError, match=r"report\.json is damaged; remove .* and convert again$"):
        convert(*small.arguments, samples_per_shard=3)


@pytest.mark.parametrize("text", ["", "null", "{}", "[]", '{"problems": 1}', '{"problems": []}'])
def test_a_damaged_result_file_is_as_good_as_none(small, unfinished, text):
    result = unfinished / "shard-000001.json"
    json.loads(result.read_text())
    result.write_text(text)
    shards = sorted(small.output.glob("*.tar"))
    for path in shards:
        os.utime(path, (1, 1))  # the clock of file times may stand still meanwhile
    manifest = convert(*small.arguments, samples_per_shard=3).manifest
    assert manifest.num_images == 8
    assert [path.stat().st_mtime == 1 for path in shards] == [True, False, True]
