"""A checkpoint as a folder that the transformers library loads."""

import json
from pathlib import Path

from model.transformers_weights import save_for_transformers
from pipeline.config import AugmentConfig
from pipeline.data.batch import MEAN, STD
from pipeline.errors import UserError
from pipeline.predict import Detector


def write_for_transformers(detector: Detector, folder: Path) -> None:
    """Weights, configuration with class names, and what images must be made into, so that both the
    model and its image processor load by `from_pretrained(folder)`.

    A class column without a category is named LABEL_n: transformers takes one name for each column.
    Raises `UserError` for a model that transformers has no counterpart of.
    """
    names = [name or f"LABEL_{column}" for column, name in enumerate(detector.labels.names)]
    try:
        save_for_transformers(detector.model, folder, names)
    except ValueError as error:
        raise UserError(str(error)) from None
    dense = detector.config.model.architecture == "detr"
    processor = _image_processor(detector.config.augment, dense)
    text = json.dumps(processor, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def _image_processor(augment: AugmentConfig, dense: bool) -> dict[str, object]:
    """The evaluation's transform in transformers' words."""
    size = {"shortest_edge": augment.val_short_side, "longest_edge": augment.max_side}
    return {
        "image_processor_type": f"{'Detr' if dense else 'DeformableDetr'}ImageProcessor",
        "format": "coco_detection",
        "do_resize": augment.val_short_side > 0,
        **({"size": size} if augment.val_short_side > 0 else {}),
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "do_pad": True,
    }
