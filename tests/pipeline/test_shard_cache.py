"""Remote shards: the local folder bounded, checked, shared between processes, failures survived."""

import contextlib
import functools
import hashlib
import http.server
import multiprocessing
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout

from pipeline.config import DataConfig
from pipeline.data import cache as cache_module
from pipeline.data.cache import ShardCache
from pipeline.data.images import decode_image
from pipeline.data.labels import build_labels
from pipeline.data.loader import evaluation_batches, fetching, training_steps
from pipeline.data.order import Stream
from pipeline.data.shards import ShardSet, is_remote
from pipeline.dataset import open_dataset
from pipeline.errors import UserError
from pipeline.recipes import recipe


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(cache_module, "FIRST_WAIT", 0.001)


@pytest.fixture
def memory():
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


def upload(memory, folder: Path, url: str) -> None:
    for file in folder.iterdir():
        memory.pipe_file(f"{url}/{file.name}", file.read_bytes())


def contents(shards: ShardSet) -> list[bytes]:
    return [shards.read(i).image_bytes for i in range(len(shards))]


def tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.tar"))


@contextlib.contextmanager
def served(folder: Path, handler=http.server.SimpleHTTPRequestHandler):
    """The folder behind a web server of this machine."""
    quiet = type("Quiet", (handler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(quiet, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("location", "remote"),
    [("s3://b/x", True), ("memory://x", True), ("http://h/x", True), ("/data/x", False),
     ("data/x", False), ("file:///data/x", False), ("local:///data/x", False)],
)  # fmt: skip
def test_what_is_remote(location, remote):
    assert is_remote(location) == remote


def test_samples_of_a_url_are_those_of_the_folder(drawn, memory, tmp_path):
    upload(memory, drawn.shards / "train", "/train")
    local = ShardSet(drawn.shards / "train")
    remote = ShardSet("memory://train", str(tmp_path))
    assert remote.digest == local.digest
    assert not tars(tmp_path)  # nothing before it is needed
    assert contents(remote) == contents(local)
    assert len(tars(tmp_path)) == 3
    for name in local.shard_names:  # once there, the storage is not asked again
        memory.rm_file(f"/train/{name}")
    again = ShardSet("memory://train", str(tmp_path))
    assert contents(again) == contents(local)


@pytest.mark.parametrize("scheme", ["file://", "local://", "file://localhost"])
def test_a_file_url_reads_in_place_where_fsspec_does(drawn, tmp_path, scheme):
    place = tmp_path / "with%20percent, space #1?"
    shutil.copytree(drawn.shards / "train", place)
    if scheme != "file://localhost":  # fsspec takes that for a relative path
        assert fsspec.url_to_fs(f"{scheme}{place}")[1] == str(place)
    shards = ShardSet(f"{scheme}{place}", str(tmp_path / "cache"))
    assert contents(shards) == contents(ShardSet(drawn.shards / "train"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "url", ["file://server/data", "local://server/data", "file://localhostile"]
)
def test_a_file_url_of_another_host_is_refused(url):
    with pytest.raises(
        UserError, match=rf"^{url}: got host '\w+', expected none, as in \w+:///PATH"
    ):
        ShardSet(url)


def test_workers_read_over_http(drawn, tmp_path):
    config = recipe("demo")
    config = replace(
        config,
        data=DataConfig(cache_dir=str(tmp_path), shuffle_window=1),
        engine=replace(config.engine, loader_workers=2),
    )
    seen = []
    with served(drawn.shards) as url:
        for location in (f"{url}/train", drawn.shards / "train"):
            shards = ShardSet(location, str(tmp_path))
            labels = build_labels(shards.categories, "contiguous")
            steps = training_steps(shards, labels, config, range(5), 0, 1, False)
            seen.append([b.images.sum().item() for step in steps for b in step])
    assert seen[0] == seen[1]
    assert len(tars(tmp_path)) == 3


def test_shards_are_fetched_before_they_are_read(drawn, memory, tmp_path):
    upload(memory, drawn.shards / "train", "/train")
    shards = ShardSet("memory://train", str(tmp_path))
    config = recipe("demo")
    config = replace(
        config,
        data=DataConfig(shuffle_window=1),
        optimizer=replace(config.optimizer, batch_size=8),
    )
    steps = fetching(shards, config, range(10))
    assert next(steps) == 0
    ahead = 16 // 8 + 1  # the steps of a window of one shard, and one
    later = Stream(shards.shard_sizes, config.seed, 1).batch(ahead, 8)[:, 1]
    expected = {shards.shard_names[i] for i in shards.shard[later]}
    deadline = time.monotonic() + 200
    while {path.name for path in tars(tmp_path)} != expected:
        assert time.monotonic() < deadline, tars(tmp_path)
        time.sleep(0.01)
    assert list(steps) == list(range(1, 10))
    local = ShardSet(drawn.shards / "train")
    assert list(fetching(local, config, range(3))) == [0, 1, 2]


class Faulty(http.server.SimpleHTTPRequestHandler):
    """Fails each shard twice: with status 503, then with a body that is cut short or damaged."""

    asked: ClassVar[dict[str, int]]
    damage: ClassVar[Callable[[bytes], bytes]]

    def do_GET(self):
        count = self.asked[self.path] = self.asked.get(self.path, 0) + 1
        if count == 1:
            self.send_error(503)
        elif count == 2:
            content = self.damage(Path(self.translate_path(self.path)).read_bytes())
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        else:
            super().do_GET()


@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], lambda content: content[:-1] + b"x"]
)
def test_what_fails_or_arrives_damaged_is_fetched_again(drawn, tmp_path, damage):
    handler = type("Handler", (Faulty,), {"asked": {"/train/manifest.json": 2}, "damage":
                                          staticmethod(damage)})  # fmt: skip
    with served(drawn.shards, handler) as url:
        shards = ShardSet(f"{url}/train", str(tmp_path))
        assert contents(shards) == contents(ShardSet(drawn.shards / "train"))
    assert all(count >= 3 for path, count in handler.asked.items() if path.endswith(".tar"))
    assert not list(tmp_path.glob("*/*.partial"))


