"""MLflow, fed from a run's `metrics.jsonl` by a thread that training never waits for."""

import dataclasses
import json
import logging
import os
import secrets
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from pipeline.config import RunConfig
from pipeline.follow import Tail

logger = logging.getLogger(__name__)
PAUSE = 2.0  # seconds between two looks at the file
MOST_METRICS, MOST_PARAMS = 1000, 100  # in one batch, MLflow's limits
LAST_TRIES = 5  # attempts to deliver the rest once the run has ended
ARTIFACTS = ("config.json", "best.json", "predictions.png", "metrics.jsonl")


def default_tracking_uri(folder: Path) -> str:
    """The embedded store: SQLite beside the run folder, shared with the runs next to it."""
    return f"sqlite:///{folder.resolve().parent / 'mlflow.db'}"


def choose_tracking_uri(asked: str, folder: Path) -> str:
    """What was asked for, else this node's MLFLOW_TRACKING_URI, else the embedded store."""
    return asked or os.environ.get("MLFLOW_TRACKING_URI", "") or default_tracking_uri(folder)


def shown(uri: str) -> str:
    """The URI as it may be written anywhere: with "***" for its user and password."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return parts._replace(netloc=f"***@{parts.netloc.rpartition('@')[2]}").geturl()


class Forwarder(threading.Thread):
    """Sends new metric lines to one MLflow run, the same one through all attempts of a job.

    `folder/mlflow.json` remembers the run and what it has had, so nothing is sent twice. While the
    server is away, lines wait in the file.
    """

    def __init__(
        self, folder: Path, config: RunConfig, uri: str, experiment: str, tags: dict[str, str]
    ) -> None:
        super().__init__(daemon=True)
        # A server that is away must cost seconds, not MLflow's default of minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        # It would print the run's address, password included.
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        self.folder, self.config, self.tags = folder, config, tags
        self.uri, self.experiment = uri, experiment
        self.tail = Tail(folder / "metrics.jsonl")
        self.pending: list[dict[str, Any]] = []
        self.state_path = folder / "mlflow.json"
        self.state: dict[str, Any] = {"uri": shown(uri), "run_id": "", "sent": {}}
        self.done = threading.Event()
        self.client: Any = None

    def run(self) -> None:
        while not self.done.wait(PAUSE):
            self.try_to_send()

    def finish(self, status: str) -> bool:
        """Delivers the rest and the artifacts, and closes the run as "FINISHED" or "FAILED".

        False (and a warning) when the server stayed away; starting the job again delivers it.
        """
        self.done.set()
        self.join()
        for _ in range(LAST_TRIES):
            if self.try_to_send() and self.try_to_close(status):
                return True
        logger.warning(
            "MLflow at %s did not answer; metrics remain in %s", shown(self.uri), self.folder
        )
        return False

    def try_to_send(self) -> bool:
        """Whether everything written so far is in MLflow."""
        self.pending += self.tail.new_lines()
        try:
            if self.client is None:
                self.open()
            self.send_pending()
        except Exception as error:  # any failure of the server or the network: later, again
            logger.info("MLflow is not reached: %s", self.without_secrets(error))
            return False
        return True

    def open(self) -> None:
        """Connects, and makes or resumes the run."""
        import mlflow
        from mlflow.entities import Param

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        if self.state_path.exists():
            self.state = json.loads(self.state_path.read_text(encoding="utf-8"))
        client = mlflow.MlflowClient(tracking_uri=self.uri)
        if self.uri.startswith("sqlite:///"):
            # Two processes that create one database at once would both fail.
            store = Path(self.uri.removeprefix("sqlite:///"))
            with FileLock(store.with_suffix(".lock")):
                experiment = self.experiment_id(client, (store.parent / "mlartifacts").as_uri())
        else:
            experiment = self.experiment_id(client, None)
        if not self.state["run_id"]:
            self.state["run_id"] = self.make_run(client, experiment)
            self.remember()
        run_id = self.state["run_id"]
        # In each attempt: one that died here may have left some out. MLflow changes none.
        had = client.get_run(run_id).data.params
        params = flat(dataclasses.asdict(self.config)).items()
        missing = [Param(key, str(value)) for key, value in params if key not in had]
        for start in range(0, len(missing), MOST_PARAMS):
            client.log_batch(run_id, params=missing[start : start + MOST_PARAMS])
        for kind, step in steps_had(client, run_id).items():
            self.state["sent"][kind] = max(step, self.state["sent"].get(kind, -1))
        client.update_run(run_id, status="RUNNING")
        self.client = client

    def make_run(self, client: Any, experiment: str) -> str:
        """The run's id. Its key is written down before it is made, so that an attempt that dies in
        between leaves no second one."""
        if "key" not in self.state:
            self.state["key"] = secrets.token_hex(8)
            self.remember()
        tag = f"tags.creation_key = '{self.state['key']}'"
        for run in client.search_runs([experiment], filter_string=tag, max_results=1):
            return run.info.run_id
        tags = {**self.tags, "creation_key": self.state["key"]}
        return client.create_run(experiment, run_name=self.folder.name, tags=tags).info.run_id

    def experiment_id(self, client: Any, artifacts: str | None) -> str:
        found = client.get_experiment_by_name(self.experiment)
        if found is not None:
            return found.experiment_id
        return client.create_experiment(self.experiment, artifact_location=artifacts)

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

    def try_to_close(self, status: str) -> bool:
        try:
            for name in ARTIFACTS:
                if (self.folder / name).exists():
                    self.client.log_artifact(self.state["run_id"], str(self.folder / name))
            self.client.set_terminated(self.state["run_id"], status=status)
        except Exception as error:
            logger.info("MLflow is not reached: %s", self.without_secrets(error))
            return False
        return True

    def without_secrets(self, error: Exception) -> str:
        return str(error).replace(self.uri, shown(self.uri))

    def remember(self) -> None:
        # Where a run that has not begun may have files of its launcher.
        aside = self.folder / "ray" / self.state_path.name
        aside.parent.mkdir(exist_ok=True)
        aside.write_text(json.dumps(self.state), encoding="utf-8")
        os.replace(aside, self.state_path)


def steps_had(client: Any, run_id: str) -> dict[str, int]:
    """The last step of each kind of line that MLflow has: an attempt may have sent it and died
    before it remembered."""
    found = {"train": "train/loss", "evaluation": "val/AP"}
    histories = {kind: client.get_metric_history(run_id, key) for kind, key in found.items()}
    return {kind: max(m.step for m in had) for kind, had in histories.items() if had}


def metric_name(kind: str, key: str) -> str:
    """`train/loss`, `val/AP`, `val/AP/circle`; MLflow's charts group by the part before "/"."""
    return f"{'val' if kind == 'evaluation' else kind}/{safe(key)}"


def safe(name: str) -> str:
    """A name of MLflow's alphabet: other characters become "_"."""
    return "".join(c if c.isalnum() or c in "_-./ :" else "_" for c in name)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result
