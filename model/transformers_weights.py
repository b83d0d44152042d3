"""Models to and from the `transformers` library's Deformable DETR and DETR, without importing it.

Names are those of its files. Its models in memory use others for some of them, which
`load_transformers` takes as well.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.backbone import ResNet
from model.config import ModelConfig
from model.deformable_detr import DeformableDETR
from model.dense_detr import DenseDETR

_BACKBONE = "model.backbone.conv_encoder.model."

# Ours to theirs. All that match are applied, in order.
_COMMON = [
    (r"^queries\.embed$", "model.query_position_embeddings.weight"),
    (r"^(encoder|decoder)\.", r"model.\1.layers."),
    (r"(encoder\.layers\.\d+)\.attention\.", r"\1.self_attn."),
    (r"(encoder\.layers\.\d+)\.norm\.", r"\1.self_attn_layer_norm."),
    (r"\.self_attention\.", ".self_attn."),
    (r"\.cross_attention\.", ".encoder_attn."),
    (r"\.self_norm\.", ".self_attn_layer_norm."),
    (r"\.cross_norm\.", ".encoder_attn_layer_norm."),
    (r"\.feedforward\.norm\.", ".final_layer_norm."),
    (r"\.feedforward\.linear(\d)\.", r".fc\1."),
]
_DEFORMABLE = [
    *_COMMON,
    (r"^neck\.levels\.", "model.input_proj."),
    (r"^level_embed", "model.level_embed"),
    (r"^queries\.reference_points\.", "model.reference_points."),
    (r"(decoder.*self_attn)\.(query|key|value)_proj\.", lambda m: f"{m[1]}.{m[2][0]}_proj."),
    (r"(decoder.*self_attn)\.output_proj\.", r"\1.out_proj."),
    (r"\.attention_logits\.", ".attention_weights."),
    (r"^queries\.memory_proj\.", "model.enc_output."),
    (r"^queries\.memory_norm\.", "model.enc_output_norm."),
    (r"^queries\.query_proj\.", "model.pos_trans."),
    (r"^queries\.query_norm\.", "model.pos_trans_norm."),
    (r"^heads\.classes\.", "class_embed."),
    (r"^heads\.boxes\.(\d+)\.hidden\.0\.", r"bbox_embed.\1.layers.0."),
    (r"^heads\.boxes\.(\d+)\.hidden\.2\.", r"bbox_embed.\1.layers.1."),
    (r"^heads\.boxes\.(\d+)\.output\.", r"bbox_embed.\1.layers.2."),
]
_DENSE = [
    *_COMMON,
    (r"^input_proj\.", "model.input_projection."),
    (r"attn\.(query|key|value)_proj\.", lambda m: f"attn.{m[1][0]}_proj."),
    (r"attn\.output_proj\.", "attn.out_proj."),
    (r"^heads\.norm\.", "model.decoder.layernorm."),
    (r"^heads\.classes\.", "class_labels_classifier."),
    (r"^heads\.boxes\.hidden\.0\.", "bbox_predictor.layers.0."),
    (r"^heads\.boxes\.hidden\.2\.", "bbox_predictor.layers.1."),
    (r"^heads\.boxes\.output\.", "bbox_predictor.layers.2."),
]
# Within the backbone: to timm's names, which are torchvision's, and to those of its own ResNet.
_TIMM = [
    (r"(^|\.)conv(\d)\.norm\.", r"\1bn\2."),
    (r"downsample\.norm\.", "downsample.1."),
    (r"downsample\.weight", "downsample.0.weight"),
]
_RESNET = [
    (r"^conv1\.norm\.", "embedder.embedder.normalization."),
    (r"^conv1\.", "embedder.embedder.convolution."),
    (
        r"^layer(\d)\.(\d+)\.",
        lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.",
    ),
    (r"\.conv(\d)\.norm\.", lambda m: f".layer.{int(m[1]) - 1}.normalization."),
    (r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution."),
    (r"\.downsample\.norm\.", ".shortcut.normalization."),
    (r"\.downsample\.", ".shortcut.convolution."),
]
_MEMORY_TO_FILE = [
    (r"^model\.backbone\.model\.", _BACKBONE),
    (r"_attn\.o_proj\.", "_attn.out_proj."),
    (r"\.mlp\.fc(\d)\.", r".fc\1."),
]
_DEPTHS = {"resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}


def save_for_transformers(model: nn.Module, path: str | Path, names: Sequence[str] = ()) -> None:
    """Write a folder that `DeformableDetrForObjectDetection.from_pretrained` loads, or for a DETR
    `DetrForObjectDetection.from_pretrained`: config.json and model.safetensors.

    `names`: one for each class column; without, they are LABEL_0, LABEL_1, …. The loss's weights
    stay behind. A dilated or a ResNeXt backbone needs timm where it is loaded. Raises `ValueError`
    for a model that transformers has no counterpart of.
    """
    config = _config_of(model)
    folder = Path(path)
    content = _config_json(config, names)
    state = model.state_dict()
    content["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    tensors = {}
    for key, value in state.items():
        parts = _names(key, config, _needs_timm(config))
        for part, aliases in zip(value.chunk(len(parts)), parts, strict=True):
            for name in aliases:
                # A copy for each name: the format has no shared tensors.
                tensors[name] = part.detach().cpu().clone(memory_format=torch.contiguous_format)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_transformers(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load the weights of a `DeformableDetrForObjectDetection` or `DetrForObjectDetection` of the
    same architecture, with its own ResNet or timm's: of its file, or of its `state_dict()`.

    Raises `ValueError` naming every key that is missing, unexpected or of another shape, or a head
    that has different values under its several names; the model is then left as it was.
    """
    config = _config_of(model)
    given = {_rename(name, _MEMORY_TO_FILE): value for name, value in state_dict.items()}
    timm = f"{_BACKBONE}conv1.weight" in given
    sources = {key: _names(key, config, timm) for key in model.state_dict()}
    known = {name for parts in sources.values() for aliases in parts for name in aliases}
    unexpected = sorted(given.keys() - known)
    # Its files leave out all names but one of a tensor that has several.
    missing = sorted(
        aliases[0]
        for parts in sources.values()
        for aliases in parts
        if not given.keys() & set(aliases)
    )
    if missing or unexpected:
        raise ValueError(
            f"state dict: missing keys: {', '.join(missing) or 'none'}; "
            f"unexpected keys: {', '.join(unexpected) or 'none'}"
        )
    found, wrong = {}, []
    for key, own in model.state_dict().items():
        parts = [_the_one(aliases, given) for aliases in sources[key]]
        found[key] = torch.cat(parts) if len(parts) > 1 else parts[0]
        if found[key].shape != own.shape:
            got, expected = tuple(found[key].shape), tuple(own.shape)
            wrong.append(f"{sources[key][0][0]}: got {got}, expected {expected}")
    if wrong:
        raise ValueError(f"state dict: shapes differ: {'; '.join(wrong)}")
    model.load_state_dict(found)


