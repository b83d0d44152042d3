"""Weights to transformers and back: its models, loaded from our folders, agree with ours."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForObjectDetection,
    DeformableDetrForObjectDetection,
    DetrForObjectDetection,
)

from model.config import ModelConfig
from model.detr import build_model
from model.transformers_weights import load_transformers, save_for_transformers

Saved = Callable[[str], tuple[nn.Module, Path]]

DETR = {"architecture": "detr", "classification": "softmax", "num_levels": 1}
VARIANTS = {
    "base": {},
    "refine": {"box_refine": True},
    "two_stage": {"two_stage": True},
    "single_scale": {"num_levels": 1},
    "single_scale_dc5": {"num_levels": 1, "dilation": True},
    "five_levels": {"num_levels": 5, "num_points": 2},
    "r101": {"backbone": "resnet101"},
    "x101": {"backbone": "resnext101_32x8d", "box_refine": True},
    "detr": DETR,
    "detr_dc5": {**DETR, "dilation": True},
}
NEEDS_TIMM = ("single_scale_dc5", "x101", "detr_dc5")


def small(**changes: Any) -> ModelConfig:
    values = {
        "num_classes": 6, "num_queries": 12, "hidden_dim": 64, "num_heads": 4,
        "encoder_layers": 2, "decoder_layers": 3, "feedforward_dim": 96, "dropout": 0.0,
    }  # fmt: skip
    points = {} if changes.get("architecture") == "detr" else {"num_points": 3}
    return ModelConfig(**(values | points | changes))


def trained(config: ModelConfig) -> nn.Module:
    """A model with weights as different from each other as training makes them."""
    torch.manual_seed(3)
    model = build_model(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone."):
                scale = 0.3 if name.endswith("bias") else 1.5 * parameter.shape[-1] ** -0.5
                parameter.normal_(0, scale if parameter.dim() < 4 else 0.02)
        for name, buffer in model.named_buffers():
            if "running_var" in name or name.endswith("norm.weight"):
                buffer.uniform_(0.6, 1.2)
            elif "norm." in name:
                buffer.uniform_(-0.1, 0.1)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved(variant)`: a model and the folder it was saved to, made once."""

    @functools.cache
    def make(variant: str) -> tuple[nn.Module, Path]:
        folder = tmp_path_factory.mktemp(variant)
        model = trained(small(**VARIANTS[variant]))
        save_for_transformers(model, folder)
        return model, folder

    return make


def differences(first: nn.Module, second: nn.Module) -> list[str]:
    other = second.state_dict()
    return [k for k, v in first.state_dict().items() if not torch.equal(v, other[k])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_loads_what_we_save_and_agrees(variant: str, saved: Saved) -> None:
    if variant in NEEDS_TIMM:
        pytest.importorskip("timm", reason="transformers has dilated and ResNeXt backbones of timm")
    ours, folder = saved(variant)
    kind = DeformableDetrForObjectDetection if "detr" not in variant else DetrForObjectDetection
    theirs, info = kind.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[problem], problem
    theirs.eval()

    torch.manual_seed(5)
    images = torch.randn(2, 3, 96, 128, dtype=torch.float64)
    padding = torch.zeros(2, 96, 128, dtype=torch.bool)
    padding[1, 70:], padding[1, :, 101:] = True, True
    images[1] *= ~padding[1]
    with torch.no_grad():
        found = ours(images, padding)
        expected = theirs(pixel_values=images, pixel_mask=(~padding).long())
    # We compute the places of cells in float32 as the published model does, transformers in
    # float64: hence not 1e-9.
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert found["pred_logits"].std() > 0.1
    torch.testing.assert_close(found["pred_logits"], expected.logits, **close)
    torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes, **close)
    if variant == "two_stage":
        first = found["enc_outputs"]
        torch.testing.assert_close(first["pred_logits"], expected.enc_outputs_class, **close)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_round_trip_through_our_file_is_exact(variant: str, saved: Saved) -> None:
    ours, folder = saved(variant)
    back = build_model(ours.config).double()
    assert differences(ours, back)
    load_transformers(back, load_file(folder / "model.safetensors"))
    assert differences(ours, back) == []


