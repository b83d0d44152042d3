"""Remote shards in a local folder of bounded size, shared by all processes of a node.

A shard is downloaded whole under another name, checked against its SHA-256, on the disk and then
renamed, so that what bears a shard's name is whole. What is damaged all the same, by the disk or by
others, is fetched again: a shard that was there before is compared once more when a run first opens
it, because a JPEG may decode well and to other pixels. fsspec reads every kind of storage, filelock
keeps processes apart; both are the libraries that the machine learning tools around us use for it.
"""

import contextlib
import hashlib
import mmap
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from filelock import FileLock, Timeout

from pipeline.data.urls import masked
from pipeline.errors import UserError

T = TypeVar("T")
ATTEMPTS = 5
FIRST_WAIT = 1.0  # seconds; doubled after each attempt
BLOCK = 1 << 23
# What will not be different the next time.
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError)


def read_remote(url: str) -> bytes:
    """A whole file. Raises `UserError` where it cannot be had, after some attempts."""

    def read() -> bytes:
        with fsspec.open(url, "rb") as file:
            return file.read()

    return attempt(url, read)


def attempt(url: str, work: Callable[[], T]) -> T:
    """The result of `work`, tried again after growing pauses; `UserError` if none succeeds."""
    for number in range(ATTEMPTS):
        try:
            return work()
        except PERMANENT as error:
            said = _line(error)
            if isinstance(error, FileNotFoundError):  # of HTTP also where nobody answers
                said = "nothing is there, or nobody answers; check the URL and the network"
            raise UserError(f"{url} cannot be read: {said}") from None
        except Exception as error:  # every kind of storage has its own for what may pass
            if number == ATTEMPTS - 1:
                raise UserError(
                    f"{url} cannot be read, tried {ATTEMPTS} times: {_line(error)}"
                ) from None
            time.sleep(FIRST_WAIT * 2**number)
    raise AssertionError("unreachable")


def _line(error: BaseException) -> str:
    return masked((str(error).strip().splitlines() or [""])[0]) or type(error).__name__


@dataclass(frozen=True)
class ShardCache:
    """The shards of one remote folder, in `folder` beside those of others.

    Its shards never take more than `most_bytes` of the disk, downloads under way included; those
    that were opened longest ago make room, also where a process has them open: it reads nothing
    more from such a descriptor, and has to open the shard again.
    """

    url: str
    digest: str
    """Of the data, so that other data under the same URL is never taken for it."""
    shards: list[dict[str, Any]]
    """Of the manifest: `name`, `bytes`, `sha256`."""
    folder: Path
    most_bytes: int
    _seen_whole: mmap.mmap = field(init=False, repr=False, compare=False)
    """A byte for each shard, in memory that processes forked from this one share: not 0 where one
    of them has compared its SHA-256."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_seen_whole", mmap.mmap(-1, max(1, len(self.shards))))

    def __reduce__(self) -> tuple[Any, ...]:
        # What is no fork has compared nothing yet.
        return ShardCache, (self.url, self.digest, self.shards, self.folder, self.most_bytes)

    def open(self, shard: int) -> int:
        """A descriptor of the shard, which is downloaded if it is not there."""
        path = self.path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(_lock_of(path)):
            if path.exists() and (size := path.stat().st_size) != self.shards[shard]["bytes"]:
                _discard(path, _other_size(size, self.shards[shard]))
            if not self._seen_whole[shard]:
                self._discard_if_damaged(shard, path)
            if not path.exists():
                self._download(shard, path)
            self._seen_whole[shard] = 1
            os.utime(path)
            # Opened under the lock, without which it could be removed before.
            return os.open(path, os.O_RDONLY)

    def path(self, shard: int) -> Path:
        """Where the shard lies while it is here."""
        return self.folder / self.digest[:16] / str(self.shards[shard]["name"])

    def discard_if_damaged(self, shard: int) -> None:
        """Removes a shard whose SHA-256 is not the manifest's; the next `open` fetches it."""
        path = self.path(shard)
        with FileLock(_lock_of(path)):
            self._discard_if_damaged(shard, path)

    def fetch(self, shard: int) -> None:
        """Has the shard in the folder, for a later `open`."""
        os.close(self.open(shard))

    def _discard_if_damaged(self, shard: int, path: Path) -> None:
        if path.exists():
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.shards[shard]["sha256"]:
                _discard(path, _other_digest(found, self.shards[shard]))

    def _download(self, shard: int, path: Path) -> None:
        url, partial = f"{self.url}/{path.name}", path.with_suffix(".partial")
        try:
            self._reserve(partial, int(self.shards[shard]["bytes"]))
            attempt(url, lambda: _download(url, partial, self.shards[shard]))
            # Under the lock, so that one who counts meets one of the names.
            with FileLock(self.folder / ".lock"):
                os.rename(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, partial: Path, size: int) -> None:
        """Makes room, and takes it by a file of that size."""
        if size > self.most_bytes:
            raise UserError(
                f"data.cache_gb: got {self.most_bytes / 1e9:g}, expected {size / 1e9:g} or more, "
                f"the size of {self.url}/{partial.stem}.tar"
            )
        partial.unlink(missing_ok=True)  # what a killed process left
        while True:
            with FileLock(self.folder / ".lock"):
                if self._make_room(size):
                    with partial.open("wb") as file:
                        file.truncate(size)
                    return
            time.sleep(0.1)  # until another process's download is complete and may go

    def _make_room(self, size: int) -> bool:
        held = _held(self.folder)
        free = self.most_bytes - sum(status.st_size for status in held.values())
        for path in sorted(held, key=lambda path: held[path].st_mtime_ns):
            if free >= size:
                break
            free += _remove(path) * held[path].st_size
        return free >= size


