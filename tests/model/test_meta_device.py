"""Shapes without arithmetic: the whole network on the meta device."""

import pytest
import torch
from torch import nn

from model.detr import build_model
from model.precision import FullPrecisionLinear
from pipeline.recipes import recipe


@pytest.mark.parametrize("name", ["deformable_detr_r50", "deformable_detr_r50_two_stage", "demo"])
def test_a_forward_gives_the_shapes(name: str) -> None:
    config = recipe(name).model
    with torch.device("meta"):
        model = build_model(config)
        images, padding = torch.empty(1, 3, 800, 1066), torch.empty(1, 800, 1066, dtype=torch.bool)
    outputs = model(images, padding)
    layers = [outputs, *outputs["aux_outputs"]]
    assert len(layers) == config.decoder_layers
    for layer in layers:
        assert layer["pred_logits"].shape == (1, config.num_queries, config.num_classes)
        assert layer["pred_boxes"].shape == (1, config.num_queries, 4)
        assert layer["pred_boxes"].is_meta
    if config.two_stage:
        cells = sum(-(-800 // s) * -(-1066 // s) for s in (8, 16, 32, 64))
        assert outputs["enc_outputs"]["pred_logits"].shape == (1, cells, config.num_classes)


def test_autocast_stays_off_where_there_is_one() -> None:
    layer, x = FullPrecisionLinear(4, 2), torch.randn(3, 4)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.Linear(4, 2)(x).dtype == torch.bfloat16
        found = layer(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
