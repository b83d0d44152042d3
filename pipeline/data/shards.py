"""Reading of a shard folder: the manifest, and any sample by one positioned read."""

import io
import json
import os
import tarfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.cache import ShardCache

FORMAT, VERSION = "coco-webdataset", 1
MOST_OPEN = 32  # shards of one set in one process
REMEDY = "make one with: python -m data_prep convert --images DIR --annotations FILE"


@dataclass(frozen=True)
class Sample:
    """One image as it lies in a shard: the encoded bytes, and its COCO records unchanged."""

    image_bytes: bytes
    image: dict[str, Any]
    annotations: list[dict[str, Any]]


class ShardSet:
    """The samples of one shard folder, by index in shard order.

    location: a folder, or its URL (`s3://`, `gs://`, `http://`, whatever fsspec reads), whose
    shards are kept in `cache_dir` (empty: a folder of the user's cache) while they are needed, at
    most `cache_gb` (of 10**9 bytes) of them. Raises `UserError` when the folder is missing, is not
    a shard folder, or lacks a shard.
    """

    def __init__(self, location: str | Path, cache_dir: str = "", cache_gb: float = 100) -> None:
        self.folder = str(location).removeprefix("file://").rstrip("/")
        remote = is_remote(self.folder)
        manifest = _remote_manifest(self.folder) if remote else _read_manifest(Path(self.folder))
        self.digest: str = manifest["digest"]
        self.header: dict[str, Any] = manifest["header"]
        self.categories: list[dict[str, Any]] = manifest["categories"]
        shards = manifest["shards"]
        self.shard_names = [shard["name"] for shard in shards]
        self.shard_bytes = [int(shard["bytes"]) for shard in shards]
        self.shard_sizes = [int(shard["samples"]) for shard in shards]
        if odd := [name for name in self.shard_names if Path(name).name != name]:
            raise UserError(f"{self.folder}: got a shard named {odd[0]!r}, expected a file name")
        self.cache: ShardCache | None = None
        if remote:
            folder = Path(cache_dir or default_cache()).absolute()
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
        file = self._open(int(self.shard[index]))
        data = os.pread(file, int(self.length[index]), int(self.offset[index]))
        try:
            return _parse(data)
        except (tarfile.TarError, ValueError, KeyError) as error:
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


def _parse(data: bytes) -> Sample:
    """The two members of a piece of a tar. Raises `ValueError` and tarfile's errors."""
    contents: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as members:
        for member in members:
            file = members.extractfile(member)
            if file is not None:
                kind = "json" if member.name.endswith(".json") else "image"
                contents[kind] = file.read()
    if contents.keys() != {"json", "image"}:
        raise ValueError(f"got {sorted(contents)}, expected an image and a JSON member")
    record = json.loads(contents["json"])
    return Sample(contents["image"], record["image"], record["annotations"])


def is_remote(location: str) -> bool:
    """Whether it is a URL of storage that is not this machine's file system."""
    return "://" in location and not location.startswith("file://")


def _cache(*arguments: Any) -> "ShardCache":
    from pipeline.data.cache import ShardCache  # its libraries are for URLs alone

    return ShardCache(*arguments)


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "deformable-detr-shards"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
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
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: not a shard manifest ({error}); {REMEDY}") from None
    if found != (FORMAT, VERSION):
        raise UserError(f"{where}: got format {found}, expected {(FORMAT, VERSION)}; {REMEDY}")
    return manifest


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
