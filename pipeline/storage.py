"""Storage that is away for a moment, as a network's is while its server starts anew."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
# What a later try, or another node, may not meet; it tells nothing of what was written.
PASSING = frozenset(
    (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO, errno.EBADMSG)
)
PAUSES = (1.0, 4.0, 15.0)  # seconds before each further try


def patiently(work: Callable[[], T]) -> T:
    """The result of `work`, tried again after pauses where storage fails in a way that may pass.
    Raises the last try's `OSError`."""
    for pause in PAUSES:
        try:
            return work()
        except OSError as error:
            if error.errno not in PASSING:
                raise
        time.sleep(pause)
    return work()
