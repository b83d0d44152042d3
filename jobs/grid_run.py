"""Submits a grid's runs as jobs, as many at once as there is room for, until each has ended.

What was submitted is asked of the cluster, what is done of the run folders: a command that dies
leaves nothing that the next one does not find.
"""

import re
import shlex
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from jobs.grid import Entry
from jobs.grid_pruning import Pruning
from jobs.grid_state import (
    DONE,
    FAILED,
    PRUNED,
    RUNNING,
    STOPPED,
    Code,
    Record,
    nothing_runs,
    progress,
    set_aside,
)
from jobs.resources import room
from jobs.spec import JobSpec
from jobs.submit import STOP_MARGIN, submit
from pipeline.errors import UserError

POLL = 2.0  # seconds between two looks at the jobs
COUNT_EVERY = 30.0  # seconds between two looks at the nodes
ARRIVAL = 5.0  # seconds until a cluster tells of a job whose submission was broken off
MOST_NODES = 10_000
# Exit statuses of a job's driver.
MISTAKE, WAS_STOPPED = 2, 3


@dataclass(frozen=True)
class Submission:
    """How each run is submitted, beside its config and folder."""

    address: str
    grid: str
    parallel: int
    """Most jobs at once; 0: as many as there is room for."""
    retries: int
    patience: float
    """Seconds that the cluster may not answer."""
    spec: JobSpec
    """Of any run: workers, grace, tracking and so on."""


