"""A small file that readers find whole, as it was or as it is, never half written."""

import itertools
import os
from pathlib import Path

PARTIAL = ".tmp"
# Names of their own: a signal's handler may write the file that it has interrupted the writing of.
_numbers = itertools.count()


def write_whole(path: Path, text: str, aside: Path | None = None) -> None:
    """Writes `text` beside `path`, or in the folder `aside` of the same file system, and renames it
    to `path`."""
    folder = aside or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{path.name}.{os.getpid()}-{next(_numbers)}{PARTIAL}"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
