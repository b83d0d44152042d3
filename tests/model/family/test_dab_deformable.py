"""DAB-Deformable-DETR: its decoder against a plain re-computation, names, counts and start."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_ops.reference import multi_scale_deformable_attention
from model.config import ModelConfig
from model.detr import build_model
from model.parts import Memory
from pipeline.recipes import recipe
from tests.model.family.plain_dab import (
    as_leaves,
    attend,
    check_gradients,
    loaded,
    logit,
    random,
    sine,
)
from tests.model.family.plain_detr import State, assert_same_layers, linear, mlp, norm

WIDTH, HEADS, LEVELS, POINTS, CLASSES, QUERIES, LAYERS = 32, 4, 4, 2, 7, 5, 3
CONFIG = ModelConfig(
    architecture="dab_deformable_detr",
    box_refine=True,
    num_classes=CLASSES,
    num_queries=QUERIES,
    num_levels=LEVELS,
    num_points=POINTS,
    hidden_dim=WIDTH,
    num_heads=HEADS,
    feedforward_dim=48,
    encoder_layers=1,
    decoder_layers=LAYERS,
    dropout=0.0,
)
IMAGES = torch.zeros(2, 3, 64, 96, dtype=torch.float64)
PADDING = torch.zeros(2, 64, 96, dtype=torch.bool)
PADDING[1, 30:], PADDING[1, :, 50:] = True, True


def published(denoised: bool = False) -> State:
    """Random parameters in the published names, but for the backbone's."""
    state: State = {"transformer.level_embed": random(LEVELS, WIDTH)}

    def add_linear(name: str, outputs: int, inputs: int) -> None:
        state[f"{name}.weight"] = random(outputs, inputs) / math.sqrt(inputs)
        state[f"{name}.bias"] = 0.3 * random(outputs)

    def add_norm(name: str) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + 0.2 * random(WIDTH), random(WIDTH)

    def add_attention(name: str) -> None:
        samples = HEADS * LEVELS * POINTS
        add_linear(f"{name}.sampling_offsets", samples * 2, WIDTH)
        add_linear(f"{name}.attention_weights", samples, WIDTH)
        add_linear(f"{name}.value_proj", WIDTH, WIDTH)
        add_linear(f"{name}.output_proj", WIDTH, WIDTH)

    layers = {"encoder": ("self_attn", 1, (1, 2)), "decoder": ("cross_attn", LAYERS, (1, 2, 3))}
    for stack, (attention, count, norms) in layers.items():
        for name in (f"transformer.{stack}.layers.{index}" for index in range(count)):
            add_attention(f"{name}.{attention}")
            add_linear(f"{name}.linear1", 48, WIDTH)
            add_linear(f"{name}.linear2", WIDTH, 48)
            for number in norms:
                add_norm(f"{name}.norm{number}")
            if stack == "decoder":
                state[f"{name}.self_attn.in_proj_weight"] = random(3 * WIDTH, WIDTH) / 6
                state[f"{name}.self_attn.in_proj_bias"] = random(3 * WIDTH) / 6
                add_linear(f"{name}.self_attn.out_proj", WIDTH, WIDTH)
    for index, (outputs, inputs) in enumerate(((WIDTH, 2 * WIDTH), (WIDTH, WIDTH))):
        add_linear(f"transformer.decoder.ref_point_head.layers.{index}", outputs, inputs)
        add_linear(f"transformer.decoder.query_scale.layers.{index}", outputs, WIDTH)
    for layer in range(LAYERS):
        add_linear(f"class_embed.{layer}", CLASSES, WIDTH)
        for index, outputs in enumerate((WIDTH, WIDTH, 4)):
            add_linear(f"bbox_embed.{layer}.layers.{index}", outputs, WIDTH)
    for name in [name for name in state if name.startswith("bbox_embed.")]:
        state[f"transformer.decoder.{name}"] = state[name]
    for level, (channels, side) in enumerate(((512, 1), (1024, 1), (2048, 1), (2048, 3))):
        state[f"input_proj.{level}.0.weight"] = random(WIDTH, channels, side, side) / channels**0.5
        state[f"input_proj.{level}.0.bias"] = random(WIDTH)
        add_norm(f"input_proj.{level}.1")
    state["refpoint_embed.weight"] = random(QUERIES, 4)
    state["tgt_embed.weight"] = random(QUERIES, WIDTH - int(denoised))
    if denoised:
        state["label_enc.weight"] = random(CLASSES + 1, WIDTH - 1)
    return state


