"""A detector small enough to run in milliseconds, and a batch for it; the published names of
transformers' weights."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig

Batch = tuple[Tensor, Tensor, list[dict[str, Tensor]]]
PublishedNames = Callable[[str, dict[str, Tensor]], dict[str, Tensor]]

# Names in transformers' models (in memory; its files have others) to those of the authors' files.
# All that match are applied, in order. Written from those two, not from ours: `load_official` is
# checked by them.
NAMES: Sequence[tuple[str, Any]] = (
    (r"^model\.backbone\.model\.embedder\.embedder\.convolution", "backbone.0.body.conv1"),
    (r"^model\.backbone\.model\.embedder\.embedder\.normalization", "backbone.0.body.bn1"),
    (
        r"^model\.backbone\.model\.encoder\.stages\.(\d)\.layers\.",
        lambda m: f"backbone.0.body.layer{int(m[1]) + 1}.",
    ),
    (r"\.layer\.(\d)\.convolution", lambda m: f".conv{int(m[1]) + 1}"),
    (r"\.layer\.(\d)\.normalization", lambda m: f".bn{int(m[1]) + 1}"),
    (r"\.shortcut\.convolution", ".downsample.0"),
    (r"\.shortcut\.normalization", ".downsample.1"),
    (r"^model\.input_proj(ection)?\.", "input_proj."),
    (r"^model\.query_position_embeddings", "query_embed"),
    (r"^model\.decoder\.layernorm", "transformer.decoder.norm"),
    (r"^model\.", "transformer."),
    (r"(encoder\.layers\.\d+)\.self_attn_layer_norm", r"\1.norm1"),
    (r"(encoder\.layers\.\d+)\.final_layer_norm", r"\1.norm2"),
    (r"(decoder\.layers\.\d+)\.final_layer_norm", r"\1.norm3"),
    (r"\.mlp\.fc(\d)", r".linear\1"),
    (r"attn\.o_proj", "attn.out_proj"),
    (r"^class_labels_classifier", "class_embed"),
    (r"^bbox_predictor", "bbox_embed"),
)
# The authors of DETR number a decoder layer's norms as they are used, those of Deformable DETR not.
DECODER_NAMES: dict[str, Sequence[tuple[str, Any]]] = {
    "detr": (
        (r"self_attn_layer_norm", "norm1"),
        (r"encoder_attn_layer_norm", "norm2"),
        (r"encoder_attn", "multihead_attn"),
    ),
    "deformable_detr": (
        (r"self_attn_layer_norm", "norm2"),
        (r"encoder_attn_layer_norm", "norm1"),
        (r"encoder_attn", "cross_attn"),
    ),
}


@pytest.fixture(scope="session")
def published_names() -> PublishedNames:
    """`published_names(architecture, state)`: a transformers model's tensors as published."""

    def rename(architecture: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name, value in state.items():
            for pattern, replacement in (*NAMES, *DECODER_NAMES[architecture]):
                name = re.sub(pattern, replacement, name)
            result[name] = value
        for name in [n for n in result if "attn.q_proj." in n]:
            parts = [result.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
            result[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        return result

    return rename


@pytest.fixture
def small_config() -> Callable[..., ModelConfig]:
    def make(**changes: Any) -> ModelConfig:
        values: dict[str, Any] = {
            "num_classes": 5,
            "num_queries": 9,
            "backbone": "tiny",
            "hidden_dim": 64,
            "num_heads": 2,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "feedforward_dim": 96,
            "dropout": 0.0,
            "proposal_scale": 0.1,
        }
        return ModelConfig(**(values | changes))

    return make


@pytest.fixture
def batch() -> Batch:
    """Two images padded to 96 x 128, the second 64 x 96, with three boxes and one."""
    torch.manual_seed(7)
    images = torch.randn(2, 3, 96, 128)
    padding = torch.zeros(2, 96, 128, dtype=torch.bool)
    padding[1, 64:], padding[1, :, 96:] = True, True
    images[1] *= ~padding[1]
    targets = [
        {
            "labels": torch.tensor([0, 3, 3]),
            "boxes": torch.tensor(
                [[0.3, 0.4, 0.2, 0.1], [0.6, 0.5, 0.5, 0.6], [0.8, 0.2, 0.1, 0.3]]
            ),
        },
        {"labels": torch.tensor([4]), "boxes": torch.tensor([[0.5, 0.5, 0.9, 0.8]])},
    ]
    return images, padding, targets
