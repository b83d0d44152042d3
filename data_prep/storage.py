"""Folders to read from and write to: local ones, and fsspec URLs such as s3:// and gs://.

A local path is used as it is, and what follows file:// is one, letter by letter. Any other URL goes
through fsspec, the library that every object store has a driver for: transient errors are tried
again with growing pauses, and what arrives is compared by size, and by MD5 where the store gives
one. (An S3 ETag is none: it depends on parts and encryption.)
"""

import base64
import errno
import hashlib
import os
import posixpath
import random
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from data_prep.urls import check_url, masked

Location = str | os.PathLike[str]  # a path, or a URL
Result = TypeVar("Result")

TEMPORARY = ".tmp"  # ends the name of what a killed process leaves behind
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds, before each further try
THREADS = 32  # requests at once for sizes, where a store has no listing
# Trying again does not help; nor with an HTTP status of 4xx but these.
FINAL = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError,
    NotImplementedError, ImportError, ValueError, TypeError, LookupError, AttributeError,
)  # fmt: skip
TRANSIENT_STATUS = (408, 429)
# Of a name below a folder that is there: there is no such file, or it is not for this user.
ABSENT = frozenset(
    (
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EACCES,
        errno.EPERM,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EINVAL,
        errno.EILSEQ,
    )
)


class Facts(NamedTuple):
    """What a listing says of a file: its bytes, and its MD5 where a store gives one."""

    size: int
    md5: bytes | None = None


def sizes_of(facts: Sequence[Facts | None]) -> list[int | None]:
    """Bytes of each file; None for what is none."""
    return [None if file is None else file.size for file in facts]


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine, or of a file system that all machines share."""

    path: Path
    everywhere = True  # other processes see it too

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> set[str] | None:
        """What is in the folder; None if there is none.

        Raises:
            ValueError: it is a file.
        """
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; choose a folder")
        return set(os.listdir(self.path))

    def facts(self, names: Sequence[str]) -> list[Facts | None]:
        """What is known of each file; None for what is no file inside the folder.

        Raises:
            OSError: the file system fails, which says nothing about the file.
        """
        root = os.path.abspath(self.path)
        return [_local_facts(root, name) for name in names]

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of each file, as `facts` has them."""
        return sizes_of(self.facts(names))

    def read(self, name: str, facts: Facts | None = None) -> bytes:
        """A whole file. `facts` are those of when it was listed."""
        descriptor = os.open(os.path.join(self.path, name), os.O_RDONLY)
        try:
            parts = [os.read(descriptor, (facts.size if facts else 0) + 1)]
            while parts[-1]:
                parts.append(os.read(descriptor, 2**20))
            return parts[0] if len(parts) == 2 else b"".join(parts)
        finally:
            os.close(descriptor)

    def write(self, name: str, content: bytes) -> None:
        """Write a file so that `name` never holds a part of it, after a power cut neither."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or the new name may reach the disk before the content
        os.replace(temporary, path)

    @contextmanager
    def new_file(self, name: str, scratch: str) -> Iterator[Path]:
        """A path to write to, in the subfolder `scratch`; it is `name` when the block ends well."""
        place = self.path / scratch
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{name}.", suffix=TEMPORARY, dir=place) as folder:
            path = Path(folder) / "file"
            yield path
            os.replace(path, self.path / name)

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A path to read a file at, as long as the block lasts."""
        yield self.path / name

    def remove(self, name: str) -> None:
        """Remove a subfolder with all in it, as far as that can be."""
        shutil.rmtree(self.path / name, ignore_errors=True)


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL. The methods are those of LocalFolder.

    Raises:
        ConnectionError: the store failed at every try.
        ValueError: there is no driver for the URL.
    """

    url: str

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        import fsspec  # a tenth of a second in every process, and only URLs need it

        try:
            system, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"cannot open {self.url}: {error}") from None
        return system, root.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}  # connections do not travel to other processes

    @property
    def everywhere(self) -> bool:
        return not {"memory"} & self._protocols

    @property
    def _is_http(self) -> bool:
        return bool({"http", "https"} & self._protocols)

    @property
    def _protocols(self) -> set[str]:
        protocol = self._opened[0].protocol
        return {protocol} if isinstance(protocol, str) else set(protocol)

    def names(self) -> set[str] | None:
        if self._is_http:
            raise ValueError(
                f"{self.url} cannot be listed or written to; use a store such as s3://"
            )
        try:
            found = self._tried("", lambda system, path: system.ls(path, detail=False))
        except FileNotFoundError:
            return None
        paths = {path.rstrip("/") for path in found} - {self._opened[1]}  # S3 may list itself
        return {path.rpartition("/")[2] for path in paths} or None

    def facts(self, names: Sequence[str]) -> list[Facts | None]:
        listed: dict[str, Any] = {}
        if not self._is_http:
            _, root = self._opened
            found = self._tried("", lambda system, path: system.find(path, detail=True))
            listed = {path[len(root) :].lstrip("/"): row for path, row in found.items()}

        def known(name: str) -> Facts | None:
            if not _is_inside(name) or (listed and name not in listed):
                return None
            size, md5 = _facts(listed.get(name, {}))
            return self._asked(name) if size is None else Facts(size, md5)

        with ThreadPoolExecutor(THREADS) as threads:
            return list(threads.map(known, names))

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        return sizes_of(self.facts(names))

    def read(self, name: str, facts: Facts | None = None) -> bytes:
        def download(system: Any, path: str) -> bytes:
            data: bytes = system.cat_file(path)
            expected, md5 = _facts(system.info(path)) if facts is None else facts
            _compare(expected, md5, len(data), lambda: hashlib.md5(data).digest())
            return data

        return self._tried(name, download)

    def write(self, name: str, content: bytes) -> None:
        def upload(system: Any, path: str) -> None:
            system.pipe_file(path, content)
            system.invalidate_cache()
            digest = hashlib.md5(content).digest()
            _compare(*_facts(system.info(path)), len(content), lambda: digest)

        self._tried(name, upload)

    @contextmanager
    def new_file(self, name: str, scratch: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "file"
            yield local

            def upload(system: Any, path: str) -> None:
                system.put_file(str(local), path)
                system.invalidate_cache()
                _compare(*_facts(system.info(path)), local.stat().st_size, lambda: _md5(local))

            self._tried(name, upload)

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "file"

            def download(system: Any, path: str) -> None:
                expected, md5 = _facts(system.info(path))
                system.get_file(path, str(local))
                _compare(expected, md5, local.stat().st_size, lambda: _md5(local))

            self._tried(name, download)
            yield local

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._tried(name, lambda system, path: system.rm(path, recursive=True))

    def _asked(self, name: str) -> Facts | None:
        try:
            info = self._tried(name, lambda system, path: system.info(path))
        except FileNotFoundError:
            return None
        if info["type"] != "file":
            return None
        size, md5 = _facts(info)
        # A server that does not tell the size: only the content does.
        return Facts(len(self.read(name)) if size is None else size, md5)

    def _tried(self, name: str, action: Callable[[Any, str], Result]) -> Result:
        system, root = self._opened
        # Of a web address the root is one already; a name is that of a file, with any character.
        below = quote(name) if self._is_http else name
        path = f"{root}/{below}" if name else root
        for pause in (*PAUSES, None):
            try:
                system.invalidate_cache()
                return action(system, path)
            except FINAL:
                raise
            except Exception as error:  # every driver has errors of its own
                status = getattr(error, "status", None)
                refused = isinstance(status, int) and 400 <= status < 500
                if pause is None or (refused and status not in TRANSIENT_STATUS):
                    why = masked(f"{type(error).__name__}: {error}".partition("\n")[0])
                    tries = "" if refused else f", at each of {len(PAUSES) + 1} tries"
                    where = f"{self.url}/{name}" if name else self.url
                    raise ConnectionError(f"{where} failed{tries}: {why}") from None
                time.sleep(pause * random.uniform(0.5, 1.0))
        raise AssertionError


Folder = LocalFolder | RemoteFolder


def folder_at(location: Location) -> Folder:
    """The folder of a path or URL; nothing is opened yet.

    Raises:
        ValueError: a file:// URL of another machine, or a URL with a password or a query.
    """
    text = os.fspath(location)
    path = _local_path(text)
    if path is not None:
        return LocalFolder(Path(path))
    check_url(text)
    return RemoteFolder(text.rstrip("/"))


def absolute(folder: Folder) -> Folder:
    """The folder by a name that holds in processes with another working directory, too."""
    return LocalFolder(folder.path.absolute()) if isinstance(folder, LocalFolder) else folder


def file_at(location: Location) -> tuple[Folder, str]:
    """The folder of a file and its name in it, which is empty if the location ends in a slash.

    A web address may have more than a name at its end (`%20`): it is a folder whole, and the file
    is the one of the empty name in it.

    Raises:
        ValueError: as `folder_at`, and for a URL without a folder.
    """
    text = os.fspath(location)
    path = _local_path(text)
    if path is not None:
        parent, name = os.path.split(path)
        return LocalFolder(Path(parent)), name
    check_url(text)
    if text.lower().startswith(("http://", "https://")):
        return RemoteFolder(text), ""
    parent, _, name = text.rpartition("/")
    if parent.endswith(":/"):
        raise ValueError(f"got {text}, expected the URL of a file, such as {parent}/bucket/file")
    return RemoteFolder(parent), name


def _local_path(text: str) -> str | None:
    """The path of a location; None of a URL that is not a local one."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        return text
    if scheme.lower() not in ("file", "local"):
        return None
    # As fsspec does, so that training takes the same URL: no character has a meaning of its own.
    path = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
    if not path.startswith("/"):
        raise ValueError(
            f"{text}: got {path.partition('/')[0]!r} behind {scheme}://, expected an absolute "
            f"path, such as {scheme}:///data"
        )
    return path


