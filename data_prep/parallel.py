"""Work spread over processes, with results in order and few tasks held at once."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing.connection import wait
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def default_workers() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0))


def ordered_map(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    """Yield `function(task)` for each task, in order; `function` must be picklable.

    At most two tasks a worker are drawn from `tasks` ahead of the result being yielded, so a
    generator of heavy tasks stays small in memory. One worker means this very process.

    Raises:
        ValueError: `workers` is below 1.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if workers == 1:
        yield from map(function, tasks)
        return
    source = iter(tasks)
    # Forking a process that runs threads (progress bars, torch) can deadlock: spawn.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for task in islice(source, 2 * workers):
                waiting.append(pool.submit(function, task))
            while waiting:
                result = waiting.popleft().result()
                for task in islice(source, 1):
                    waiting.append(pool.submit(function, task))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal; the parent decides, the worker ends its task.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed must not go on writing beside the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
