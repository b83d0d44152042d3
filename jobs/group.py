"""A worker group of Ray Train around `pipeline.train.train`, started over after failures."""

import os
import threading
import time
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import (
    ControllerError,
    RayTrainError,
    TrainingFailedError,
    WorkerGroupError,
)

from jobs.fence import Fence
from jobs.lost import LESS_MEMORY, WorkersLost, in_a_line, killed_for_memory, node_memory
from jobs.process_group import ProcessGroupConfig
from jobs.resources import Waiting, placement_groups, recount, release
from jobs.restarts import Restarts
from jobs.save_first import SaveFirst
from jobs.spec import JOB_VARIABLE, JobSpec
from jobs.stopping import ASKED, StopFile
from pipeline.config import RunConfig
from pipeline.errors import FolderInUse, UserError
from pipeline.storage import patiently

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
        self.asked = self.told = self.over = False

    def ask_to_stop(self) -> None:
        """Has training save and end; may be called in a signal's handler. Once training has ended,
        no request is left behind: it would stop the next start."""
        self.asked = True
        self.tell()

    def tell(self) -> None:
        """Passes the request on, now or, where storage is away, at the next look."""
        if not self.over:
            with suppress(OSError):
                self.request.ask(ASKED)
                self.told = True

    def train(self) -> bool:
        """Trains to the end of the schedule, or until `ask_to_stop`; whether it is the end.

        Starts over after failures that may pass, as often as `Restarts` allows. Then it raises
        `UserError` where memory was too small, `WorkersLost` where processes were lost for another
        reason, and else the last failure's cause.
        """
        try:
            return self._train()
        finally:
            self.over = True
            with suppress(OSError):  # storage that is away; the next job's driver withdraws it
                patiently(self.request.withdraw)  # nobody is left to answer it

    def _train(self) -> bool:
        restarts = Restarts(self.folder, self.spec.restarts)
        while True:
            try:
                self.request.withdraw()  # one that the group before has not lived to answer
                reason = ASKED if self.asked else self.attempt()
            except (TrainingFailedError, RayError, OSError) as error:
                cause = root_cause(error)
                permanent = isinstance(cause, PERMANENT) and not isinstance(cause, FolderInUse)
                if self.asked:
                    print(f"while it was stopping: {in_a_line(cause)}", flush=True)
                    return False
                if permanent:
                    raise cause from error
                if killed_for_memory(cause) and restarts.stuck():
                    raise UserError(too_large(cause, restarts)) from error
                if not restarts.allowed():
                    raise last_failure(cause, restarts) from error
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
            if self.asked and not self.told:
                self.tell()
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
    """The exception of the worker that failed first, as far as it can be told: a user's mistake, or
    a process that is gone, rather than the collective that broke because of it."""
    if isinstance(error, ControllerError):
        return error.controller_failure
    if not isinstance(error, WorkerGroupError):
        return error
    failures: list[Any] = [error.worker_failures[rank] for rank in sorted(error.worker_failures)]
    causes = [getattr(f, "cause", None) or f for f in failures]
    for likely in (lambda c: isinstance(c, PERMANENT), killed_for_memory, is_loss):
        if found := [cause for cause in causes if likely(cause)]:
            return found[0]
    return causes[0] if causes else error


def is_loss(cause: BaseException) -> bool:
    """Whether a process, a node or the resources for them are gone, by Ray's account."""
    return isinstance(cause, (RayError, RayTrainError)) and not isinstance(cause, RayTaskError)


def too_large(cause: BaseException, restarts: Restarts) -> str:
    """The line for a run that was killed for memory twice at one place."""
    return (
        f"a training process was killed for memory twice, at step {restarts.killed_at} without a "
        f"new one between: {node_memory(str(cause))}; {LESS_MEMORY}"
    )


def last_failure(cause: BaseException, restarts: Restarts) -> BaseException:
    """What to raise for a failure after which the job may not start over."""
    if killed_for_memory(cause):
        return UserError(f"{in_a_line(cause)}; {LESS_MEMORY}; {restarts.spent()}")
    if is_loss(cause):
        return WorkersLost(f"training has lost its workers: {in_a_line(cause)}; {restarts.spent()}")
    return cause
