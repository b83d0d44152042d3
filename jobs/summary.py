"""What a finished run comes to, as text."""

import json
import sys
from pathlib import Path

from jobs.tracking import remembered, shown
from pipeline.evaluate import Evaluation, table


def summary(folder: Path, tracking_uri: str) -> str:
    """The best epoch's AP table, the best checkpoint, the picture and how to open MLflow."""
    best = json.loads((folder / "best.json").read_text(encoding="utf-8"))
    ui = f"{sys.executable} -m mlflow ui --host 127.0.0.1 --backend-store-uri {shown(tracking_uri)}"
    server = tracking_uri.startswith("http")
    evaluation = Evaluation(best["summary"], best["per_class"], [])
    lines = [
        "",
        f"COCO evaluation of the best epoch ({best['epoch']:.0f})",
        table(evaluation),
        "",
        f"best checkpoint  {folder / 'checkpoints' / best['checkpoint']}",
        f"predictions      {folder / 'predictions.png'}",
        f"open MLflow      {shown(tracking_uri) if server else ui}",
    ]
    if model := remembered(folder).get("model"):
        lines.append(f"registered       {model['name']}, version {model['version']}")
    return "\n".join(lines)
