"""Submission of a training job through the Ray Jobs API, and following it."""

import asyncio
import logging
import os
import re
import sys
import time
from typing import Any

from jobs.lost import LOW_ON_MEMORY, of_supervisor
from jobs.spec import ROOT, SPEC_VARIABLE, JobSpec
from pipeline.cli import DEBUG_VARIABLE
from pipeline.errors import UserError

# What a job does not need of the checkout. The built operators in .build/cuda_ops do travel,
# although git ignores them.
EXCLUDES = [
    "/.git", "/.venv", "/outputs", "/tests", "/docs", "/.mypy_cache", "/.ruff_cache",
    "/.pytest_cache", "/.hypothesis", "__pycache__", "/.build/*", "!/.build/cuda_ops",
]  # fmt: skip
# How soon Ray Train notices; its defaults are 2, 60 and 5 s.
RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead worker
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",  # that the resources it counted on are gone
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # that a node drains
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}
NOISE = re.compile(r"INFO job_manager\.py:\d+ -- Runtime env is setting up\.")
PROGRESS = re.compile(r"\d+%\|")  # a progress bar as tqdm draws it
AGENT_TIMEOUT = 90.0  # seconds until a starting cluster must take jobs
STOP_MARGIN = 20.0  # seconds that Ray may take beyond the job's own grace
QUIET_SECONDS = 5.0  # between two progress lines where the terminal cannot redraw


def connect(address: str) -> Any:
    """A Ray Jobs client. Raises `UserError` when nothing answers there."""
    os.environ.setdefault("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    # EXCLUDES says what stays behind; Ray would warn of each default that agrees with it.
    os.environ.setdefault("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except Exception as error:  # of requests, of Ray, of what answers: whatever is there
        raise UserError(why_no_cluster(address, error)) from None
    check_ray_version(address, client._server_ray_version)  # it has no public name (2.60)
    sdk = "ray.dashboard.modules"
    for name in ("ray", f"{sdk}.dashboard_sdk", f"{sdk}.job.sdk"):  # at INFO by now
        logging.getLogger(name).setLevel(logging.WARNING)
    return client


def why_no_cluster(address: str, error: Exception) -> str:
    """The line for what came of asking an address for Ray's Jobs API."""
    said = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "AuthenticationError" or "401" in said or "403" in said:
        return (
            f"the Ray cluster at {address!r} wants a token, and got none or another; set "
            f"RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's"
        )
    return (
        f"no Ray cluster answers at {address!r} ({said[:200]}); give the dashboard's address, such "
        f"as http://HOST:8265, or leave --address out to run on this machine"
    )


def check_ray_version(address: str, theirs: str) -> None:
    """Raises `UserError` where the cluster has another Ray than this machine. A job would get as
    far as its first worker, and say there what nobody expects."""
    from ray import __version__ as ours

    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise UserError(
            f"Ray versions: got {theirs} on the cluster at {address!r} and {ours} here, expected "
            f"the same; start the cluster with ray=={ours}, with the packages of requirements.lock"
        )


def submit(client: Any, spec: JobSpec, name: str, entrypoint: str = "python -m jobs.entry") -> str:
    """Submits the job and returns its id: the name and the number of the attempt.

    A cluster that has just started, without an agent to take jobs yet, is waited for, and so is one
    that drops the connection; what it took of a dropped one counts.
    """
    jobs = client.list_jobs()
    for other in jobs:
        same = (other.metadata or {}).get("folder") == spec.folder
        if same and not other.status.is_terminal():
            raise UserError(
                f"job {other.submission_id} trains in {spec.folder} already; follow it with: "
                f"python -m jobs logs --job {other.submission_id} --address ADDRESS"
            )
    taken = {job.submission_id for job in jobs}
    attempt = next(n for n in range(len(taken) + 1) if f"{name}-{n}" not in taken)
    job_id = f"{name}-{attempt}"
    job = {
        "entrypoint": entrypoint,
        "submission_id": job_id,
        "runtime_env": {
            "working_dir": str(ROOT),
            "excludes": EXCLUDES,
            "env_vars": {
                SPEC_VARIABLE: spec.to_json(),
                # Seconds from SIGTERM to SIGKILL when the job is stopped; Ray's default is 3.
                "RAY_JOB_STOP_WAIT_TIME_S": str(round(spec.grace)),
                **RAY_TRAIN,
                **{name: os.environ[name] for name in (DEBUG_VARIABLE,) if name in os.environ},
            },
        },
        "metadata": {
            "folder": spec.folder,
            "recipe": spec.run_config().recipe,
            "grace": str(spec.grace),
        },
    }
    deadline = time.monotonic() + AGENT_TIMEOUT
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            if "No available agent" not in str(error):
                said = " ".join(str(error).split())[:300]
                raise UserError(f"the cluster refuses the job: {said}") from None
            if time.monotonic() > deadline:
                raise UserError(
                    f"the cluster takes no jobs: no agent was ready in {AGENT_TIMEOUT:.0f} s; "
                    f"look at its nodes with: ray status"
                ) from None
        except OSError:  # requests' errors: a busy dashboard has dropped the connection
            if has_arrived(client, job_id):
                return job_id
            if time.monotonic() > deadline:
                raise
        time.sleep(1)


def has_arrived(client: Any, job_id: str) -> bool:
    """Whether the cluster knows of the job, whose submission it did not answer."""
    try:
        return any(job.submission_id == job_id for job in client.list_jobs())
    except OSError:
        return False


def follow(client: Any, job_id: str) -> str:
    """Prints the job's log until it ends; returns its final status, such as "SUCCEEDED"."""
    asyncio.run(_stream(client, job_id, sys.stdout.isatty()))
    status = client.get_job_status(job_id)
    while not status.is_terminal():  # the log can close just before the status is written
        time.sleep(0.2)
        status = client.get_job_status(job_id)
    return status.value


async def _stream(client: Any, job_id: str, redraw: bool) -> None:
    """Passes lines on; of progress bars, a terminal shows the latest in place, a file one every
    few seconds. Ray's page on a job that was killed for memory, the log's last, becomes a line."""
    printed, pending, open_bar, killed = 0.0, "", False, False
    async for chunk in client.tail_job_logs(job_id):
        *lines, pending = (pending + chunk).split("\n")
        for line in lines:
            if killed or NOISE.search(line):
                continue
            if LOW_ON_MEMORY in line and (told := of_supervisor(line)):
                killed, line = True, f"error: {told}"
            bar = PROGRESS.search(line) is not None
            if bar and not redraw and time.monotonic() - printed < QUIET_SECONDS:
                continue
            if bar:
                printed = time.monotonic()
            start = "\r\033[K" if open_bar else ""
            open_bar = bar and redraw
            print(f"{start}{line}", end="" if open_bar else "\n", flush=True)
    if open_bar:
        print()


def stop(client: Any, job_id: str) -> str:
    """Stops a job, which saves first, and returns its status once it has ended."""
    client.stop_job(job_id)
    grace = float((client.get_job_info(job_id).metadata or {}).get("grace", 0.0))
    deadline = time.monotonic() + grace + STOP_MARGIN
    while not (status := client.get_job_status(job_id)).is_terminal():
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return status.value
