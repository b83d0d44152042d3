"""Reading of a shard folder: the manifest, and any sample by one positioned read."""

import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError

FORMAT, VERSION = "coco-webdataset", 1


@dataclass(frozen=True)
class Sample:
    """One image as it lies in a shard: the encoded bytes, and its COCO records unchanged."""

    image_bytes: bytes
    image: dict[str, Any]
    annotations: list[dict[str, Any]]


class ShardSet:
    """The samples of one shard folder, by index in shard order.

    Raises `UserError` when the folder is missing, is not a shard folder, or lacks a shard.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        self.digest: str = manifest["digest"]
        self.header: dict[str, Any] = manifest["header"]
        self.categories: list[dict[str, Any]] = manifest["categories"]
        self.shard_names = [shard["name"] for shard in manifest["shards"]]
        self.shard_sizes = [int(shard["samples"]) for shard in manifest["shards"]]
        for shard in manifest["shards"]:
            path = self.folder / shard["name"]
            actual = path.stat().st_size if path.exists() else -1
            if actual != shard["bytes"]:
                found = "no such file" if actual < 0 else f"{actual} bytes"
                raise UserError(
                    f"{path}: got {found}, expected {shard['bytes']} bytes as its manifest says; "
                    f"copy it again or convert the data anew"
                )
        columns = manifest["samples"]
        self.shard = np.asarray(columns["shard"], dtype=np.int64)
        self.offset = np.asarray(columns["offset"], dtype=np.int64)
        self.length = np.asarray(columns["length"], dtype=np.int64)
        self.image_id = np.asarray(columns["id"], dtype=np.int64)
        # [samples, 2] (width, height) in pixels, for batching by size without opening the images.
        self.size = np.stack([np.asarray(columns["width"]), np.asarray(columns["height"])], axis=1)
        self._files: dict[int, int] = {}
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self.offset)

    def read(self, index: int) -> Sample:
        """The sample at `index`, by one read at its offset."""
        if self._pid != os.getpid():  # after a fork: descriptors of our own
            self._files, self._pid = {}, os.getpid()
        shard = int(self.shard[index])
        if shard not in self._files:
            self._files[shard] = os.open(self.folder / self.shard_names[shard], os.O_RDONLY)
        data = os.pread(self._files[shard], int(self.length[index]), int(self.offset[index]))
        image_bytes, record = b"", None
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as members:
            for member in members:
                content = members.extractfile(member)
                assert content is not None, f"{member.name} in a shard is not a file"
                if member.name.endswith(".json"):
                    record = json.loads(content.read())
                else:
                    image_bytes = content.read()
        assert record is not None, f"sample {index} of {self.folder} has no JSON member"
        return Sample(image_bytes, record["image"], record["annotations"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # descriptors do not travel to other processes


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    remedy = "make one with: python -m data_prep convert --images DIR --annotations FILE"
    if not folder.is_dir():
        raise UserError(f"shard folder {str(folder)!r} does not exist; {remedy} --output {folder}")
    if not path.exists():
        raise UserError(f"{str(folder)!r} is not a shard folder: it has no manifest.json; {remedy}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = (manifest["format"], manifest["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a shard manifest ({error}); {remedy}") from None
    if found != (FORMAT, VERSION):
        raise UserError(f"{path}: got format {found}, expected {(FORMAT, VERSION)}; {remedy}")
    return manifest