class GridRunner:
    """Runs the jobs of one grid. `say` gets a line for whatever happens."""

    def __init__(
        self,
        client: Any,
        folder: Path,
        submission: Submission,
        say: Callable[[str], None],
        pruning: Pruning,
    ) -> None:
        self.client, self.folder, self.submission, self.say = client, folder, submission, say
        self.pruning = pruning
        self.pruned: set[str] = set()  # runs whose jobs were told to stop
        self.running: dict[str, tuple[Entry, str]] = {}  # by run: the entry and its job
        # The run that is being submitted, and its record of before.
        self.submitting: tuple[Entry, Record] | None = None
        self.retried: dict[str, int] = {}
        self.evaluated: dict[str, float] = {}
        self.anew: set[str] = set()
        self.silent_since = self.unread_since = self.counted = 0.0
        self.places = 0

    def run(self, todo: Sequence[Entry], anew: Collection[str] = ()) -> None:
        """Returns when every run has ended, well or not: their records say how. Interrupted, it has
        the jobs save and stop first. `anew`: runs to be set aside before they are submitted."""
        queue, self.anew = list(todo), set(anew)
        try:
            self.adopt(queue)
            while queue or self.running:
                try:
                    self.look(queue)
                    self.unread_since = 0.0
                except OSError as error:  # what the cluster does not answer is told by `jobs`
                    self.unread(error)
                if queue or self.running:
                    time.sleep(POLL)
        except BaseException:
            self.stop()
            raise

    def look(self, queue: list[Entry]) -> None:
        """Takes note of what has ended, and starts what there is room for. Broken off where storage
        fails, it can be done again."""
        jobs = self.jobs()
        if jobs is not None:
            self.collect(jobs, queue)
            if self.submitting:  # broken off in between: the cluster may have got it
                entry = self.submitting[0]
                if job := living(jobs, str(self.folder / entry.folder)):
                    self.follow(entry, job)
                    queue.remove(entry)
            ready = [entry for entry in queue if not self.waits(entry, queue)]
            while ready and len(self.running) < self.room(ready[0]):
                if not self.start(ready[0]):
                    break
                queue.remove(ready.pop(0))
        self.tell_epochs()
        self.prune()

    def unread(self, error: OSError) -> None:
        """Says that storage fails; raises `error` where it does so for too long. The jobs, which
        may see it from other nodes, go on."""
        now = time.monotonic()
        if not self.unread_since:
            self.unread_since = now
            self.say(f"storage does not answer ({first_line(error)}); looking again")
        if now - self.unread_since > self.submission.patience:
            raise error

    def adopt(self, queue: list[Entry]) -> None:
        """Takes over jobs that an earlier command has left on the cluster; a run that it left
        without one is not "running"."""
        for job in self.client.list_jobs():
            folder = (job.metadata or {}).get("folder")
            for entry in [e for e in queue if str(self.folder / e.folder) == folder]:
                if job.submission_id and not job.status.is_terminal():
                    if entry.run in self.anew:
                        raise UserError(
                            f"job {job.submission_id} trains {folder} as it was before; stop it "
                            f"first: python -m jobs stop --job {job.submission_id} --address "
                            f"{self.submission.address}"
                        )
                    self.follow(entry, job.submission_id)
                    queue.remove(entry)
                    self.say(f"{entry.run}: job {job.submission_id} trains it already")
        nothing_runs(self.folder, [entry.run for entry in queue])

    def jobs(self) -> dict[str, Any] | None:
        """The cluster's jobs by id; None while it does not answer."""
        try:
            found = {job.submission_id: job for job in self.client.list_jobs()}
        except (OSError, RuntimeError) as error:  # requests' errors are OSErrors
            self.unanswered(error)
            return None
        self.silent_since = 0.0
        return found

    def unanswered(self, error: Exception) -> None:
        now = time.monotonic()
        if not self.silent_since:
            self.silent_since = now
            self.say(f"the cluster does not answer ({first_line(error)}); asking again")
        if now - self.silent_since > self.submission.patience:
            raise UserError(
                f"the cluster at {self.submission.address} did not answer for "
                f"{self.submission.patience:.0f} s "
                f"({first_line(error)}); the same command goes on once it does"
            )

    def room(self, entry: Entry) -> int:
        """How many jobs may run at once: for what the nodes have in all, at least one, which then
        waits for nodes and tells an autoscaler what is needed."""
        now = time.monotonic()
        if not self.places or now - self.counted > COUNT_EVERY:
            try:
                self.places = places(self.submission.address, entry, self.submission.spec)
            except RayStateApiException as error:
                self.unanswered(error)
                return 0
            self.counted = now
        return min(max(1, self.places), self.submission.parallel or MOST_NODES)

    def waits(self, entry: Entry, queue: Sequence[Entry]) -> bool:
        """Whether it evaluates a run that is still to be trained."""
        under_way = [e for e, _ in self.running.values()]
        return entry.evaluates in [e.folder for e in (*queue, *under_way)]

    def start(self, entry: Entry) -> bool:
        """Submits the run; False where the cluster does not answer."""
        if entry.run in self.anew:
            if (self.folder / entry.folder).exists():  # not moved, but for the answer, before
                self.say(f"{entry.run}: the old run is now {set_aside(self.folder, entry)}")
            self.anew.remove(entry.run)
        if (flag := self.flag(entry)) and self.pruning.stop:
            self.ended(entry, PRUNED, flag)
            return True
        entrypoint = {}
        if entry.evaluates:
            trained = self.folder / entry.evaluates
            if not progress(trained).finished:
                self.ended(entry, FAILED, f"{trained.name}, which it evaluates, is not done")
                return True
            command = f"python -m jobs.grid_augmented {shlex.quote(str(trained))}"
            entrypoint = {"entrypoint": command}
        code = Code.present()  # each time: a job takes the checkout along as it is now
        spec = replace(
            self.submission.spec,
            config=entry.config.to_json(),
            folder=str(self.folder / entry.folder),
            code=code.commit,
            code_digest=code.digest,
        )
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{self.submission.grid}-{entry.run}")
        before = Record.read(self.folder, entry.run)
        self.submitting = (entry, before)
        # Before it is submitted: should this command die now, its code is known of a job that the
        # cluster has got all the same.
        coded = {**before.code, code.digest: code.commit}
        record = replace(before, outcome=RUNNING, error="", job="", code=coded)
        record.write(self.folder, entry.run)
        try:
            job = submit(self.client, spec, name, **entrypoint)
        except OSError as error:  # requests' errors are OSErrors
            before.write(self.folder, entry.run)
            self.submitting = None
            self.unanswered(error)
            return False
        except (RuntimeError, UserError) as error:
            self.ended(entry, FAILED, f"not submitted: {first_line(error)}")
            self.submitting = None
            return True
        self.say(f"{entry.run}: submitted as {job}, attempt {self.follow(entry, job)}")
        return True

    def follow(self, entry: Entry, job: str) -> int:
        """Takes note that the job trains the run; returns which attempt it is."""
        record = Record.read(self.folder, entry.run)
        attempts = record.attempts + (record.job != job)
        record = replace(record, attempts=attempts, outcome=RUNNING, error="", job=job)
        record.write(self.folder, entry.run)
        self.running[entry.run] = (entry, job)
        self.submitting = None
        return attempts

    def collect(self, jobs: dict[str, Any], queue: list[Entry]) -> None:
        """Takes note of the jobs that have ended; runs to be tried again join the queue."""
        for entry, job in list(self.running.values()):
            if job in jobs and not jobs[job].status.is_terminal():
                continue
            outcome, error, status = FAILED, "the cluster no longer knows its job", None
            if job in jobs:
                self.tell_epochs_of(entry)
                status = jobs[job].driver_exit_code
                outcome, error = self.outcome(entry, jobs[job])
            self.ended(entry, outcome, error)
            tried = self.retried.get(entry.run, 0)
            if outcome == FAILED and status != MISTAKE and tried < self.submission.retries:
                self.retried[entry.run] = tried + 1
                self.say(f"{entry.run}: will be tried again")
                queue.append(entry)

    def outcome(self, entry: Entry, job: Any) -> tuple[str, str]:
        """How an attempt ended, and why where it failed."""
        said = self.keep_log(entry, job.submission_id)
        if job.status.value == "STOPPED" or job.driver_exit_code == WAS_STOPPED:
            pruned = entry.run in self.pruned
            return (PRUNED, Record.read(self.folder, entry.run).flag) if pruned else (STOPPED, "")
        if job.status.value == "SUCCEEDED" and progress(self.folder / entry.folder).finished:
            return DONE, ""
        if job.status.value == "SUCCEEDED":
            return FAILED, (
                f"its job succeeded, but {self.folder / entry.folder} has no finished run: does "
                f"the cluster see the same storage under this path?"
            )
        errors = [line for line in said if line.startswith("error: ")]
        last = (errors or said or [job.message or "its job said nothing"])[-1]
        return FAILED, last.removeprefix("error: ")

    def keep_log(self, entry: Entry, job: str) -> list[str]:
        """Writes the job's log to the grid's folder, which outlives the cluster; its lines."""
        try:
            log: str = self.client.get_job_logs(job)
        except (OSError, RuntimeError) as error:
            log = f"the cluster did not give the log: {first_line(error)}\n"
        path = self.folder / "logs" / f"{job}.log"
        path.parent.mkdir(exist_ok=True)
        path.write_text(log, encoding="utf-8")
        return [line for line in log.splitlines() if line.strip()]

    def ended(self, entry: Entry, outcome: str, error: str) -> None:
        record = replace(Record.read(self.folder, entry.run), outcome=outcome, error=error)
        replace(record, flag="" if outcome == DONE else record.flag).write(self.folder, entry.run)
        # After the record: interrupted in between, it is asked of the cluster once more.
        self.running.pop(entry.run, None)
        self.pruned.discard(entry.run)
        self.say(f"{entry.run}: {outcome}{': ' if error else ''}{error}")

    def tell_epochs(self) -> None:
        for entry, _ in self.running.values():
            self.tell_epochs_of(entry)

    def tell_epochs_of(self, entry: Entry) -> None:
        """Says once for each epoch that it was evaluated."""
        now = progress(self.folder / entry.folder)
        had = self.evaluated.setdefault(entry.run, now.evaluated)
        if now.evaluated > had:
            self.evaluated[entry.run] = now.evaluated
            self.say(
                f"{entry.run}: epoch {now.evaluated:.0f}/{now.epochs}, best AP so far {now.ap:.3f}"
            )

    def prune(self) -> None:
        """Flags running cells that seem hopeless, and with --prune has their jobs save and end."""
        for entry, job in self.running.values():
            if entry.run in self.pruned or not self.flag(entry) or not self.pruning.stop:
                continue
            try:
                self.client.stop_job(job)
            except (OSError, RuntimeError) as error:
                self.unanswered(error)
            else:
                self.pruned.add(entry.run)
                self.say(f"{entry.run}: saving, to be pruned")

    def flag(self, entry: Entry) -> str:
        """Why the run seems hopeless, "" where it does not; a change is said and recorded."""
        flag, record = self.pruning.flag(entry), Record.read(self.folder, entry.run)
        if flag != record.flag:
            replace(record, flag=flag).write(self.folder, entry.run)
        if bool(flag) != bool(record.flag):
            self.say(f"{entry.run}: {f'flagged: {flag}' if flag else 'no longer flagged'}")
        return flag

    def stop(self) -> None:
        """Has every job save and end, all at the same time. Interrupted once more, it leaves them
        to it."""
        if self.running:
            self.say(f"saving {len(self.running)} runs; interrupt once more to end at once")
        told: list[Entry] = []
        try:
            for entry, job in list(self.running.values()):
                self.tell_to_stop(entry, job, told)
            if self.submitting and self.submitting[0].run not in self.running:
                entry, before = self.submitting
                if job := self.sent(entry, before):
                    self.follow(entry, job)
                    self.tell_to_stop(entry, job, told)
            deadline = time.monotonic() + self.submission.spec.grace + STOP_MARGIN
            while self.running and time.monotonic() < deadline:
                jobs = self.jobs() or {}
                for entry, job in list(self.running.values()):
                    if job in jobs and jobs[job].status.is_terminal():
                        self.ended(entry, *self.outcome(entry, jobs[job]))
                time.sleep(0.5)
        finally:
            for entry in told:
                if entry.run in self.running:
                    self.ended(entry, STOPPED, "")

    def tell_to_stop(self, entry: Entry, job: str, told: list[Entry]) -> None:
        """Has a job save and end, and adds its run to `told` unless the cluster does not answer."""
        told.append(entry)  # first: interrupted meanwhile, the cluster may well have heard it
        try:
            self.client.stop_job(job)
        except (OSError, RuntimeError) as error:
            told.remove(entry)
            self.say(f"{entry.run}: not told to stop ({first_line(error)})")

    def sent(self, entry: Entry, before: Record) -> str:
        """The job of a submission that was interrupted; "" where the cluster has got none, and the
        run is what it was before."""
        self.say(f"{entry.run}: interrupted as it was submitted; asking what the cluster has got")
        folder, job = str(self.folder / entry.folder), ""
        deadline = time.monotonic() + ARRIVAL
        try:
            while True:
                job = living(self.jobs() or {}, folder)
                if job or time.monotonic() > deadline:
                    break
                time.sleep(0.5)
        finally:
            if not job:
                before.write(self.folder, entry.run)
        return job


def living(jobs: dict[str, Any], folder: str) -> str:
    """The job that trains in the folder; "" where none does."""
    return next(
        (
            name
            for name, found in jobs.items()
            if (found.metadata or {}).get("folder") == folder and not found.status.is_terminal()
        ),
        "",
    )


def places(address: str, entry: Entry, spec: JobSpec) -> int:
    """Jobs of this size that the cluster's nodes could hold at once."""
    nodes = [
        {"Alive": node.state == "ALIVE", "Resources": node.resources_total or {}}
        for node in list_nodes(address=address, limit=MOST_NODES, detail=True)
    ]
    need: dict[str, float] = {"CPU": spec.cpus_per_worker}
    gpus = sum(node["Resources"].get("GPU", 0) for node in nodes if node["Alive"])
    if gpus and entry.config.engine.device != "cpu":
        need["GPU"] = 1
    return room(need, nodes) // (spec.min_workers or spec.workers)


def first_line(error: BaseException) -> str:
    """An error's first line, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
