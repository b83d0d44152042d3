"""What `jobs train` says and refuses of recipe and weights before it reads any data."""

from dataclasses import replace

from model.config import TINY
from pipeline.config import RunConfig
from pipeline.errors import UserError

DEFORMABLE_DETR = "the README of github.com/fundamentalvision/Deformable-DETR"
DETR = "the README of github.com/facebookresearch/detr"
PUBLISHED = {  # a recipe -> where its detector of COCO is to be had
    "deformable_detr_r50_single_scale": DEFORMABLE_DETR,
    "deformable_detr_r50_single_scale_dc5": DEFORMABLE_DETR,
    "deformable_detr_r50": DEFORMABLE_DETR,
    "deformable_detr_r50_refine": DEFORMABLE_DETR,
    "deformable_detr_r50_two_stage": DEFORMABLE_DETR,
    "detr_r50": DETR,
    "detr_r50_dc5": DETR,
    "faster_rcnn_r50_fpn": "torchvision's documentation (fasterrcnn_resnet50_fpn)",
}


def beginning(config: RunConfig, is_default: bool, workers: int, address: str) -> str:
    """What will be trained and on what, in a line; and one more where that will take days."""
    import torch  # seconds, which a mistake in the options need not wait for

    from model.detr import build_model

    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(config.model).parameters())
    gpus = 0 if config.engine.device == "cpu" else min(workers, torch.cuda.device_count())
    place = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "cpu"
    line = (
        f"recipe {config.recipe}{' (the default)' if is_default else ''}, "
        f"{parameters / 1e6:.1f} million parameters, on {address or place}"
    )
    if gpus or address or config.model.backbone in TINY:
        return line
    return (
        f"{line}\nthere is no GPU here: such a training takes days on a CPU; --address trains on a "
        f"cluster, and --recipe demo is small enough to try the command with"
    )


def check_weights(config: RunConfig) -> None:
    """Raises `UserError` where --weights or --init.backbone do not fit the recipe."""
    from pipeline.initialise import initial_model

    if not config.init.weights and not config.init.backbone:
        return
    try:
        initial_model(config)
    except UserError as error:
        raise UserError(str(error).replace("init.weights", "--weights")) from None


def with_weights(config: RunConfig, weights: object) -> RunConfig:
    """The config with --weights, where they are given."""
    if not weights:
        return config
    return replace(config, init=replace(config.init, weights=str(weights)))


def starts_from(config: RunConfig) -> str:
    """What training starts from, in a sentence, and what to do where that is too little."""
    if config.init.weights:
        return f"starts from {config.init.weights}"
    start = "random weights"
    if config.init.backbone:
        start = "the backbone's weights alone"
    where = PUBLISHED.get(config.recipe)
    remedy = "give the run folder of a detector that was trained on more images as --weights"
    if where:
        remedy = f"download a detector of COCO for this recipe from {where}, and give it as "
        remedy += "--weights"
    return (
        f"no --weights: training starts from {start}. A DETR learns to detect from tens of "
        f"thousands of images; from few hundred AP stays near 0: {remedy}"
    )
