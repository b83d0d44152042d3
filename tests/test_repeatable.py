"""What lets tests end alike each time: their random examples, and ports of their own."""

import os
import subprocess
import sys
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT


def test_examples_are_the_same_each_time_and_have_no_deadline():
    seen = []

    @settings(max_examples=20)
    @given(st.integers())
    def example(number):
        if not seen:
            time.sleep(0.3)  # above Hypothesis' own deadline
        seen.append(number)

    example()
    example()
    assert len(set(seen)) > 10
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


def test_two_processes_of_the_tests_are_given_no_port_in_common():
    program = "from tests.ports import free_ports; print(*free_ports(1000))"
    given = [
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True,
            env={**os.environ, "PYTEST_XDIST_WORKER": f"gw{i}", "PYTEST_XDIST_WORKER_COUNT": "2"},
        ).stdout.split()
        for i in range(2)
    ]  # fmt: skip
    assert len({*given[0], *given[1]}) == 2000
