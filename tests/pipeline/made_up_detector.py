"""A checkpoint without a training, whose boxes and classes depend on the image all the same."""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from model.detr import build_model
from pipeline.data.labels import Labels
from pipeline.recipes import recipe


def save_checkpoint(path: Path, labels: Labels, precision: str = "fp32") -> None:
    """A `model.pt` of the demo's architecture, which sees images with a shorter side of 96."""
    config = recipe("demo")
    config = replace(
        config,
        model=replace(
            config.model, decoder_layers=2, num_queries=40, num_classes=labels.num_classes
        ),
        augment=replace(config.augment, val_short_side=96, max_side=160),
        engine=replace(config.engine, precision=precision),
    )
    torch.manual_seed(3)
    model = build_model(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("encoder.", "decoder.", "heads.")) and "norm" not in name:
                parameter.normal_(0, 0.3 if name.endswith("bias") else parameter.shape[-1] ** -0.5)
    content = {"model": model.state_dict(), "config": config.to_json(), "progress": {}}
    torch.save({**content, "labels": asdict(labels)}, path)
