"""A node with an address of its own is cut off in the middle of a step."""

import time

import psutil
import pytest

from tests.jobs.namespaces import Network, SeparateNodes, why_not
from tests.jobs.nodes import Run, options, report

WHY_NOT = why_not()

# How fast a cluster notices; docs/cluster.md has them with Ray's defaults.
FAST = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}

EPOCHS = 40  # of 5 steps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.chaos,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]


def writer(cluster: SeparateNodes, run: Run) -> psutil.Process:
    """The worker that holds the run folder: the first rank."""
    lock = str(run.folder / "lock")
    workers = cluster.processes("RayTrainWorker")
    return next(w for w in workers if lock in [file.path for file in w.open_files()])


def test_a_job_goes_on_without_a_node_that_is_cut_off(drawn, tmp_path):
    run = Run(tmp_path / "runs" / "cut")
    command = options(
        drawn, run.folder, EPOCHS, "--engine.checkpoint-steps", 2, "--workers", 2,
        "--min-workers", 1, "--resize-interval", 5,
    )  # fmt: skip
    with Network() as network, SeparateNodes(network, 2, **FAST) as cluster:
        job = cluster.jobs(*command)
        cluster.wait(run.reached(4), job)
        old = writer(cluster, run)
        node = cluster.node_of(old)
        name, address = cluster.places[node.pid]

        since = time.time()
        network.cut(name)
        report("node cut off, elastic", cluster.wait(run.went_on(since), job))
        assert run.worlds()[-1] == 1
        new = writer(cluster, run)
        assert cluster.node_of(new) is not node
        assert not old.is_running()  # it could no longer have written

        since = time.time()
        network.mend(name)
        cluster.kill_node(node)  # as what restarts it does; Ray gives up by itself much later
        cluster.add_node((name, address))
        report("the node is back, elastic", cluster.wait(run.went_on(since), job))
        assert run.worlds()[-1] == 2
        assert job.wait(240) == 0, job.log.read_text()
    assert [x["step"] for x in run.lines("train")] == list(range(1, EPOCHS * 5 + 1))
