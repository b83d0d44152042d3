"""Being asked to stop: by SIGTERM, by Ctrl-C, or by a file `stop` in the run folder."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

STOP_FILE = "stop"
LOOK_EVERY = 1.0  # seconds


class StopRequest:
    """Whether this process was asked to stop; what the others were asked it does not know."""

    def __init__(self) -> None:
        self.asked = False

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # whoever asks twice does not want to wait
        self.asked = True

    def _look(self, file: Path, done: threading.Event) -> None:
        while not done.is_set():
            with suppress(OSError):  # storage that is away for a moment
                if file.exists():
                    self.asked = True
            done.wait(LOOK_EVERY)


@contextmanager
def stop_request(folder: Path, look: bool) -> Iterator[StopRequest]:
    """Listens while the block lasts. `look`: for the file, too, which is left to whoever made it.

    Signals reach the main thread alone; a training in another one (Ray's) is told by the file.
    """
    request, done = StopRequest(), threading.Event()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, request._signalled)
    watcher = threading.Thread(target=request._look, args=(folder / STOP_FILE, done), daemon=True)
    if look:
        watcher.start()
    try:
        yield request
    finally:
        done.set()
        for number, handler in before.items():
            signal.signal(number, handler)
