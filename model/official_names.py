"""Our parameters' names to those of the published checkpoints. Methods below `family` have theirs
in their own files."""

import re
from collections.abc import Sequence

from model.config import ModelConfig

Rules = Sequence[tuple[str, str]]
"""Patterns and replacements. All that match are applied, in order."""

# Ours to the names of fundamentalvision/Deformable-DETR.
_DEFORMABLE_DETR = [
    (r"^backbone\.", "backbone.0.body."),
    (r"^neck\.levels\.", "input_proj."),
    (r"^queries\.embed$", "query_embed.weight"),
    (r"^(level_embed)", r"transformer.\1"),
    (r"^queries\.reference_points\.", "transformer.reference_points."),
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
    (r"^queries\.memory_proj\.", "transformer.enc_output."),
    (r"^queries\.memory_norm\.", "transformer.enc_output_norm."),
    (r"^queries\.query_proj\.", "transformer.pos_trans."),
    (r"^queries\.query_norm\.", "transformer.pos_trans_norm."),
    (r"^heads\.classes\.", "class_embed."),
    (r"^heads\.boxes\.(\d+)\.hidden\.0\.", r"bbox_embed.\1.layers.0."),
    (r"^heads\.boxes\.(\d+)\.hidden\.2\.", r"bbox_embed.\1.layers.1."),
    (r"^heads\.boxes\.(\d+)\.output\.", r"bbox_embed.\1.layers.2."),
]

# Ours to the names of facebookresearch/detr.
_DETR = [
    (r"^backbone\.", "backbone.0.body."),
    (r"^queries\.embed$", "query_embed.weight"),
    (r"^(encoder|decoder)\.", r"transformer.\1.layers."),
    (r"^heads\.norm\.", "transformer.decoder.norm."),
    (r"(encoder\.layers\.\d+)\.attention\.", r"\1.self_attention."),
    (r"(encoder\.layers\.\d+)\.norm\.", r"\1.norm1."),
    (r"(encoder\.layers\.\d+)\.feedforward\.norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.feedforward\.norm\.", r"\1.norm3."),
    (r"\.feedforward\.", "."),
    (r"\.self_attention\.", ".self_attn."),
    (r"\.cross_attention\.", ".multihead_attn."),
    (r"attn\.(query|key|value|query_key)_proj\.", "attn.in_proj_"),
    (r"attn\.output_proj\.", "attn.out_proj."),
    (r"\.self_norm\.", ".norm1."),
    (r"\.cross_norm\.", ".norm2."),
    (r"^heads\.classes\.", "class_embed."),
    (r"^heads\.boxes\.hidden\.0\.", "bbox_embed.layers.0."),
    (r"^heads\.boxes\.hidden\.2\.", "bbox_embed.layers.1."),
    (r"^heads\.boxes\.output\.", "bbox_embed.layers.2."),
]

# Ours to the names of torchvision's Faster R-CNN.
_FASTER_RCNN = [(r"^backbone\.", "backbone.body."), (r"^fpn\.", "backbone.fpn.")]

# Ours to torchvision's, within the backbone.
_TORCHVISION = [
    (r"(^|\.)conv(\d)\.norm\.", r"\1bn\2."),
    (r"\.downsample\.norm\.", ".downsample.1."),
    (r"\.downsample\.weight", ".downsample.0.weight"),
]


def rename(key: str, rules: Rules) -> str:
    """`key` after all rules that match."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def in_backbone(key: str) -> str:
    """Our name of a parameter in a ResNet to torchvision's, whatever is in front of it."""
    return rename(key, _TORCHVISION)


def official_name(key: str, rules: Rules) -> str:
    """The published name of a parameter of any detector with torchvision's backbone."""
    name = rename(key, rules)
    return in_backbone(name) if key.startswith("backbone.") else name


def detr_names(key: str) -> list[str]:
    """Of facebookresearch/detr."""
    return [official_name(key, _DETR)]


def faster_rcnn_names(key: str) -> list[str]:
    """Of torchvision."""
    return [official_name(key, _FASTER_RCNN)]


def deformable_detr_names(key: str, config: ModelConfig) -> list[str]:
    """Of fundamentalvision/Deformable-DETR, which has one head under several names."""
    name = official_name(key, _DEFORMABLE_DETR)
    if not key.startswith("heads."):
        return [name]
    if not config.refines:
        return [name.replace(".0.", f".{layer}.", 1) for layer in range(config.decoder_layers)]
    if key.startswith("heads.boxes.") or config.two_stage:
        return [name, f"transformer.decoder.{name}"]
    return [name]
