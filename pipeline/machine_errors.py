"""What the machine and the libraries raise that is no bug of ours, as one line with a remedy."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# `data_prep.machine_errors` has the same, because neither package may import the other.
REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENOSPC: "free some, or choose a place on another disk",
    errno.EDQUOT: "free some, or choose a place on another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.ENOTDIR: "a part of the path is a file; choose another place",
    errno.EISDIR: "give a file, not a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit on open files (ulimit -n 65536)",
    errno.ENOMEM: "close other programs, or take fewer workers",
    errno.EADDRINUSE: "end what listens there, or choose another port",
    errno.EIO: "the disk or its connection fails; copy the file from elsewhere",
    errno.ESTALE: "the network file system was mounted anew; run the command again",
}
OURS = ("cuda_ops", "jobs", "model", "pipeline")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives `path` to an error of the system that names no file, as that of a full disk does."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def in_a_line(error: BaseException) -> str | None:
    """The line for an error of the machine (disk, memory, a missing package); None for any other,
    which is then a bug."""
    if isinstance(error, OSError):
        return of_the_system(error)
    if isinstance(error, ImportError):
        return of_an_import(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without its import
        return (
            f"{first_line(error).rstrip('.')}; lower the batch or image size, or take a GPU with "
            f"more memory"
        )
    if isinstance(error, MemoryError):
        return "out of memory; close other programs, or take smaller batches and fewer workers"
    killed = re.search(r"DataLoader worker \(pid.*?\) is killed by signal: (\w+)", str(error))
    if isinstance(error, RuntimeError) and killed:
        return (
            f"a loader process was killed ({killed[1]}), as happens where memory or /dev/shm is "
            f"full; lower --engine.loader-workers, or give the container more (--shm-size)"
        )
    return None


def of_the_system(error: OSError) -> str:
    """What was touched, what the system said, and what helps; of an error that some code of Python
    raised with words of its own, those."""
    if error.errno is None or error.strerror is None:
        return " ".join(str(error).split()) or type(error).__name__
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = f"{' -> '.join(names)}: " if names else ""
    remedy = REMEDIES.get(error.errno)
    return f"{where}{error.strerror}" + (f"; {remedy}" if remedy else "")


def of_an_import(error: ImportError) -> str | None:
    """A package that is not installed, or operators that are not built, which say so themselves;
    None where a module of ours, or a name in one that is there, is not found."""
    if error.name is None:
        return " ".join(str(error).split())
    package = error.name.partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package in OURS:
        return None
    return f"the package {package} is not installed in this Python; run: make setup"


def first_line(error: BaseException) -> str:
    """What it says, cut to a line; its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
