"""The rest of the DETR family, as named experiments: see docs/family.md."""

from collections.abc import Callable
from dataclasses import replace

from model.config import ModelConfig
from pipeline.config import DataConfig, OptimizerConfig, RunConfig, ScheduleConfig


def conditional_detr_r50() -> RunConfig:
    """Conditional DETR with ResNet-50 (its README: 41.0 AP, 44 M parameters).

    Dense attention over the stride-32 map, 300 queries; 50 epochs, drop at 40, 16 images a step.
    """
    return RunConfig(
        recipe="conditional_detr_r50",
        model=ModelConfig(architecture="conditional_detr", num_levels=1, feedforward_dim=2048),
        data=DataConfig(labels="category_id"),
        optimizer=OptimizerConfig(lr=1e-4, backbone_lr=1e-5, batch_size=16),
        schedule=ScheduleConfig(epochs=50, drop_epochs=(40,)),
    )


def conditional_detr_r50_dc5() -> RunConfig:
    """Conditional DETR on a dilated stage 5, at stride 16 (its README: 43.7 AP); 8 images a
    step."""
    base = conditional_detr_r50()
    return replace(
        base,
        recipe="conditional_detr_r50_dc5",
        model=replace(base.model, dilation=True),
        optimizer=replace(base.optimizer, batch_size=8),
    )


def smca_detr_r50() -> RunConfig:
    """SMCA DETR with ResNet-50 on a single scale (its README: 41.0 AP; 42.7 after 108 epochs, 43.5
    after 250).

    DETR with a Gaussian in the cross-attention, 300 queries; 50 epochs, drop at 40, 16 images a
    step.
    """
    base = conditional_detr_r50()
    return replace(
        base,
        recipe="smca_detr_r50",
        model=replace(base.model, architecture="smca_detr", classification="focal_no_object"),
    )


def dab_detr_r50() -> RunConfig:
    """DAB-DETR with ResNet-50 (its README: 42.2 AP, 44 M parameters; 42.6 with
    `--model.num_patterns 3`).

    300 anchor boxes as queries, dense attention over the stride-32 map, no dropout, class loss of
    weight 1; 50 epochs, drop at 40, 16 images a step.
    """
    return RunConfig(
        recipe="dab_detr_r50",
        model=ModelConfig(
            architecture="dab_detr",
            num_levels=1,
            feedforward_dim=2048,
            dropout=0.0,
            class_weight=1.0,
        ),
        data=DataConfig(labels="category_id"),
        optimizer=OptimizerConfig(lr=1e-4, backbone_lr=1e-5, batch_size=16),
        schedule=ScheduleConfig(epochs=50, drop_epochs=(40,)),
    )


def dab_detr_r50_dc5() -> RunConfig:
    """DAB-DETR on a dilated stage 5, at stride 16 (its README: 44.5 AP; 45.7 with 3 patterns)."""
    base = dab_detr_r50()
    return replace(base, recipe="dab_detr_r50_dc5", model=replace(base.model, dilation=True))


def dab_deformable_detr_r50() -> RunConfig:
    """DAB-Deformable-DETR with ResNet-50 (its README: 48.7 AP).

    Deformable DETR with box refinement whose queries are anchor boxes; feed-forwards of 2048, no
    dropout, offsets at the rate of the rest; 50 epochs, drop at 40, 16 images a step.
    """
    return RunConfig(
        recipe="dab_deformable_detr_r50",
        model=ModelConfig(
            architecture="dab_deformable_detr",
            box_refine=True,
            feedforward_dim=2048,
            dropout=0.0,
            class_weight=1.0,
        ),
        data=DataConfig(labels="category_id"),
        optimizer=OptimizerConfig(lr=1e-4, backbone_lr=1e-5, offsets_lr_factor=1.0, batch_size=16),
        schedule=ScheduleConfig(epochs=50, drop_epochs=(40,)),
    )


def dn_dab_detr_r50() -> RunConfig:
    """DN-DETR, DAB-DETR with denoising (its README: 44.4 AP, where DAB-DETR has 42.2)."""
    base = dab_detr_r50()
    return replace(base, recipe="dn_dab_detr_r50", model=replace(base.model, denoising_groups=5))


def dn_dab_detr_r50_dc5() -> RunConfig:
    """DN-DETR on a dilated stage 5, at stride 16 (its README: 46.3 AP)."""
    base = dn_dab_detr_r50()
    return replace(base, recipe="dn_dab_detr_r50_dc5", model=replace(base.model, dilation=True))


def dn_dab_deformable_detr_r50() -> RunConfig:
    """DN-Deformable-DETR, DAB-Deformable-DETR with denoising (DN-DETR's README: 49.5 AP; 48.4
    after 24 epochs)."""
    base = dab_deformable_detr_r50()
    return replace(
        base,
        recipe="dn_dab_deformable_detr_r50",
        model=replace(base.model, denoising_groups=5),
    )


