"""A run that is struck at random, again and again, equal to one that nothing touched.

CHAOS_SEED and CHAOS_KILLS choose another schedule. `pytest -s` shows every blow.
"""

import os
import random
import time
from collections.abc import Callable

import psutil
import pytest

from tests.jobs.nodes import Cluster, Run, options
from tests.jobs.test_many_nodes import assert_unhurt

SEED = int(os.environ.get("CHAOS_SEED", "0"))
KILLS = int(os.environ.get("CHAOS_KILLS", "30"))
EPOCHS = KILLS  # of five steps: enough for a few between two blows
WORKERS, NODES = 2, 3

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(3600)]


class Chaos:
    """A job on a cluster of three nodes, and what can befall it."""

    def __init__(self, run: Run, command: list[object]) -> None:
        self.run, self.command = run, command
        self.cluster = Cluster(NODES)
        self.job = self.cluster.jobs(*command)

    def worker(self) -> None:
        self.kill(self.cluster.processes("RayTrainWorker")[:1])

    def workers(self) -> None:
        self.kill(self.cluster.processes("RayTrainWorker"))

    def workers_while_writing(self) -> None:
        """In the middle of a checkpoint, if one comes in time."""
        folder, deadline = self.run.folder / "checkpoints", time.monotonic() + 20
        while not list(folder.glob("*.partial")) and time.monotonic() < deadline:
            time.sleep(0.001)
        self.workers()

    def node(self) -> None:
        """One that trains, if any does; a new one takes its place."""
        working = [self.cluster.node_of(w) for w in self.cluster.processes("RayTrainWorker")]
        alive = [n for n in self.cluster.nodes if n is not self.cluster.head and n.poll() is None]
        self.cluster.kill_node((working or alive)[0])
        self.cluster.add_node()

    def driver(self) -> None:
        self.kill(self.cluster.processes("jobs.driver"))

    def controller(self) -> None:
        self.kill(self.cluster.processes("TrainController"))

    def whole_job(self) -> None:
        """Its entry point, which would have started a driver anew."""
        self.kill(self.cluster.processes("jobs.entry"))

    def whole_cluster(self) -> None:
        self.cluster.stop()
        self.cluster = Cluster(NODES)

    def kill(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            process.kill()

    def go_on(self) -> None:
        """Submits the same again where the job has ended."""
        if self.job.poll() is None:
            # The submitter learns of a dead job a moment later than the cluster.
            time.sleep(2)
        if self.job.poll() is not None and not self.finished():
            self.job = self.cluster.jobs(*self.command)

    def finished(self) -> bool:
        return any(x["event"] == "finished" for x in self.run.lines("event"))

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, self.job.log.read_text()
            if self.job.poll() is not None:
                self.go_on()
            time.sleep(0.05)


def test_a_run_struck_at_random_ends_as_if_nothing_had_been(drawn, tmp_path, reference):
    run = Run(tmp_path / "runs" / "chaos")
    command = options(
        drawn, run.folder, EPOCHS, "--engine.checkpoint-steps", 1, "--workers", WORKERS,
        "--restarts", 10,
    )  # fmt: skip
    chooser = random.Random(SEED)
    chaos = Chaos(run, command)
    faults = [
        chaos.worker, chaos.workers, chaos.workers_while_writing, chaos.node, chaos.driver,
        chaos.controller, chaos.whole_job, chaos.whole_cluster,
    ]  # fmt: skip
    try:
        for number in range(KILLS):
            assert not chaos.finished(), f"the run ended before blow {number + 1}"
            if chooser.random() < 0.75:
                chaos.wait(run.reached(run.step() + chooser.randint(1, 3)))
                time.sleep(chooser.random() * 0.3)
            else:  # while it starts
                time.sleep(chooser.random() * 15)
            fault = chooser.choice(faults)
            print(f"\nblow {number + 1}: {fault.__name__} at step {run.step()}", flush=True)
            fault()
            chaos.go_on()
        chaos.wait(chaos.finished)
        assert chaos.job.wait(240) == 0, chaos.job.log.read_text()
    finally:
        chaos.cluster.stop()
    assert_unhurt(run, reference(WORKERS, EPOCHS))