def _config_of(model: nn.Module) -> ModelConfig:
    """The model's configuration, if transformers has such a model."""
    if not isinstance(model, DeformableDETR | DenseDETR) or not isinstance(model.backbone, ResNet):
        raise ValueError(
            f"transformers weights: got {type(model).__name__} with backbone "
            f"{getattr(model.config, 'backbone', None)}, expected a Deformable DETR or a DETR "
            "with a ResNet or ResNeXt backbone"
        )
    config = model.config
    needed: dict[str, Any] = {
        "neck": "plain", "level_exchange": True, "mixed_query_selection": False,
        "denoising_pairs": 0,
    }  # fmt: skip
    if config.two_stage:
        needed["proposal_scale"] = 0.05
    if config.architecture == "detr":
        needed["classification"] = "softmax"
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"transformers weights: got {name}={getattr(config, name)!r}, expected {value!r}: "
                "transformers has no other"
            )
    if config.backbone.endswith("_dcn"):
        raise ValueError(
            f"transformers weights: got backbone={config.backbone!r}, expected one without "
            "deformable convolutions: transformers has none"
        )
    return config


def _config_json(config: ModelConfig, names: Sequence[str]) -> dict[str, Any]:
    names = names or [f"LABEL_{i}" for i in range(config.num_classes)]
    if len(names) != config.num_classes:
        raise ValueError(f"names: got {len(names)}, expected {config.num_classes}, one a class")
    content = {
        "backbone_config": _backbone_json(config),
        "use_timm_backbone": False,  # the backbone's own entry says what it is
        "use_pretrained_backbone": False,
        "num_queries": config.num_queries,
        "d_model": config.hidden_dim,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_attention_heads": config.num_heads,
        "decoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.feedforward_dim,
        "decoder_ffn_dim": config.feedforward_dim,
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "activation_dropout": config.dropout,
        "auxiliary_loss": config.auxiliary_loss,
        "dilation": config.dilation,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    if config.architecture == "detr":
        return {
            "model_type": "detr",
            "architectures": ["DetrForObjectDetection"],
            **content,
            # With it, transformers (5.23) feeds each layer's normed output to the next layer.
            "auxiliary_loss": False,
            "eos_coefficient": config.no_object_weight,
        }
    return {
        "model_type": "deformable_detr",
        "architectures": ["DeformableDetrForObjectDetection"],
        **content,
        "num_feature_levels": config.num_levels,
        "encoder_n_points": config.num_points,
        "decoder_n_points": config.num_points,
        "with_box_refine": config.refines,
        "two_stage": config.two_stage,
        "two_stage_num_proposals": config.num_queries,
        "focal_alpha": config.focal_alpha,
        # Ties heads that are one; those of different values stay apart.
        "tie_word_embeddings": True,
    }


def _needs_timm(config: ModelConfig) -> bool:
    """Its own ResNet knows neither dilation nor groups."""
    return config.dilation or config.backbone not in _DEPTHS


def _backbone_json(config: ModelConfig) -> dict[str, Any]:
    stages = [2, 3, 4] if config.num_levels > 1 else [4]
    if _needs_timm(config):
        return {
            "model_type": "timm_backbone",
            "backbone": config.backbone,
            "num_channels": 3,
            "features_only": True,
            "use_pretrained_backbone": False,
            "out_indices": stages,
            **({"output_stride": 16} if config.dilation else {}),
        }
    return {
        "model_type": "resnet",
        "layer_type": "bottleneck",
        "depths": _DEPTHS[config.backbone],
        "hidden_sizes": [256, 512, 1024, 2048],
        "embedding_size": 64,
        "out_features": [f"stage{stage}" for stage in stages],
    }


def _names(key: str, config: ModelConfig, timm: bool) -> list[list[str]]:
    """Where one of our tensors is in theirs: the parts it is cut into along its first axis, each
    under all its names."""
    if key.startswith("backbone."):
        rules = _TIMM if timm else _RESNET
        return [[_BACKBONE + _rename(key.removeprefix("backbone."), rules)]]
    rules = _DENSE if config.architecture == "detr" else _DEFORMABLE
    if ".query_key_proj." in key:
        return [
            [_rename(key.replace("query_key_proj", f"{part}_proj"), rules)]
            for part in ("query", "key")
        ]
    name = _rename(key, rules)
    if config.architecture == "detr" or not key.startswith("heads."):
        return [[name]]
    if not config.refines:
        return [[name.replace(".0.", f".{layer}.", 1) for layer in range(config.decoder_layers)]]
    if key.startswith("heads.boxes.") or config.two_stage:
        return [[name, f"model.decoder.{name}"]]
    return [[name]]


def _rename(name: str, rules: Sequence[tuple[str, Any]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _the_one(aliases: list[str], given: Mapping[str, Tensor]) -> Tensor:
    """The value under those of the names that are there; they must agree."""
    first, *others = [name for name in aliases if name in given]
    for name in others:
        if not torch.equal(given[first], given[name]):
            raise ValueError(
                f"state dict: got different values in {name} and {first}, expected one head under "
                "both names"
            )
    return given[first]
