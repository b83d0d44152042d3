"""One MLflow run, fed from a run folder's files by a thread that training never waits for."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from jobs.artifacts import upload
from jobs.parent_run import parent_of
from jobs.registry import register
from jobs.tracking import (
    STATE_FILE,
    SYSTEM_FILE,
    connect,
    made_once,
    metric_name,
    of_this_store,
    reason,
    remembered,
    shown,
)
from pipeline.follow import Tail
from pipeline.whole_file import write_whole

logger = logging.getLogger(__name__)
PAUSE = 2.0  # seconds between two looks at the files
MOST_METRICS, MOST_PARAMS, LONGEST_PARAM, LONGEST_DIGEST = 1000, 100, 6000, 36  # MLflow's limits
# A metric that every line of its kind has.
IN_EACH = {
    "train": "train/loss",
    "evaluation": "val/AP",
    "system": "system/cpu_utilization_percentage",
}
# Seconds before each further attempt to deliver the rest of a run that has finished: a server that
# is restarted is back by then.
LAST_PAUSES = (1, 2, 4, 8, 15, 30)
UPLOAD_TIMEOUT = "120"  # seconds until a server must have stored a file


@dataclass(frozen=True)
class Source:
    """A data set of the run: `context` is "train" or "validation", `digest` the manifest's,
    `location` without a password."""

    context: str
    name: str
    digest: str
    location: str
    images: int
    annotations: int


@dataclass(frozen=True)
class About:
    """What MLflow is told of a run beside its files. `model_name`: in the registry, empty to leave
    it out; `grid`: the folder of the grid that it is a cell's run of, if it is."""

    experiment: str
    params: dict[str, Any]
    tags: dict[str, str]
    sources: tuple[Source, ...] = ()
    model_name: str = ""
    grid: str = ""

    @staticmethod
    def of(content: dict[str, Any]) -> "About":
        sources = tuple(Source(**source) for source in content["sources"])
        return About(**{**content, "sources": sources})


