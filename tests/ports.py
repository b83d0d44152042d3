"""Ports of this machine on which nobody listens, and which stay so until they are used."""

import os
import random
import socket

# Below those that Linux gives to connections by itself (32768 on), so that none of these takes one
# meanwhile, and above those of a local cluster's workers (jobs/cluster.py).
FROM, TO = 30_100, 32_700
# Of several processes that run the tests, each has its own: what one has been given and has not
# used yet, another would find free.
OWN = range(
    FROM + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]),
    TO,
    int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")),
)
_given: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Each is given once."""
    found: list[int] = []
    for port in random.SystemRandom().sample(OWN, len(OWN)):
        if len(found) == count:
            break
        with socket.socket() as one:
            try:
                one.bind(("", port))
            except OSError:
                continue
        if port not in _given:
            found.append(port)
            _given.add(port)
    assert len(found) == count
    return found


def free_port() -> int:
    return free_ports(1)[0]
