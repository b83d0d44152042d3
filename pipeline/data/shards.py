"""Reading of a shard folder: the manifest, and any sample by one positioned read."""

import json
import os
import reprlib
import tarfile
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.urls import check_url
from pipeline.errors import UserError
from pipeline.storage import patiently

if TYPE_CHECKING:
    from pipeline.data.cache import ShardCache

FORMAT, VERSION = "coco-webdataset", 1
COLUMNS = ("shard", "offset", "length", "width", "height", "id", "annotations")
BLOCK = tarfile.BLOCKSIZE
LOCAL = ("file://", "local://")
MOST_OPEN = 32  # shards of one set in one process
REMEDY = "make one with: python -m data_prep convert --images DIR --annotations FILE"


@dataclass(frozen=True)
class Sample:
    """One image as it lies in a shard: the encoded bytes, and its COCO records, of which the
    image's has `width` and `height` in any case."""

    image_bytes: bytes
    image: dict[str, Any]
    annotations: list[dict[str, Any]]


class ShardSet:
    """The samples of one shard folder, by index in shard order.

    location: a folder, or its URL (`s3://`, `gs://`, `http://`, whatever fsspec reads), whose
    shards are kept in `cache_dir` (empty: a folder of the user's cache) while they are needed, at
    most `cache_gb` (of 10**9 bytes) of them. Raises `UserError` when the folder is missing, is not
    a shard folder, or lacks a shard, and for a URL with a password or a query.
    """

    def __init__(self, location: str | Path, cache_dir: str = "", cache_gb: float = 100) -> None:
        self.folder = _without_scheme(str(location)).rstrip("/") or "/"
        remote = is_remote(self.folder)
        check_url(self.folder)
        if remote:
            manifest = _remote_manifest(self.folder)
        else:
            manifest = patiently(partial(_read_manifest, Path(self.folder)))
        self.digest: str = manifest["digest"]
        self.header: dict[str, Any] = manifest["header"]
        self.categories: list[dict[str, Any]] = manifest["categories"]
        shards = manifest["shards"]
        self.shard_names = [shard["name"] for shard in shards]
        self.shard_bytes = [int(shard["bytes"]) for shard in shards]
        self.shard_sizes = [int(shard["samples"]) for shard in shards]
        self.cache: ShardCache | None = None
        if remote:
            folder = Path(cache_dir or _default_cache()).absolute()
            self.cache = _cache(self.folder, self.digest, shards, folder, int(cache_gb * 1e9))
        else:
            _check_sizes(Path(self.folder), shards)
        columns = manifest["samples"]
        # Arrays, not lists: reading a list's items would copy its pages into every worker.
        self.shard = np.asarray(columns["shard"], dtype=np.int64)
        self.offset = np.asarray(columns["offset"], dtype=np.int64)
        self.length = np.asarray(columns["length"], dtype=np.int64)
        self.annotations = np.asarray(columns["annotations"], dtype=np.int64)
        self.image_id = np.asarray(columns["id"], dtype=np.int64)
        # [samples, 2] (width, height) in pixels, for batching by size without opening the images.
        self.size = np.stack([np.asarray(columns["width"]), np.asarray(columns["height"])], axis=1)
        self._files: OrderedDict[int, int] = OrderedDict()  # the one used last at the end
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self.offset)

    def read(self, index: int) -> Sample:
        """The sample at `index`, by one read at its offset."""
        data = self._bytes(index)
        try:
            return self._parsed(index, data)
        except UserError:
            if not self.mend(index):
                raise
        return self._parsed(index, self._bytes(index))

    def mend(self, index: int) -> bool:
        """Whether a damaged sample may be whole when it is read again: its shard is a cached one,
        which is fetched again unless it is as its manifest says."""
        if self.cache is None:
            return False
        self.cache.discard_if_damaged(int(self.shard[index]))
        return True

    def _bytes(self, index: int) -> bytes:
        shard, offset = int(self.shard[index]), int(self.offset[index])
        length = int(self.length[index])
        try:
            data = os.pread(self._open(shard), length, offset)
            while self.cache is not None and len(data) < length:  # it has made room for others
                os.close(self._files.pop(shard))
                data = os.pread(self._open(shard), length, offset)
        except OSError as error:  # of an open file it has no name
            error.filename = error.filename or f"{self.folder}/{self.shard_names[shard]}"
            raise
        return data

    def _parsed(self, index: int, data: bytes) -> Sample:
        try:
            return _parse(data, *self.size[index].tolist())
        except ValueError as error:
            raise UserError(
                f"{self.folder}/{self.shard_names[int(self.shard[index])]}: no sample at byte "
                f"{int(self.offset[index])}, where its manifest has one ({error}); copy it again "
                f"or convert the data anew"
            ) from None

    def _open(self, shard: int) -> int:
        if self._pid != os.getpid():  # after a fork: descriptors of our own
            self._files, self._pid = OrderedDict(), os.getpid()
        if shard not in self._files:
            if self.cache is not None:
                self._files[shard] = self.cache.open(shard)
            else:
                path = os.path.join(self.folder, self.shard_names[shard])
                self._files[shard] = os.open(path, os.O_RDONLY)
            if len(self._files) > MOST_OPEN:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        # Descriptors do not travel to other processes.
        return {**self.__dict__, "_files": OrderedDict()}


