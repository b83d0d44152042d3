"""Defaults for few images of one's own, over a recipe that was made for COCO's 118,000.

What others do, who start from a detector of COCO, too: transformers' guide and AutoTrain on CPPE-5
(1,000 images) take lr 5e-5 for 8 images, warm-up over a tenth, 30 to 100 epochs; RF-DETR lr 1e-4
for 16 images, 100 epochs and an average of the weights; mmdetection's tutorial a lower rate and a
fresh class head. From ImageNet's weights alone few thousand images are not enough for a DETR
(facebookresearch/detr issues 9 and 125).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import RunConfig

SMALL_BATCH, BATCH = 8, 16  # images in a step: below FEW of them in the data, and from there on
FEW = 1000
STEPS = 4000  # that a detector of COCO needs, at least, to be at home in another data set
FEWEST_EPOCHS, MOST_EPOCHS = 12, 100
EVALUATIONS = 25  # of few images, more would take longer than training
MOST_WARM_UP = 500  # steps


@dataclass(frozen=True)
class Default:
    """`field` of a RunConfig, such as "optimizer.lr", its value, and why."""

    field: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{as_option(self.field, self.value)}: {self.reason}"


def as_option(field: str, value: Any) -> str:
    """As it is written on a command line: "--schedule.drop-epochs 40 45"."""
    values = value if isinstance(value, tuple) else (value,)
    words = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)
    return " ".join((f"--{field.replace('_', '-')}", *words))


def fine_tuning(
    config: RunConfig, images: int, batch_size: int = 0, epochs: int = 0
) -> tuple[RunConfig, list[Default]]:
    """A recipe with the defaults for `images` training images, and each of them with its reason.

    batch_size, epochs: of the user's choice, on which the other defaults then depend; 0: none.
    """
    given = config.optimizer
    batch = min(SMALL_BATCH if images < FEW else BATCH, given.batch_size, max(1, images))
    batch = batch_size or batch
    usual = min(max(-(-STEPS * batch // max(1, images)), FEWEST_EPOCHS), MOST_EPOCHS)
    epochs = epochs or usual
    steps = max(1, epochs * images // batch)
    share = batch / given.batch_size
    warm_up = min(0.1, MOST_WARM_UP / steps)
    drop = max(1, round(0.8 * epochs))
    decay = min(max(1 - 20 / steps, 0.9), 0.9997)
    cnn = config.model.architecture == "faster_rcnn"
    defaults = [
        Default(
            "optimizer.batch_size", batch,
            f"{images} images make {images / batch:.0f} steps an epoch of it",
        ),
        Default(
            "optimizer.lr", given.lr * share,
            f"the recipe's {given.lr:g} for {given.batch_size} images, in proportion",
        ),
        Default(
            "optimizer.backbone_lr", given.backbone_lr * share,
            f"the recipe's {given.backbone_lr:g}, in proportion",
        ),
        Default(
            "optimizer.ema_decay", round(decay, 4),
            f"evaluated is the mean of about the last {1 / (1 - decay):.0f} steps: steadier on "
            f"few images",
        ),
        Default(
            "schedule.epochs", epochs,
            f"{steps} steps: {STEPS} are aimed at, in {FEWEST_EPOCHS} to {MOST_EPOCHS} epochs",
        ),
        Default(
            "schedule.evaluate_every", max(1, epochs // EVALUATIONS),
            f"about {min(epochs, EVALUATIONS)} evaluations in all, from which the best is kept",
        ),
        Default(
            "schedule.warmup_fraction", round(warm_up, 4),
            f"{warm_up * steps:.0f} steps: the fresh class head must not spoil the rest",
        ),
        Default(
            "data.labels", "contiguous_from_1" if cnn else "contiguous",
            "a column for each category, whatever its id",
        ),
    ]  # fmt: skip
    if config.schedule.kind == "step":
        defaults.append(
            Default("schedule.drop_epochs", (drop,), "at four fifths, as the paper's 40 of 50")
        )
    for default in defaults:
        config = _with_value(config, default.field, default.value)
    return config, defaults


def _with_value(config: RunConfig, field: str, value: Any) -> RunConfig:
    section, name = field.split(".")
    changed: Callable[..., Any] = replace
    return replace(config, **{section: changed(getattr(config, section), **{name: value})})


def value_of(config: RunConfig, field: str) -> Any:
    """Of a field such as "optimizer.lr"."""
    section, name = field.split(".")
    return getattr(getattr(config, section), name)