def test_pauses_grow_from_attempt_to_attempt(monkeypatch):
    pauses = []
    monkeypatch.setattr(cache_module.time, "sleep", pauses.append)
    monkeypatch.setattr(cache_module, "FIRST_WAIT", 1.0)

    def work():
        raise ConnectionError("busy")

    with pytest.raises(UserError, match="s3://b/x cannot be read, tried 5 times: busy"):
        cache_module.attempt("s3://b/x", work)
    assert pauses == [1, 2, 4, 8]


@pytest.mark.parametrize("left", [b"", b"cut", bytes(2**20)])
def test_a_cached_shard_of_another_size_is_fetched_again(drawn, memory, tmp_path, capfd, left):
    """As a power cut could leave it."""
    upload(memory, drawn.shards / "train", "/train")
    expected = contents(ShardSet(drawn.shards / "train"))
    assert contents(ShardSet("memory://train", str(tmp_path))) == expected
    damaged = tars(tmp_path)[1]
    damaged.write_bytes(left)
    capfd.readouterr()
    size = (drawn.shards / "train" / damaged.name).stat().st_size
    with open(ShardSet("memory://train", str(tmp_path)).cache.open(1), "rb") as file:
        assert os.fstat(file.fileno()).st_size == size
    assert contents(ShardSet("memory://train", str(tmp_path))) == expected
    said = f"got {len(left)} bytes, expected {size} as its manifest says; it is fetched again"
    assert capfd.readouterr().err == f"{damaged}: {said}\n"


