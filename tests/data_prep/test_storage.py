"""Folders behind URLs: the same shards, through errors, and nothing half read or half written."""

import base64
import functools
import hashlib
import http.server
import json
import re
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_prep import storage
from data_prep.convert import convert
from data_prep.export import export
from data_prep.manifest import read_manifest
from data_prep.stats import collect
from data_prep.storage import LocalFolder, RemoteFolder, file_at, folder_at
from data_prep.verify import verify


class FlakyStore(MemoryFileSystem):
    """A store of this process that fails, cuts and forgets as it is told to."""

    protocol = "flaky"
    store: ClassVar = {}
    calls: ClassVar = Counter()
    failures: ClassVar = {}  # of each operation, how many more will fail
    pauses: ClassVar = []
    torn = 0  # transfers that will lose a byte
    flipped = 0  # downloads in which a bit will change
    md5 = False  # whether listings tell it, as those of Google's store do

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def _count(self, name):
        self.calls[name] += 1
        if self.failures.get(name, 0) > 0:
            self.failures[name] -= 1
            raise TimeoutError(f"{name} took too long")

    def cat_file(self, path, start=None, end=None, **options):
        self._count("cat_file")
        data = super().cat_file(path, start, end, **options)
        if type(self).torn:
            type(self).torn -= 1
            return data[:-1]
        if type(self).flipped:
            type(self).flipped -= 1
            return data[:-1] + bytes([data[-1] ^ 1])
        return data

    def put_file(self, source, path, **options):
        self._count("put_file")
        super().put_file(source, path, **options)
        if type(self).torn:
            type(self).torn -= 1
            super().pipe_file(path, super().cat_file(path)[:-1])

    def get_file(self, path, target, **options):
        self._count("get_file")
        super().get_file(path, target, **options)

    def find(self, path, **options):
        self._count("find")
        found = super().find(path, **options)
        if self.md5 and options.get("detail"):
            for name, row in found.items():
                digest = hashlib.md5(self.store[name].getvalue()).digest()
                row["md5Hash"] = base64.b64encode(digest).decode()
        return found

    def info(self, path, **options):
        self.calls[f"info of {path.rpartition('.')[2]}"] += 1
        return super().info(path, **options)


@pytest.fixture
def store(monkeypatch):
    fsspec.register_implementation("flaky", FlakyStore, clobber=True)
    for name in ("store", "failures"):
        monkeypatch.setattr(FlakyStore, name, {})
    monkeypatch.setattr(FlakyStore, "calls", Counter())
    for name, value in (("torn", 0), ("flipped", 0), ("md5", False)):
        monkeypatch.setattr(FlakyStore, name, value)
    monkeypatch.setattr(FlakyStore, "pauses", [])
    monkeypatch.setattr(storage.time, "sleep", FlakyStore.pauses.append)
    return FlakyStore


def upload(folder, url):
    system, root = fsspec.core.url_to_fs(url)
    for path in folder.iterdir():
        system.pipe_file(f"{root}/{path.name}", path.read_bytes())


def downloaded(url):
    system, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(f"{root}/"): system.cat_file(path) for path in system.find(root)}


def on_disk(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def remote(small, store):
    """The small data set in the store, and its shards on disk."""
    small(9)
    upload(small.images, "flaky://bucket/images")
    system, _ = fsspec.core.url_to_fs("flaky://")
    system.pipe_file("/bucket/a.json", small.annotations.read_bytes())
    convert(*small.arguments, samples_per_shard=4)
    store.calls.clear()
    return ("flaky://bucket/images", "flaky://bucket/a.json", "flaky://bucket/shards")


def test_everything_remote_gives_the_same_bytes(remote, small, tmp_path):
    result = convert(*remote, samples_per_shard=4)
    assert result.fresh
    assert downloaded(remote[2]) == on_disk(small.output)
    assert not convert(*remote, samples_per_shard=4).fresh
    assert verify(remote[2], decode=True) == []
    assert read_manifest(remote[2]) == read_manifest(small.output)
    assert collect(remote[2]) == collect(small.output)
    export(remote[2], "flaky://bucket/out.json")
    export(small.output, tmp_path / "out.json")
    assert downloaded("flaky://bucket")["out.json"] == (tmp_path / "out.json").read_bytes()


@pytest.mark.parametrize("operation", ["cat_file", "put_file", "get_file", "find"])
def test_transient_errors_are_tried_again_with_growing_pauses(remote, small, store, operation):
    store.failures = {operation: 3}
    convert(*remote, samples_per_shard=4)
    assert store.failures == {operation: 0}
    assert downloaded(remote[2]) == on_disk(small.output)
    assert len(store.pauses) == 3
    for i, pause in enumerate(store.pauses):
        assert storage.PAUSES[i] / 2 <= pause <= storage.PAUSES[i]


def test_a_store_that_stays_away_stops_the_conversion_and_quarantines_nothing(remote, small, store):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "failures", {"put_file": 6})
        message = r"flaky://bucket/shards/shard-000000.tar failed, at each of 6 tries: TimeoutError"
        with pytest.raises(ConnectionError, match=message):
            convert(*remote, samples_per_shard=4)
        store.failures["cat_file"] = 6
        message = r"flaky://bucket/images/\d.jpg failed"
        with pytest.raises(ConnectionError, match=message):
            convert(remote[0], small.annotations, "flaky://bucket/other", samples_per_shard=4)
    for output in (remote[2], "flaky://bucket/other"):
        result = convert(remote[0], small.annotations, output, samples_per_shard=4)
        assert result.manifest.num_images == 9
        assert result.problems == []


