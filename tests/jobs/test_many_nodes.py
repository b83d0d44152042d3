"""A run through the losses that a cluster of several nodes can have, equal to an unhurt one.

`pytest -s` shows how long each took until the next step.
"""

import time

import mlflow
import pytest

from pipeline.checkpoint_store import checkpoint_steps
from tests.jobs.nodes import Cluster, Run, assert_same, options, report, send

EPOCHS = 10

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "runs" / "many")


@pytest.fixture
def command(drawn, run) -> list[object]:
    return options(drawn, run.folder, EPOCHS, "--engine.checkpoint-steps", 2, "--workers", 2)


def tracked_steps(run: Run, key: str) -> list[int]:
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run.folder.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("deformable-detr")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    return sorted(m.step for m in client.get_metric_history(tracked.info.run_id, key))


def assert_unhurt(run: Run, uninterrupted: Run) -> None:
    assert_same(run, uninterrupted)
    assert tracked_steps(run, "train/loss") == [x["step"] for x in run.lines("train")]
    assert tracked_steps(run, "val/AP") == [x["step"] for x in run.lines("evaluation")]


def test_a_killed_node_and_a_stop_change_nothing(run, command, reference):
    with Cluster(nodes=3) as cluster:  # one of them spare
        job = cluster.jobs(*command)
        cluster.wait(run.reached(4), job)
        nodes = {cluster.node_of(w) for w in cluster.processes("RayTrainWorker")}
        assert len(nodes) == 2  # a worker each
        since = time.time()
        cluster.kill_node(nodes.pop())
        report("node killed, another is free", cluster.wait(run.went_on(since), job))

        cluster.wait(run.reached(run.step() + 1), job)
        since = time.time()
        stop = cluster.jobs("stop", "--job", "many-0")
        assert stop.wait(400) == 0, stop.log.read_text()
        report("jobs stop, until the job has ended", time.time() - since)
        assert "STOPPED" in stop.log.read_text()
        assert job.wait(240) == 2
        told = job.log.read_text()
        assert "stopped as asked" in told
        assert "restart 1 of 3" in told
        assert run.lines("event")[-1]["event"] == "stopped"
        assert max(checkpoint_steps(run.folder)) == run.step()  # nothing is lost

        since = time.time()
        job = cluster.jobs(*command)
        report("submitted again after a stop", cluster.wait(run.went_on(since), job))
        assert job.wait(600) == 0, job.log.read_text()
    assert_unhurt(run, reference(2, EPOCHS))


@pytest.mark.chaos
def test_a_killed_worker_driver_controller_and_cluster_change_nothing(run, command, reference):
    with Cluster(nodes=2) as cluster:
        job = cluster.jobs(*command)
        cluster.wait(run.reached(4), job)
        since = send(cluster.processes("RayTrainWorker")[0])
        report("worker killed", cluster.wait(run.went_on(since), job))

        cluster.wait(run.reached(run.step() + 4), job)
        (driver,) = cluster.processes("jobs.driver")
        since = send(driver)
        report("driver killed", cluster.wait(run.went_on(since), job))

        cluster.wait(run.reached(run.step() + 4), job)
        (controller,) = cluster.processes("ray::TrainController")
        since = send(controller)
        report("Ray Train's controller killed", cluster.wait(run.went_on(since), job))

        cluster.wait(run.reached(run.step() + 4), job)
        told = [line for line in job.log.read_text().splitlines() if "; restart " in line]
        # Of each the first: a checkpoint lay between.
        assert ["restart 1 of 3" in line for line in told] == 3 * [True], told
    assert job.wait(60) != 0  # with all its cluster

    with Cluster(nodes=2) as cluster:
        since = time.time()
        job = cluster.jobs(*command)
        report("cluster lost, submitted to a new one", cluster.wait(run.went_on(since), job))
        assert job.wait(240) == 0, job.log.read_text()
    assert_unhurt(run, reference(2, EPOCHS))


@pytest.mark.chaos
def test_a_node_that_drains_loses_no_step(run, command, reference):
    with Cluster(nodes=3) as cluster:
        job = cluster.jobs(*command)
        cluster.wait(run.reached(4), job)
        node = cluster.node_of(cluster.processes("RayTrainWorker")[0])
        since = time.time()
        node.terminate()  # what a machine does that goes down in order
        report("node drains, another is free", cluster.wait(run.went_on(since), job))
        assert "a node is about to go" in job.log.read_text()
        stopped = [x["step"] for x in run.lines("event") if x["event"] == "stopped"]
        started = [x["step"] for x in run.lines("event") if x["event"] == "start"]
        assert stopped == started[1:]
        assert job.wait(240) == 0, job.log.read_text()
    assert_unhurt(run, reference(2, EPOCHS))


@pytest.mark.chaos
def test_an_elastic_run_shrinks_and_grows(drawn, run, reference):
    # Images by themselves and no dropout: then the number of workers changes rounding alone. No
    # choice among proposals, which rounding decides while all are alike, and a rate that lets it
    # grow slowly. Batches that take a second, so that it grows again within 50 steps.
    alone = (
        "--model.no-two-stage", "--model.dropout", 0, "--optimizer.lr", 2e-5,
        "--optimizer.backbone-lr", 2e-5, "--engine.precision", "fp32", "--engine.micro-batch", 1,
        "--engine.checkpoint-steps", 2, "--optimizer.batch-size", 16,
    )  # fmt: skip
    elastic = ("--workers", 2, "--min-workers", 1, "--resize-interval", 5)
    with Cluster(nodes=2) as cluster:
        job = cluster.jobs(*options(drawn, run.folder, 40, *alone, *elastic))
        cluster.wait(run.reached(4), job)
        since = time.time()
        cluster.kill_node(cluster.node_of(cluster.processes("RayTrainWorker")[0]))
        report("node killed, elastic, none is free", cluster.wait(run.went_on(since), job))
        assert run.worlds()[-1] == 1

        since = time.time()
        cluster.add_node()
        report("node added, elastic", cluster.wait(run.went_on(since), job))
        assert run.worlds()[-1] == 2
        stopped = [x["step"] for x in run.lines("event") if x["event"] == "stopped"]
        started = [x["step"] for x in run.lines("event") if x["event"] == "start"]
        assert stopped == started[-1:]  # to grow costs no step
        assert job.wait(400) == 0, job.log.read_text()
    lines, unhurt = run.lines("train"), reference(2, 40, *alone).lines("train")
    for name in ("step", "lr"):
        assert [x[name] for x in lines] == [x[name] for x in unhurt]
    assert started[-1] < 50
    apart = [abs(x["loss"] / y["loss"] - 1) for x, y in zip(lines[:50], unhurt[:50], strict=True)]
    print(
        f"losses of the first 50 steps: at most {max(apart):.1e} apart, of all {len(lines)}: "
        f"{max(abs(x['loss'] / y['loss'] - 1) for x, y in zip(lines, unhurt, strict=True)):.1e}"
    )
    assert max(apart) <= 1e-5
