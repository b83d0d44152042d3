"""New lines of a run's metrics file as they are written."""

import os
from pathlib import Path
from typing import Any

from pipeline.tracking import whole_lines


class Tail:
    """Reads `metrics.jsonl` from where it last stopped.

    A resumed run replaces the file by a shorter one; then reading starts anew, so a line can be
    seen twice, and readers must skip steps that they have had.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position, self.inode = 0, -1

    def new_lines(self) -> list[dict[str, Any]]:
        """Whole lines since the last call; a line still being written is left for the next."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino  # not of the path, which may be another by now
            if inode != self.inode:
                self.position, self.inode = 0, inode
            file.seek(self.position)
            data = file.read()
        lines, length = whole_lines(data)
        self.position += length
        return lines
