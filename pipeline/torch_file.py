"""A file of torch, written so that what stops it is told."""

from pathlib import Path
from typing import Any

import torch


def save(content: Any, file: Path) -> None:
    """Raises `OSError` where it cannot be written: given a path, torch.save would hide why."""
    with file.open("wb") as opened:
        try:
            torch.save(content, opened)
        except RuntimeError as error:
            # Its writer is closed after a write that failed, and complains of its own position.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