@pytest.mark.parametrize("variant", ["base", "refine", "two_stage", "single_scale", "detr"])
def test_the_round_trip_through_transformers_is_exact(
    variant: str, saved: Saved, tmp_path: Path
) -> None:
    ours, folder = saved(variant)
    theirs = AutoModelForObjectDetection.from_pretrained(folder, dtype=torch.float64)
    theirs.save_pretrained(tmp_path)
    for state in (load_file(tmp_path / "model.safetensors"), theirs.state_dict()):
        back = build_model(ours.config).double()
        load_transformers(back, state)
        assert differences(ours, back) == []


@pytest.mark.parametrize("variant", ["refine", "two_stage"])
def test_refining_heads_stay_one_in_transformers(variant: str, saved: Saved) -> None:
    """Fine-tuned there, the copies in its decoder must learn with the heads."""
    theirs = DeformableDetrForObjectDetection.from_pretrained(saved(variant)[1])
    for layer in range(3):
        inner, outer = theirs.model.decoder.bbox_embed[layer], theirs.bbox_embed[layer]
        assert inner.layers[2].weight is outer.layers[2].weight
    assert theirs.bbox_embed[0].layers[2].weight is not theirs.bbox_embed[1].layers[2].weight
    assert not torch.equal(theirs.class_embed[0].weight, theirs.class_embed[1].weight)


def test_the_configuration_says_classes_and_precision(tmp_path: Path) -> None:
    model = build_model(small(num_classes=2)).half()
    save_for_transformers(model, tmp_path, names=("cat", "dog"))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.id2label == {0: "cat", 1: "dog"}
    assert config.label2id == {"cat": 0, "dog": 1}
    assert config.num_labels == 2
    theirs = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert isinstance(theirs, DeformableDetrForObjectDetection)
    assert theirs.dtype == torch.float16
    assert json.loads((tmp_path / "config.json").read_text())["num_feature_levels"] == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone": "tiny"}, "expected a Deformable DETR or a DETR with a ResNet"),
        ({"backbone": "resnext101_64x4d_dcn"}, "without deformable convolutions"),
        ({"neck": "fpn"}, "got neck='fpn', expected 'plain'"),
        ({"level_exchange": False}, "got level_exchange=False, expected True"),
        ({"two_stage": True, "proposal_scale": 0.1}, "got proposal_scale=0.1, expected 0.05"),
        (DETR | {"classification": "focal"}, "got classification='focal', expected 'softmax'"),
    ],
)
def test_what_transformers_has_not_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with torch.device("meta"):
        model = build_model(small(**changes))
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        save_for_transformers(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=words):
        load_transformers(model, {})


def test_the_number_of_names_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names: got 2, expected 6"):
        save_for_transformers(build_model(small()), tmp_path / "out", names=("a", "b"))
    assert not (tmp_path / "out").exists()


def _drop(state: dict[str, Tensor]) -> None:
    del state["model.level_embed"]


def _add(state: dict[str, Tensor]) -> None:
    state["model.extra"] = torch.zeros(1)


def _reshape(state: dict[str, Tensor]) -> None:
    state["model.level_embed"] = torch.zeros(3, 64)


def _split_head(state: dict[str, Tensor]) -> None:
    state["class_embed.2.bias"] = state["class_embed.2.bias"] + 1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_drop, "missing keys: model.level_embed; unexpected keys: none"),
        (_add, "missing keys: none; unexpected keys: model.extra"),
        (_reshape, r"model.level_embed: got \(3, 64\), expected \(4, 64\)"),
        (_split_head, "different values in class_embed.2.bias and class_embed.0.bias"),
    ],
)
def test_a_wrong_state_dict_is_named_and_changes_nothing(
    damage: Callable[[dict[str, Tensor]], None], words: str, saved: Saved
) -> None:
    state = load_file(saved("base")[1] / "model.safetensors")
    damage(state)
    model = build_model(small()).double()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=words):
        load_transformers(model, state)
    assert differences(model, before) == []
