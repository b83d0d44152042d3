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


FAMILY: tuple[Callable[[], RunConfig], ...] = (
    conditional_detr_r50,
    conditional_detr_r50_dc5,
)
