"""DAB-DETR once more, plainly: one image at a time, its valid cells alone, a loop over the heads.

A state dict in the published names goes in, so that names are checked with the mathematics. Angles
of cells and frequencies are rounded to float32 as the published code rounds them.
"""

import math
from itertools import pairwise
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from model.config import ModelConfig
from model.detr import build_model
from model.weights import load_official
from tests.model.family.plain_detr import State, linear, mlp, norm

Layer = tuple[Tensor, Tensor]


class Given(nn.Module):
    """A backbone that gives the same maps whatever it sees, and the channels that it would have."""

    def __init__(self, *maps: Tensor) -> None:
        super().__init__()
        self.maps = list(maps)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.maps


def published_backbone() -> State:
    """A ResNet-50's tensors in the published names, with any numbers."""
    with torch.device("meta"):
        backbone = torchvision.models.resnet50().state_dict()
    return {
        f"backbone.0.body.{name}": torch.empty(value.shape)
        for name, value in backbone.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }


def loaded(config: ModelConfig, state: State, *maps: Tensor) -> Any:
    """The model with a published state in float64, `maps` in place of its backbone's."""
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device="cpu").double()
    load_official(model, state | published_backbone())
    if maps:
        model.backbone = Given(*maps)
    return model


def random(*shape: int) -> Tensor:
    """Normal numbers of float32, as checkpoints have them, in float64."""
    return torch.randn(shape).double()


def published_transformer(
    width: int, feedforward: int, classes: int, queries: int, layers: int = 2, patterns: int = 0
) -> State:
    """Random parameters of a DAB-DETR with as many encoder as decoder layers, backbone left out."""
    state: State = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        state[f"{name}.weight"] = random(outputs, inputs) / math.sqrt(inputs)
        state[f"{name}.bias"] = 0.3 * random(outputs)

    def norm(name: str) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * random(width)
        state[f"{name}.bias"] = 0.2 * random(width)

    def mlp(name: str, *widths: int) -> None:
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            linear(f"{name}.layers.{index}", outputs, inputs)

    for stack in ("encoder", "decoder"):
        mlp(f"transformer.{stack}.query_scale", width, width, width)
        for index in range(layers):
            name = f"transformer.{stack}.layers.{index}"
            linear(f"{name}.linear1", feedforward, width)
            linear(f"{name}.linear2", width, feedforward)
            state[f"{name}.activation.weight"] = random(1).sigmoid()
            for number in (1, 2) if stack == "encoder" else (1, 2, 3):
                norm(f"{name}.norm{number}")
            linear(f"{name}.self_attn.out_proj", width, width)
            if stack == "encoder":
                state[f"{name}.self_attn.in_proj_weight"] = random(3 * width, width) / 8
                state[f"{name}.self_attn.in_proj_bias"] = random(3 * width) / 8
                continue
            linear(f"{name}.cross_attn.out_proj", width, width)
            names = ["sa_qcontent", "sa_qpos", "sa_kcontent", "sa_kpos", "sa_v"]
            names += ["ca_qcontent", "ca_kcontent", "ca_kpos", "ca_v", "ca_qpos_sine"]
            for projection in [*names, "ca_qpos"] if index == 0 else names:
                linear(f"{name}.{projection}_proj", width, width)
    mlp("transformer.decoder.ref_point_head", 2 * width, width, width)
    mlp("transformer.decoder.ref_anchor_head", width, width, 2)
    norm("transformer.decoder.norm")
    linear("class_embed", classes, width)
    mlp("bbox_embed", width, width, width, 4)
    for name in [name for name in state if name.startswith("bbox_embed.")]:
        state[f"transformer.decoder.{name}"] = state[name]
    state["input_proj.weight"] = random(width, 2048, 1, 1) / math.sqrt(2048)
    state["input_proj.bias"] = random(width)
    state["refpoint_embed.weight"] = random(queries, 4)
    if patterns:
        state["transformer.patterns.weight"] = random(patterns, width)
    return state


