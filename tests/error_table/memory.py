"""Machines whose memory is too small for a job, with a Ray that says so in its own words.

What Ray does is played; the job's own part, from the failure to the line in its log, is run.
"""

import io
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.job_submission import JobStatus

from tests.error_table.files import TRAIN
from tests.error_table.place import Mistake

SUBMIT = TRAIN.replace("pipeline train", "jobs submit")
# As Ray 2.60 writes it, shortened by most of its lines.
KILLED = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: "
    "127.0.0.1, ID: 3d40) was 22.60GB used / 23.54GB limit (0.960000). Object store memory usage: "
    "0.00GB.\nRay killed these worker(s) based on the killing policy.\nWorkers killed:\n"
    "PID\tMEM(GB)\tCOMMAND\n4711\t19.80\tray::RayTrainWorker\n"
)


class Client:
    """Of a Ray whose only job has ended with this log."""

    def __init__(self, log: str, message: str = "") -> None:
        self.log, self.message = log, message

    def list_jobs(self) -> list[Any]:
        return []

    def submit_job(self, submission_id: str, **_: Any) -> str:
        return submission_id

    def get_job_status(self, _: str) -> JobStatus:
        return JobStatus.FAILED

    def get_job_info(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(message=self.message)

    def get_job_logs(self, _: str) -> str:
        return self.log

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        yield self.log


def failing(group: Any, *failures: BaseException, steps: int = 0) -> Callable[[], str]:
    """Stands for `Group.attempt`: ends with one failure after the other, each after so many more
    steps; there is no further attempt."""
    left = list(failures)

    def attempt() -> str:
        assert left, "started over once too often"
        path = group.folder / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_text() if path.exists() else ""
        line = {"kind": "train", "step": steps * (len(failures) - len(left) + 1)}
        path.write_text(before + (json.dumps(line) + "\n" if steps else ""))
        raise left.pop(0)

    return attempt


def killed_twice(folder: str, config: Any) -> str:
    """The log of a job's driver whose worker group is killed twice."""
    from ray.exceptions import OutOfMemoryError
    from ray.train.v2.api.exceptions import WorkerGroupError

    from jobs.group import Group
    from jobs.spec import JOB_VARIABLE, JobSpec
    from pipeline.cli import tell

    os.environ[JOB_VARIABLE] = "x"
    group = Group(JobSpec(config=config.to_json(), folder=folder), config, use_gpu=False)
    killed = WorkerGroupError(KILLED, {0: OutOfMemoryError(KILLED)})
    group.attempt = failing(group, killed, killed)  # type: ignore[method-assign]
    said = io.StringIO()
    with redirect_stdout(said):
        try:
            group.train()
        except Exception as error:
            tell(error, said)
    return said.getvalue()


def a_ray_with(log: Callable[[], str]) -> Callable[[], None]:
    """The Ray that a command starts on this machine has run its job with this log."""

    def prepare() -> None:
        import jobs.launch
        from jobs.cluster import LocalCluster

        client = Client(log())
        cluster = LocalCluster(jobs="http://127.0.0.1:8265", head="")
        jobs.launch.local_cluster = lambda: nullcontext(cluster)  # type: ignore
        jobs.launch.connect = lambda _: client

    return prepare


def model_too_large() -> str:
    from pipeline.recipes import recipe

    return killed_twice(str(Path("killed").resolve()), recipe("demo"))


MEMORY = [
    Mistake("a model too large for a node's memory", SUBMIT,
            ("killed for memory twice, at step 0", "22.60GB used of 23.54GB",
             "--engine.micro-batch", "--engine.loader-workers", "--augment.short-sides"),
            "Do as it says; other programs on the node count, too.", a_ray_with(model_too_large)),
    Mistake("a node whose memory others have filled", SUBMIT,
            ("job's own process was killed", "22.60GB used of 23.54GB", "close other programs",
             "goes on from the last checkpoint"),
            "Make room there; the same command goes on.",
            a_ray_with(lambda: f"epoch 1\nUnexpected error occurred: {KILLED}")),
]  # fmt: skip
