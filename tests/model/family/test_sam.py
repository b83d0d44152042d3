"""SAM-DETR against loops, on one map and on three; its published names, counts and constants."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from model.config import ModelConfig
from model.criterion import build_criterion
from model.detr import build_model
from model.family.sam import encode_cells_in_published_order, one_level
from model.parts import Memory
from model.position import encode_cells
from model.weights import load_official
from pipeline.recipes import recipe
from tests.model.family import plain_sam
from tests.model.family.plain_detr import (
    assert_same_gradients,
    attend,
    dot_products,
    feed_forward,
    linear,
    mlp,
    norm,
    published,
    randomised,
)

ONE_MAP: dict[str, Any] = {"architecture": "sam_detr", "num_levels": 1, "box_refine": True}
THREE_MAPS = ONE_MAP | {"architecture": "sam_multiscale_detr", "num_levels": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "one_map": ONE_MAP,
    "gaussians": ONE_MAP | {"salient_gaussians": True},
    "input_norm": ONE_MAP | {"input_norm": True},
    "three_maps": THREE_MAPS,
    "three_maps_gaussians": THREE_MAPS | {"salient_gaussians": True},
}


def plainly(model: Any, memory: Memory) -> list[tuple[Tensor, Tensor]]:
    """Each decoder layer's logits and boxes."""
    state, heads = published(model), model.config.num_heads
    width, layers = model.config.hidden_dim, model.config.decoder_layers
    logits = state["query_embed.weight"].expand(len(memory.tokens), -1, -1)
    boxes = logits.sigmoid()
    content = torch.zeros(*logits.shape[:2], width, dtype=torch.float64)
    predictions = []
    for layer in range(layers):
        name, module = f"transformer.decoder.layers.{layer}", model.decoder[layer]
        centres = boxes[..., :2].detach().flatten(0, 1)
        place = torch.stack([plain_sam.encode(x, width) for x in centres]).view_as(content)
        query, key = (
            linear(content, state, f"{name}.sa_{x}content_proj")
            + linear(place, state, f"{name}.sa_{x}pos_proj")
            for x in "qk"
        )
        value = linear(content, state, f"{name}.sa_v_proj")
        attended = attend(dot_products(query, key, heads), value, None)
        attended = linear(attended, state, f"{name}.self_attn.out_proj")
        content = norm(content + attended, state, f"{name}.norm1")
        # From the coarsest map to the finest, as many layers each.
        level = one_level(memory, {1: [0] * layers, 3: [2, 1, 0]}[len(memory.shapes)][layer])
        aligned = plain_sam.align(module.aligner, content, boxes, level)
        attended = plain_sam.attend(module.cross_attention, *aligned, level)
        content = norm(content + attended, state, f"{name}.norm2")
        content = feed_forward(content, state, name, "norm3")
        change = mlp(content, state, f"bbox_embed.{layer}", 3)
        held = boxes.clamp(min=1e-5) / (1 - boxes).clamp(min=1e-5)
        corrected = (held.log() + change).sigmoid()
        predictions.append((linear(content, state, f"class_embed.{layer}"), corrected))
        logits = (logits + change).detach()
        boxes = logits.sigmoid()
    return predictions


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_those_of_plain_loops(
    variant: str, batch: tuple, small_config: Callable[..., ModelConfig]
) -> None:
    torch.manual_seed(0)
    values = {"num_queries": 3, "hidden_dim": 32, "decoder_layers": 3} | VARIANTS[variant]
    model: Any = randomised(build_model(small_config(**values))).train()
    with torch.no_grad():  # a box too small for the logit that is predicted from, and a large one
        model.queries.embed[0, 2:] = -13.0
        model.queries.embed[1, 2:] = 1.0
    images, padding, _ = batch
    memory = model.encode(images.double(), padding)
    found = model.decode(model.queries(memory, model.heads), memory)
    expected = plainly(model, model.encode(images.double(), padding))
    ours = theirs = torch.zeros((), dtype=torch.float64)
    for (logits, boxes), (plain_logits, plain_boxes) in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, plain_logits, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(boxes, plain_boxes, rtol=1e-10, atol=1e-12)
        ours = ours + boxes.square().sum() + logits.sin().sum()
        theirs = theirs + plain_boxes.square().sum() + plain_logits.sin().sum()
    assert_same_gradients(model, ours, theirs)


def test_cells_are_encoded_in_the_published_order() -> None:
    """Within an image as Deformable DETR does. In a column without a valid cell as float32 rounds
    -0.5 + 1e-6 + 0.5, which makes 1 % more than 1e-6."""
    mask = torch.ones(1, 3, 4, dtype=torch.bool)
    mask[:, :2, :3] = False
    found = encode_cells_in_published_order([mask], 32).view(3, 4, 32)
    usual = encode_cells([mask], 32).view(3, 4, 32)
    torch.testing.assert_close(found[:, :3, :16], usual[:, :3, :16], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:2, :, 16:], usual[:2, :, 16:], rtol=0, atol=1e-5)

    half = torch.tensor(-0.5)
    angle = half / (half + 1e-6 + 0.5) * (2 * math.pi)
    assert -3.11e6 < angle < -3.10e6  # -0.5 / 1e-6 * 2 pi is -3.14e6
    assert torch.equal(found[0, 3, 0], angle.sin())
    assert torch.equal(found[0, 3, 1], angle.cos())
    assert torch.equal(found[:, 3, :16], found[:1, 3, :16].expand(3, -1))
    assert not torch.allclose(found[0, 3, :16], usual[0, 3, :16], atol=0.1)


