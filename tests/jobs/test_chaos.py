"""A run that is struck at random, again and again, equal to one that nothing touched.

Every kind of blow falls at least once while it trains. CHAOS_SEED and CHAOS_KILLS choose another
schedule. `pytest -s` shows every blow.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import psutil
import pytest

from pipeline.checkpoint_store import checkpoint_path, checkpoint_steps
from tests.jobs.nodes import Cluster, Run, options
from tests.jobs.test_many_nodes import assert_unhurt

SEED = int(os.environ.get("CHAOS_SEED", "0"))
KILLS = int(os.environ.get("CHAOS_KILLS", "30"))
EPOCHS = KILLS  # of five steps: enough for a few between two blows
WORKERS, NODES = 2, 3

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(3600)]


class Chaos:
    """A job on a cluster of three nodes, and what can befall it: each blow says whether it has hit
    anything."""

    def __init__(self, run: Run, command: list[object]) -> None:
        self.run, self.command = run, command
        self.checkpoints = run.folder / "checkpoints"
        self.cluster = Cluster(NODES)
        self.job = self.cluster.jobs(*command)

    @property
    def workers(self) -> list[psutil.Process]:
        return self.cluster.processes("RayTrainWorker")

    def worker(self) -> bool:
        return kill(self.workers[:1])

    def all_workers(self) -> bool:
        return kill(self.workers)

    def all_workers_while_writing(self) -> bool:
        """In the middle of a checkpoint, of which the unfinished folder is left."""
        workers, deadline = self.workers, time.monotonic() + 20
        while workers and time.monotonic() < deadline:
            if list(self.checkpoints.glob("*.partial")):
                return kill(workers) and bool(list(self.checkpoints.glob("*.partial")))
            time.sleep(0.001)
        return False

    def all_workers_and_the_newest_checkpoint(self) -> bool:
        """Which is cut short before others look for it."""
        workers = self.workers
        if not kill(workers):
            return False
        psutil.wait_procs(workers, timeout=60)
        steps = checkpoint_steps(self.run.folder)
        if steps:
            os.truncate(checkpoint_path(self.run.folder, steps[-1]) / "training.pt", 1000)
        return bool(steps)

    def node(self) -> bool:
        """One that trains, if any does; a new one takes its place."""
        working = []
        for worker in self.workers:
            with suppress(psutil.NoSuchProcess, StopIteration):
                working.append(self.cluster.node_of(worker))
        alive = [n for n in self.cluster.nodes if n is not self.cluster.head and n.poll() is None]
        self.cluster.kill_node((working or alive)[0])
        self.cluster.add_node()
        return True

    def driver(self) -> bool:
        return kill(self.cluster.processes("jobs.driver"))

    def controller(self) -> bool:
        return kill(self.cluster.processes("TrainController"))

    def whole_job(self) -> bool:
        """Its entry point, which would have started a driver anew."""
        return kill(self.cluster.processes("jobs.entry"))

    def whole_cluster(self) -> bool:
        self.cluster.stop()
        self.cluster = Cluster(NODES)
        return True

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


def kill(processes: list[psutil.Process]) -> bool:
    """Whether any was alive."""
    killed = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
            killed += 1
    return killed > 0


Blow = Callable[[Chaos], bool]
BLOWS: tuple[Blow, ...] = (
    Chaos.worker, Chaos.all_workers, Chaos.all_workers_while_writing,
    Chaos.all_workers_and_the_newest_checkpoint, Chaos.node, Chaos.driver, Chaos.controller,
    Chaos.whole_job, Chaos.whole_cluster,
)  # fmt: skip


def planned(chooser: random.Random) -> Iterator[tuple[Blow | None, bool]]:
    """The blows, and whether it trains when each falls: every kind once while it does, in any
    order, and then any (None: drawn when its time has come)."""
    kinds = list(BLOWS)
    chooser.shuffle(kinds)
    yield from ((blow, True) for blow in kinds[:KILLS])
    for _ in range(KILLS - len(kinds)):
        yield None, chooser.random() < 0.75


def strike(chaos: Chaos, chooser: random.Random, blow: Blow | None, training: bool) -> str:
    """Waits for its time, and strikes until a blow hits; its name."""
    while True:
        assert not chaos.finished(), "the run ended before a blow"
        if training:
            chaos.wait(chaos.run.reached(chaos.run.step() + chooser.randint(1, 3)))
            time.sleep(chooser.random() * 0.3)
        else:
            time.sleep(chooser.random() * 15)
        drawn, step = blow or chooser.choice(BLOWS), chaos.run.step()
        hit = drawn(chaos)
        when = f"at step {step}" + ("" if training else ", or in a start")
        print(f"\n{drawn.__name__} {when}{'' if hit else ': nothing there'}", flush=True)
        chaos.go_on()
        if hit:
            return drawn.__name__


def test_a_run_struck_at_random_ends_as_if_nothing_had_been(drawn, tmp_path, reference):
    run = Run(tmp_path / "runs" / "chaos")
    command = options(
        drawn, run.folder, EPOCHS, "--engine.checkpoint-steps", 1, "--workers", WORKERS,
        "--restarts", 10,
    )  # fmt: skip
    chooser = random.Random(SEED)
    chaos = Chaos(run, command)
    try:
        hits = [strike(chaos, chooser, blow, training) for blow, training in planned(chooser)]
        chaos.wait(chaos.finished)
        assert chaos.job.wait(240) == 0, chaos.job.log.read_text()
    finally:
        chaos.cluster.stop()
    assert len(hits) == KILLS
    left = {path.suffix for path in chaos.checkpoints.iterdir()}
    damaged = Chaos.all_workers_and_the_newest_checkpoint.__name__ in hits
    assert left == ({"", ".damaged"} if damaged else {""})
    assert_unhurt(run, reference(WORKERS, EPOCHS))
