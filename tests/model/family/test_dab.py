"""DAB-DETR: against a plain re-computation, against transformers, and what it does to batches."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DabDetrConfig, DabDetrForObjectDetection, ResNetConfig

from model.config import ModelConfig
from model.criterion import build_criterion
from model.detr import build_model
from pipeline.recipes import recipe
from tests.model.family.plain_dab import (
    as_leaves,
    check_gradients,
    loaded,
    plain_dab_detr,
    published_transformer,
    random,
)
from tests.model.family.plain_detr import State, assert_same_layers

SMALL: dict[str, Any] = {
    "architecture": "dab_detr",
    "num_classes": 7,
    "num_queries": 5,
    "num_levels": 1,
    "hidden_dim": 32,
    "num_heads": 4,
    "feedforward_dim": 48,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "dropout": 0.0,
}
IMAGES = torch.zeros(2, 3, 64, 96, dtype=torch.float64)
PADDING = torch.zeros(2, 64, 96, dtype=torch.bool)
PADDING[1, 30:], PADDING[1, :, 50:] = True, True
# Of the 2 x 3 cells of the second image, one row and two columns begin with a valid pixel.
VALID = [(2, 3), (1, 2)]


def case(patterns: int, **changes: Any) -> tuple[Any, State]:
    """A model and the published state that it was loaded from, in float64."""
    torch.manual_seed(2)
    state = published_transformer(32, 48, 7, 5, layers=3, patterns=patterns)
    features = random(2, 2048, 2, 3)
    return loaded(ModelConfig(**(SMALL | changes), num_patterns=patterns), state, features), state


@pytest.mark.parametrize("patterns", [0, 2])
def test_outputs_and_gradients_are_those_of_a_plain_one(patterns: int) -> None:
    model, state = case(patterns)
    state = as_leaves(state)
    anchors = state["refpoint_embed.weight"].sigmoid().repeat(max(patterns, 1), 1)
    content = torch.zeros(5, 32, dtype=torch.float64)
    if patterns:
        kinds = state["transformer.patterns.weight"]
        content = torch.stack([kinds[i] for i in range(patterns) for _ in range(5)])
    expected = plain_dab_detr(state, model.backbone.maps[0], VALID, [content] * 2, [anchors] * 2, 4)

    outputs = model(IMAGES, PADDING)
    assert outputs["pred_logits"].shape == (2, 5 * max(patterns, 1), 7)
    loss, expected_loss = assert_same_layers(outputs, expected, 1e-9)
    loss.backward()
    expected_loss.backward()
    check_gradients(model, state)


@pytest.mark.parametrize(
    ("name", "total", "trained"),
    [  # counted in IDEA-Research/DAB-DETR and DN-DETR
        ("dab_detr_r50", 43_671_517, 43_449_117),
        ("dab_detr_r50_dc5", 43_671_517, 43_449_117),
        ("dn_dab_detr_r50", 43_694_977, 43_472_577),
    ],
)
def test_parameters_are_the_published_models(name: str, total: int, trained: int) -> None:
    config = recipe(name).model
    with torch.device("meta"):
        model = build_model(config)
        images, padding = torch.empty(1, 3, 320, 416), torch.empty(1, 320, 416, dtype=torch.bool)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    outputs = model.eval()(images, padding)
    assert len(outputs["aux_outputs"]) == 5
    assert outputs["pred_logits"].shape == (1, 300, 91)
    assert outputs["pred_boxes"].shape == (1, 300, 4)


def test_three_patterns_make_three_times_as_many_queries() -> None:
    model, _ = case(patterns=3)
    with torch.no_grad():
        outputs = model.eval()(IMAGES, PADDING)
    assert outputs["pred_boxes"].shape == (2, 15, 4)


def test_a_checkpoint_of_another_kind_is_refused() -> None:
    _, state = case(patterns=2)
    config = ModelConfig(**SMALL, num_patterns=2)
    missing = {name: x for name, x in state.items() if name != "transformer.patterns.weight"}
    with pytest.raises(ValueError, match=r"missing keys: transformer\.patterns\.weight;"):
        loaded(config, missing)
    twice = {**state, "bbox_embed.layers.0.bias": state["bbox_embed.layers.0.bias"] + 1}
    with pytest.raises(ValueError, match=r"different values in transformer\.decoder\.bbox_embed"):
        loaded(config, twice)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_levels": 4},
        {"box_refine": True},
        {"classification": "softmax"},
        {"num_patterns": -1},
        {"num_patterns": 3, "architecture": "detr"},
        {"denoising_groups": 5, "architecture": "detr"},
        {"denoising_groups": -1},
        {"denoising_label_noise": 1.5},
        {"denoising_box_noise": -0.1},
    ],
)
def test_a_config_that_no_model_can_be_built_from_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"got .* expected "):
        ModelConfig(**(SMALL | changes))


def test_padding_changes_nothing() -> None:
    model, _ = case(patterns=0)
    features = model.backbone.maps[0]
    around = torch.full((2, 2048, 4, 5), 9.0, dtype=torch.float64)
    around[:, :, :2, :3] = features
    padding = torch.ones(2, 128, 160, dtype=torch.bool)
    padding[:, :64, :96] = PADDING
    with torch.no_grad():
        expected = model.eval()(IMAGES, PADDING)
        model.backbone.maps = [around]
        found = model(torch.zeros(2, 3, 128, 160, dtype=torch.float64), padding)
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("changes", [{"num_queries": 1}, {"decoder_layers": 1}, {}])
@pytest.mark.parametrize("boxes", [0, 2])
def test_every_parameter_gets_a_gradient(
    changes: dict[str, Any], boxes: int, small_config: Callable[..., ModelConfig], batch: tuple
) -> None:
    config = small_config(architecture="dab_detr", num_levels=1, num_patterns=2, **changes)
    images, padding, targets = batch
    targets = [{name: x[:boxes] for name, x in target.items()} for target in targets]
    model = build_model(config).train()
    build_criterion(config)(model(images, padding), targets)["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


# Names in transformers to the published ones, before those of tests/model/conftest.py.
NAMES = [
    (r"\.model\.conv_encoder\.", "."),
    (r"^model\.query_refpoint_embeddings", "refpoint_embed"),
    (r"^model\.backbone\.conv_encoder\.", "model.backbone."),
    (r"\.self_attn_layer_norm", ".norm1"),
    (r"\.(decoder\.layers\.\d+)\.(self_attn|cross_attn)\.(\2)\.output_proj", r".\1.\2.out_proj"),
    (r"\.self_attn\.norm1", ".norm1"),
    (r"\.cross_attn\.cross_attn_layer_norm", ".norm2"),
    (r"\.self_attn\.self_attn_", ".sa_"),
    (r"\.cross_attn\.cross_attn_", ".ca_"),
    (r"_(query|key)_(content|pos)", lambda m: f"_{m[1][0]}{m[2]}"),
    (r"a_value_proj", "a_v_proj"),
    (r"\.mlp\.", "."),
    (r"\.fc(\d)\.", r".linear\1."),
    (r"(decoder\.layers\.\d+)\.final_layer_norm", r"\1.norm3"),
    (r"\.activation_fn\.", ".activation."),
]


def test_transformers_agrees(published_names: Callable) -> None:
    """Its logits of boxes are cut off at 1e-5, those published at 1e-3, which no box here comes
    near, and its softmax is in float32."""
    theirs = DabDetrForObjectDetection(
        DabDetrConfig(
            backbone_config=ResNetConfig(
                out_features=["stage4"], depths=[1, 1, 1, 1], hidden_sizes=[256, 512, 1024, 2048]
            ),
            num_labels=7,
            num_queries=5,
            num_patterns=2,
            hidden_size=32,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_layers=3,
            decoder_layers=3,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            dropout=0.0,
            auxiliary_loss=True,
            attn_implementation="eager",
        )
    ).double()
    theirs.model.decoder.bbox_embed = theirs.bbox_predictor
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "backbone" not in name:
                parameter.add_(0.3 * random(*parameter.shape) / parameter.shape[-1] ** 0.5)
    state = {}
    for name, value in theirs.state_dict().items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = value
    state = published_names("detr", state)
    state = {name: x for name, x in state.items() if not name.startswith("backbone.")}
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        features = theirs.model.backbone.conv_encoder.model(images).feature_maps[-1]
        ours = loaded(ModelConfig(**SMALL, num_patterns=2), state, features)
        found = ours.eval()(images, PADDING)
        expected = theirs.eval()(pixel_values=images, pixel_mask=(~PADDING).long())
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert expected.logits.std() > 0.1
    torch.testing.assert_close(found["pred_logits"], expected.logits, **close)
    torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes, **close)
