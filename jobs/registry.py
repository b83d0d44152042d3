"""MLflow's model registry: the best checkpoint of a run as a version of a named model.

Versions are tagged with what they scored on which validation set; the alias `best` is on the one
with the highest AP on the set of the version that was registered last.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from jobs.model_artifact import write_model

ALIAS = "best"


def register(client: Any, run_id: str, name: str, folder: Path) -> dict[str, str]:
    """Makes a version of the run folder's best checkpoint, unless there is one, and moves the
    alias. Returns {name, version}."""
    from mlflow.exceptions import MlflowException

    best = json.loads((folder / "best.json").read_text(encoding="utf-8"))
    checkpoint = folder / "checkpoints" / best["checkpoint"]
    digests = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    identity = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    progress = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
    tags = {
        "val/AP": repr(float(best["summary"]["AP"])),
        "val_digest": identity["val_digest"],
        "step": str(progress["step"]),
        "epoch": f"{best['epoch']:g}",
        "model_sha256": digests["model.pt"],
        "run_id": run_id,
    }
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = version_of(client, name, tags)
    if version is None:
        # Each checkpoint in a folder of its own: earlier versions stay what they are.
        place = f"model/{checkpoint.name}"
        with tempfile.TemporaryDirectory() as aside:
            write_model(Path(aside) / "model", checkpoint / "model.pt", tags)
            client.log_artifacts(run_id, str(Path(aside) / "model"), place)
        source = f"{client.get_run(run_id).info.artifact_uri}/{place}"
        version = client.create_model_version(name, source, run_id, tags=tags)
    move_alias(client, name, tags["val_digest"])
    return {"name": name, "version": str(version.version)}


def version_of(client: Any, name: str, tags: dict[str, str]) -> Any | None:
    """The version that is this run's checkpoint already."""
    same = ("run_id", "model_sha256")
    for version in client.search_model_versions(f"name = '{name}'"):
        if all(version.tags.get(key) == tags[key] for key in same):
            return version
    return None


def move_alias(client: Any, name: str, val_digest: str) -> None:
    """Puts the alias on the version of the highest AP, of equal ones the earliest.

    Looks again afterwards: of two runs that register at once, the later look has seen both."""
    chosen = ""
    while chosen != (best := best_version(client, name, val_digest)):
        client.set_registered_model_alias(name, ALIAS, best)
        chosen = best


def best_version(client: Any, name: str, val_digest: str) -> str:
    """The version with the highest AP among those evaluated on this validation set; the oldest of
    equals."""
    versions = client.search_model_versions(f"name = '{name}'")
    comparable = [v for v in versions if v.tags.get("val_digest") == val_digest]
    best = max(comparable, key=lambda v: (float(v.tags["val/AP"]), -int(v.version)))
    return str(best.version)
