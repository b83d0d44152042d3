"""DETR's encoder and the pieces of a decoder in plain float64, from weights by their published
names: what the methods that change the decoder alone are held against."""

import math
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def randomised(model: nn.Module, seed: int = 5) -> nn.Module:
    """In float64, with no parameter of the transformer or the heads left at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.double().named_parameters():
            if name.startswith("backbone."):
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 1:
                parameter.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
            else:
                parameter.copy_(1.3 * noise * parameter[0].numel() ** -0.5)
    return model


def published(model: nn.Module, values: State | None = None) -> State:
    """The live parameters, or `values` by our names, by the published ones; parts of one tensor are
    joined in order."""
    parts: dict[str, list[Tensor]] = {}
    for key, value in (values or dict(model.named_parameters())).items():
        parts.setdefault(model.official_names(key)[0], []).append(value)
    return {name: x[0] if len(x) == 1 else torch.cat(x) for name, x in parts.items()}


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def mlp(x: Tensor, state: State, name: str, layers: int) -> Tensor:
    for layer in range(layers - 1):
        x = linear(x, state, f"{name}.layers.{layer}").clamp(min=0)
    return linear(x, state, f"{name}.layers.{layers - 1}")


def norm(x: Tensor, state: State, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]


def feed_forward(x: Tensor, state: State, name: str, last_norm: str) -> Tensor:
    hidden = linear(x, state, f"{name}.linear1").clamp(min=0)
    return norm(x + linear(hidden, state, f"{name}.linear2"), state, f"{name}.{last_norm}")


def attend(logits: list[list[Tensor]], value: Tensor, padding: Tensor | None) -> Tensor:
    """logits[image][head] [Q, S] and value [N, S, C] to [N, Q, C]; padding [N, S]."""
    images = []
    for image, heads in enumerate(logits):
        width = value.shape[-1] // len(heads)
        found = []
        for head, x in enumerate(heads):
            if padding is not None:
                x = x.masked_fill(padding[image], float("-inf"))
            found.append(x.softmax(-1) @ value[image, :, head * width : (head + 1) * width])
        images.append(torch.cat(found, dim=-1))
    return torch.stack(images)


def dot_products(query: Tensor, key: Tensor, heads: int) -> list[list[Tensor]]:
    """Of each image and head, over the root of the head's width."""
    width = query.shape[-1] // heads
    parts = [slice(head * width, (head + 1) * width) for head in range(heads)]
    return [
        [q[:, part] @ k[:, part].T / math.sqrt(width) for part in parts]
        for q, k in zip(query, key, strict=True)
    ]


def packed(x: Tensor, state: State, name: str, part: int) -> Tensor:
    """The query's (0), the key's (1) or the value's (2) rows of one input projection."""
    width = x.shape[-1]
    rows = slice(part * width, (part + 1) * width)
    return x @ state[f"{name}.in_proj_weight"][rows].T + state[f"{name}.in_proj_bias"][rows]


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, state: State, name: str, heads: int,
    padding: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`nn.MultiheadAttention` of the weights under `name`."""
    logits = dot_products(packed(query, state, name, 0), packed(key, state, name, 1), heads)
    attended = attend(logits, packed(value, state, name, 2), padding)
    return linear(attended, state, f"{name}.out_proj")


def encode(
    model: nn.Module, state: State, images: Tensor, padding: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Tokens and position [N, S, C] and padding [N, S] behind DETR's encoder, and the map's size.
    Positions of padded cells, which nothing depends on, are those of an image without padding."""
    features = model.backbone(images)[-1]
    height, width = features.shape[-2:]
    weight, bias = state["input_proj.weight"][:, :, 0, 0], state["input_proj.bias"]
    tokens = features.flatten(2).transpose(1, 2) @ weight.T + bias
    stride = images.shape[-1] // width
    cells = padding[:, ::stride, ::stride]
    position = torch.stack([cell_positions(~mask, tokens.shape[-1]) for mask in cells])
    hidden = cells.flatten(1)
    for layer in range(model.config.encoder_layers):
        name = f"transformer.encoder.layers.{layer}"
        query = tokens + position
        attended = plain_attention(
            query, query, tokens, state, f"{name}.self_attn", model.config.num_heads, hidden
        )
        tokens = norm(tokens + attended, state, f"{name}.norm1")
        tokens = feed_forward(tokens, state, name, "norm2")
    return tokens, position, hidden, (height, width)


def cell_positions(valid: Tensor, channels: int) -> Tensor:
    """[H, W] valid cells to [H W, C], in the published models' float32."""
    height, width = int(valid[:, 0].sum()), int(valid[0].sum())
    y = torch.arange(1, valid.shape[0] + 1) / (torch.tensor(float(height)) + 1e-6)
    x = torch.arange(1, valid.shape[1] + 1) / (torch.tensor(float(width)) + 1e-6)
    rows, columns = sines(y, channels // 2), sines(x, channels // 2)
    return torch.stack([torch.cat((row, column)) for row in rows for column in columns]).double()


def sines(x: Tensor, count: int) -> Tensor:
    """[...] in [0, 1] to [..., count] sines and cosines in turn."""
    features = []
    for index in range(count):
        frequency = torch.tensor(10000.0) ** (torch.tensor(2.0 * (index // 2)) / count)
        angle = x * (2 * math.pi) / frequency
        features.append(angle.cos() if index % 2 else angle.sin())
    return torch.stack(features, dim=-1)


def assert_same_layers(
    outputs: dict[str, Any], expected: list[tuple[Tensor, Tensor]], tolerance: float = 1e-11
) -> tuple[Tensor, Tensor]:
    """Logits and boxes of every decoder layer. Gives a loss of what was found, and of `expected`,
    through which each parameter has a gradient."""
    layers = [*outputs["aux_outputs"], outputs]
    close = {"rtol": tolerance, "atol": tolerance}
    ours = theirs = torch.zeros((), dtype=torch.float64)
    for found, (logits, boxes) in zip(layers, expected, strict=True):
        torch.testing.assert_close(found["pred_logits"], logits, **close)
        torch.testing.assert_close(found["pred_boxes"], boxes, **close)
        ours = ours + found["pred_boxes"].square().sum() + found["pred_logits"].sin().sum()
        theirs = theirs + boxes.square().sum() + logits.sin().sum()
    return ours, theirs


def assert_same_gradients(model: nn.Module, found: Tensor, expected: Tensor) -> None:
    """Of every trainable parameter, to 1e-8 of the largest of all."""
    names, parameters = zip(
        *[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True
    )
    ours = torch.autograd.grad(found, parameters)
    theirs = torch.autograd.grad(expected, parameters)
    largest = max(x.abs().max() for x in theirs)
    for name, one, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-8, atol=1e-11 * float(largest), msg=lambda m, n=name: f"{n}: {m}"
        )