class Forwarder(threading.Thread):
    """Sends what a run folder has to one MLflow run, the same one through all attempts of a job.

    `about`: None for what an earlier forwarder was told. `say` hears, in a line each, when the
    server goes away and comes back.
    """

    def __init__(
        self,
        folder: Path,
        uri: str,
        about: About | None = None,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        super().__init__(daemon=True)
        self.folder, self.uri, self.say = folder, uri, say
        with self.alone():
            before = remembered(folder)
            self.about = about or About.of(before["about"])
            self.state = {"sent": {}, "run_id": "", **of_this_store(before, uri)}
            self.state |= {"about": asdict(self.about), "delivered": ""}
            self.remember()
        self.tails = [Tail(folder / "metrics.jsonl"), Tail(folder / SYSTEM_FILE)]
        self.pending: list[dict[str, Any]] = []
        self.done = threading.Event()
        self.client: Any = None
        self.why = ""  # the server was away at the last try; empty: it was not

    def run(self) -> None:
        while not self.done.wait(PAUSE):
            self.try_to_send()

    def finish(self, status: str, pauses: Sequence[float] = ()) -> bool:
        """Delivers the rest, the artifacts and the model, and closes the run as "FINISHED",
        "FAILED" or "KILLED". pauses: seconds before each further try.

        False (and a line that says so) when the server stayed away: the next forwarder does it.
        """
        self.done.set()
        if self.is_alive():
            self.join()
        for pause in (0, *pauses):
            time.sleep(pause)
            if self.try_to_send() and self.answered(lambda: self.close(status)):
                return True
        self.say(
            f"MLflow at {shown(self.uri)} did not take all of {self.folder} ({self.why}); it stays "
            f"there, and the same command sends it"
        )
        return False

    def try_to_send(self) -> bool:
        """Whether everything written so far is in MLflow."""
        return self.answered(self.send)

    def answered(self, task: Callable[[], None]) -> bool:
        """Whether the server let the task be done; says when that changes."""
        try:
            task()
        except Exception as error:  # any failure of the server or the network: later, again
            logger.debug("MLflow: %s", reason(error, self.uri))
            if not self.why:
                self.say(
                    f"MLflow at {shown(self.uri)} does not answer as it should "
                    f"({reason(error, self.uri)}); what it misses is sent later"
                )
            self.why = reason(error, self.uri)
            return False
        if self.why:
            self.why = ""
            self.say(f"MLflow at {shown(self.uri)} answers again")
        return True

    def send(self) -> None:
        for tail in self.tails:
            self.pending += tail.new_lines()
        if self.client is None:
            self.open()
        self.send_pending()

    def open(self) -> None:
        """Connects, and makes or resumes the run."""
        client, experiment = connect(self.uri, self.about.experiment)
        tags = self.about.tags
        if self.about.grid:
            parent = parent_of(client, experiment, Path(self.about.grid), self.uri)
            tags = {**tags, "mlflow.parentRunId": parent}
        with self.alone():
            if not self.state["run_id"]:
                made = of_this_store(remembered(self.folder), self.uri)
                self.state |= {name: made.get(name, "") for name in ("key", "run_id")}
            name = self.folder.name
            run_id = made_once(client, experiment, name, tags, self.state, self.remember)
        # In each attempt: one that died here may have left some out. MLflow changes no param.
        had = client.get_run(run_id)
        self.send_params(client, had.data.params)
        for key, value in tags.items():  # such as the code of the latest attempt
            if had.data.tags.get(key) != value:
                client.set_tag(run_id, key, value)
        self.send_sources(client, had.inputs.dataset_inputs)
        for kind, step in steps_had(client, run_id).items():
            self.state["sent"][kind] = max(step, self.state["sent"].get(kind, -1))
        client.update_run(run_id, status="RUNNING")
        self.client = client

    def send_params(self, client: Any, had: dict[str, str]) -> None:
        from mlflow.entities import Param

        params = self.about.params.items()
        missing = [Param(k, str(v)[:LONGEST_PARAM]) for k, v in params if k not in had]
        for start in range(0, len(missing), MOST_PARAMS):
            client.log_batch(self.state["run_id"], params=missing[start : start + MOST_PARAMS])

    def send_sources(self, client: Any, had: list[Any]) -> None:
        known = {one.dataset.digest for one in had}
        inputs = [dataset_input(source) for source in self.about.sources]
        missing = [one for one in inputs if one.dataset.digest not in known]
        if missing:
            client.log_inputs(self.state["run_id"], datasets=missing)

    def send_pending(self) -> None:
        from mlflow.entities import Metric

        batch: list[Any] = []
        sent = dict(self.state["sent"])
        for line in self.pending:
            kind, step = line["kind"], line["step"]
            if kind == "event" or step <= sent.get(kind, -1):
                continue
            sent[kind] = step
            # The line's own time: sending a line again changes nothing.
            stamp = int(line["time"] * 1000)
            metrics = [
                Metric(metric_name(kind, key), value, stamp, step)
                for key, value in line.items()
                if key not in ("kind", "step", "time")
            ]
            if len(batch) + len(metrics) > MOST_METRICS:  # a line is sent whole
                self.client.log_batch(self.state["run_id"], metrics=batch)
                batch = []
            batch += metrics
        if batch:
            self.client.log_batch(self.state["run_id"], metrics=batch)
        self.pending = []
        if sent != self.state["sent"]:
            self.state["sent"] = sent
            self.remember()

    def close(self, status: str) -> None:
        before = os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = max(before, UPLOAD_TIMEOUT, key=float)
        try:
            upload(self.client, self.state["run_id"], self.folder)
            self.client.set_terminated(self.state["run_id"], status=status)
            if self.about.model_name and status == "FINISHED":
                self.state["model"] = register(
                    self.client, self.state["run_id"], self.about.model_name, self.folder
                )
        finally:
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = before
        self.state["delivered"] = status
        self.remember()

    def alone(self) -> FileLock:
        """Two trainings may be begun in one folder at once: one will be refused, but both tell
        MLflow of it."""
        return FileLock(self.folder / "ray" / "mlflow.lock")

    def remember(self) -> None:
        # Aside where a run that has not begun may have files of its launcher.
        write_whole(self.folder / STATE_FILE, json.dumps(self.state), self.folder / "ray")


def dataset_input(source: Source) -> Any:
    """MLflow's entry of a data set: name, digest, place, numbers of images and annotations."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    scheme = source.location.partition("://")[0] if "://" in source.location else "local"
    place = {"url" if scheme.startswith("http") else "uri": source.location}
    profile = {
        "images": source.images,
        "annotations": source.annotations,
        "manifest_digest": source.digest,
    }
    dataset = Dataset(
        name=source.name,
        digest=source.digest[:LONGEST_DIGEST],
        source_type="http" if scheme == "https" else scheme,
        source=json.dumps(place),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", source.context)])


def steps_had(client: Any, run_id: str) -> dict[str, int]:
    """The last step of each kind of line that MLflow has: an attempt may have sent it and died
    before it remembered."""
    histories = {kind: client.get_metric_history(run_id, key) for kind, key in IN_EACH.items()}
    return {kind: max(m.step for m in had) for kind, had in histories.items() if had}
