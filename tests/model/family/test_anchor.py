"""Anchor DETR against a re-computation from a checkpoint in the published names."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import Tensor, nn

from model.config import ModelConfig
from model.criterion import build_criterion
from model.detr import build_model
from model.weights import load_official
from pipeline.recipes import recipe

SMALL = ModelConfig(
    architecture="anchor_detr",
    num_classes=5,
    num_queries=4,
    num_patterns=2,
    num_levels=1,
    hidden_dim=32,
    num_heads=2,
    encoder_layers=1,
    decoder_layers=2,
    feedforward_dim=12,
    dropout=0.0,
)
WIDTH, HEADS = 32, 2
State = dict[str, Tensor]


def resnet() -> nn.Module:
    return torchvision.models.resnet50(
        weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d
    ).double()


def checkpoint() -> State:
    """A random one of `SMALL`, as megvii-research/AnchorDETR names it."""
    torch.manual_seed(5)
    state: State = {}

    def linear(name: str, inputs: int, outputs: int, separator: str = ".") -> None:
        weight = torch.randn(outputs, inputs, dtype=torch.float64)
        state[f"{name}{separator}weight"] = 1.3 * weight / math.sqrt(inputs)
        state[f"{name}{separator}bias"] = 0.5 * torch.randn(outputs, dtype=torch.float64)

    def norm(name: str) -> None:
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(WIDTH, dtype=torch.float64)
        state[f"{name}.bias"] = 0.3 * torch.randn(WIDTH, dtype=torch.float64)

    def attention(name: str, blocks: int) -> None:
        linear(f"{name}.in_proj", WIDTH, blocks * WIDTH, separator="_")
        linear(f"{name}.out_proj", WIDTH, WIDTH)

    for name, value in resnet().state_dict().items():
        if not name.startswith("fc."):
            damped = 0.3 if name.endswith("bn3.weight") else 1.0
            state[f"backbone.body.{name}"] = damped * value
    linear("input_proj.0.0", 2048, WIDTH)
    state["input_proj.0.0.weight"] = state["input_proj.0.0.weight"][..., None, None]
    norm("input_proj.0.1")
    state["transformer.position.weight"] = 1.2 * torch.rand(4, 2, dtype=torch.float64) - 0.1
    state["transformer.pattern.weight"] = torch.randn(2, WIDTH, dtype=torch.float64)
    for name in ("adapt_pos1d.0", "adapt_pos1d.2", "adapt_pos2d.0", "adapt_pos2d.2"):
        linear(f"transformer.{name}", WIDTH, WIDTH)
    for layer in ("encoder_layers.0", "decoder_layers.0", "decoder_layers.1"):
        if layer.startswith("encoder"):
            attention(f"transformer.{layer}.self_attn", 5)
        else:
            attention(f"transformer.{layer}.cross_attn", 5)
            attention(f"transformer.{layer}.self_attn", 3)
            norm(f"transformer.{layer}.norm2")
        norm(f"transformer.{layer}.norm1")
        linear(f"transformer.{layer}.ffn.linear1", WIDTH, 12)
        linear(f"transformer.{layer}.ffn.linear2", 12, WIDTH)
        norm(f"transformer.{layer}.ffn.norm2")
    linear("transformer.class_embed.0", WIDTH, 5)
    for number, outputs in enumerate((WIDTH, WIDTH, 4)):
        linear(f"transformer.bbox_embed.0.layers.{number}", WIDTH, outputs)
    heads = [name for name in state if "_embed.0." in name]
    return state | {name.replace("_embed.0.", "_embed.1."): state[name] for name in heads}


class Plain:
    """The two predictions of one image, from a state dict, without batches or modules."""

    def __init__(self, state: State, valid: tuple[int, int]) -> None:
        self.state = state
        self.valid_h, self.valid_w = valid

    def linear(self, name: str, x: Tensor, joint: str = ".", block: int | None = None) -> Tensor:
        rows = slice(None) if block is None else slice(block * WIDTH, (block + 1) * WIDTH)
        weight = self.state[f"transformer.{name}{joint}weight"][rows]
        return x @ weight.T + self.state[f"transformer.{name}{joint}bias"][rows]

    def norm(self, name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * self.state[f"transformer.{name}.weight"] + self.state[f"transformer.{name}.bias"]

    def place(self, coordinates: list[Tensor], width: int) -> Tensor:
        """Sine and cosine of each coordinate in turn."""
        features = []
        for coordinate in coordinates:
            for pair in range(width // 2):
                angle = coordinate * 2 * math.pi / 10000 ** (2 * pair / width)
                features += [angle.sin(), angle.cos()]
        return torch.stack(features)

    def adapted(self, name: str, places: list[Tensor]) -> Tensor:
        hidden = self.linear(f"{name}.0", torch.stack(places)).relu()
        return self.linear(f"{name}.2", hidden)

    def axis(self, cells: int, valid: int) -> Tensor:
        centres = [torch.tensor((min(i + 1, valid) - 0.5) / valid).double() for i in range(cells)]
        return self.adapted("adapt_pos1d", [self.place([x], WIDTH) for x in centres])

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(0, 1)  # [heads, length, D]

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        logits = self.split(query) @ self.split(key).transpose(1, 2)
        return (logits / math.sqrt(WIDTH / HEADS)).softmax(-1)

    def decoupled(self, name: str, query_x: Tensor, query_y: Tensor, cells: Tensor) -> Tensor:
        key_x = (cells.mean(0) + self.columns)[: self.valid_w]
        key_y = (cells.mean(1) + self.rows)[: self.valid_h]
        value = cells[: self.valid_h, : self.valid_w].flatten(0, 1)
        parts = enumerate((query_x, query_y, key_x, key_y, value))
        qx, qy, kx, ky, v = (self.linear(f"{name}.in_proj", x, "_", i) for i, x in parts)
        both = self.weights(qy, ky)[..., :, None] * self.weights(qx, kx)[..., None, :]
        attended = both.flatten(2) @ self.split(v)
        return self.linear(f"{name}.out_proj", attended.transpose(0, 1).flatten(1))

    def self_attention(self, name: str, content: Tensor, position: Tensor) -> Tensor:
        inputs = enumerate((content + position, content + position, content))
        query, key, value = (self.linear(f"{name}.in_proj", x, "_", i) for i, x in inputs)
        attended = self.weights(query, key) @ self.split(value)
        return self.linear(f"{name}.out_proj", attended.transpose(0, 1).flatten(1))

    def feedforward(self, layer: str, x: Tensor) -> Tensor:
        hidden = self.linear(f"{layer}.ffn.linear1", x).relu()
        return self.norm(f"{layer}.ffn.norm2", x + self.linear(f"{layer}.ffn.linear2", hidden))

    def projected(self, features: Tensor) -> Tensor:
        """A 1x1 convolution and a group norm, whose 32 groups have one channel each here."""
        weight, bias = (self.state[f"input_proj.0.0.{x}"] for x in ("weight", "bias"))
        cells = torch.einsum("chw,kc->hwk", features, weight[..., 0, 0]) + bias
        cells = cells - cells.mean((0, 1))
        cells = cells / (cells.square().mean((0, 1)) + 1e-5).sqrt()
        return cells * self.state["input_proj.0.1.weight"] + self.state["input_proj.0.1.bias"]

    def predict(self, features: Tensor) -> list[State]:
        """features [2048, H, W]."""
        cells = self.projected(features)
        height, width, _ = cells.shape
        self.columns, self.rows = self.axis(width, self.valid_w), self.axis(height, self.valid_h)
        query_x, query_y = cells + self.columns, cells + self.rows[:, None]
        layer = "encoder_layers.0"
        attended = self.decoupled(
            f"{layer}.self_attn", query_x.flatten(0, 1), query_y.flatten(0, 1), cells
        )
        tokens = self.norm(f"{layer}.norm1", cells.flatten(0, 1) + attended)
        cells = self.feedforward(layer, tokens).unflatten(0, (height, width))

        # The four points with the first pattern, then the same with the second.
        points = [self.state["transformer.position.weight"][i] for _ in range(2) for i in range(4)]
        patterns = self.state["transformer.pattern.weight"]
        content = torch.stack([patterns[p] for p in range(2) for _ in range(4)])
        plane = self.adapted("adapt_pos2d", [self.place([y, x], WIDTH // 2) for x, y in points])
        along_x = self.adapted("adapt_pos1d", [self.place([x], WIDTH) for x, _ in points])
        along_y = self.adapted("adapt_pos1d", [self.place([y], WIDTH) for _, y in points])
        inside = torch.stack(points).clamp(0, 1)
        logits = (inside.clamp(min=1e-5) / (1 - inside).clamp(min=1e-5)).log()
        predictions = []
        for layer in ("decoder_layers.0", "decoder_layers.1"):
            attended = self.self_attention(f"{layer}.self_attn", content, plane)
            content = self.norm(f"{layer}.norm2", content + attended)
            attended = self.decoupled(
                f"{layer}.cross_attn", content + along_x, content + along_y, cells
            )
            content = self.feedforward(layer, self.norm(f"{layer}.norm1", content + attended))
            box = self.linear("bbox_embed.0.layers.0", content).relu()
            box = self.linear("bbox_embed.0.layers.1", box).relu()
            box = self.linear("bbox_embed.0.layers.2", box)
            box = torch.cat((box[:, :2] + logits, box[:, 2:]), dim=1).sigmoid()
            classes = self.linear("class_embed.0", content)
            predictions.append({"pred_logits": classes, "pred_boxes": box})
        return predictions


def recomputed(state: State, images: Tensor, valid: list[tuple[int, int]]) -> list[State]:
    """Each decoder layer's prediction; valid: cells (h, w) of each image."""
    net = resnet()
    body = {n.removeprefix("backbone.body."): x for n, x in state.items() if "body" in n}
    net.load_state_dict(body, strict=False)
    features = nn.Sequential(*list(net.children())[:-2])(images)
    found = [Plain(state, v).predict(x) for x, v in zip(features, valid, strict=True)]
    return [
        {name: torch.stack([image[layer][name] for image in found]) for name in found[0][layer]}
        for layer in range(2)
    ]


