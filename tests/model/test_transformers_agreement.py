"""Our network against transformers' `DeformableDetrForObjectDetection`, which others wrote."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

from model.config import ModelConfig
from model.detr import build_model
from model.weights import load_official

# transformers' names to the published ones.
RULES = [
    (r"^model\.backbone\.model\.embedder\.embedder\.convolution", "backbone.0.body.conv1"),
    (r"^model\.backbone\.model\.embedder\.embedder\.normalization", "backbone.0.body.bn1"),
    (r"\.shortcut\.convolution", ".downsample.0"),
    (r"\.shortcut\.normalization", ".downsample.1"),
    (r"^model\.(input_proj)", r"\1"),
    (r"^model\.query_position_embeddings", "query_embed"),
    (r"^model\.(?!backbone)", "transformer."),
    (r"(encoder\.layers\.\d+)\.self_attn_layer_norm", r"\1.norm1"),
    (r"(transformer\.encoder\.layers\.\d+)\.final_layer_norm", r"\1.norm2"),
    (r"(decoder\.layers\.\d+)\.self_attn_layer_norm", r"\1.norm2"),
    (r"encoder_attn_layer_norm", "norm1"),
    (r"(decoder\.layers\.\d+)\.final_layer_norm", r"\1.norm3"),
    (r"encoder_attn", "cross_attn"),
    (r"\.mlp\.fc(\d)", r".linear\1"),
    (r"self_attn\.o_proj", "self_attn.out_proj"),
]


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        name = re.sub(
            r"^model\.backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.",
            lambda m: f"backbone.0.body.layer{int(m[1]) + 1}.{m[2]}.",
            name,
        )
        name = re.sub(
            r"\.layer\.(\d)\.(convolution|normalization)",
            lambda m: f".{'conv' if m[2] == 'convolution' else 'bn'}{int(m[1]) + 1}",
            name,
        )
        for pattern, replacement in RULES:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    for name in [n for n in result if ".self_attn.q_proj." in n]:
        parts = [result.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        result[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return result


@pytest.mark.parametrize(
    "changes", [{}, {"box_refine": True}, {"two_stage": True}], ids=["base", "refine", "two_stage"]
)
def test_outputs_and_gradients(changes: dict[str, Any]) -> None:
    config = ModelConfig(
        num_classes=6,
        num_queries=12,
        hidden_dim=64,
        num_heads=4,
        num_points=3,
        encoder_layers=2,
        decoder_layers=3,
        feedforward_dim=96,
        dropout=0.0,
        **changes,
    )
    theirs = DeformableDetrForObjectDetection(
        DeformableDetrConfig(
            backbone_config=ResNetConfig(out_features=["stage2", "stage3", "stage4"]),
            num_labels=6,
            num_queries=12,
            two_stage_num_proposals=12,
            d_model=64,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_n_points=3,
            decoder_n_points=3,
            encoder_layers=2,
            decoder_layers=3,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            dropout=0.0,
            auxiliary_loss=True,
            with_box_refine=config.refines,
            two_stage=config.two_stage,
            tie_word_embeddings=not config.refines,
            attn_implementation="eager",
        )
    ).double()
    if config.refines:
        theirs.model.decoder.bbox_embed = theirs.bbox_embed
    if config.two_stage:
        theirs.model.decoder.class_embed = theirs.class_embed
    theirs.requires_grad_(True)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "backbone" not in name:
                scale = 0.3 if name.endswith("bias") else 1.5 * parameter.shape[-1] ** -0.5
                parameter.normal_(0, scale if parameter.dim() < 4 else 0.02)
        for name, buffer in theirs.named_buffers():
            if "running_var" in name or name.endswith("normalization.weight"):
                buffer.uniform_(0.6, 1.2)
    ours = build_model(config).double()
    load_official(ours, published_names(theirs.state_dict()))

    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, 45:], padding[1, :, 71:] = True, True
    images[1] *= ~padding[1]
    found = ours.train()(images, padding)
    expected = theirs.train()(pixel_values=images, pixel_mask=(~padding).long())

    # We compute the places of cells in float32 as the published model does, transformers in
    # float64: hence not 1e-9.
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found["pred_logits"], expected.logits, **close)
    torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes, **close)
    if config.two_stage:
        first = found["enc_outputs"]
        torch.testing.assert_close(first["pred_logits"], expected.enc_outputs_class, **close)
        torch.testing.assert_close(
            first["pred_boxes"], expected.enc_outputs_coord_logits.sigmoid(), **close
        )

    (found["pred_boxes"].square().sum() + found["pred_logits"].sin().sum()).backward()
    (expected.pred_boxes.square().sum() + expected.logits.sin().sum()).backward()
    gradients = published_names(
        {
            name: p.grad if p.grad is not None else torch.zeros_like(p)
            for name, p in theirs.named_parameters(remove_duplicate=False)
        }
    )
    checked = [
        (
            ours.encoder[0].attention.sampling_offsets,
            "transformer.encoder.layers.0.self_attn.sampling_offsets",
        ),
        (ours.encoder[1].attention.value_proj, "transformer.encoder.layers.1.self_attn.value_proj"),
        (
            ours.decoder[0].cross_attention.attention_logits,
            "transformer.decoder.layers.0.cross_attn.attention_weights",
        ),
        (ours.decoder[2].feedforward.linear2, "transformer.decoder.layers.2.linear2"),
        (ours.neck.levels[3][0], "input_proj.3.0"),
        (ours.heads.boxes[0 if ours.heads.shared else 2].output, "bbox_embed.2.layers.2"),
        (ours.backbone.layer3[0].conv2, "backbone.0.body.layer3.0.conv2"),
    ]
    for module, name in checked:
        wanted = gradients[f"{name}.weight"]
        if name.startswith("bbox_embed") and ours.heads.shared:
            wanted = gradients["bbox_embed.0.layers.2.weight"]
        assert wanted.abs().max() > 0, name
        error = (module.weight.grad - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-4, name