def flip(file: Path, at: int) -> None:
    """One bit, as a disk may: the time of the file stays what it was."""
    status = file.stat()
    with file.open("r+b") as opened:
        opened.seek(at)
        (byte,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_cached_shard_that_decodes_to_other_pixels_is_fetched_again(
    drawn, memory, tmp_path, capfd
):
    upload(memory, drawn.shards / "train", "/train")
    local = ShardSet(drawn.shards / "train")
    expected = contents(local)
    assert contents(ShardSet("memory://train", str(tmp_path))) == expected
    damaged = tars(tmp_path)[1]
    first = int(np.searchsorted(local.shard, 1))
    image = local.read(first).image_bytes
    flip(damaged, 512 + image.rindex(b"\xff\xda") + 40)
    with damaged.open("rb") as file:
        file.seek(512)
        other = decode_image(file.read(len(image)))[0]
    assert not torch.equal(other, decode_image(image)[0])
    capfd.readouterr()
    for _ in range(2):
        assert contents(ShardSet("memory://train", str(tmp_path))) == expected
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith(f"{damaged}: got SHA-256 ")


def test_a_run_compares_a_shard_once_for_all_its_workers(drawn, memory, tmp_path):
    upload(memory, drawn.shards / "train", "/train")
    shards = ShardSet("memory://train", str(tmp_path))
    expected = contents(shards)
    again = ShardSet("memory://train", str(tmp_path))
    elsewhere = pickle.loads(pickle.dumps(again))  # no fork
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=contents, args=(again,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    flip(tars(tmp_path)[0], 512 + 20)
    assert contents(again) != expected  # as a worker has seen it whole
    assert contents(elsewhere) == expected


@pytest.mark.parametrize("member", [512, 0])  # the picture; the header before it
def test_a_cached_shard_with_damaged_samples_is_fetched_again(
    drawn, memory, tmp_path, capfd, member
):
    upload(memory, drawn.shards / "train", "/train")
    config = recipe("demo")
    config = replace(
        config,
        engine=replace(config.engine, loader_workers=0),
        optimizer=replace(config.optimizer, batch_size=40),  # all of them
    )

    def trained_on(location) -> list[float]:
        shards = ShardSet(location, str(tmp_path))
        labels = build_labels(shards.categories, "contiguous")
        steps = training_steps(shards, labels, config, range(1), 0, 1, False)
        return [b.images.sum().item() for step in steps for b in step]

    expected = trained_on(drawn.shards / "train")
    assert trained_on("memory://train") == expected
    with tars(tmp_path)[1].open("r+b") as file:
        file.seek(member)
        file.write(bytes(300))
    capfd.readouterr()
    for _ in range(2):
        assert trained_on("memory://train") == expected
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith(f"{tars(tmp_path)[1]}: got SHA-256 ")
    assert said.endswith("as its manifest says; it is fetched again")


@pytest.mark.parametrize("member", [512, 0])
def test_a_sample_that_is_damaged_in_the_store_is_not_fetched_for_ever(
    drawn, memory, tmp_path, member
):
    """Its SHA-256 is the manifest's, so that another download would be no better."""
    shutil.copytree(drawn.shards / "val", tmp_path / "val")
    shard, manifest = tmp_path / "val" / "shard-000000.tar", tmp_path / "val" / "manifest.json"
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    with shard.open("r+b") as file:
        file.seek(member)
        file.write(bytes(300))
    other = hashlib.sha256(shard.read_bytes()).hexdigest()
    manifest.write_text(manifest.read_text().replace(digest, other))
    upload(memory, tmp_path / "val", "/val")
    shards = ShardSet("memory://val", str(tmp_path / "cache"))
    labels = build_labels(shards.categories, "contiguous")
    config = recipe("demo")
    config = replace(config, engine=replace(config.engine, loader_workers=0))
    reads = evaluation_batches(shards, labels, config, 0, 1, 4, False)
    with pytest.raises(UserError, match=r"no sample at byte 0|cannot be decoded"):
        list(reads)


def test_a_shard_is_on_the_disk_before_it_has_its_name(memory, tmp_path, monkeypatch):
    done = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(file):
        done.append(("fsync", os.fstat(file).st_ino, os.pread(file, 2000, 0)))
        fsync(file)

    def recorded_rename(old, new):
        done.append(("rename", os.stat(old).st_ino))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    cache = ShardCache("memory://many", "d" * 64, storage_of(memory, 2, 1000), tmp_path, 2000)
    cache.fetch(1)
    file = (tmp_path / ("d" * 16) / "shard-000001.tar").stat().st_ino
    assert done == [("fsync", file, bytes([1]) * 1000), ("rename", file)]


def test_what_stays_damaged_or_missing_is_named_and_leaves_nothing(drawn, memory, tmp_path):
    upload(memory, drawn.shards / "train", "/train")
    shards = ShardSet("memory://train", str(tmp_path))
    memory.pipe_file("/train/shard-000001.tar", b"something else")
    with pytest.raises(
        UserError, match=r"shard-000001\.tar cannot be read, tried 5 .*got 14 bytes"
    ):
        shards.cache.open(1)
    memory.pipe_file("/train/shard-000001.tar", bytes(shards.shard_bytes[1]))
    with pytest.raises(UserError, match=r"shard-000001\.tar cannot be read, tried 5 .*SHA-256"):
        shards.cache.open(1)
    memory.rm_file("/train/shard-000001.tar")
    with pytest.raises(UserError, match=r"memory://train/shard-000001\.tar cannot be read"):
        shards.cache.open(1)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".tar", ".partial")]
    with pytest.raises(UserError, match=r"memory://nothing/manifest\.json cannot be read"):
        ShardSet("memory://nothing", str(tmp_path))
    with pytest.raises(UserError, match=r"nowhere://.*cannot be read"):
        ShardSet("nowhere://x", str(tmp_path))


