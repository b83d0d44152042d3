"""A training job from its submission to its end, on a cluster or on a Ray of its own."""

import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jobs.cluster import local_cluster
from jobs.lost import of_supervisor
from jobs.spec import JobSpec
from jobs.submit import connect, follow, stop, submit
from pipeline.errors import UserError


def launch(spec: JobSpec, address: str, wait: bool) -> None:
    """Submits the job, and follows it where it is to be waited for. Without an address it runs on a
    local Ray, which lasts as long. Raises `UserError` where it does not succeed."""
    with ExitStack() as stack:
        cluster = address or stack.enter_context(local_cluster()).jobs
        client = connect(cluster)
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", Path(spec.folder).name)
        job_id = submit(client, spec, name)
        print(f"submitted {job_id} to {cluster}", flush=True)
        if wait or not address:
            finish(client, job_id, stop_on_interrupt=not address)


def finish(client: Any, job_id: str, stop_on_interrupt: bool) -> None:
    """Follows the job's log to its end."""
    try:
        status = follow(client, job_id)
    except BaseException:
        if stop_on_interrupt:
            print("saving; interrupt once more to end at once", file=sys.stderr, flush=True)
            stop(client, job_id)
        raise
    if status != "SUCCEEDED":
        said = last_error(client.get_job_logs(job_id)) or rays_reason(client, job_id, status)
        raise UserError(f"job {job_id} ended as {status}{said}; its log is above")


def last_error(log: str) -> str:
    """What the job's driver, or Ray in its place, said last that it ended for, as ": …"; empty
    where neither could."""
    lines = log.splitlines()
    told = [
        line.removeprefix("error: ") if line.startswith("error: ") else of_supervisor(line)
        for line in lines
    ]
    return next((f": {line}" for line in reversed(told) if line), "")


def rays_reason(client: Any, job_id: str, status: str) -> str:
    """What Ray says of a job that failed without a word in its log, as ": …"."""
    said = (client.get_job_info(job_id).message or "") if status == "FAILED" else ""
    reason = said.partition(", last available logs")[0].strip().partition("\n")[0]
    return f": {of_supervisor(reason) or reason}" if reason else ""
