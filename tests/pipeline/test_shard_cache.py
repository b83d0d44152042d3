"""Remote shards: the local folder bounded, checked, shared between processes, failures survived."""

import contextlib
import functools
import hashlib
import http.server
import multiprocessing
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest

from pipeline.config import DataConfig
from pipeline.data import cache as cache_module
from pipeline.data.cache import ShardCache
from pipeline.data.labels import build_labels
from pipeline.data.loader import fetching, training_steps
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
     ("data/x", False), ("file:///data/x", False)],
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


def test_a_file_url_reads_in_place(drawn, tmp_path):
    shards = ShardSet(f"file://{drawn.shards / 'train'}", str(tmp_path))
    assert contents(shards) == contents(ShardSet(drawn.shards / "train"))
    assert not list(tmp_path.iterdir())


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


def test_what_stays_damaged_or_missing_is_named_and_leaves_nothing(drawn, memory, tmp_path):
    upload(memory, drawn.shards / "train", "/train")
    shards = ShardSet("memory://train", str(tmp_path))
    memory.pipe_file("/train/shard-000001.tar", b"something else")
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


def test_the_shards_used_longest_ago_make_room(memory, tmp_path):
    shards = storage_of(memory, 6, 1000)
    cache = ShardCache("memory://many", "d" * 64, shards, tmp_path, most_bytes=3500)
    for shard in (0, 1, 2, 0, 3):
        cache.fetch(shard)
        time.sleep(0.002)
    assert [p.stem[-1] for p in tars(tmp_path)] == ["0", "2", "3"]
    # Other data shares the folder and its bound.
    other = replace(cache, digest="e" * 64)
    other.fetch(5)
    assert [(p.parent.name[0], p.stem[-1]) for p in tars(tmp_path)] == [
        ("d", "0"), ("d", "3"), ("e", "5"),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"data\.cache_gb: got 5e-07, expected 1e-06 or more"):
        replace(cache, most_bytes=500).fetch(4)


def test_an_evicted_shard_stays_readable_where_it_is_open(memory, tmp_path):
    shards = storage_of(memory, 3, 1000)
    cache = ShardCache("memory://many", "d" * 64, shards, tmp_path, most_bytes=1000)
    with open(cache.open(0), "rb") as first:
        cache.fetch(1)
        assert [p.stem[-1] for p in tars(tmp_path)] == ["1"]
        assert first.read() == bytes(1000)


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


def read_all(cache: ShardCache, order: list[int], failures) -> None:
    try:
        for shard in order:
            with open(cache.open(shard), "rb") as file:
                assert file.read() == bytes([shard]) * 1000
    except BaseException as error:
        failures.put(repr(error))
        raise


def test_processes_share_a_cache_that_holds_two_of_their_shards(memory, tmp_path):
    shards = storage_of(memory, 6, 1000)
    cache = ShardCache("memory://many", "d" * 64, shards, tmp_path, most_bytes=2000)
    context = multiprocessing.get_context("fork")  # as a loader's workers are made
    failures = context.Queue()
    processes = [
        context.Process(target=read_all, args=(cache, [(i + k) % 6 for k in range(12)], failures))
        for i in range(4)
    ]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        held = 0
        for path in [*tmp_path.glob("*/*.tar"), *tmp_path.glob("*/*.partial")]:
            with contextlib.suppress(FileNotFoundError):
                held += path.stat().st_size
        most = max(most, held)
        time.sleep(0.001)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0, failures.get()
    assert 1000 <= most <= 3000  # a shard may be seen under both names while it is renamed
    assert sum(p.stat().st_size for p in tars(tmp_path)) <= 2000


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
