"""Our network against transformers' `DeformableDetrForObjectDetection`, which others wrote."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

from model.config import ModelConfig
from model.detr import build_model
from model.weights import load_official
from tests.model.beside_transformers import (
    CLOSE,
    assert_close_gradient,
    assert_same_outputs,
    with_random_weights,
)


@pytest.mark.parametrize(
    "changes", [{}, {"box_refine": True}, {"two_stage": True}], ids=["base", "refine", "two_stage"]
)
def test_outputs_and_gradients(changes: dict[str, Any], published_names: Callable) -> None:
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
    )
    if config.refines:
        theirs.model.decoder.bbox_embed = theirs.bbox_embed
    if config.two_stage:
        theirs.model.decoder.class_embed = theirs.class_embed
    torch.manual_seed(3)
    with_random_weights(theirs)
    ours = build_model(config).double()
    load_official(ours, published_names("deformable_detr", theirs.state_dict()))
    found, expected, gradients = assert_same_outputs(ours, theirs)
    if config.two_stage:
        first = found["enc_outputs"]
        torch.testing.assert_close(first["pred_logits"], expected.enc_outputs_class, **CLOSE)
        torch.testing.assert_close(
            first["pred_boxes"], expected.enc_outputs_coord_logits.sigmoid(), **CLOSE
        )
    gradients = published_names("deformable_detr", gradients)
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
        assert_close_gradient(module.weight.grad, wanted, name)
