"""A small file that readers find whole, as it was or as it is, never half written, also after a
power cut."""

import itertools
import os
from pathlib import Path

PARTIAL = ".tmp"
# Names of their own: a signal's handler may write the file that it has interrupted the writing of.
_numbers = itertools.count()


def write_whole(path: Path, text: str, aside: Path | None = None) -> None:
    """Writes `text` beside `path`, or in the folder `aside` of the same file system, and renames it
    to `path`. Raises `OSError` naming `path`; what was there before is still there."""
    folder = aside or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{path.name}.{os.getpid()}-{next(_numbers)}{PARTIAL}"
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    flush(path.parent)


def flush(path: Path) -> None:
    """What was written to a file, or a folder's list of names, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
