"""The files of a run folder that MLflow keeps."""

import gzip
import shutil
import tempfile
from pathlib import Path
from typing import Any

from jobs.tracking import SYSTEM_FILE

FILES = ("config.json", "best.json", "predictions.png", "metrics.jsonl", SYSTEM_FILE)
FIGURES = "figures"  # a folder
DETECTIONS = Path("evaluations") / "best-detections.json"
LARGE = 1 << 20  # bytes from which on detections, megabytes of digits, are compressed


def upload(client: Any, run_id: str, folder: Path) -> None:
    """Stores what the folder has of them; a file that is there already is replaced."""
    for name in FILES:
        if (folder / name).exists():
            client.log_artifact(run_id, str(folder / name))
    if (folder / FIGURES).is_dir():
        client.log_artifacts(run_id, str(folder / FIGURES), FIGURES)
    if (folder / DETECTIONS).exists():
        upload_detections(client, run_id, folder / DETECTIONS)


def upload_detections(client: Any, run_id: str, path: Path) -> None:
    """Uploads a file of detections, packed where it is large."""
    if path.stat().st_size < LARGE:
        client.log_artifact(run_id, str(path), path.parent.name)
        return
    with tempfile.TemporaryDirectory() as aside:
        packed = Path(aside) / f"{path.name}.gz"
        with path.open("rb") as content, gzip.open(packed, "wb") as into:
            shutil.copyfileobj(content, into)
        client.log_artifact(run_id, str(packed), path.parent.name)
