"""Published weights: Deformable DETR checkpoints and ImageNet backbones, in their own key names."""

import argparse
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from model.backbone import ResNet
from model.config import ModelConfig
from model.detr import DeformableDETR

# Ours to the names of fundamentalvision/Deformable-DETR. All that match are applied, in order.
_OFFICIAL = [
    (r"^backbone\.", "backbone.0.body."),
    (r"^neck\.levels\.", "input_proj."),
    (r"^query_embed$", "query_embed.weight"),
    (r"^(level_embed|reference_points)", r"transformer.\1"),
    (r"^(encoder|decoder)\.", r"transformer.\1.layers."),
    (r"(encoder\.layers\.\d+)\.attention\.", r"\1.self_attn."),
    (r"(encoder\.layers\.\d+)\.norm\.", r"\1.norm1."),
    (r"(encoder\.layers\.\d+)\.feedforward\.norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.feedforward\.norm\.", r"\1.norm3."),
    (r"\.feedforward\.", "."),
    (r"\.self_attention\.(query_key|value)_proj\.", ".self_attn.in_proj_"),
    (r"\.self_attention\.output_proj\.", ".self_attn.out_proj."),
    (r"\.self_norm\.", ".norm2."),
    (r"\.cross_attention\.", ".cross_attn."),
    (r"\.cross_norm\.", ".norm1."),
    (r"\.attention_logits\.", ".attention_weights."),
    (r"^proposals\.memory_proj\.", "transformer.enc_output."),
    (r"^proposals\.memory_norm\.", "transformer.enc_output_norm."),
    (r"^proposals\.query_proj\.", "transformer.pos_trans."),
    (r"^proposals\.query_norm\.", "transformer.pos_trans_norm."),
    (r"^heads\.classes\.", "class_embed."),
    (r"^heads\.boxes\.(\d+)\.hidden\.0\.", r"bbox_embed.\1.layers.0."),
    (r"^heads\.boxes\.(\d+)\.hidden\.2\.", r"bbox_embed.\1.layers.1."),
    (r"^heads\.boxes\.(\d+)\.output\.", r"bbox_embed.\1.layers.2."),
]

# Ours to torchvision's, within the backbone.
_TORCHVISION = [
    (r"(^|\.)conv(\d)\.norm\.", r"\1bn\2."),
    (r"\.downsample\.norm\.", ".downsample.1."),
    (r"\.downsample\.weight", ".downsample.0.weight"),
]


def load_official(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a published Deformable DETR checkpoint's state dict (its `model` entry) into `model`.

    Raises `ValueError` naming every key that is missing, unexpected or of another shape, or whose
    aliases (one head under several names) differ; the model is then left as it was.
    """
    if not isinstance(model, DeformableDETR) or not isinstance(model.backbone, ResNet):
        raise ValueError(
            "load_official: got a model without a published checkpoint, "
            "expected a Deformable DETR with a ResNet backbone"
        )
    sources = {key: _official_names(key, model.config) for key in model.state_dict()}
    _compare_keys(state_dict.keys(), {name for names in sources.values() for name in names})
    for key, (first, *aliases) in sources.items():
        for alias in aliases:
            if not torch.equal(state_dict[first], state_dict[alias]):
                raise ValueError(
                    f"checkpoint: got different values in {alias} and {first}, expected one head "
                    f"under both names (ours: {key})"
                )
    width = model.config.hidden_dim
    found = {
        key: _rows_of_in_proj(key, state_dict[names[0]], width) for key, names in sources.items()
    }
    _copy_into(model, found)


def load_backbone(model: nn.Module, path: str | Path) -> None:
    """Load ImageNet weights, a torchvision ResNet's or ResNeXt's state dict, into `model.backbone`.

    The classifier `fc` and batch counters are left out, and the offsets of deformable convolutions,
    which no such file has, stay as they are; otherwise as strict as `load_official`.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, ResNet):
        raise ValueError("load_backbone: got a model without a ResNet backbone, expected one")
    state_dict = {
        name: value
        for name, value in read_state_dict(path).items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    sources = {
        key: _rename(key, _TORCHVISION) for key in backbone.state_dict() if ".offsets." not in key
    }
    _compare_keys(state_dict.keys(), set(sources.values()))
    _copy_into(backbone, {key: state_dict[name] for key, name in sources.items()})


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `torch.save` file, of its `model` entry where it has one.

    Reads data only: a file that would run code when read is refused, with a `ValueError`.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = (str(error) or "an empty file").splitlines()[0]
        raise ValueError(f"{path}: {reason}; expected a state dict by torch.save") from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise ValueError(f"{path}: got no dict of tensors, expected a model's state dict")
    return content


def _official_names(key: str, config: ModelConfig) -> list[str]:
    """The published name of one of our keys, and the other names the same tensor has there."""
    name = _rename(key, _OFFICIAL)
    if key.startswith("backbone."):
        return [_rename(name, _TORCHVISION)]
    if not key.startswith("heads."):
        return [name]
    if not config.refines:
        return [name.replace(".0.", f".{layer}.", 1) for layer in range(config.decoder_layers)]
    if key.startswith("heads.boxes.") or config.two_stage:
        return [name, f"transformer.decoder.{name}"]
    return [name]


def _rename(key: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _rows_of_in_proj(key: str, value: Tensor, width: int) -> Tensor:
    """The published self-attention keeps query, key and value projections in one tensor."""
    if ".self_attention.query_key_proj." in key:
        return value[: 2 * width]
    if ".self_attention.value_proj." in key:
        return value[2 * width :]
    return value


def _compare_keys(got: Iterable[str], expected: set[str]) -> None:
    missing, unexpected = sorted(expected - set(got)), sorted(set(got) - expected)
    if missing or unexpected:
        raise ValueError(
            f"state dict: missing keys: {', '.join(missing) or 'none'}; "
            f"unexpected keys: {', '.join(unexpected) or 'none'}"
        )


def _copy_into(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Into those entries of the module that `values` names."""
    own = module.state_dict()
    wrong = [
        f"{key}: got {tuple(value.shape)}, expected {tuple(own[key].shape)}"
        for key, value in values.items()
        if value.shape != own[key].shape
    ]
    if wrong:
        raise ValueError(f"state dict: shapes differ: {'; '.join(wrong)}")
    module.load_state_dict({**own, **values})
