"""A folder that one process has at a time, until it ends, whichever way."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(folder: Path, wait: bool) -> Iterator[None]:
    """Keeps other processes out of the folder, which is made and may be removed by who had it.

    Raises:
        BlockingIOError: another process has it, and it is not to be waited for.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / "lock").open("w")
            break
        except FileNotFoundError:  # who had it has removed it just now
            continue
    with file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
