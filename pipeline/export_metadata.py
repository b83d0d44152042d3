"""What an exported file says of itself, as texts by name."""

import json
import tomllib
from dataclasses import replace

from pipeline.config import InitConfig
from pipeline.data.batch import MEAN, STD
from pipeline.export_graph import smallest_side
from pipeline.predict import Detector
from pipeline.step_report import ROOT, commit


def metadata(detector: Detector) -> dict[str, str]:
    """JSON texts.

    `names`, `category_ids`: of each class column; "" and -1 for one that no category has.
    `mean`, `std`: of the normalisation, for channels in [0, 1]. `short_side`, `max_side`: to
    which the image is resized before (`short_side` 0: not at all). `smallest_side`: of an image
    that an exported graph takes. `config`: of the run, without paths of the machine it was on.
    `version`, `commit`: of this repository.
    """
    augment = detector.config.augment
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    values = {
        "names": detector.labels.names,
        "category_ids": detector.labels.category_of,
        "mean": MEAN,
        "std": STD,
        "short_side": augment.val_short_side,
        "max_side": augment.max_side,
        "smallest_side": smallest_side(detector.config.model),
        "config": replace(detector.config, init=InitConfig()).identity(),
        "version": project["version"],
        "commit": commit(),
    }
    return {name: json.dumps(value) for name, value in values.items()}
