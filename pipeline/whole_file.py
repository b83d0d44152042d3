"""A small file that readers find whole, as it was or as it is, never half written."""

import os
from pathlib import Path


def write_whole(path: Path, text: str, aside: Path | None = None) -> None:
    """Writes `text` beside `path`, or in the folder `aside` of the same file system, and renames it
    to `path`."""
    folder = aside or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{path.name}.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
