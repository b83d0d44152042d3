"""Conditional DETR against plain loops, and against transformers' `ConditionalDetr`."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ResNetConfig,
)

from model.config import ModelConfig
from model.criterion import build_criterion
from model.detr import build_model
from model.family.concat_attention import (
    ConcatCrossAttention,
    ConditionalPosition,
    SummedSelfAttention,
)
from model.parts import Memory
from model.postprocess import postprocess
from model.weights import load_official
from pipeline.recipes import recipe
from tests.model.beside_transformers import assert_same_outputs, with_random_weights
from tests.model.family.plain_detr import (
    State,
    assert_same_gradients,
    assert_same_layers,
    attend,
    dot_products,
    encode,
    feed_forward,
    linear,
    mlp,
    norm,
    published,
    randomised,
    sines,
)

CHANGES = {"architecture": "conditional_detr", "num_levels": 1}


@pytest.fixture
def config(small_config: Callable[..., ModelConfig]) -> ModelConfig:
    return small_config(**CHANGES, decoder_layers=3)


def plainly(
    model: nn.Module, state: State, images: Tensor, padding: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Each decoder layer's logits and boxes."""
    tokens, place, hidden, _ = encode(model, state, images, padding)
    heads, queries = model.config.num_heads, state["query_embed.weight"]
    point = mlp(queries, state, "transformer.decoder.ref_point_head", 2).sigmoid()
    width = queries.shape[-1]
    sine = torch.cat((sines(point[:, 1], width // 2), sines(point[:, 0], width // 2)), dim=-1)
    content = torch.zeros(len(images), *queries.shape, dtype=torch.float64)
    predictions = []
    for layer in range(model.config.decoder_layers):
        name = f"transformer.decoder.layers.{layer}"

        def of(x: Tensor, part: str, name: str = name) -> Tensor:
            return linear(x, state, f"{name}.{part}_proj")

        scale = mlp(content, state, "transformer.decoder.query_scale", 2) if layer else 1.0
        spatial = of(sine * scale, "ca_qpos_sine").expand_as(content)
        logits = dot_products(
            of(content, "sa_qcontent") + of(queries, "sa_qpos"),
            of(content, "sa_kcontent") + of(queries, "sa_kpos"),
            heads,
        )
        attended = linear(
            attend(logits, of(content, "sa_v"), None), state, f"{name}.self_attn.out_proj"
        )
        content = norm(content + attended, state, f"{name}.norm1")
        query, key = of(content, "ca_qcontent"), of(tokens, "ca_kcontent")
        if layer == 0:
            query, key = query + of(queries, "ca_qpos"), key + of(place, "ca_kpos")
        by_content = dot_products(query, key, heads)
        by_place = dot_products(spatial, of(place, "ca_kpos"), heads)
        logits = [
            [(x + y) / 2**0.5 for x, y in zip(*image, strict=True)]
            for image in zip(by_content, by_place, strict=True)
        ]
        attended = attend(logits, of(tokens, "ca_v"), hidden)
        attended = linear(attended, state, f"{name}.cross_attn.out_proj")
        content = norm(content + attended, state, f"{name}.norm2")
        content = feed_forward(content, state, name, "norm3")
        normed = norm(content, state, "transformer.decoder.norm")
        change = mlp(normed, state, "bbox_embed", 3)
        centre = change[..., :2] + (point / (1 - point)).log()
        boxes = torch.cat((centre, change[..., 2:]), dim=-1).sigmoid()
        predictions.append((linear(normed, state, "class_embed"), boxes))
    return predictions


def test_outputs_and_gradients_are_those_of_plain_loops(config: ModelConfig, batch: tuple) -> None:
    torch.manual_seed(0)
    model = randomised(build_model(config)).train()
    images, padding, _ = batch
    images = images.double()
    outputs = model(images, padding)
    expected = plainly(model, published(model), images, padding)
    assert len(expected) == 3
    assert_same_gradients(model, *assert_same_layers(outputs, expected))


def test_names_and_shapes_of_the_published_checkpoint() -> None:
    """Without the backbone's and the encoder's, which are DETR's."""
    with torch.device("meta"):
        model = build_model(recipe("conditional_detr_r50").model)
    assert sum(p.numel() for p in model.parameters()) == 43_418_401
    state = published(model)
    found = {
        name: tuple(value.shape)
        for name, value in state.items()
        if not name.startswith(("backbone.0.body.", "transformer.encoder.layers."))
    }
    assert len(state) - len(found) == 53 + 6 * 12
    linear = {"weight": (256, 256), "bias": (256,)}
    vector = {"weight": (256,), "bias": (256,)}
    parts: dict[str, dict[str, tuple[int, ...]]] = {
        "query_embed": {"weight": (300, 256)},
        "input_proj": {"weight": (256, 2048, 1, 1), "bias": (256,)},
        "class_embed": {"weight": (91, 256), "bias": (91,)},
        "bbox_embed.layers.0": linear,
        "bbox_embed.layers.1": linear,
        "bbox_embed.layers.2": {"weight": (4, 256), "bias": (4,)},
        "transformer.decoder.norm": vector,
        "transformer.decoder.query_scale.layers.0": linear,
        "transformer.decoder.query_scale.layers.1": linear,
        "transformer.decoder.ref_point_head.layers.0": linear,
        "transformer.decoder.ref_point_head.layers.1": {"weight": (2, 256), "bias": (2,)},
        "transformer.decoder.layers.0.ca_qpos_proj": linear,
    }
    for layer in range(6):
        name = f"transformer.decoder.layers.{layer}"
        for part in ("sa_qcontent", "sa_qpos", "sa_kcontent", "sa_kpos", "sa_v"):
            parts[f"{name}.{part}_proj"] = linear
        for part in ("ca_qcontent", "ca_kcontent", "ca_kpos", "ca_qpos_sine", "ca_v"):
            parts[f"{name}.{part}_proj"] = linear
        parts |= {f"{name}.self_attn.out_proj": linear, f"{name}.cross_attn.out_proj": linear}
        parts |= {f"{name}.norm{index}": vector for index in (1, 2, 3)}
        parts[f"{name}.linear1"] = {"weight": (2048, 256), "bias": (2048,)}
        parts[f"{name}.linear2"] = {"weight": (256, 2048), "bias": (256,)}
    assert found == {f"{name}.{x}": shape for name, y in parts.items() for x, shape in y.items()}


# Names that `published_names("detr", ...)` gives to those of the authors' files, in order.
NAMES = [
    (r"\.self_attn\.(q|k)_(content|pos)_proj\.", r".sa_\1\2_proj."),
    (r"\.multihead_attn\.(q|k)_(content|pos|pos_sine)_proj\.", r".ca_\1\2_proj."),
    (r"\.self_attn\.v_proj\.", ".sa_v_proj."),
    (r"\.multihead_attn\.v_proj\.", ".ca_v_proj."),
    (r"\.multihead_attn\.out_proj\.", ".cross_attn.out_proj."),
]


def renamed(state: State) -> State:
    result = {}
    for name, value in state.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    return result


def test_outputs_and_gradients_are_those_of_transformers(published_names: Callable) -> None:
    torch.manual_seed(3)
    theirs = ConditionalDetrForObjectDetection(
        ConditionalDetrConfig(
            backbone_config=ResNetConfig(out_features=["stage4"]),
            num_labels=7,
            num_queries=12,
            d_model=64,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_layers=2,
            decoder_layers=3,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            dropout=0.0,
            # With them transformers hands the normed state of each decoder layer to the next one.
            auxiliary_loss=False,
            attn_implementation="eager",
        )
    )
    with_random_weights(theirs)
    config = ModelConfig(
        **CHANGES,
        num_classes=7,
        num_queries=12,
        hidden_dim=64,
        num_heads=4,
        encoder_layers=2,
        decoder_layers=3,
        feedforward_dim=96,
        dropout=0.0,
    )
    ours = build_model(config).double()
    load_official(ours, renamed(published_names("detr", theirs.state_dict())))

    _, _, theirs_gradients = assert_same_outputs(ours, theirs)
    gradients = renamed(published_names("detr", theirs_gradients))
    trained = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    largest = max(float(x.abs().max()) for x in gradients.values())
    for name, found_gradient in published(ours, trained).items():
        wanted = gradients[name]
        error = (found_gradient - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6 * largest)
        assert error < 1e-4, name


def test_content_and_place_are_concatenated_within_each_head() -> None:
    """By hand: one head sees content alone, the other the place alone."""
    attention = ConcatCrossAttention(hidden_dim=4, num_heads=2, dropout=0.0, first=False).double()
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            parameter.copy_(torch.eye(4) if name.endswith("weight") else torch.zeros(4))
    content = torch.tensor([[[2.0, 1.0, 0.0, 0.0]]], dtype=torch.float64)
    sine = torch.tensor([[[0.0, 0.0, 3.0, -1.0]]], dtype=torch.float64)
    tokens = torch.tensor(
        [[[1.0, 0.0, 5.0, 6.0], [0.0, 1.0, 7.0, 9.0], [1.0, 1.0, -4.0, 2.0]]], dtype=torch.float64
    )
    place = torch.tensor(
        [[[9.0, 9.0, 1.0, 0.0], [4.0, 4.0, 0.0, 1.0], [5.0, 5.0, 1.0, 1.0]]], dtype=torch.float64
    )
    padding = torch.tensor([[False, False, True]])
    memory = Memory(tokens, place, [], padding, [(1, 3)], torch.empty(0), torch.empty(0))
    found = attention(content, ConditionalPosition(content, sine), memory)
    # Logits over sqrt(2 + 2): (2, 1) of the first head, (3, -1) of the second; then padding.
    first = torch.tensor([1.0, 0.5], dtype=torch.float64).softmax(0)
    second = torch.tensor([1.5, -0.5], dtype=torch.float64).softmax(0)
    expected = torch.cat((first @ tokens[0, :2, :2], second @ tokens[0, :2, 2:]))
    torch.testing.assert_close(found[0, 0], expected, rtol=1e-14, atol=1e-14)


def test_only_the_first_layer_adds_positions_to_contents(config: ModelConfig) -> None:
    model = build_model(config)
    added = [layer.cross_attention.query_position_proj is not None for layer in model.decoder]
    assert added == [True, False, False]


def test_queries_do_not_see_what_the_mask_hides() -> None:
    torch.manual_seed(0)
    attention = SummedSelfAttention(hidden_dim=8, num_heads=2, dropout=0.0).double()
    content, position = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[:3, 3:] = True
    alone = attention(content[:, :3], position[:, :3])
    together = attention(content, position, mask)
    torch.testing.assert_close(together[:, :3], alone, rtol=1e-13, atol=1e-13)
    assert not torch.allclose(attention(content, position)[:, :3], alone)


@pytest.mark.parametrize("changes", [{"num_queries": 1}, {"decoder_layers": 1}], ids=str)
def test_every_parameter_learns_from_one_cell_and_no_boxes(
    changes: dict, config: ModelConfig
) -> None:
    torch.manual_seed(0)
    config = replace(config, **changes)
    model, criterion = build_model(config).train(), build_criterion(config)
    padding = torch.ones(1, 64, 64, dtype=torch.bool)
    padding[:, :1, :1] = False
    outputs = model(torch.randn(1, 3, 64, 64) * ~padding, padding)
    nothing = [{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]
    criterion(outputs, nothing)["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    (result,) = postprocess(outputs, torch.tensor([[10, 10]]))
    assert result["boxes"].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_levels": 4}, "got conditional_detr with num_levels=4"),
        ({"box_refine": True}, "box_refine=True"),
    ],
)
def test_what_no_model_can_be_built_from_is_refused(
    changes: dict, message: str, config: ModelConfig
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)
