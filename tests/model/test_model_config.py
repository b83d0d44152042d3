from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from model.config import ModelConfig


def test_the_default_is_the_papers_model() -> None:
    config = ModelConfig()
    assert (config.num_queries, config.num_levels, config.num_heads, config.num_points) == (
        300,
        4,
        8,
        4,
    )
    assert not config.refines


def test_two_stage_implies_refinement() -> None:
    assert ModelConfig(two_stage=True).refines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 0}, "num_classes: got 0, expected at least 1"),
        ({"num_queries": -3}, "num_queries: got -3"),
        (
            {"architecture": "conditional_detr", "num_levels": 1, "num_points": 8},
            "num_points: got 8 with conditional_detr, expected 4: it is a part of deformable_detr",
        ),
        ({"dynamic_scale": "type1"}, "dynamic_scale: got 'type1' with deformable_detr"),
        ({"neck": "pan"}, "neck: got 'pan', expected one of plain, fpn, bifpn"),
        ({"num_levels": 1, "neck": "fpn"}, "got fpn, True with num_levels=1"),
        ({"num_levels": 1, "level_exchange": False}, "got plain, False with num_levels=1"),
        ({"backbone": "resnet18"}, "got 'resnet18', expected one of resnet50, resnet101"),
        ({"num_levels": 2}, "num_levels: got 2, expected 1, or 3 and up"),
        ({"hidden_dim": 100}, "hidden_dim: got 100, expected a multiple of 32"),
        ({"num_heads": 7}, "num_heads=7"),
        ({"dropout": 1.0}, "dropout: got 1.0, expected 0 <= dropout < 1"),
        ({"dropout": float("nan")}, "dropout: got nan"),
        ({"focal_alpha": 1.5}, "focal_alpha: got 1.5"),
        ({"giou_cost": float("inf")}, "giou_cost: got inf, expected a finite number"),
        ({"bbox_weight": -1.0}, "bbox_weight: got -1.0"),
        ({"proposal_scale": 0.0}, "proposal_scale: got 0.0"),
        ({"two_stage": True, "auxiliary_loss": False}, "auxiliary_loss: got False"),
    ],
)
def test_a_wrong_value_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        ModelConfig(**change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_it_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        ModelConfig().num_classes = 3  # type: ignore[misc]