def plain_dab_detr(
    state: State,
    features: Tensor,
    valid: list[tuple[int, int]],
    content: list[Tensor],
    anchors: list[Tensor],
    heads: int,
    sees: Tensor | None = None,
) -> list[Layer]:
    """Logits and boxes [N, Q, ...] of every decoder layer.

    features: the backbone's last map [N, 2048, H, W], of whose cells the first (h, w) are `valid`
    in each image. content [Q, C] and anchors [Q, 4] in (0, 1) of each image before the first
    layer. sees [Q, Q] bool: which query (row) attends to which.
    """
    images = [
        _one_image(state, features[i, :, :h, :w], content[i], anchors[i], heads, sees)
        for i, (h, w) in enumerate(valid)
    ]
    return [
        (torch.stack([x for x, _ in layer]), torch.stack([x for _, x in layer]))
        for layer in zip(*images, strict=True)
    ]


def _one_image(
    state: State,
    features: Tensor,
    content: Tensor,
    anchors: Tensor,
    heads: int,
    sees: Tensor | None,
) -> list[Layer]:
    _, height, width = features.shape
    weight, bias = state["input_proj.weight"][:, :, 0, 0], state["input_proj.bias"]
    memory = features.flatten(1).T @ weight.T + bias
    channels = memory.shape[1]
    position = cell_sines(height, width, channels)
    for index in range(count(state, "transformer.encoder.layers")):
        memory = _encode(state, f"transformer.encoder.layers.{index}", memory, position, heads)

    layers = []
    reference = anchors
    for index in range(count(state, "transformer.decoder.layers")):
        name = f"transformer.decoder.layers.{index}"
        sines = {axis: sine(anchors[:, i], channels // 2, 10000) for i, axis in enumerate("xywh")}
        whole = torch.cat([sines[axis] for axis in "yxwh"], dim=1)
        query_position = mlp(whole, state, "transformer.decoder.ref_point_head", 2)
        place = torch.cat((sines["y"], sines["x"]), dim=1)
        if index > 0:
            place = place * mlp(content, state, "transformer.decoder.query_scale", 2)
        wanted = mlp(content, state, "transformer.decoder.ref_anchor_head", 2).sigmoid()
        by_y, by_x = place.split(channels // 2, dim=1)
        by_y = by_y * (wanted[:, 1] / anchors[:, 3])[:, None]
        by_x = by_x * (wanted[:, 0] / anchors[:, 2])[:, None]
        place = torch.cat((by_y, by_x), dim=1)
        content = _decode(
            state, name, content, query_position, place, memory, position, heads, sees, index == 0
        )
        normed = norm(content, state, "transformer.decoder.norm")
        boxes = (mlp(normed, state, "bbox_embed", 3) + logit(reference)).sigmoid()
        layers.append((linear(normed, state, "class_embed"), boxes))
        reference = (mlp(content, state, "bbox_embed", 3) + logit(anchors)).sigmoid()
        anchors = reference.detach()
    return layers


def _encode(state: State, name: str, x: Tensor, position: Tensor, heads: int) -> Tensor:
    channels = x.shape[1]
    place = x + position * mlp(x, state, "transformer.encoder.query_scale", 2)
    weight = state[f"{name}.self_attn.in_proj_weight"].split(channels)
    bias = state[f"{name}.self_attn.in_proj_bias"].split(channels)
    query, key = (place @ weight[i].T + bias[i] for i in (0, 1))
    value = x @ weight[2].T + bias[2]
    attended = linear(attend(query, key, value, heads), state, f"{name}.self_attn.out_proj")
    x = norm(x + attended, state, f"{name}.norm1")
    return _feed_forward(state, name, x, "norm2")


def _decode(
    state: State,
    name: str,
    content: Tensor,
    query_position: Tensor,
    place: Tensor,
    memory: Tensor,
    position: Tensor,
    heads: int,
    sees: Tensor | None,
    first: bool,
) -> Tensor:
    def project(kind: str, x: Tensor) -> Tensor:
        return linear(x, state, f"{name}.{kind}_proj")

    query = project("sa_qcontent", content) + project("sa_qpos", query_position)
    key = project("sa_kcontent", content) + project("sa_kpos", query_position)
    attended = attend(query, key, project("sa_v", content), heads, sees)
    content = norm(
        content + linear(attended, state, f"{name}.self_attn.out_proj"), state, f"{name}.norm1"
    )

    query, key = project("ca_qcontent", content), project("ca_kcontent", memory)
    key_position = project("ca_kpos", position)
    if first:
        query, key = query + project("ca_qpos", query_position), key + key_position
    query_place = project("ca_qpos_sine", place)
    # Side by side within each head.
    together = [
        torch.cat([torch.cat(pair, dim=1) for pair in zip(a, b, strict=True)], dim=1)
        for a, b in (
            (query.chunk(heads, 1), query_place.chunk(heads, 1)),
            (key.chunk(heads, 1), key_position.chunk(heads, 1)),
        )
    ]
    attended = attend(*together, project("ca_v", memory), heads)
    attended = linear(attended, state, f"{name}.cross_attn.out_proj")
    content = norm(content + attended, state, f"{name}.norm2")
    return _feed_forward(state, name, content, "norm3")


def _feed_forward(state: State, name: str, x: Tensor, norm_name: str) -> Tensor:
    hidden = linear(x, state, f"{name}.linear1")
    hidden = torch.where(hidden > 0, hidden, hidden * state[f"{name}.activation.weight"])
    return norm(x + linear(hidden, state, f"{name}.linear2"), state, f"{name}.{norm_name}")


def attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, sees: Tensor | None = None
) -> Tensor:
    found = []
    for q, k, v in zip(
        query.chunk(heads, 1), key.chunk(heads, 1), value.chunk(heads, 1), strict=True
    ):
        weights = (q @ k.T / math.sqrt(q.shape[1])).exp()
        if sees is not None:
            weights = weights * sees
        found.append(weights / weights.sum(1, keepdim=True) @ v)
    return torch.cat(found, dim=1)


def logit(x: Tensor) -> Tensor:
    return (x.clamp(1e-3, 1) / (1 - x).clamp(1e-3, 1)).log()


def sine(x: Tensor, features: int, temperature: int) -> Tensor:
    """[n] in [0, 1] to [n, features]: sin, cos, sin, ... of growing wave length."""
    columns = []
    for pair in range(features // 2):
        exponent = torch.tensor(2 * pair / features, dtype=torch.float32)
        angle = x * (2 * math.pi) / temperature**exponent
        columns += [angle.sin(), angle.cos()]
    return torch.stack(columns, dim=1)


def cell_sines(height: int, width: int, features: int) -> Tensor:
    """[H W, features] of all cells of an image, y then x, at temperature 20."""
    y = torch.arange(1, height + 1, dtype=torch.float32) / (height + 1e-6)
    x = torch.arange(1, width + 1, dtype=torch.float32) / (width + 1e-6)
    by_y, by_x = sine(y, features // 2, 20), sine(x, features // 2, 20)
    return torch.cat(
        (
            by_y[:, None].expand(-1, width, -1).flatten(0, 1),
            by_x[None].expand(height, -1, -1).flatten(0, 1),
        ),
        dim=1,
    ).double()


def count(state: State, name: str) -> int:
    """How many numbered things there are below `name`."""
    depth = len(name.split("."))
    return len({key.split(".")[depth] for key in state if key.startswith(f"{name}.")})


def as_leaves(state: State) -> State:
    """The state with gradients to come, the box head one tensor under both of its names."""
    leaves = {name: x.clone().requires_grad_() for name, x in state.items()}
    for name in leaves:
        if name.startswith("bbox_embed."):
            leaves[f"transformer.decoder.{name}"] = leaves[name]
    return leaves


def check_gradients(model: Any, state: State) -> None:
    """The gradients of all parameters that require one are those of `state`."""
    found: dict[str, list[Tensor]] = {}
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, key
        found.setdefault(model.official_names(key)[0], []).append(parameter.grad)
    for name, parts in found.items():
        wanted = state[name].grad
        assert wanted is not None, name
        # The rows of an input projection are several parameters here.
        torch.testing.assert_close(torch.cat(parts), wanted, rtol=1e-7, atol=1e-9, msg=name)
    # A bias of keys has none: it adds the same to all logits of a query.
    moved = [name for name in found if state[name].grad.abs().max() > 1e-6]
    assert len(moved) > 0.8 * len(found), set(found) - set(moved)