def own_rows(key: str, packed: Tensor) -> Tensor:
    """Of a published input projection, what our parameter `key` has."""
    kind = key.split(".")[-2].removesuffix("_proj")
    if kind == "query_key":
        return packed[: 2 * WIDTH]
    blocks = packed.split(WIDTH)
    order = {"query_x": 0, "query_y": 1, "key_x": 2, "key_y": 3, "value": len(blocks) - 1}
    return blocks[order[kind]]


def test_outputs_and_gradients_from_a_published_checkpoint() -> None:
    state = checkpoint()
    model = build_model(SMALL).double().train()
    model.backbone.requires_grad_(False)
    load_official(model, state)
    images = torch.randn(2, 3, 64, 128, dtype=torch.float64)
    padding = torch.zeros(2, 64, 128, dtype=torch.bool)
    padding[1, 30:], padding[1, :, 70:] = True, True
    outputs = model(images, padding)
    found = [*outputs["aux_outputs"], outputs]
    for name, value in state.items():
        value.requires_grad_("body" not in name)
    expected = recomputed(state, images, [(2, 4), (1, 3)])
    # Places of cells and frequencies are float32 in ours, as in the published code.
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["pred_logits"].shape == (2, 8, 5)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)

    def scalar(layers: list[State]) -> Tensor:
        terms = [x["pred_boxes"].square().sum() + x["pred_logits"].sin().sum() for x in layers]
        return torch.stack(terms).sum()

    scalar(found).backward()
    scalar(expected).backward()
    # A bias of all keys changes no softmax, and one of all cells no norm of a channel alone.
    without = ("key_x_proj.bias", "key_y_proj.bias", "neck.levels.0.0.bias")
    compared = 0
    for key, parameter in model.named_parameters():
        if key.startswith("backbone.") or key.endswith(without):
            continue
        name = model.official_names(key)[0]
        assert state[name].grad is not None, name
        wanted = own_rows(key, state[name].grad) if "in_proj_" in name else state[name].grad
        error = (parameter.grad - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-4, (key, error.item())
        compared += 1
    assert compared == 91


def test_a_checkpoint_of_another_shape_is_refused() -> None:
    state, model = checkpoint(), build_model(SMALL).double()
    state["transformer.class_embed.1.bias"] = state["transformer.class_embed.1.bias"] + 1
    with pytest.raises(ValueError, match=r"different values in transformer\.class_embed\.1\.bias"):
        load_official(model, state)
    del state["transformer.adapt_pos1d.2.bias"], state["transformer.bbox_embed.1.layers.0.weight"]
    with pytest.raises(ValueError, match=r"missing keys: transformer\.adapt_pos1d\.2\.bias, tran"):
        load_official(model, state)


@pytest.mark.parametrize("name", ["anchor_detr_r50", "anchor_detr_r50_dc5"])
def test_the_full_size(name: str) -> None:
    config = recipe(name).model
    with torch.device("meta"):
        model = build_model(config)
        images, padding = torch.empty(1, 3, 800, 1066), torch.empty(1, 800, 1066, dtype=torch.bool)
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == 37_038_711
    assert sum(p.numel() for p in parameters if p.requires_grad) == 36_816_311
    outputs = model(images, padding)
    assert len(outputs["aux_outputs"]) == 5
    assert outputs["pred_logits"].shape == (1, 900, 91)
    assert outputs["pred_boxes"].shape == (1, 900, 4)


def test_at_the_start_boxes_are_small_and_centred_on_the_points(
    small_config: Callable[..., ModelConfig],
) -> None:
    model = build_model(small_config(architecture="anchor_detr", num_levels=1, num_patterns=3))
    points = model.queries.points.detach()
    assert 0 <= points.min() < points.max() <= 1
    outputs = model(torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
    boxes = outputs["pred_boxes"].view(3, 9, 4)
    side = torch.tensor(-2.0).sigmoid()
    expected = torch.cat((points, side.expand(9, 2)), dim=1).expand(3, -1, -1)
    torch.testing.assert_close(boxes, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("queries", "patterns", "boxes"), [(1, 1, 3), (9, 3, 0)])
def test_every_parameter_learns_in_every_step(
    queries: int, patterns: int, boxes: int, batch: tuple, small_config: Callable[..., ModelConfig]
) -> None:
    config = small_config(
        architecture="anchor_detr", num_levels=1, num_queries=queries, num_patterns=patterns
    )
    model, criterion = build_model(config), build_criterion(config)
    images, padding, targets = batch
    targets = [{name: x[:boxes] for name, x in target.items()} for target in targets]
    criterion(model(images, padding), targets)["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_levels": 4}, "architecture: got anchor_detr with num_levels=4"),
        ({"box_refine": True}, "architecture: got anchor_detr with num_levels=1, box_refine=True"),
        ({"num_patterns": 0}, "num_patterns: got 0, expected at least 1 with anchor_detr"),
        ({"classification": "softmax"}, "classification: got softmax with anchor_detr"),
    ],
)
def test_what_is_no_anchor_detr_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)
