"""Small files are replaced whole, also by a signal's handler in the middle of a write."""

import json
import os
import resource
import signal
import threading
from pathlib import Path

import pytest

from pipeline.whole_file import write_whole


def test_a_file_is_as_it_was_or_as_it_is(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_whole(path, "1")
    write_whole(path, "22", aside=tmp_path / "aside")
    assert path.read_text() == "22"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
    assert not list((tmp_path / "aside").iterdir())


def test_a_file_without_room_is_named_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.json"
    write_whole(path, "1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as told:
            write_whole(path, "2" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert told.value.filename == str(path)
    assert path.read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_a_power_cut_finds_a_whole_file(tmp_path, monkeypatch):
    """Its content reaches the disk before its name, and its name before the writer goes on."""
    done, fsync, replace = [], os.fsync, os.replace

    def record(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def replaced(one, other):
        done.append("renamed")
        replace(one, other)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", replaced)
    write_whole(tmp_path / "file.json", "1")
    content, *rest = done
    assert content.startswith("file.json.")
    assert rest == ["renamed", tmp_path.name]


def test_a_handler_may_write_what_it_interrupts(tmp_path, monkeypatch):
    path, write = tmp_path / "stop", Path.write_text

    def interrupted(self, text, **how):
        done = write(self, text, **how)
        if text == "first":
            signal.raise_signal(signal.SIGUSR1)  # between the write and the rename
        return done

    monkeypatch.setattr(Path, "write_text", interrupted)
    before = signal.signal(signal.SIGUSR1, lambda *_: write_whole(path, "handler's"))
    try:
        write_whole(path, "first")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["stop"]


def test_writers_at_once_leave_one_whole_file(tmp_path):
    path, texts = tmp_path / "file.json", [json.dumps([i] * 2000) for i in range(8)]

    def write_often(text):
        for _ in range(50):
            write_whole(path, text)
            assert json.loads(path.read_text())  # of whichever writer

    failures: list[BaseException] = []

    def run(text):
        try:
            write_often(text)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert path.read_text() in texts
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