def test_torn_downloads_and_uploads_are_done_again(remote, small, store):
    store.torn = 4
    convert(*remote, samples_per_shard=4)
    assert store.torn == 0
    assert downloaded(remote[2]) == on_disk(small.output)
    store.torn = 1000
    folder = RemoteFolder("flaky://bucket/images")
    with pytest.raises(ConnectionError, match=r"expected \d+"):
        folder.read("0.jpg")


def test_an_interrupted_remote_conversion_keeps_what_is_there(remote, small, store):
    store.failures = {}
    original, count = store.put_file, Counter()

    def dies(self, source, path, **options):
        count["puts"] += 1
        if count["puts"] == 3:
            raise KeyboardInterrupt
        original(self, source, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "put_file", dies)
        with pytest.raises(KeyboardInterrupt):
            convert(*remote, samples_per_shard=4)
    there = set(downloaded(remote[2]))
    assert {"shard-000000.tar", "shard-000001.tar"} <= there
    assert "manifest.json" not in there
    with pytest.raises(ValueError, match="unfinished conversion of other input or options"):
        convert(*remote, samples_per_shard=3)
    store.calls.clear()
    convert(*remote, samples_per_shard=4)
    assert store.calls["put_file"] == 1
    assert downloaded(remote[2]) == on_disk(small.output)


def test_what_a_run_killed_at_its_end_left_in_a_store_is_removed(remote, small):
    convert(*remote, samples_per_shard=4)
    system, _ = fsspec.core.url_to_fs("flaky://")
    system.pipe_file("/bucket/shards/.convert/plan.json", b"{}")
    assert not convert(*remote, samples_per_shard=4).fresh
    assert downloaded(remote[2]) == on_disk(small.output)


def test_md5_of_the_store_is_checked(remote, store):
    folder = RemoteFolder("flaky://bucket/images")
    with pytest.MonkeyPatch.context() as patch:
        plain = store.info
        md5 = "1B2M2Y8AsgTpgAmY7PhCfg=="  # of nothing
        patch.setattr(store, "info", lambda self, path, **o: plain(self, path) | {"md5Hash": md5})
        with pytest.raises(ConnectionError, match="MD5"):
            folder.read("0.jpg")
        with pytest.raises(ConnectionError, match="MD5"), folder.local_copy("0.jpg"):
            pass
        folder.write("empty", b"")
        assert folder.read("empty") == b""


def test_the_md5_that_a_listing_tells_is_compared_for_every_image(remote, small, store):
    """Without a request for each."""
    store.md5, store.flipped = True, 4
    convert(*remote, samples_per_shard=4)
    assert store.flipped == 0
    assert downloaded(remote[2]) == on_disk(small.output)
    assert store.calls["info of jpg"] == 0
    store.flipped = 1000
    message = r"flaky://bucket/images/\d\.jpg failed, at each of 6 tries: EOFError: the MD5 of \d+"
    with pytest.raises(ConnectionError, match=message):
        convert(*remote[:2], "flaky://bucket/other")


def test_missing_remote_images_and_names_are_problems(remote, small, store):
    system, _ = fsspec.core.url_to_fs("flaky://")
    content = json.loads(small.annotations.read_text())
    for i, name in enumerate(("../a.json", "/bucket/a.json", "", ".", "a\0", "\ud800", "x//y")):
        content["images"].append({"id": 500 + i, "file_name": name})
    system.pipe_file("/bucket/a.json", json.dumps(content).encode())
    system.rm_file("/bucket/images/3.jpg")
    result = convert(*remote)
    missing = {p.image_id for p in result.problems if p.kind == "missing image"}
    assert missing == {13, *range(500, 507)}
    assert result.manifest.num_images == 8


@pytest.mark.parametrize("name", ["with space", "with%20space", "hash#1", "really?", "a:b"])
@pytest.mark.parametrize("scheme", ["file://", "local://", "file://localhost", "FILE://"])
def test_what_follows_file_is_a_path_letter_by_letter(tmp_path, scheme, name):
    path = tmp_path / name
    assert folder_at(f"{scheme}{path}") == LocalFolder(path)
    assert file_at(f"{scheme}{path}") == (LocalFolder(tmp_path), name)
    if scheme not in ("file://localhost", "FILE://"):  # which fsspec takes for paths here
        assert fsspec.core.url_to_fs(f"{scheme}{path}")[1] == str(path)


