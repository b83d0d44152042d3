"""SMCA DETR against plain loops; there is none in transformers."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.criterion import build_criterion
from model.detr import build_model
from model.family.smca import log_gaussian
from model.postprocess import postprocess
from model.weights import load_official
from pipeline.recipes import recipe
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
    packed,
    plain_attention,
    published,
    randomised,
)

TYPES = ["type1", "type2", "type3", "type4"]


@pytest.fixture
def config(small_config: Callable[..., ModelConfig]) -> ModelConfig:
    return small_config(
        architecture="smca_detr", classification="focal_no_object", num_levels=1, decoder_layers=3
    )


def exponent(centre: Tensor, scales: Tensor, cell: tuple[int, int], kind: str) -> Tensor:
    """The logarithm of one head's weight of one cell (x, y) for one query."""
    dx, dy = (centre[0] - cell[0]) ** 2, (centre[1] - cell[1]) ** 2
    if kind == "type1":
        return -(dx + dy) / 8
    squared = scales**2
    if kind == "type2":
        return -squared[0] * (dx + dy) / 8
    total = squared[0] * dx + squared[1] * dy
    return -(total + squared[2] * dx * dy if kind == "type4" else total) / 8


def plainly(
    model: nn.Module, state: State, images: Tensor, padding: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Each decoder layer's logits and boxes."""
    tokens, place, hidden, (height, width) = encode(model, state, images, padding)
    heads, kind = model.config.num_heads, model.config.dynamic_scale
    position = state["query_embed.weight"].expand(len(images), -1, -1)
    content = torch.zeros_like(position)
    cells = [(x, y) for y in range(height) for x in range(width)]
    predictions: list[tuple[Tensor, Tensor]] = []
    for layer in range(model.config.decoder_layers):
        name = f"transformer.decoder.layers.{layer}"
        entering = norm(content + position, state, f"{name}.norm4")
        if layer == 0:
            start = mlp(entering, state, f"{name}.point1", 3)
        offsets = linear(entering, state, f"{name}.point2").unflatten(-1, (heads, 2))
        scales = offsets
        if kind != "type1":
            scales = linear(entering, state, f"{name}.point3").unflatten(-1, (heads, -1))
        query = content + position
        attended = plain_attention(query, query, content, state, f"{name}.self_attn", heads)
        content = norm(content + attended, state, f"{name}.norm1")
        logits = dot_products(
            packed(content + position, state, f"{name}.multihead_attn", 0),
            packed(tokens + place, state, f"{name}.multihead_attn", 1),
            heads,
        )
        for image, pixels in enumerate(padding):
            extent = torch.stack(((~pixels)[0].sum(), (~pixels)[:, 0].sum()))
            for head in range(heads):
                rows = []
                for one in range(position.shape[1]):
                    centre = extent * start[image, one].sigmoid() / 32 + offsets[image, one, head]
                    scale = scales[image, one, head]
                    rows.append(torch.stack([exponent(centre, scale, c, kind) for c in cells]))
                logits[image][head] = logits[image][head] + torch.stack(rows)
        value = packed(tokens, state, f"{name}.multihead_attn", 2)
        attended = linear(attend(logits, value, hidden), state, f"{name}.multihead_attn.out_proj")
        content = norm(content + attended, state, f"{name}.norm2")
        content = feed_forward(content, state, name, "norm3")
        normed = norm(content, state, "transformer.decoder.norm")
        change = mlp(normed, state, "bbox_embed", 3)
        boxes = torch.cat((change[..., :2] + start, change[..., 2:]), dim=-1).sigmoid()
        predictions.append((linear(normed, state, "class_embed"), boxes))
    return predictions


@pytest.mark.parametrize("kind", TYPES)
def test_outputs_and_gradients_are_those_of_plain_loops(
    kind: str, config: ModelConfig, batch: tuple
) -> None:
    torch.manual_seed(0)
    config = replace(config, dynamic_scale=kind, num_queries=4)
    model = randomised(build_model(config)).train()
    images, padding, _ = batch
    images = images.double()
    outputs = model(images, padding)
    expected = plainly(model, published(model), images, padding)
    assert len(expected) == 3
    assert outputs["pred_logits"].shape[-1] == 6  # five classes and no object
    assert_same_gradients(model, *assert_same_layers(outputs, expected))


def test_names_and_shapes_of_the_published_checkpoint() -> None:
    """Without the backbone's and the encoder's, which are DETR's."""
    with torch.device("meta"):
        model = build_model(recipe("smca_detr_r50").model)
    assert sum(p.numel() for p in model.parameters()) == 41_760_482
    state = published(model)
    found = {
        name: tuple(value.shape)
        for name, value in state.items()
        if not name.startswith(("backbone.0.body.", "transformer.encoder.layers."))
    }
    assert len(state) - len(found) == 53 + 6 * 12
    linear = {"weight": (256, 256), "bias": (256,)}
    vector = {"weight": (256,), "bias": (256,)}
    sixteen = {"weight": (16, 256), "bias": (16,)}
    packed_linear = {
        "in_proj_weight": (768, 256),
        "in_proj_bias": (768,),
        "out_proj.weight": (256, 256),
        "out_proj.bias": (256,),
    }
    parts: dict[str, dict[str, tuple[int, ...]]] = {
        "query_embed": {"weight": (300, 256)},
        "input_proj": {"weight": (256, 2048, 1, 1), "bias": (256,)},
        "class_embed": {"weight": (92, 256), "bias": (92,)},
        "bbox_embed.layers.0": linear,
        "bbox_embed.layers.1": linear,
        "bbox_embed.layers.2": {"weight": (4, 256), "bias": (4,)},
        "transformer.decoder.norm": vector,
        "transformer.decoder.layers.0.point1.layers.0": linear,
        "transformer.decoder.layers.0.point1.layers.1": linear,
        "transformer.decoder.layers.0.point1.layers.2": {"weight": (2, 256), "bias": (2,)},
    }
    for layer in range(6):
        name = f"transformer.decoder.layers.{layer}"
        parts |= {f"{name}.self_attn": packed_linear, f"{name}.multihead_attn": packed_linear}
        parts |= {f"{name}.norm{index}": vector for index in (1, 2, 3, 4)}
        parts |= {f"{name}.point2": sixteen, f"{name}.point3": sixteen}
        parts[f"{name}.linear1"] = {"weight": (2048, 256), "bias": (2048,)}
        parts[f"{name}.linear2"] = {"weight": (256, 2048), "bias": (256,)}
    assert found == {f"{name}.{x}": shape for name, y in parts.items() for x, shape in y.items()}


def test_a_published_checkpoint_loads_whole_or_not_at_all(config: ModelConfig) -> None:
    torch.manual_seed(0)
    config = replace(config, backbone="resnet50")
    source, target = build_model(config), build_model(config)
    state = published(source, source.state_dict())
    load_official(target, state)
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name
    missing = "transformer.decoder.layers.1.point3.bias"
    del state[missing]
    with pytest.raises(ValueError, match=missing.replace(".", r"\.")):
        load_official(target, state)


def test_a_gaussian_by_hand() -> None:
    """On a map of 2 x 3, centred on the cell at x = 1, y = 0, of scales 2, 1 and, in one, 3."""
    centre = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    found = log_gaussian(centre, torch.tensor([2.0, 1.0]).view(1, 1, 1, 2), (2, 3))
    expected = torch.tensor([[-4.0, 0.0, -4.0], [-5.0, -1.0, -5.0]]) / 8
    torch.testing.assert_close(found.view(2, 3), expected)
    found = log_gaussian(centre, torch.tensor([2.0, 1.0, 3.0]).view(1, 1, 1, 3), (2, 3))
    expected = torch.tensor([[-4.0, 0.0, -4.0], [-14.0, -1.0, -14.0]]) / 8
    torch.testing.assert_close(found.view(2, 3), expected)


@pytest.mark.parametrize(
    ("kind", "numbers"), [("type1", 0), ("type2", 2), ("type3", 4), ("type4", 6)]
)
def test_scales_start_at_one(kind: str, numbers: int, config: ModelConfig, batch: tuple) -> None:
    """So all types start as the first does."""
    torch.manual_seed(0)
    model = build_model(replace(config, dynamic_scale=kind)).eval()
    scales = [n for n, _ in model.named_parameters() if n.endswith("scales.bias")]
    assert len(scales) == (3 if numbers else 0)
    for name in scales:
        assert torch.equal(model.get_parameter(name), torch.ones(numbers))
        assert not model.get_parameter(name.replace("bias", "weight")).any()
    content = torch.randn(1, 9, 64)
    focus = model.queries.foci[0](content, content)
    assert torch.equal(focus.scales, torch.ones(1, 2, 9, 3 if kind == "type4" else 2))


def test_no_object_is_trained_and_never_found(config: ModelConfig, batch: tuple) -> None:
    torch.manual_seed(0)
    model, criterion = build_model(config).train(), build_criterion(config)
    images, padding, targets = batch
    with torch.no_grad():
        model.heads.classes.bias[-1] = 20.0
    outputs = model(images, padding)
    assert outputs["classification"] == "focal_no_object"
    found = postprocess(outputs, torch.tensor([[96, 128], [64, 96]]))
    for result in found:
        assert len(result["scores"]) == 9 * 5
        assert result["labels"].max() < 5
        assert result["scores"].max() < 0.5
    losses = criterion(outputs, targets)
    assert losses["loss_ce"] > 9 * 20 * 0.75 * 2 / 4 - 1  # of each query, over four boxes
    losses["loss"].backward()
    assert (model.heads.classes.bias.grad[-1] > 0).all()


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
def test_the_loss_is_focal_over_all_columns(
    counts: tuple[int, int], config: ModelConfig, batch: tuple
) -> None:
    """With the pairs that cost least of all, found by trying every one (Q = 3)."""
    from itertools import permutations

    from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

    from model.boxes import cxcywh_to_xyxy

    torch.manual_seed(0)
    config = replace(config, num_queries=3, decoder_layers=1)
    model = randomised(build_model(config))
    images, padding, _ = batch
    outputs = model(images.double(), padding)
    targets = [
        {
            "labels": torch.randint(0, 5, (n,)),
            "boxes": 0.2 + 0.3 * torch.rand(n, 4, dtype=torch.float64),
        }
        for n in counts
    ]
    losses = build_criterion(config)(outputs, targets)
    wanted = torch.zeros(2, 3, 6, dtype=torch.float64)
    distance = overlap = torch.zeros((), dtype=torch.float64)
    for image, target in enumerate(targets):
        logits, boxes = outputs["pred_logits"][image], outputs["pred_boxes"][image]
        probability = logits.sigmoid()
        positive = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
        negative = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
        l1 = torch.cdist(boxes, target["boxes"], p=1)
        giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target["boxes"]))
        cost = 2 * (positive - negative)[:, target["labels"]] + 5 * l1 - 2 * giou
        every = [list(p) for p in permutations(range(3), counts[image])]
        box = range(counts[image])
        best = min(every, key=lambda queries: float(cost.detach()[queries, box].sum()))
        wanted[image, best, target["labels"]] = 1.0
        distance = distance + l1[best, box].sum()
        overlap = overlap + (1 - giou[best, box]).sum()
    boxes_in_all = max(1, sum(counts))
    classes = sigmoid_focal_loss(outputs["pred_logits"], wanted, alpha=0.25, gamma=2).sum()
    for name, expected in (
        ("loss_ce", classes),
        ("loss_bbox", distance),
        ("loss_giou", overlap),
        ("loss", 2 * classes + 5 * distance + 2 * overlap),
    ):
        torch.testing.assert_close(losses[name], expected / boxes_in_all, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["type1", "type4"])