def test_a_fresh_model_predicts_its_reference_boxes(
    batch: tuple, small_config: Callable[..., ModelConfig]
) -> None:
    model: Any = build_model(small_config(**VARIANTS["three_maps"]))
    images, padding, _ = batch
    outputs = model(images, padding)
    expected = model.queries.embed.sigmoid().expand(2, -1, -1)
    for layer in (outputs, *outputs["aux_outputs"]):
        torch.testing.assert_close(layer["pred_boxes"], expected)
        assert (layer["pred_logits"].sigmoid() < 0.2).all()


@pytest.mark.parametrize("variant", ["input_norm", "three_maps_gaussians"])
@pytest.mark.parametrize("count", [0, 2])
def test_a_training_step(
    variant: str, count: int, batch: tuple, small_config: Callable[..., ModelConfig]
) -> None:
    """With one query, checkpointed, with and without boxes."""
    changes = {"num_queries": 1, "dropout": 0.1, "activation_checkpointing": True}
    config = small_config(**(changes | VARIANTS[variant]))
    torch.manual_seed(0)
    model = build_model(config)
    images, padding, _ = batch
    target = {"labels": torch.zeros(count).long(), "boxes": torch.full((count, 4), 0.3)}
    build_criterion(config)(model(images, padding), [target, target])["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


COUNTS = {
    "sam_detr_r50": (58_295_946, 58_073_546),
    "sam_detr_r50_smca": (58_345_194, 58_122_794),
    "sam_detr_r50_dc5": (58_295_946, 58_073_546),
    "sam_detr_r50_dc5_smca": (58_345_194, 58_122_794),
    "sam_detr_r50_multiscale": (55_194_698, 54_972_298),
    "sam_detr_r50_multiscale_smca": (55_243_946, 55_021_546),
}
"""Parameters in all and, as in the published runs' logs (`n_parameters`), trainable ones."""


@pytest.mark.parametrize("name", COUNTS)
def test_as_many_parameters_as_published(name: str) -> None:
    with torch.device("meta"):
        parameters = list(build_model(recipe(name).model).parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    assert (sum(p.numel() for p in parameters), trainable) == COUNTS[name]


def checkpoint(three_maps: bool, gaussians: bool, input_norm: bool) -> dict[str, Tensor]:
    """Random numbers under the published names, for a width of 32, 2 heads, 2 + 3 layers."""
    c, f, heads = 32, 48, 2
    shapes: dict[str, tuple[int, ...]] = {"query_embed.weight": (6, 4)}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def layer_of(name: str, norms: int, width: int) -> None:
        linear(f"{name}.linear1", width, c)
        linear(f"{name}.linear2", c, width)
        for number in range(1, norms + 1):
            shapes[f"{name}.norm{number}.weight"] = shapes[f"{name}.norm{number}.bias"] = (c,)

    if three_maps:
        shapes["transformer.level_embed"] = (3, c)
    for level, channels in enumerate([512, 1024, 2048] if three_maps else [2048]):
        shapes[f"input_proj.{level}.0.weight"] = (c, channels, 1, 1)
        shapes[f"input_proj.{level}.0.bias"] = (c,)
        if three_maps or input_norm:
            for kind in ("weight", "bias"):
                shapes[f"input_proj.{level}.1.{kind}"] = (c,)
    for index in range(2):
        name = f"transformer.encoder.layers.{index}"
        layer_of(name, norms=2, width=f // 2 if three_maps else f)
        if three_maps:
            linear(f"{name}.self_attn.sampling_offsets", heads * 3 * 4 * 2, c)
            linear(f"{name}.self_attn.attention_weights", heads * 3 * 4, c)
            linear(f"{name}.self_attn.value_proj", c, c)
            linear(f"{name}.self_attn.output_proj", c, c)
        else:
            shapes[f"{name}.self_attn.in_proj_weight"] = (3 * c, c)
            shapes[f"{name}.self_attn.in_proj_bias"] = (3 * c,)
            linear(f"{name}.self_attn.out_proj", c, c)
    for index in range(3):
        name = f"transformer.decoder.layers.{index}"
        layer_of(name, norms=3, width=f)
        for part in ("sa_qcontent", "sa_qpos", "sa_kcontent", "sa_kpos", "sa_v"):
            linear(f"{name}.{part}_proj", c, c)
        for part in ("ca_qcontent", "ca_kcontent", "ca_v"):
            linear(f"{name}.{part}_proj", c, c)
        for part in ("ca_qpos_sine_proj", "ca_kpos_sine_proj"):
            linear(f"{name}.{part}.layers.0", c, c)
            linear(f"{name}.{part}.layers.1", c, c)
        linear(f"{name}.self_attn.out_proj", c, c)
        linear(f"{name}.cross_attn.out_proj", c, c)
        shapes[f"{name}.point1.0.weight"] = (c // 4, c, 1, 1)
        shapes[f"{name}.point1.0.bias"] = (c // 4,)
        linear(f"{name}.point2.0", c, c // 4 * 49)
        linear(f"{name}.point2.2", 2 * c, c)
        linear(f"{name}.point2.4", 2 * c, 2 * c)
        linear(f"{name}.point2.6", heads * (4 if gaussians else 2), 2 * c)
        linear(f"{name}.attn1", heads * c, c)
        linear(f"{name}.attn2", heads * c, c)
        linear(f"class_embed.{index}", 5, c)
        for number, outputs in enumerate((c, c, 4)):
            linear(f"bbox_embed.{index}.layers.{number}", outputs, c)
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name in [n for n in state if n.startswith("bbox_embed.")]:
        state[f"transformer.decoder.{name}"] = state[name]
    with torch.device("meta"):
        resnet = torchvision.models.resnet50(weights=None).state_dict()
    for name, value in resnet.items():
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            state[f"backbone.0.body.{name}"] = torch.randn(value.shape)
    return state


@pytest.mark.parametrize("variant", ["one_map", "input_norm", "three_maps_gaussians"])
def test_published_checkpoints_are_loaded(
    variant: str, small_config: Callable[..., ModelConfig]
) -> None:
    sizes = {"num_queries": 6, "hidden_dim": 32, "decoder_layers": 3, "feedforward_dim": 48}
    with torch.device("meta"):
        model: Any = build_model(small_config(**(sizes | VARIANTS[variant]), backbone="resnet50"))
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(math.nan)
    state = checkpoint("three" in variant, "gaussians" in variant, variant == "input_norm")
    load_official(model, state)
    taken = sum(float(x.double().sum()) for x in model.state_dict().values())
    own = {name: x for name, x in state.items() if not name.startswith("transformer.decoder.bbox")}
    assert taken == pytest.approx(sum(float(x.double().sum()) for x in own.values()))
    layer, name = model.decoder[1], "transformer.decoder.layers.1"
    for ours, theirs in (
        (layer.self_norm.weight, "norm1.weight"),
        (layer.cross_norm.weight, "norm2.weight"),
        (layer.feedforward.norm.weight, "norm3.weight"),
        (layer.self_attention.query_position_proj.bias, "sa_qpos_proj.bias"),
        (layer.self_attention.key_content_proj.bias, "sa_kcontent_proj.bias"),
        (layer.self_attention.output_proj.bias, "self_attn.out_proj.bias"),
        (layer.aligner.hidden[2].bias, "point2.2.bias"),
        (layer.aligner.hidden[4].bias, "point2.4.bias"),
        (layer.aligner.content_gate.bias, "attn1.bias"),
        (layer.aligner.position_gate.bias, "attn2.bias"),
        (layer.cross_attention.query_proj.bias, "ca_qcontent_proj.bias"),
        (layer.cross_attention.key_proj.bias, "ca_kcontent_proj.bias"),
        (layer.cross_attention.query_position[2].bias, "ca_qpos_sine_proj.layers.1.bias"),
        (layer.cross_attention.key_position[0].bias, "ca_kpos_sine_proj.layers.0.bias"),
        (layer.cross_attention.output_proj.bias, "cross_attn.out_proj.bias"),
    ):
        assert torch.equal(ours, state[f"{name}.{theirs}"]), theirs

    alias = "transformer.decoder.bbox_embed.2.layers.0.weight"
    before = model.queries.embed.clone()
    state["query_embed.weight"] = torch.zeros(6, 4)
    with pytest.raises(ValueError, match=f"different values in {alias}"):
        load_official(model, state | {alias: torch.zeros(32, 32)})
    del state[alias]
    with pytest.raises(ValueError, match=f"missing keys: {alias}"):
        load_official(model, state)
    assert torch.equal(model.queries.embed, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_levels": 3}, "got sam_detr with num_levels=3.*expected 1, True, False"),
        ({"box_refine": False}, "box_refine=False"),
        ({"two_stage": True}, "two_stage=True"),
        ({"architecture": "sam_multiscale_detr"}, "num_levels=1.*expected 3 and up"),
        ({"classification": "softmax"}, "classification: got softmax with sam_detr"),
        (
            {"architecture": "detr", "box_refine": False, "salient_gaussians": True},
            "salient_gaussians: got True with detr",
        ),
        (
            {"architecture": "sam_multiscale_detr", "num_levels": 3, "input_norm": True},
            "input_norm: got True with sam_multiscale_detr",
        ),
    ],
)
def test_what_is_no_sam_detr_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**(ONE_MAP | changes))