def _local_facts(root: str, name: str) -> Facts | None:
    try:
        path = f"{root}/{name}"
        if "/" in name or name in (".", ".."):
            path = os.path.normpath(os.path.join(root, name))
            if os.path.commonpath((root, path)) != root:
                return None
        found = os.stat(path)
    except ValueError:  # a name with a NUL or a lone surrogate
        return None
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise
    return Facts(found.st_size) if stat.S_ISREG(found.st_mode) else None


def _is_inside(name: str) -> bool:
    """Whether a name is an ordinary one below its folder, that every store can have."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return (
        0 < len(name) < 1024
        and posixpath.normpath(name) == name
        and not name.startswith(("/", "../"))
        and name not in (".", "..")
        and "\0" not in name
    )


def _facts(info: dict[str, Any]) -> tuple[int | None, bytes | None]:
    """Size and MD5 of a file, as far as its store tells them: Google's and Azure's do."""
    size, settings = info.get("size"), info.get("content_settings") or {}
    md5 = info.get("md5Hash") or settings.get("content_md5")
    if isinstance(md5, str):
        md5 = base64.b64decode(md5)
    return size if size is None else int(size), None if md5 is None else bytes(md5)


def _compare(size: int | None, md5: bytes | None, found: int, digest: Callable[[], bytes]) -> None:
    if size is not None and found != size:
        raise EOFError(f"got {found} bytes, expected {size}")
    if md5 is not None and digest() != md5:
        raise EOFError(f"the MD5 of {found} bytes is not that of the store")


def _md5(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").digest()
