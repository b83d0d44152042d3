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
from pipeline.family_recipes import FAMILY

DEMO_SCALE = "_demo"
# Those that learn at a lower rate at demo scale.
DENSE = (
    "detr",
    "conditional_detr",
    "smca_detr",
    "dab_detr",
    "sam_detr",
    "sam_multiscale_detr",
)


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


def deformable_detr_r50_12ep() -> RunConfig:
    """Two-stage with what its successors found, in a quarter of the epochs: aims above 48.7 AP,
    which is published for all of it but denoising and averaging.

    Each is a switch of its own; the grid `recipe12` puts them on one after the other. Published AP
    on COCO val2017 with ResNet-50 after 12 epochs:
    - `model.dropout` 0, `model.mixed_query_selection` and `model.look_forward_twice`: 43.7 to 47.0
      together (README of H-Deformable-DETR); in DINO the second gave 0.5 and the third 0.4 (its
      Table 4).
    - `model.one_to_many_queries`: 47.0 to 48.7 (same README).
    - `model.denoising_pairs`: 47.4 to 47.9 in DINO (its Table 4). Together with one-to-many
      supervision it is unproven: see `model/family/one_to_many.py`.
    - `optimizer.ema_decay`: 49.2 to 49.4 for DINO in detrex (its model zoo; its pull request 201).

    Neighbours, after 12 epochs too: DINO 49.0 with 900 queries, Mr. DETR 49.5 with 300 and 50.7
    with 900, Relation-DETR 51.7. Schedule, batch and feed-forward are those of H-Deformable-DETR,
    whose rate, the paper's, needs no warm-up: 16 images a step, drop at the start of the last
    epoch. In evaluation the wider feed-forward alone costs more than two-stage: 225 G
    multiply-adds, not 168. H-Deformable-DETR's checkpoints load with --model.denoising-pairs 0.
    """
    base = deformable_detr_r50_two_stage()
    return replace(
        base,
        recipe="deformable_detr_r50_12ep",
        model=replace(
            base.model,
            feedforward_dim=2048,
            dropout=0.0,
            mixed_query_selection=True,
            look_forward_twice=True,
            one_to_many_queries=1500,
            denoising_pairs=100,
        ),
        optimizer=replace(base.optimizer, batch_size=16, ema_decay=0.9997),
        schedule=ScheduleConfig(epochs=12, drop_epochs=(11,)),
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


def deformable_detr_x101_two_stage() -> RunConfig:
    """Two-stage with ResNeXt-101 64x4d (Table 3: 49.0 AP on test-dev)."""
    base = deformable_detr_r50_two_stage()
    return replace(
        base,
        recipe="deformable_detr_x101_two_stage",
        model=replace(base.model, backbone="resnext101_64x4d"),
    )


def deformable_detr_x101_dcn_two_stage() -> RunConfig:
    """Two-stage with ResNeXt-101 and DCNv2 in C3-C5 (Table 3: 50.1 AP on test-dev, 52.3 with
    test-time augmentation)."""
    base = deformable_detr_x101_two_stage()
    return replace(
        base,
        recipe="deformable_detr_x101_dcn_two_stage",
        model=replace(base.model, backbone="resnext101_64x4d_dcn"),
    )


def detr_r50() -> RunConfig:
    """DETR with ResNet-50, the published 500 epochs (Table 1: 42.0 AP).

    Dense attention over the stride-32 map, 100 queries, softmax with a class for no object.
    Cost: 2000 GPU-hours on V100 (paper); lr 1e-4 for 64 images, drop at 400.
    """
    return RunConfig(
        recipe="detr_r50",
        model=ModelConfig(
            architecture="detr",
            classification="softmax",
            num_queries=100,
            num_levels=1,
            feedforward_dim=2048,
            class_weight=1.0,
            class_cost=1.0,
        ),
        data=DataConfig(labels="category_id"),
        optimizer=OptimizerConfig(lr=1e-4, backbone_lr=1e-5, batch_size=64),
        schedule=ScheduleConfig(epochs=500, drop_epochs=(400,)),
    )


def detr_r50_dc5() -> RunConfig:
    """DETR on a dilated stage 5, at stride 16 (Table 1: 43.3 AP; 35.3 after 50 epochs)."""
    base = detr_r50()
    return replace(base, recipe="detr_r50_dc5", model=replace(base.model, dilation=True))


def detr_r50_dc5_plus() -> RunConfig:
    """DETR-DC5+: with focal loss and 300 queries, in 50 epochs (section 5; Table 1: 36.2 AP)."""
    base = detr_r50_dc5()
    return replace(
        base,
        recipe="detr_r50_dc5_plus",
        model=replace(
            base.model, classification="focal", num_queries=300, class_weight=2.0, class_cost=2.0
        ),
        schedule=ScheduleConfig(epochs=50, drop_epochs=(40,)),
    )


def faster_rcnn_r50_fpn() -> RunConfig:
    """Faster R-CNN with ResNet-50 and an FPN, torchvision's (Table 1: 42.0 AP after 109 epochs).

    In the trainer, the data and the augmentation of the other recipes. The published run is SGD's:
    the rates here are AdamW's and have not been tuned on COCO. torchvision's own checkpoint
    (37.0 AP after 26 epochs) loads through --init.weights. Cost: 380 GPU-hours on V100 (paper).
    """
    return RunConfig(
        recipe="faster_rcnn_r50_fpn",
        model=ModelConfig(architecture="faster_rcnn", classification="softmax"),
        data=DataConfig(labels="category_id"),
        optimizer=OptimizerConfig(lr=1e-4, backbone_lr=1e-4, clip_norm=1.0, batch_size=16),
        schedule=ScheduleConfig(epochs=109, drop_epochs=(101, 106), warmup_fraction=0.001),
    )


def at_demo_scale(config: RunConfig) -> RunConfig:
    """The same system, so small that it learns simple shapes from scratch in minutes on two cores.

    What makes it that system stays: architecture, stages, refinement, levels, neck, points,
    dilation, deformable convolutions, classification, what trains beside it. Backbone, width,
    number of queries, data and schedule become the demo's, so ResNet-50, ResNet-101 and ResNeXt
    are all one.
    """
    model = config.model
    small = replace(
        model,
        num_classes=4,
        # A DINO with 30 trains its first stage on these tokens alone, and learns slowly.
        num_queries=max(30, model.num_queries // 10),
        backbone="tiny_dcn" if model.backbone.endswith("_dcn") else "tiny",
        hidden_dim=64,
        num_heads=2,
        encoder_layers=2,
        feedforward_dim=256,
        dropout=0.0,
        proposal_scale=0.1,
        one_to_many_queries=min(model.one_to_many_queries, 5 * 30),
        denoising_pairs=min(model.denoising_pairs, 25),
        anchor_cells=4,
        sampled_proposals=64,
    )
    # A Faster R-CNN's gradient is larger: clipped at 0.1 it would hardly move. A DETR's dense
    # attention learns nothing at the rate that suits the others.
    cnn = model.architecture == "faster_rcnn"
    lr = 5e-4 if model.architecture in DENSE else 2e-3
    if model.architecture == "anchor_detr":
        lr = 1e-3  # AP 0.027 after 4 epochs of 6, and 0.012 at 2e-3
    return RunConfig(
        recipe=config.recipe + DEMO_SCALE,
        model=small,
        data=DataConfig(labels="contiguous_from_1" if cnn else "contiguous"),
        augment=AugmentConfig(
            short_sides=(),
            crop_probability=0.0,
            flip_probability=0.5,
            transpose_probability=0.5,
            val_short_side=0,
        ),
        optimizer=OptimizerConfig(
            lr=lr,
            backbone_lr=lr,
            offsets_lr_factor=1.0,
            clip_norm=1.0 if cnn else 0.1,
            batch_size=16,
            ema_decay=config.optimizer.ema_decay,
        ),
        schedule=ScheduleConfig(epochs=6, kind="cosine", warmup_fraction=0.1, final_factor=0.01),
        engine=EngineConfig(loader_workers=0, log_every=20),
    )


def demo() -> RunConfig:
    """The main job of `make demo`: deformable_detr_r50_two_stage at demo scale.

    The same model code as the paper's recipes (two-stage, refinement, multi-scale deformable
    attention, six decoder layers). Aims at AP 0.50 or more on the synthetic validation set.
    """
    return replace(at_demo_scale(deformable_detr_r50_two_stage()), recipe="demo")


RECIPES: dict[str, Callable[[], RunConfig]] = {
    function.__name__: function
    for function in (
        deformable_detr_r50,
        deformable_detr_r50_refine,
        deformable_detr_r50_two_stage,
        deformable_detr_r50_12ep,
        deformable_detr_r50_single_scale,
        deformable_detr_r50_single_scale_dc5,
        deformable_detr_r101_two_stage,
        deformable_detr_x101_two_stage,
        deformable_detr_x101_dcn_two_stage,
        detr_r50,
        detr_r50_dc5,
        detr_r50_dc5_plus,
        faster_rcnn_r50_fpn,
        *FAMILY,
        demo,
    )
}


def recipe(name: str) -> RunConfig:
    """The named experiment, with `_demo` behind its name at demo scale; an unknown name raises
    `UserError` with the nearest match."""
    if name in RECIPES:
        return RECIPES[name]()
    base = name.removesuffix(DEMO_SCALE)
    if base != name and base in RECIPES and base != "demo":
        return at_demo_scale(RECIPES[base]())
    method = [known for known in RECIPES if known.startswith(f"{base}_")][:1]
    nearest = method or difflib.get_close_matches(base, RECIPES, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0] + name[len(base) :]!r}? " if nearest else ""
    raise UserError(
        f"unknown recipe {name!r}: {hint}expected one of {', '.join(RECIPES)}, "
        f"or one of them with {DEMO_SCALE} behind it"
    )
