"""A worker group of Ray Train around `pipeline.train.train`, started over after failures."""

import os
import re
import threading
import time
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from jobs.fence import Fence
from jobs.process_group import ProcessGroupConfig
from jobs.resources import Waiting, placement_groups, recount, release
from jobs.restarts import Restarts
from jobs.save_first import SaveFirst
from jobs.spec import JOB_VARIABLE, JobSpec
from jobs.stopping import ASKED, StopFile
from pipeline.config import RunConfig
from pipeline.errors import FolderInUse, UserError

# Failures that would come again with every restart.
PERMANENT = (UserError, FloatingPointError, ImportError)
FINISHED = ""  # why training ended, where nobody stopped it


def worker(arguments: dict[str, Any]) -> str:
    """Runs in every process of the group. Returns why training ended."""
    import torch

    from jobs.pictures import draw
    from jobs.system_metrics import SystemMetrics
    from pipeline.errors import Stopped
    from pipeline.train import train

    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    first, folder = torch.distributed.get_rank() == 0, Path(arguments["folder"])
    Fence(folder, arguments["job"]).end_process_when_over(arguments["attempt"])
    config = RunConfig.from_json(arguments["config"])
    try:
        with SystemMetrics(folder) if first else nullcontext():
            train(config, folder)
            if first:
                draw(folder, config)
    except Stopped:
        return StopFile(folder).answer() if first else ASKED
    return FINISHED


class Group:
    """The worker groups of one job, one after the other."""

    def __init__(self, spec: JobSpec, config: RunConfig, use_gpu: bool) -> None:
        self.spec, self.config, self.use_gpu = spec, config, use_gpu
        self.folder = Path(spec.folder)
        self.need = {"CPU": spec.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
        self.fence = Fence(self.folder, os.environ[JOB_VARIABLE])
        self.request = StopFile(self.folder)
        self.asked = False

    def ask_to_stop(self) -> None:
        """Has training save and end; may be called in a signal's handler."""
        self.asked = True
        self.request.ask(ASKED)

    def train(self) -> bool:
        """Trains to the end of the schedule, or until `ask_to_stop`; whether it is the end.

        Starts over after failures that may pass, as often as `Restarts` allows, and raises the
        last one's cause.
        """
        restarts = Restarts(self.folder, self.spec.restarts)
        while True:
            self.request.withdraw()  # one that the group before has not lived to answer
            if self.asked:
                return False
            try:
                reason = self.attempt()
            except (TrainingFailedError, RayError) as error:
                cause = root_cause(error)
                permanent = isinstance(cause, PERMANENT) and not isinstance(cause, FolderInUse)
                if self.asked:
                    print(f"while it was stopping: {in_a_line(cause)}", flush=True)
                    return False
                if permanent or not restarts.allowed():
                    raise cause from error
                print(f"{in_a_line(cause)}; {restarts}; restarting", flush=True)
            else:
                if reason in (FINISHED, ASKED):
                    return reason == FINISHED
                print("a node is about to go; training is saved and goes on elsewhere", flush=True)

    def attempt(self) -> str:
        """One worker group, from its start to its end. Returns why it ended."""
        release()
        outcome: Future[str] = Future()
        # Not in the main thread, which takes signals.
        threading.Thread(target=self.fulfil, args=(outcome,), daemon=True).start()
        waiting = Waiting(self.need, self.spec.min_workers or self.spec.workers)
        while not outcome.done():
            has_resources = bool(placement_groups("CREATED"))
            if self.asked and not has_resources:
                return ASKED  # nothing has begun that could be saved
            waiting.look(has_resources)
            time.sleep(0.5)
        return outcome.result()

    def fulfil(self, outcome: "Future[str]") -> None:
        try:
            if self.spec.min_workers:
                recount()
            outcome.set_result(self.trainer(self.fence.begin()).fit().return_value)
        except BaseException as error:
            outcome.set_exception(error)

    def trainer(self, attempt: int) -> DataParallelTrainer:
        spec = self.spec
        return DataParallelTrainer(
            worker,
            train_loop_config={
                "config": self.config.to_json(),
                "folder": spec.folder,
                "job": self.fence.job,
                "attempt": attempt,
            },
            backend_config=ProcessGroupConfig(
                backend="nccl" if self.use_gpu else "gloo",
                timeout=self.config.engine.collective_timeout,
            ),
            scaling_config=ScalingConfig(
                num_workers=(spec.min_workers, spec.workers) if spec.min_workers else spec.workers,
                elastic_resize_monitor_interval_s=spec.resize_interval,
                use_gpu=self.use_gpu,
                resources_per_worker=self.need,
            ),
            run_config=RayRunConfig(
                storage_path=str(self.folder / "ray"),
                name=f"attempt-{attempt}",
                # Ray would count in total, and retry what comes again with every restart.
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
                callbacks=[SaveFirst(self.folder, spec.grace)],
            ),
        )


def root_cause(error: BaseException) -> BaseException:
    """The exception of the worker that failed first, as far as it can be told: a user's mistake
    rather than the collective that broke because of it."""
    if not isinstance(error, WorkerGroupError):
        return error
    failures: list[Any] = [error.worker_failures[rank] for rank in sorted(error.worker_failures)]
    causes = [getattr(f, "cause", None) or f for f in failures]
    return next((c for c in causes if isinstance(c, PERMANENT)), causes[0] if causes else error)


def in_a_line(error: BaseException) -> str:
    """What happened. Of a process that is gone Ray tells in many lines, the reason in one of them:
    "The actor died because its node has died.", "Memory on the node (IP: 10.0.0.1, ID: 3d40) was
    22GB used / 23GB limit (0.95)"."""
    text = str(error)
    memory = re.search(r"Memory on the node \(IP: ([^,]+),.*?\) was (.+?) used / (.+?) limit", text)
    if memory:
        node, used, limit = memory.groups()
        return f"a worker was killed: node {node} ran low on memory ({used} used of {limit})"
    because = re.search(r"The actor[^.\n]* because[^.\n]*", text)
    if because:
        return because.group().replace("The actor", "a worker", 1)
    return (text.strip().splitlines() or [type(error).__name__])[0]
