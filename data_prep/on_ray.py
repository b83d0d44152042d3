"""Tasks of a conversion on a Ray cluster: the one file of this package that knows Ray."""

import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.parallel import OrderedMap, Result, Task, default_workers, drawn_ahead

LOCAL, AUTO = "local", "auto"
CONNECT_TIMEOUT = 5.0  # seconds; Ray itself would try for minutes
# Ray gives a node 30 s, which cannot be changed and is short on a machine with much else to do.
STARTS, TOO_SLOW = 3, "timed out during startup"


@contextmanager
def ray_cluster(address: str) -> Iterator[OrderedMap]:
    """Connect to a cluster, and give an ordered map over all of its CPUs.

    Folders that the tasks read and write must be the same on every machine: a shared file system,
    or URLs. The cluster needs this environment's Python packages; this package itself is sent.

    Args:
        address: "auto" for the one in RAY_ADDRESS or on this machine, "local" for one that is
            started here and ended with the block, else host:port or ray://host:port.

    Raises:
        ValueError: there is no cluster at the address, or (while mapping) it was lost.
    """
    address = os.environ.get("RAY_ADDRESS", AUTO) if address == AUTO else address
    _refuse_silent(address)
    options: dict[str, object] = {}
    if address == LOCAL:
        options = {"num_cpus": default_workers(), "include_dashboard": False}
        if "ray" not in sys.modules:
            # Ray's control port listens on every interface. It reads this when it is imported.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    for left in reversed(range(STARTS)):
        try:
            ray.init(
                address=address,
                runtime_env={"py_modules": [str(Path(__file__).parent)]},
                log_to_driver=False,
                logging_level="error",
                **options,
            )
            break
        except Exception as error:  # Ray raises all kinds, and plain Exception when it cannot start
            if TOO_SLOW in str(error) and left:
                continue
            why = str(error).partition("\n")[0]
            raise ValueError(
                f"no Ray cluster at {address!r} ({why}); start one with ray start --head, or take "
                f"--ray {LOCAL}"
            ) from None

    def ordered(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        remote = ray.remote(num_cpus=1, max_retries=3)(function)
        ahead = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        return drawn_ahead(remote.remote, ray.get, tasks, ahead)

    try:
        yield ordered
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"the Ray cluster failed: {why}; run the same command again") from None
    finally:
        ray.shutdown()


def _refuse_silent(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT).close()
    except (OSError, ValueError) as error:
        raise ValueError(f"no Ray cluster answers at {address!r}: {error}") from None