def test_a_manifest_cannot_lead_out_of_the_folder(drawn, tmp_path):
    shutil.copytree(drawn.shards / "val", tmp_path / "val")
    manifest = tmp_path / "val" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("shard-000000.tar", "../shard-000000.tar"))
    with pytest.raises(UserError, match="expected a file name"):
        ShardSet(tmp_path / "val")


def storage_of(memory, count: int, size: int) -> list[dict]:
    shards = []
    for i in range(count):
        content = bytes([i]) * size
        memory.pipe_file(f"/many/shard-{i:06d}.tar", content)
        digest = hashlib.sha256(content).hexdigest()
        shards.append({"name": f"shard-{i:06d}.tar", "bytes": size, "sha256": digest})
    return shards


def wait_for_file_times(folder: Path) -> None:
    """Until files get a later time: the clock of file times may stand still for 10 ms."""
    clock = folder / "clock"
    clock.touch()
    before = clock.stat().st_mtime_ns
    while clock.stat().st_mtime_ns == before:
        time.sleep(0.001)
        clock.touch()


def test_the_shards_used_longest_ago_make_room(memory, tmp_path):
    shards = storage_of(memory, 6, 1000)
    cache = ShardCache("memory://many", "d" * 64, shards, tmp_path, most_bytes=3500)
    for shard in (0, 1, 2, 0, 3):
        cache.fetch(shard)
        wait_for_file_times(tmp_path)
    assert [p.stem[-1] for p in tars(tmp_path)] == ["0", "2", "3"]
    # Other data shares the folder and its bound.
    other = replace(cache, digest="e" * 64)
    other.fetch(5)
    assert [(p.parent.name[0], p.stem[-1]) for p in tars(tmp_path)] == [
        ("d", "0"), ("d", "3"), ("e", "5"),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"data\.cache_gb: got 5e-07, expected 1e-06 or more"):
        replace(cache, most_bytes=500).fetch(4)


def test_an_evicted_shard_takes_no_room_where_it_is_open(memory, tmp_path):
    shards = storage_of(memory, 3, 1000)
    cache = ShardCache("memory://many", "d" * 64, shards, tmp_path, most_bytes=1000)
    with open(cache.open(0), "rb") as first:
        cache.fetch(1)
        assert [p.stem[-1] for p in tars(tmp_path)] == ["1"]
        status = os.fstat(first.fileno())
        assert (status.st_size, status.st_blocks) == (0, 0)


def test_what_a_killed_process_left_is_cleared(memory, tmp_path):
    shards = storage_of(memory, 2, 1000)
    cache = ShardCache("memory://many", "d" * 64, shards, tmp_path, most_bytes=1500)
    left = tmp_path / ("d" * 16) / "shard-000000.partial"
    left.parent.mkdir()
    left.write_bytes(bytes(1000))
    cache.fetch(1)  # it has no owner, so it makes room
    assert not left.exists()
    left.write_bytes(bytes(1000))
    cache.fetch(0)
    assert [p.stem[-1] for p in tars(tmp_path)] == ["0"]


def test_a_download_takes_its_name_when_nobody_counts(memory, tmp_path, monkeypatch):
    """One who counted could meet neither name, or one that has just gone."""
    rename, locked = os.rename, []

    def recorded(old, new):
        try:
            FileLock(tmp_path / ".lock", timeout=0).acquire()
        except Timeout:
            locked.append(new)
        rename(old, new)

    monkeypatch.setattr(os, "rename", recorded)
    ShardCache("memory://many", "d" * 64, storage_of(memory, 1, 1000), tmp_path, 2000).fetch(0)
    assert locked == tars(tmp_path) != []