def _held(folder: Path) -> dict[Path, os.stat_result]:
    held = {}
    for path in (*folder.glob("*/*.tar"), *folder.glob("*/*.partial")):
        with contextlib.suppress(FileNotFoundError):  # damaged or failed, and removed meanwhile
            held[path] = path.stat()
    return held


def _lock_of(path: Path) -> Path:
    return path.with_suffix(".lock")


def _remove(path: Path) -> bool:
    """Removes a shard, or what a killed process left of one; False where a process is at it."""
    try:
        with FileLock(_lock_of(path), timeout=0):
            _free(path)
            return True
    except Timeout:
        return False


def _discard(path: Path, why: str) -> None:
    print(f"{path}: {why}; it is fetched again", file=sys.stderr, flush=True)
    _free(path)


def _free(path: Path) -> None:
    """Gives the space of a file back at once, which unlinking alone does not where it is open."""
    if path.exists():
        os.truncate(path, 0)
        path.unlink()


def _download(url: str, partial: Path, shard: dict[str, Any]) -> None:
    digest, size = hashlib.sha256(), 0
    # Written over what was reserved and no further, so that the space is never given up nor passed.
    with fsspec.open(url, "rb") as source, partial.open("r+b") as target:
        while block := source.read(BLOCK):
            size += len(block)
            if size > shard["bytes"]:
                raise OSError(_other_size(f"{size} or more", shard))
            digest.update(block)
            target.write(block)
        target.flush()
        # Else a power cut after the rename could leave a shard's name on zeros, or on nothing.
        os.fsync(target.fileno())
    if size != shard["bytes"]:
        raise OSError(_other_size(size, shard))
    if digest.hexdigest() != shard["sha256"]:
        raise OSError(_other_digest(digest.hexdigest(), shard))


def _other_size(found: int | str, shard: dict[str, Any]) -> str:
    return f"got {found} bytes, expected {shard['bytes']} as its manifest says"


def _other_digest(found: str, shard: dict[str, Any]) -> str:
    return f"got SHA-256 {found[:12]}…, expected {shard['sha256'][:12]}… as its manifest says"