def test_the_root_folder_has_files_too():
    assert file_at("file:///a.json") == (LocalFolder(Path("/")), "a.json")
    assert file_at("/a.json") == (LocalFolder(Path("/")), "a.json")


def test_file_urls_give_the_same_bytes(small, tmp_path):
    small()
    odd = tmp_path / "50% #1"
    convert(*(f"file://{path}" for path in (*small.arguments[:2], odd)))
    convert(*small.arguments)
    assert on_disk(odd) == on_disk(small.output)


@pytest.mark.parametrize("url", ["file://host/x", "local://host/x", "file://x", "file://./x"])
def test_a_file_url_of_another_machine_is_refused(small, tmp_path, monkeypatch, url):
    small()
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    scheme, _, rest = url.partition("://")
    got = f"{url}: got {rest.partition('/')[0]!r} behind {scheme}://"
    line = re.escape(f"{got}, expected an absolute path, such as {scheme}:///data")
    for place in range(3):
        locations = list(small.arguments)
        locations[place] = url
        with pytest.raises(ValueError, match=f"^{line}$"):
            convert(*locations)
    with pytest.raises(ValueError, match=f"^{line}$"):
        verify(url)
    assert set(tmp_path.rglob("*")) == before


@contextmanager
def served(folder, handler):
    """The address of a server of this machine for what is in the folder."""
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=folder)
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_http_serves_images_and_annotations(small, store):
    """A real server; the third answer is an error, as servers give them."""
    small(6)
    answers = Counter()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_head(self):
            answers[self.command] += 1
            if answers["GET"] == 3 and self.command == "GET":
                answers["GET"] += 1
                self.send_error(503)
                return None
            return super().send_head()

        def log_message(self, *arguments):
            pass

    folder = small.images.parent
    output = folder / "from http"
    with served(folder, Handler) as url:
        convert(f"{url}/images", f"{url}/annotations.json", output, workers=2)
        (small.images / "2.jpg").unlink()
        again = convert(f"{url}/images", f"{url}/annotations.json", folder / "again")
        with pytest.raises(ValueError, match="cannot be listed or written to"):
            convert(*small.arguments[:2], f"{url}/shards")
        with pytest.raises(ValueError, match="cannot be listed or written to"):
            export(output, f"{url}/out.json")
    assert answers["GET"] >= 8
    assert [(p.kind, p.image_id) for p in again.problems] == [("missing image", 12)]
    small(6)
    convert(*small.arguments)
    assert on_disk(output) == on_disk(small.output)


def test_names_with_any_character_are_found_over_http(small, tmp_path):
    """An address is given as it is in a browser; a name is that of a file, whatever is in it."""
    content = small(8)
    names = (
        "a#1.jpg", "b?c.jpg", "100%.jpg", "%41.jpg", "d e.jpg", "f%20g.jpg", "ü&=+;:@.jpg",
        "h#/i?.jpg",
    )  # fmt: skip
    for i, name in enumerate(names):
        path = small.images / name
        path.parent.mkdir(exist_ok=True)
        (small.images / f"{i}.jpg").rename(path)
        content["images"][i]["file_name"] = name
    small.save(content)
    small.images.rename(tmp_path / "my images")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_head(self):
            asked.append(self.path)
            return super().send_head()

        def log_message(self, *arguments):
            pass

    with served(tmp_path, Handler) as url:
        result = convert(f"{url}/my%20images", f"{url}/annotation%73.json", small.output)
    assert (result.problems, result.manifest.num_images) == ([], 8)
    assert "/annotations.json" in asked
    assert {f"/my images/{name}" for name in names} <= {unquote(path) for path in asked}
    convert(tmp_path / "my images", small.annotations, tmp_path / "local")
    assert on_disk(small.output) == on_disk(tmp_path / "local")


def test_mistakes_are_named(small, remote):
    small()
    with pytest.raises(ValueError, match="seen by one process only"):
        convert(small.images, small.annotations, "memory://shards", workers=2)
    assert convert(small.images, small.annotations, "memory://shards").manifest.num_images == 4
    for url in ("s3://bucket/x", "nonsense://x"):
        with pytest.raises(ValueError, match=f"cannot open {url}: ") as error:
            convert(url, small.annotations, small.output)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"cannot read annotation file flaky://bucket/none\.json"):
        convert(small.images, "flaky://bucket/none.json", small.output)
    with pytest.raises(ValueError, match="is not a folder of shards"):
        verify("flaky://bucket/images")
    with pytest.raises(ValueError, match=r"got memory://a\.json, expected the URL of a file"):
        convert(small.images, "memory://a.json", small.output)