def case() -> tuple[Any, State]:
    torch.manual_seed(5)
    state = published()
    maps = [random(2, c, 64 // s, 96 // s) for c, s in ((512, 8), (1024, 16), (2048, 32))]
    return loaded(CONFIG, state, *maps), state


def plain_decoder(state: State, memory: Memory) -> list[tuple[Tensor, Tensor]]:
    """Logits and boxes of every layer, image after image."""
    images = [_one_image(state, memory, image) for image in range(len(memory.tokens))]
    return [
        (torch.stack([x for x, _ in layer]), torch.stack([x for _, x in layer]))
        for layer in zip(*images, strict=True)
    ]


def _one_image(state: State, memory: Memory, image: int) -> list[tuple[Tensor, Tensor]]:
    content, anchors = state["tgt_embed.weight"], state["refpoint_embed.weight"].sigmoid()
    ratios = memory.ratios[image]  # [L, 2]
    layers = []
    for index in range(LAYERS):
        name = f"transformer.decoder.layers.{index}"
        (x_share, y_share) = ratios[0]
        there = anchors * torch.stack((x_share, y_share, x_share, y_share))
        encoded = torch.cat([sine(there[:, axis], WIDTH // 2, 10000) for axis in (1, 0, 2, 3)], 1)
        position = mlp(encoded, state, "transformer.decoder.ref_point_head", 2)
        if index > 0:
            position = position * mlp(content, state, "transformer.decoder.query_scale", 2)

        weight = state[f"{name}.self_attn.in_proj_weight"].split(WIDTH)
        bias = state[f"{name}.self_attn.in_proj_bias"].split(WIDTH)
        query, key = ((content + position) @ weight[i].T + bias[i] for i in (0, 1))
        attended = attend(query, key, content @ weight[2].T + bias[2], HEADS)
        attended = linear(attended, state, f"{name}.self_attn.out_proj")
        content = norm(content + attended, state, f"{name}.norm2")
        looked = _sampled(state, name, content + position, anchors, memory, image)
        content = norm(content + looked, state, f"{name}.norm1")
        hidden = linear(content, state, f"{name}.linear1").clamp(min=0)
        content = norm(content + linear(hidden, state, f"{name}.linear2"), state, f"{name}.norm3")

        boxes = (mlp(content, state, f"bbox_embed.{index}", 3) + logit(anchors)).sigmoid()
        layers.append((linear(content, state, f"class_embed.{index}"), boxes))
        anchors = boxes.detach()
    return layers


def _sampled(
    state: State, name: str, query: Tensor, anchors: Tensor, memory: Memory, image: int
) -> Tensor:
    """Each point is an offset, in halves of the anchor's size and K-ths, from its centre."""
    name = f"{name}.cross_attn"
    value = linear(memory.tokens[image], state, f"{name}.value_proj")
    value = torch.where(memory.padding[image][:, None], 0.0, value)
    offsets = linear(query, state, f"{name}.sampling_offsets")
    offsets = offsets.view(QUERIES, HEADS, LEVELS, POINTS, 2)
    weights = linear(query, state, f"{name}.attention_weights")
    weights = weights.view(QUERIES, HEADS, LEVELS * POINTS).softmax(-1)
    weights = weights.view(QUERIES, HEADS, LEVELS, POINTS)
    share = memory.ratios[image][None, None, :, None]
    centre, size = (x[:, None, None, None] * share for x in (anchors[:, :2], anchors[:, 2:]))
    sampled = multi_scale_deformable_attention(
        value.view(1, -1, HEADS, WIDTH // HEADS),
        memory.shapes,
        (centre + offsets / POINTS * size / 2)[None],
        weights[None],
    )
    return linear(sampled[0], state, f"{name}.output_proj")


def test_outputs_and_gradients_are_those_of_a_plain_one() -> None:
    model, state = case()
    state = as_leaves(state)
    outputs = model(IMAGES, PADDING)
    with torch.no_grad():  # of an encoder that Deformable DETR's tests look at
        memory = model.encode(IMAGES, PADDING)
    expected = plain_decoder(state, memory)
    loss, expected_loss = assert_same_layers(outputs, expected, 1e-9)
    loss.backward()
    expected_loss.backward()
    for stack in (model.encoder, model.neck):
        stack.requires_grad_(False)
    model.level_embed.requires_grad_(False)
    check_gradients(model, state)


@pytest.mark.parametrize(
    ("name", "total", "trained"),
    [  # counted in IDEA-Research/DAB-DETR and DN-DETR
        ("dab_deformable_detr_r50", 47_405_994, 47_183_594),
        ("dn_dab_deformable_detr_r50", 47_429_154, 47_206_754),
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


def test_a_denoised_checkpoint_is_no_other() -> None:
    torch.manual_seed(0)
    state = published(denoised=True)
    loaded(ModelConfig(**{**vars(CONFIG), "denoising_groups": 5}), state)
    with pytest.raises(ValueError, match=r"unexpected keys: label_enc\.weight"):
        loaded(CONFIG, state)


@pytest.mark.parametrize(
    "changes", [{"box_refine": False}, {"two_stage": True}, {"num_patterns": 3}]
)
def test_a_config_that_no_model_can_be_built_from_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"got .* expected "):
        ModelConfig(**{**vars(CONFIG), **changes})


def test_anchors_near_the_edge_count_as_a_thousandth_from_it() -> None:
    """The published code cuts logits off at 1e-3 here, where Deformable DETR's has 1e-5."""
    model, _ = case()
    with torch.no_grad():
        for parameter in model.heads.boxes.parameters():
            parameter.zero_()
        model.queries.anchors.fill_(-20.0)  # boxes without any extent, in the corner
        outputs = model.eval()(IMAGES, PADDING)
    expected = torch.full((2, QUERIES, 4), 1e-3 / (1 + 1e-3), dtype=torch.float64)
    torch.testing.assert_close(outputs["aux_outputs"][0]["pred_boxes"], expected)


def test_the_start(small_config: Callable[..., ModelConfig]) -> None:
    """Boxes start near the anchors, but for width and height of the first layer's correction."""
    model = build_model(small_config(architecture="dab_deformable_detr", box_refine=True))
    images, padding = torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool)
    with torch.no_grad():
        found = model.eval()(images, padding)["aux_outputs"][0]["pred_boxes"][0]
    logits = model.queries.anchors.detach()
    expected = (logits + torch.tensor([0.0, 0.0, -2.0, -2.0])).sigmoid()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
