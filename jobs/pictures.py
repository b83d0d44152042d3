"""Curves and pictures of a run's best checkpoint, drawn by rank 0 once training has finished.

They are extras: whatever goes wrong with them, the run stays a finished one.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from jobs.artifacts import DETECTIONS, FIGURES
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.tracking import MetricsLog, read_lines

IMAGES = 4  # of the validation set, looked into
OF = "checkpoint.txt"  # in the folder of figures: which one they are of


def draw(folder: Path, config: RunConfig) -> None:
    """Makes `folder/figures` anew, where it is not of the best checkpoint already. What could not
    be drawn is a line of metrics.jsonl."""
    try:
        best = json.loads((folder / "best.json").read_text(encoding="utf-8"))["checkpoint"]
        of = folder / FIGURES / OF
        if not (of.is_file() and of.read_text(encoding="utf-8") == best):
            draw_of(best, folder, config)
    except OSError as error:  # such as of a full disk
        print(f"no figures: {error}", file=sys.stderr, flush=True)


def draw_of(best: str, folder: Path, config: RunConfig) -> None:
    """Draws all figures of checkpoint `best`; those that cannot be drawn are a line in the run's
    log."""
    mark, aside = folder / "ray" / "drawing", folder / f"{FIGURES}.partial"
    if mark.exists():  # such as by a kernel short of memory; it would be again
        tell(folder, "the process that drew figures was ended meanwhile: they are left out")
        return
    mark.parent.mkdir(exist_ok=True)
    mark.touch()
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name, part in PARTS.items():
        try:
            part(folder, aside, config)
        except UserError as error:  # such as a model without queries, or without detections
            tell(folder, f"no figure of {name}: {error}")
        except Exception as error:
            tell(folder, f"no figure of {name}: {type(error).__name__}: {error}")
    (aside / OF).write_text(best, encoding="utf-8")
    shutil.rmtree(folder / FIGURES, ignore_errors=True)
    os.replace(aside, folder / FIGURES)
    mark.unlink()


def draw_curves(folder: Path, output: Path, config: RunConfig) -> None:
    """Precision over recall, as pictures and CSV, of the best evaluation's detections."""
    from pipeline.curves import curves, save_curves
    from pipeline.dataset import open_shards
    from pipeline.evaluate import ground_truth

    detections = json.loads((folder / DETECTIONS).read_text(encoding="utf-8"))
    shards = open_shards(config.data.val, config.data)
    save_curves(curves(ground_truth(shards), detections), output)


def draw_inside(folder: Path, output: Path, config: RunConfig) -> None:
    """Figures 5 and 6 of the paper."""
    from pipeline.dataset import open_shards
    from pipeline.look_inside import choose_images, look_inside
    from pipeline.predict import Detector

    detector = Detector.load(folder, config.engine.device)
    shards = open_shards(config.data.val, config.data)
    chosen = choose_images(shards, (), IMAGES)
    look_inside(detector, shards, chosen, output, tell=lambda _: None)
    (output / "predictions.png").unlink()  # the run folder has one of more images


def tell(folder: Path, text: str) -> None:
    """Writes a message into the run's metrics.jsonl."""
    last = read_lines(folder / "metrics.jsonl")[-1]
    log = MetricsLog(folder)
    log.write("event", last["step"], last["epoch"], event="message", text=text)


PARTS = {"precision and recall": draw_curves, "what the model looks at": draw_inside}
