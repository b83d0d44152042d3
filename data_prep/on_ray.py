"""Tasks of a conversion on a Ray cluster: the one file of this package that knows Ray."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from data_prep.parallel import OrderedMap, Result, Task, drawn_ahead

LOCAL = "local"


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
    package = Path(__file__).parent
    try:
        ray.init(
            address=address,
            runtime_env={"py_modules": [str(package)]},
            include_dashboard=False if address == LOCAL else None,
            log_to_driver=False,
            logging_level="error",
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"no Ray cluster answers at {address!r} ({why}); start one with ray start --head, or "
            f"take --ray {LOCAL}"
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