@pytest.mark.parametrize("changes", [{"num_queries": 1}, {"decoder_layers": 1}], ids=str)
def test_every_parameter_learns_from_one_cell_and_no_boxes(
    kind: str, changes: dict, config: ModelConfig
) -> None:
    torch.manual_seed(0)
    config = replace(config, dynamic_scale=kind, **changes)
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


@pytest.mark.parametrize(("dtype", "third"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-2)])
def test_16_bits_tell_the_cells_nearest_to_a_far_centre_apart(
    dtype: torch.dtype, third: float, config: ModelConfig, batch: tuple
) -> None:
    """Their logarithms are below -2e4, where bfloat16 knows every 128th, or -1e5, where float16
    ends."""
    torch.manual_seed(0)
    model = build_model(replace(config, dynamic_scale="type4")).eval()
    with torch.no_grad():
        model.queries.foci[1].offsets.bias.fill_(300.0)
        model.queries.foci[1].scales.bias.copy_(torch.tensor([1.0, 1.0, third]).repeat(2))
    seen: list[Tensor] = []
    model.decoder[1].cross_attention.register_forward_pre_hook(lambda _, x: seen.append(x[3]))
    images, padding, _ = batch
    with torch.no_grad():
        model(images, padding)
    (gaussian,) = seen
    assert gaussian.dtype == torch.float32
    exact = gaussian.double().softmax(-1)
    torch.testing.assert_close(gaussian.to(dtype).double().softmax(-1), exact, rtol=0.05, atol=1e-3)
    padded = torch.ones(3, 4, dtype=torch.bool)
    padded[:2, :3] = False
    assert gaussian[1][..., padded.flatten()].isneginf().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_levels": 4}, "got smca_detr with num_levels=4"),
        ({"dilation": True}, "dilation: got True with smca_detr"),
        ({"dynamic_scale": "type5"}, "dynamic_scale: got 'type5', expected one of type1"),
        (
            {"architecture": "deformable_detr"},
            "classification: got focal_no_object with deformable_detr",
        ),
    ],
)
def test_what_no_model_can_be_built_from_is_refused(
    changes: dict, message: str, config: ModelConfig
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)
