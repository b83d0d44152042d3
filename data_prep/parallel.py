"""Work spread over processes, with results in order and few tasks held at once."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait
from typing import Any, Protocol, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class OrderedMap(Protocol):
    """Yields `function(task)` for each task, in order; drawing few tasks ahead."""

    def __call__(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], /
    ) -> Iterator[Result]: ...


def default_workers() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def worker_processes(workers: int) -> Iterator[OrderedMap]:
    """Start processes, and give an ordered map over them; functions must be picklable.

    At most two tasks a worker are drawn from `tasks` ahead of the result being yielded, so a
    generator of heavy tasks stays small in memory. One worker means this very process.

    Raises:
        ValueError: `workers` is below 1, or (while mapping) a worker was killed.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if workers == 1:
        yield map
        return
    # Forking a process that runs threads (progress bars, torch) can deadlock: spawn.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:

        def ordered(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
            return drawn_ahead(
                lambda task: pool.submit(function, task), Future[Any].result, tasks, 2 * workers
            )

        try:
            yield ordered
        except BrokenProcessPool:
            raise ValueError(
                "a worker process was killed (out of memory?); run the same command again to "
                "continue, with fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def drawn_ahead(
    submit: Callable[[Task], Any],
    result_of: Callable[[Any], Result],
    tasks: Iterable[Task],
    ahead: int,
) -> Iterator[Result]:
    """Submit tasks, `ahead` of them before the first result is awaited; yield results in order."""
    source = iter(tasks)
    waiting = deque(submit(task) for task in islice(source, ahead))
    while waiting:
        result = result_of(waiting.popleft())
        waiting.extend(submit(task) for task in islice(source, 1))
        yield result


def ordered_map(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    """Yield `function(task)` for each task, in order, by `worker_processes` of its own."""
    with worker_processes(workers) as ordered:
        yield from ordered(function, tasks)


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
