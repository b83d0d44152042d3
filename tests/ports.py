"""Ports of this machine on which nobody listens, and which stay so until they are used."""

import random
import socket

# Below those that Linux gives to connections by itself (32768 on), so that none of these takes one
# meanwhile, and above those of a local cluster's workers (jobs/cluster.py).
FROM, TO = 30_100, 32_700
_given: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Each is given once to a process of the tests."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(FROM, TO), TO - FROM):
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