def test_room_is_made_while_other_downloads_fail(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "ATTEMPTS", 1)
    shards = storage_of(memory, 2, 1000)
    cache = ShardCache("memory://many", "d" * 64, shards, tmp_path, most_bytes=2000)
    others = [replace(cache, digest=name * 64, url="memory://none") for name in "ef"]
    done = threading.Event()

    def fail(other: ShardCache) -> None:
        while not done.is_set():
            with pytest.raises(UserError, match="nothing is there"):
                other.fetch(0)

    with ThreadPoolExecutor() as pool:
        failing = [pool.submit(fail, other) for other in others]
        try:
            for i in range(100):
                cache.path(i % 2).unlink(missing_ok=True)
                cache.fetch(i % 2)
        finally:
            done.set()
    for each in failing:
        each.result()


@pytest.mark.parametrize("content", [b"short", bytes(3000)])
def test_a_wrong_download_keeps_to_the_room_it_was_given(memory, tmp_path, monkeypatch, content):
    sizes = []
    monkeypatch.setattr(
        cache_module.time, "sleep", lambda _: sizes.extend(p.stat().st_size for p in partials())
    )

    def partials() -> list[Path]:
        return list(tmp_path.glob("*/*.partial"))

    shards = storage_of(memory, 1, 1000)
    memory.pipe_file("/many/shard-000000.tar", content)
    with pytest.raises(UserError, match=r"got \d+ (or more )?bytes, expected 1000"):
        ShardCache("memory://many", "d" * 64, shards, tmp_path, 2000).fetch(0)
    assert sizes == [1000] * 4
    assert not partials()


def read_all(shards: ShardSet, order: list[int], expected: list[bytes], failures) -> None:
    try:
        for i in order:
            assert shards.read(i).image_bytes == expected[i]
    except BaseException as error:
        failures.put(repr(error))
        raise


def taken(folder: Path, pids: list[int]) -> int:
    """Bytes of the folder's files, and of those that were in it and are open in the processes."""
    places = [*folder.glob("*/*.tar"), *folder.glob("*/*.partial")]
    for pid in pids:
        places += Path(f"/proc/{pid}/fd").glob("*")
    sizes = {}
    for place in places:
        with contextlib.suppress(OSError):  # removed or closed meanwhile
            if str(place.resolve()).startswith(f"{folder}/"):
                status = place.stat()
                sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def test_processes_share_a_cache_that_holds_two_of_their_shards(
    drawn, memory, tmp_path, run_command
):
    done = run_command(
        "data_prep", "convert", "--images", drawn.coco / "val", "--output", tmp_path / "many",
        "--annotations", drawn.coco / "annotations" / "instances_val.json",
        "--samples-per-shard", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    upload(memory, tmp_path / "many", "/many")
    local, folder = ShardSet(tmp_path / "many"), tmp_path / "cache"
    most = 2 * max(local.shard_bytes)
    shards = ShardSet("memory://many", str(folder), cache_gb=most / 1e9)
    assert len(shards.shard_names) == 6
    expected = contents(local)
    context = multiprocessing.get_context("fork")  # as a loader's workers are made
    failures = context.Queue()
    orders = [[(3 * i + k) % 12 for k in range(24)] for i in range(4)]
    processes = [
        context.Process(target=read_all, args=(shards, order, expected, failures))
        for order in orders
    ]
    for process in processes:
        process.start()
    seen = 0
    while any(process.is_alive() for process in processes):
        with FileLock(folder / ".lock"):  # nothing is added while it is counted
            seen = max(seen, taken(folder, [process.pid for process in processes]))
        time.sleep(0.001)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0, failures.get()
    assert 0 < seen <= most
    assert sum(p.stat().st_size for p in tars(folder)) <= most


def test_a_cache_too_small_for_two_windows_is_refused(drawn, memory, tmp_path):
    for split in ("train", "val"):
        upload(memory, drawn.shards / split, f"/{split}")
    config = recipe("demo")
    data = DataConfig(
        train="memory://train", val="memory://val", cache_dir=str(tmp_path), shuffle_window=1
    )
    assert len(open_dataset(replace(config, data=data)).train) == 40
    small = replace(config, data=replace(data, cache_gb=1e-4))
    with pytest.raises(
        UserError, match=r"data\.cache_gb: got 0\.0001, expected .* or more for two"
    ):
        open_dataset(small)
    elsewhere = replace(config, data=replace(config.data, cache_dir="/x", cache_gb=1, val="y"))
    assert elsewhere.digest() == config.digest()
