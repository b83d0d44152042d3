"""Where MLflow is, by what names it knows things, and runs that are made once.

mlflow itself is imported where it is used: it takes seconds, and commands start without it.
"""

import json
import logging
import os
import re
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from pipeline.errors import UserError
from pipeline.storage import patiently

STATE_FILE = "mlflow.json"
SYSTEM_FILE = "system.jsonl"  # written by jobs.system_metrics, which clients do without
LONGEST_NAME = 250  # of a metric, MLflow's limit
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.,=+-]{0,199}")
SERVERS = ("http", "https", "databricks", "postgresql", "mysql", "mssql")
# A server that is away must cost seconds, not MLflow's default of minutes.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
QUIET = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would show a password
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def default_tracking_uri(folder: Path) -> str:
    """The embedded store: SQLite beside the run folder, shared with the runs next to it."""
    return f"sqlite:///{folder.resolve().parent / 'mlflow.db'}"


def choose_tracking_uri(asked: str, folder: Path) -> str:
    """What was asked for, else this node's MLFLOW_TRACKING_URI, else the embedded store."""
    return asked or os.environ.get("MLFLOW_TRACKING_URI", "") or default_tracking_uri(folder)


def check_tracking_uri(uri: str) -> None:
    """Raises `UserError` for a --tracking-uri that no job could use, or that has a password."""
    if not uri:
        return
    if shown(uri) != uri:
        raise UserError(
            f"tracking-uri {shown(uri)}: got a user or password in it, which Ray would show to all "
            f"who see the job; set MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD, where Ray is started"
        )
    scheme, _, rest = uri.partition("://")
    if scheme.split("+")[0] in SERVERS and rest:
        return
    if not (scheme == "sqlite" and rest.startswith("//") and len(rest) > 2):
        raise UserError(
            f"tracking-uri: got {uri!r}, expected http://HOST:PORT, postgresql://HOST/DATABASE, or "
            f"sqlite:////FOLDER/FILE.db with the file's path from the root, as jobs run in other "
            f"folders"
        )


def check_model_name(name: str) -> None:
    """Raises `UserError` for a name that MLflow's registry does not take, or could not look up."""
    if name and not MODEL_NAME.fullmatch(name):
        raise UserError(
            f"model-name: got {name!r}, expected letters, digits, spaces and _ . , = + - that "
            f"begin with a letter or digit"
        )


def shown(uri: str) -> str:
    """The URI as it may be written anywhere: with "***" for its user and password."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return parts._replace(netloc=f"***@{parts.netloc.rpartition('@')[2]}").geturl()


def reason(error: BaseException, uri: str) -> str:
    """An error's first line, without the URI's user and password."""
    lines = str(error).strip().splitlines()
    said = (lines[0] if lines else type(error).__name__).replace(uri, shown(uri))
    user, _, password = urlsplit(uri).netloc.rpartition("@")[0].partition(":")
    for secret in {password or user, unquote(password or user)} - {""}:
        said = said.replace(secret, "***")
    if "(Caused by " in said:  # how requests wraps it; the cause is what tells something
        said = said.rpartition(": ")[2].strip("()\"' ")
    return said[:300]


def connect(uri: str, experiment: str) -> tuple[Any, str]:
    """A client of the store, and the experiment's id, which is made if need be. Raises whatever
    MLflow raises where the store does not answer."""
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    os.environ.update(QUIET)
    import mlflow

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    client = mlflow.MlflowClient(tracking_uri=uri)
    if not uri.startswith("sqlite:///"):
        return client, _experiment_id(client, experiment, None)
    # Two processes that create one database at once would both fail.
    store = Path(uri.removeprefix("sqlite:///"))
    with FileLock(store.with_suffix(".lock")):
        return client, _experiment_id(client, experiment, (store.parent / "mlartifacts").as_uri())


def _experiment_id(client: Any, name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    return client.create_experiment(name, artifact_location=artifacts)


def made_once(
    client: Any,
    experiment: str,
    name: str,
    tags: dict[str, str],
    state: dict[str, Any],
    remember: Callable[[], None],
) -> str:
    """The id of the run that `state` is about. Its key is written down before it is made, so that
    a process that dies in between leaves no second one."""
    if not state.get("key"):
        state["key"] = secrets.token_hex(8)
        remember()
    if not state["run_id"]:
        wanted = f"tags.creation_key = '{state['key']}'"
        found = client.search_runs([experiment], filter_string=wanted, max_results=1)
        tags = {**tags, "creation_key": state["key"]}
        made = found[0] if found else client.create_run(experiment, run_name=name, tags=tags)
        state["run_id"] = made.info.run_id
        remember()
    return state["run_id"]


def remembered(folder: Path) -> dict[str, Any]:
    """A run's or a grid's `mlflow.json`: which MLflow run it is, and what that has had, so that
    nothing is sent twice. Empty where MLflow was never told of the folder, and where the file is
    damaged, which is said: tracking must not end a training, and all of it can be sent again."""
    path = folder / STATE_FILE
    try:
        content = json.loads(patiently(path.read_bytes))
        why = "" if isinstance(content, dict) else "it is no JSON object"
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        why = f"it is not JSON ({error})"
    if why:
        said = f"{path} is damaged: {why}; all of it is sent anew, to another MLflow run"
        print(said, file=sys.stderr, flush=True)
        return {}
    return content


def of_this_store(state: dict[str, Any], uri: str) -> dict[str, Any]:
    """What is remembered of a run, without what another store was told. The key stays, by which
    the run is found again where it is the same store by another address."""
    if state.get("uri") == shown(uri):
        return state
    return {"key": state.get("key", ""), "uri": shown(uri), "run_id": ""}


def metric_name(kind: str, key: str) -> str:
    """`train/loss`, `val/AP`, `val/AP/circle`; MLflow's charts group by the part before "/"."""
    return safe(f"{'val' if kind == 'evaluation' else kind}/{key}")


def safe(name: str) -> str:
    """A name as MLflow takes them: other characters become "_", and so does whatever a path would
    lose, such as the empty part of "a//b"."""
    allowed = "".join(c if c.isalnum() or c in "_-./ :" else "_" for c in name)
    parts = ["_" if part in ("", ".", "..") else part for part in allowed.split("/")]
    return "/".join(parts)[:LONGEST_NAME].rstrip("/")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result
