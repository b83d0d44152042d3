"""Named experiments. A variant is a few lines over a baseline.

`recipe(name)` is the one way in; any field can still be overridden on the command line.
"""

import difflib
from collections.abc import Callable
from dataclasses import replace

from model.config import ModelConfig
from pipeline.config import (
    AugmentConfig,
    DataConfig,
    EngineConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
)
from pipeline.errors import UserError


def deformable_detr_r50() -> RunConfig:
    """Deformable DETR with ResNet-50, the paper's baseline (section 5, Table 1: 43.8 AP).

    Command: python -m jobs submit deformable_detr_r50 --data.train S/train --data.val S/val
    --init.backbone resnet50.pth. Cost: 325 GPU-hours on V100 (paper); 50 epochs, drop at 40.
    """
    return RunConfig(
        recipe="deformable_detr_r50",
        model=ModelConfig(),
        data=DataConfig(labels="category_id"),
    )


def deformable_detr_r50_refine() -> RunConfig:
    """+ iterative bounding box refinement (section 4.2, A.4; Table 1: 45.4 AP)."""
    base = deformable_detr_r50()
    return replace(
        base,
        recipe="deformable_detr_r50_refine",
        model=replace(base.model, box_refine=True),
    )


def deformable_detr_r50_two_stage() -> RunConfig:
    """++ two-stage (section 4.2, A.4; Table 1: 46.2 AP). Cost: 340 GPU-hours on V100 (paper)."""
    base = deformable_detr_r50()
    return replace(
        base,
        recipe="deformable_detr_r50_two_stage",
        model=replace(base.model, box_refine=True, two_stage=True),
    )


def deformable_detr_r50_single_scale() -> RunConfig:
    """Attention over the stride-32 map alone (Table 2 without multi-scale inputs)."""
    base = deformable_detr_r50()
    return replace(
        base,
        recipe="deformable_detr_r50_single_scale",
        model=replace(base.model, num_levels=1),
    )


def deformable_detr_r50_single_scale_dc5() -> RunConfig:
    """Single scale on a dilated stage 5, so at stride 16."""
    base = deformable_detr_r50_single_scale()
    return replace(
        base,
        recipe="deformable_detr_r50_single_scale_dc5",
        model=replace(base.model, dilation=True),
    )


def deformable_detr_r101_two_stage() -> RunConfig:
    """Two-stage with ResNet-101 (Table 3: 48.7 AP on test-dev)."""
    base = deformable_detr_r50_two_stage()
    return replace(
        base,
        recipe="deformable_detr_r101_two_stage",
        model=replace(base.model, backbone="resnet101"),
    )


def demo() -> RunConfig:
    """A small detector that learns simple shapes from scratch in minutes on two cores.

    The same model code as the paper's recipes (two-stage, refinement, multi-scale deformable
    attention, six decoder layers), with a small backbone, 64 channels and two encoder layers.
    Command: make demo. Aims at AP 0.50 or more on the synthetic validation set.
    """
    return RunConfig(
        recipe="demo",
        model=ModelConfig(
            num_classes=4,
            num_queries=30,
            backbone="tiny",
            num_levels=4,
            hidden_dim=64,
            num_heads=2,
            num_points=4,
            encoder_layers=2,
            decoder_layers=6,
            feedforward_dim=256,
            dropout=0.0,
            box_refine=True,
            two_stage=True,
            proposal_scale=0.1,
        ),
        augment=AugmentConfig(
            short_sides=(),
            crop_probability=0.0,
            flip_probability=0.5,
            transpose_probability=0.5,
            val_short_side=0,
        ),
        optimizer=OptimizerConfig(
            lr=2e-3,
            backbone_lr=2e-3,
            offsets_lr_factor=1.0,
            clip_norm=0.1,
            batch_size=16,
        ),
        schedule=ScheduleConfig(epochs=5, kind="cosine", warmup_fraction=0.1, final_factor=0.01),
        engine=EngineConfig(loader_workers=0, log_every=20),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    function.__name__: function
    for function in (
        deformable_detr_r50,
        deformable_detr_r50_refine,
        deformable_detr_r50_two_stage,
        deformable_detr_r50_single_scale,
        deformable_detr_r50_single_scale_dc5,
        deformable_detr_r101_two_stage,
        demo,
    )
}


def recipe(name: str) -> RunConfig:
    """The named experiment; an unknown name raises `UserError` with the nearest match."""
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise UserError(f"unknown recipe {name!r}: {hint}expected one of {', '.join(RECIPES)}")
    return RECIPES[name]()
