"""Fine-tuning from the published file of each method of the family, onto other classes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model.detr import build_model
from pipeline.config import InitConfig
from pipeline.initialise import initial_model, is_class_head
from pipeline.recipes import recipe

METHODS = (
    "deformable_detr_r50_12ep", "conditional_detr_r50", "smca_detr_r50", "dab_detr_r50",
    "dn_dab_detr_r50", "dab_deformable_detr_r50", "dn_dab_deformable_detr_r50", "dino_r50_4scale",
    "anchor_detr_r50", "sam_detr_r50", "sam_detr_r50_multiscale",
)  # fmt: skip
# In which order published attentions keep their input projections in one tensor.
PARTS = ("query_key", "query", "key", "query_x", "query_y", "key_x", "key_y", "value")


def published(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors in its method's published names."""
    state: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for key, value in model.state_dict().items():
        first, *aliases = model.official_names(key)
        if "in_proj_" in first:
            part = key.split(".")[-2].removesuffix("_proj")
            packed.setdefault(first, {})[part] = value
        else:
            state |= dict.fromkeys([first, *aliases], value)
    for name, parts in packed.items():
        state[name] = torch.cat([parts[part] for part in PARTS if part in parts])
    return state


@pytest.mark.parametrize("name", METHODS)
def test_a_published_file_is_loaded_but_for_its_classes(name, tmp_path):
    base = recipe(name)
    small = replace(
        base.model, num_classes=5, num_queries=4, hidden_dim=32, num_heads=2, feedforward_dim=16,
        encoder_layers=1, decoder_layers=3, one_to_many_queries=0,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = build_model(small)
    state, file = published(theirs), tmp_path / "published.pth"
    torch.save({"model": state}, file)
    run = replace(base, model=small, init=InitConfig(weights=str(file)))
    same, said = initial_model(run)
    assert said.endswith(f"all {len(state)} tensors are loaded")
    for key, value in theirs.state_dict().items():
        assert torch.equal(same.state_dict()[key], value), key

    other, said = initial_model(replace(run, model=replace(small, num_classes=3)))
    assert "all other tensors are loaded" in said
    heads = [key for key in other.state_dict() if is_class_head(key)]
    assert heads
    for key, value in theirs.state_dict().items():
        mine = other.state_dict()[key]
        if key in heads:
            assert len(mine) == len(value) - 2, key
            assert key in said
        else:
            assert torch.equal(mine, value), key