def _parse(data: bytes, width: int, height: int) -> Sample:
    """The two members of a piece of a tar; the image record takes the size in pixels from the
    manifest, where it has none. Raises `ValueError`.

    Headers are read one by one: `tarfile.open` would also follow links, sparse maps and extended
    headers, which no shard has and a damaged one may seem to have.
    """
    contents: dict[str, bytes] = {}
    position = 0
    while position < len(data):
        try:
            header = tarfile.TarInfo.frombuf(data[position : position + BLOCK], "utf-8", "replace")
        except tarfile.TarError as error:
            raise ValueError(f"not a tar: {error}") from None
        start = position + BLOCK
        if not header.isreg() or not 0 <= header.size <= len(data) - start:
            raise ValueError(f"{header.name[:60]!r} is not a file of this size")
        kind = "json" if header.name.endswith(".json") else "image"
        contents[kind] = data[start : start + header.size]
        position = start + -(-header.size // BLOCK) * BLOCK
    if contents.keys() != {"json", "image"}:
        raise ValueError(f"got {sorted(contents)}, expected an image and a JSON member")
    try:
        record = json.loads(contents["json"])
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not (
        isinstance(record, dict)
        and isinstance(record.get("image"), dict)
        and type(record["image"].get("id")) is int
        and isinstance(record.get("annotations"), list)
        and all(isinstance(annotation, dict) for annotation in record["annotations"])
    ):
        raise ValueError("its JSON does not hold an image with an id and a list of annotations")
    record["image"].update(width=width, height=height)
    return Sample(contents["image"], record["image"], record["annotations"])


def is_remote(location: str) -> bool:
    """Whether it is a URL of storage that is not this machine's file system."""
    return "://" in location and not location.startswith(LOCAL)


def _without_scheme(location: str) -> str:
    """The path of a URL of this machine's file system, as fsspec takes it: what follows the
    scheme, nothing unquoted. Anything else as it is. Raises `UserError` for another host."""
    if not location.startswith(LOCAL):
        return location
    scheme, _, rest = location.partition("://")
    path = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
    if not path.startswith("/"):
        raise UserError(
            f"{location}: got host {rest.partition('/')[0]!r}, expected none, as in "
            f"{scheme}:///PATH: such a URL is a path of this machine"
        )
    return path


def _cache(*arguments: Any) -> "ShardCache":
    from pipeline.data.cache import ShardCache  # its libraries are for URLs alone

    return ShardCache(*arguments)


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "deformable-detr-shards"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if folder.is_file():
        raise UserError(f"shard folder: {folder} is a file, expected the folder of a manifest.json")
    if not folder.is_dir():
        raise UserError(f"shard folder {str(folder)!r} does not exist; {REMEDY} --output {folder}")
    if not path.exists():
        raise UserError(f"{str(folder)!r} is not a shard folder: it has no manifest.json; {REMEDY}")
    return _parsed(path.read_bytes(), str(path))


def _remote_manifest(url: str) -> dict[str, Any]:
    from pipeline.data.cache import read_remote

    return _parsed(read_remote(f"{url}/manifest.json"), f"{url}/manifest.json")


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    try:
        manifest = json.loads(content)
        found = (manifest["format"], manifest["version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: not a shard manifest ({said}); {REMEDY}") from None
    if found != (FORMAT, VERSION):
        raise UserError(
            f"{where}: got format {reprlib.repr(found)}, expected {(FORMAT, VERSION)}; {REMEDY}"
        )
    if why := _inconsistency(manifest):
        raise UserError(f"{where} is damaged: {why}; copy it again or convert the data anew")
    return manifest


def _inconsistency(manifest: dict[str, Any]) -> str:
    """Why a manifest cannot be right, judged by itself; empty where it can. What it says is then
    of the right types, and every sample lies within its shard."""
    shards: Any = manifest.get("shards")
    columns, categories = manifest.get("samples"), manifest.get("categories")
    if not isinstance(manifest.get("digest"), str) or not isinstance(manifest.get("header"), dict):
        return "it has no digest or no header"
    if not _objects(categories, {"id": int, "name": str}):
        return "categories must have an id and a name"
    if not _objects(shards, {"name": str, "bytes": int, "samples": int, "sha256": str}):
        return "shards must have name, bytes, samples and sha256"
    if odd := [shard["name"] for shard in shards if not _is_file_name(shard["name"])]:
        return f"got a shard named {odd[0][:60]!r}, expected a file name"
    count = sum(shard["samples"] for shard in shards)
    if not isinstance(columns, dict):
        return "it has no samples"
    for name in COLUMNS:
        column = columns.get(name)
        if not isinstance(column, list) or len(column) != count:
            return f"column {name} must have {count} entries"
        if not all(type(value) is int and -(2**63) <= value < 2**63 for value in column):
            return f"column {name} must hold whole numbers"
    of_shards = [i for i, shard in enumerate(shards) for _ in range(shard["samples"])]
    if columns["shard"] != of_shards:
        return "the column shard does not match the shards' numbers of samples"
    for i, offset, length in zip(of_shards, columns["offset"], columns["length"], strict=True):
        if offset < 0 or length <= 0 or offset + length > shards[i]["bytes"]:
            return f"{shards[i]['name']} has no sample at bytes {offset}+{length}"
    if min((*columns["width"], *columns["height"]), default=1) < 1:
        return "widths and heights must be 1 or more"
    return ""


def _objects(values: Any, kinds: dict[str, type]) -> bool:
    """Whether it is a list of objects that have these fields, whole numbers none below 0."""
    return isinstance(values, list) and all(
        isinstance(value, dict)
        and all(
            type(value.get(name)) is kind and (kind is not int or 0 <= value[name] < 2**63)
            for name, kind in kinds.items()
        )
        for value in values
    )


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and "\0" not in name and name.isprintable()


def _check_sizes(folder: Path, shards: list[dict[str, Any]]) -> None:
    for shard in shards:
        path = folder / shard["name"]
        actual = path.stat().st_size if path.exists() else -1
        if actual != shard["bytes"]:
            found = "no such file" if actual < 0 else f"{actual} bytes"
            raise UserError(
                f"{path}: got {found}, expected {shard['bytes']} bytes as its manifest says; "
                f"copy it again or convert the data anew"
            )
