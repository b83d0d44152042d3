from collections.abc import Callable

import pytest
import torch

from model.config import ModelConfig
from model.detr import build_model
from model.parameters import parameter_groups


def test_the_groups_of_the_papers_model() -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig())
    groups = parameter_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert list(groups) == ["backbone", "offsets", "rest"]
    assert len(groups["offsets"]) == 2 * (6 + 6 + 1)
    assert {names[id(p)].split(".")[-2] for p in groups["offsets"]} == {
        "sampling_offsets",
        "reference_points",
    }
    assert all(names[id(p)].startswith("backbone.layer") for p in groups["backbone"])
    assert sum(p.numel() for group in groups.values() for p in group) == 39_847_265


@pytest.mark.parametrize("two_stage", [False, True])
def test_each_trained_parameter_is_in_one_group(
    two_stage: bool, small_config: Callable[..., ModelConfig]
) -> None:
    model = build_model(small_config(two_stage=two_stage))
    grouped = [id(p) for group in parameter_groups(model).values() for p in group]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
