"""What a training job is told: one JSON text, from the submitter to the job on the cluster."""

import json
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.data.urls import check_url

ROOT = Path(__file__).resolve().parents[1]
SPEC_VARIABLE = "TRAINING_JOB"  # of the job's environment, holding a `JobSpec` as JSON
JOB_VARIABLE = "TRAINING_JOB_KEY"  # of all of a job's drivers: a name that they share


@dataclass(frozen=True)
class JobSpec:
    """`config`: a `RunConfig` as JSON; `folder`: the run folder, absolute, on storage that every
    node sees; `tracking_uri`: empty for an SQLite store beside the run folder."""

    config: str
    folder: str
    workers: int = 1
    cpus_per_worker: int = 1
    min_workers: int = 0
    """Above 0: as few workers as this may go on. Else always `workers`."""
    resize_interval: float = 60.0
    """Seconds between two looks whether there is room for more of them."""
    restarts: int = 3
    """Failures without a new checkpoint between them."""
    grace: float = 120.0
    """Seconds in which a checkpoint must be written once a stop is asked for."""
    tracking_uri: str = ""
    experiment: str = "deformable-detr"
    register: bool = True
    """The best checkpoint becomes a version of a model in MLflow's registry."""
    model_name: str = ""
    """There; empty: the recipe's."""
    grid: str = ""
    """Folder of the grid that this is a cell's run of, if it is."""
    code: str = ""
    """Commit of the checkout that was submitted."""
    code_digest: str = ""
    """Of the sources that train (`jobs.grid_state.Code`)."""

    def run_config(self) -> RunConfig:
        return RunConfig.from_json(self.config)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "JobSpec":
        return JobSpec(**json.loads(text))


def from_the_root(config: RunConfig) -> RunConfig:
    """The config with its local paths absolute: a job runs in another folder than its submitter."""
    data, init = config.data, config.init
    return replace(
        config,
        data=replace(data, train=absolute(data.train), val=absolute(data.val)),
        init=replace(init, backbone=absolute(init.backbone), weights=absolute(init.weights)),
    )


def absolute(place: str) -> str:
    """A path from the root; URLs, and none at all, stay what they are. Raises `UserError` for a URL
    with a password: Ray would show it to all who see the job."""
    check_url(place)
    return place if not place or "://" in place else str(Path(place).resolve())


def code_version() -> str:
    """The checkout's commit, with "-dirty" where files differ from it; "unknown" without git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("-dirty" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