def dino_r50_4scale() -> RunConfig:
    """DINO with ResNet-50 and four levels (its README: 49.0 AP).

    900 queries, feed-forwards of 2048, no dropout, contrastive denoising with 100 pairs and the box
    noise of its training script (1.0; its configuration file has 0.4), offsets at the rate of the
    rest; 12 epochs, drop at 11, 16 images a step. 50.4 AP after 24 epochs, drop at 20; 50.9 after
    36, drop at 30.
    """
    return RunConfig(
        recipe="dino_r50_4scale",
        model=ModelConfig(
            architecture="dino",
            two_stage=True,
            num_queries=900,
            feedforward_dim=2048,
            dropout=0.0,
            class_weight=1.0,
            denoising_pairs=100,
            denoising_label_noise=0.25,
            denoising_box_noise=1.0,
        ),
        data=DataConfig(labels="category_id"),
        optimizer=OptimizerConfig(lr=1e-4, backbone_lr=1e-5, offsets_lr_factor=1.0, batch_size=16),
        schedule=ScheduleConfig(epochs=12, drop_epochs=(11,)),
    )


def anchor_detr_r50() -> RunConfig:
    """Anchor DETR on the stride-32 map (its README: 42.1 AP).

    300 points, each with 3 patterns, row-column decoupled attention, feed-forwards of 1024, no
    dropout; 50 epochs, drop at 40, 8 images a step.
    """
    return RunConfig(
        recipe="anchor_detr_r50",
        model=ModelConfig(
            architecture="anchor_detr", num_levels=1, num_queries=300, num_patterns=3, dropout=0.0
        ),
        data=DataConfig(labels="category_id"),
        optimizer=OptimizerConfig(lr=1e-4, backbone_lr=1e-5, batch_size=8),
        schedule=ScheduleConfig(epochs=50, drop_epochs=(40,)),
    )


def anchor_detr_r50_dc5() -> RunConfig:
    """Anchor DETR on a dilated stage 5, at stride 16 (its README: 44.3 AP)."""
    base = anchor_detr_r50()
    return replace(base, recipe="anchor_detr_r50_dc5", model=replace(base.model, dilation=True))


def sam_detr_r50() -> RunConfig:
    """SAM-DETR with ResNet-50 (its README: 39.8 AP, 58 M parameters).

    Queries re-sampled from the stride-32 map in each layer; 50 epochs, drop at 40, 16 images a
    step. Its run of 12 epochs (drop at 10: 33.1 AP) has `--model.input_norm True`, as have those of
    `_smca`, `_dc5` and `_dc5_smca`.
    """
    return RunConfig(
        recipe="sam_detr_r50",
        model=ModelConfig(
            architecture="sam_detr", num_levels=1, feedforward_dim=2048, box_refine=True
        ),
        data=DataConfig(labels="category_id"),
        optimizer=OptimizerConfig(lr=1e-4, backbone_lr=1e-5, batch_size=16),
        schedule=ScheduleConfig(epochs=50, drop_epochs=(40,)),
    )


def sam_detr_r50_smca() -> RunConfig:
    """SAM-DETR with SMCA's Gaussians around its salient points (its README: 41.8 AP; 36.0 after 12
    epochs)."""
    return _with_gaussians(sam_detr_r50())


def sam_detr_r50_dc5() -> RunConfig:
    """SAM-DETR on a dilated stage 5, at stride 16 (its README: 43.3 AP; 38.3 after 12 epochs); 8
    images a step."""
    base = sam_detr_r50()
    return replace(
        base,
        recipe="sam_detr_r50_dc5",
        model=replace(base.model, dilation=True),
        optimizer=replace(base.optimizer, batch_size=8),
    )


def sam_detr_r50_dc5_smca() -> RunConfig:
    """The same with Gaussians (its README: 45.0 AP; 40.6 after 12 epochs)."""
    return _with_gaussians(sam_detr_r50_dc5())


def sam_detr_r50_multiscale() -> RunConfig:
    """SAM-DETR on strides 8, 16 and 32 with a deformable encoder (its README: 46.1 AP, 55 M
    parameters; 41.1 AP after 12 epochs, drop at 10)."""
    base = sam_detr_r50()
    return replace(
        base,
        recipe="sam_detr_r50_multiscale",
        model=replace(base.model, architecture="sam_multiscale_detr", num_levels=3),
        optimizer=replace(base.optimizer, offsets_lr_factor=1.0),
    )


def sam_detr_r50_multiscale_smca() -> RunConfig:
    """The same with Gaussians (its README: 47.1 AP; 42.8 after 12 epochs)."""
    return _with_gaussians(sam_detr_r50_multiscale())


def _with_gaussians(base: RunConfig) -> RunConfig:
    return replace(
        base,
        recipe=f"{base.recipe}_smca",
        model=replace(base.model, salient_gaussians=True),
    )


FAMILY: tuple[Callable[[], RunConfig], ...] = (
    conditional_detr_r50,
    conditional_detr_r50_dc5,
    smca_detr_r50,
    dab_detr_r50,
    dab_detr_r50_dc5,
    dab_deformable_detr_r50,
    dn_dab_detr_r50,
    dn_dab_detr_r50_dc5,
    dn_dab_deformable_detr_r50,
    dino_r50_4scale,
    anchor_detr_r50,
    anchor_detr_r50_dc5,
    sam_detr_r50,
    sam_detr_r50_smca,
    sam_detr_r50_dc5,
    sam_detr_r50_dc5_smca,
    sam_detr_r50_multiscale,
    sam_detr_r50_multiscale_smca,
)
