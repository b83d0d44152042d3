"""SAM-DETR's aligner and attention one number at a time, in float64."""

import math

import torch
from torch import Tensor

from model.family.semantics_aligner import AlignedAttention, SemanticsAligner
from model.parts import Memory

F64 = torch.float64


def memory_of(height: int, width: int, channels: int, valid: list[tuple[int, int]]) -> Memory:
    """Random tokens on one map, of images that leave (h, w) of its cells valid."""
    mask = torch.ones(len(valid), height, width, dtype=torch.bool)
    for image, (h, w) in enumerate(valid):
        mask[image, :h, :w] = False
    sizes = torch.tensor([[[w, h]] for h, w in valid])
    shape = (len(valid), height * width, channels)
    return Memory(
        tokens=torch.randn(shape, dtype=F64),
        position=torch.randn(shape, dtype=F64),
        masks=[mask],
        padding=mask.flatten(1),
        shapes=[(height, width)],
        sizes=sizes,
        ratios=sizes / torch.tensor([width, height]),
    )


def bilinear(cells: Tensor, y: Tensor | float, x: Tensor | float) -> Tensor:
    """Of `cells` [H, W, C], whose centres are integers; 0 outside them."""
    height, width, channels = cells.shape
    value = torch.zeros(channels, dtype=F64)
    top, left = (math.floor(torch.as_tensor(at, dtype=F64).detach()) for at in (y, x))
    for row, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
        for column, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
            if 0 <= row < height and 0 <= column < width:
                value = value + weight_y * weight_x * cells[row, column]
    return value


def roi_align(cells: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """[7, 7, C]: each bin is the mean of a grid of samples about one cell apart. Up to a cell
    outside the map the value at its border counts (Mask R-CNN, section 3)."""
    height, width, _ = cells.shape
    bin_w, bin_h = ((high - low) / 7).tolist()
    across, down = max(math.ceil(bin_w), 1), max(math.ceil(bin_h), 1)
    x0, y0 = (low - 0.5).tolist()
    bins = [[torch.zeros(cells.shape[-1], dtype=F64)] * 7 for _ in range(7)]
    for row in range(7):
        for column in range(7):
            for i in range(down):
                for j in range(across):
                    y = y0 + (row + (i + 0.5) / down) * bin_h
                    x = x0 + (column + (j + 0.5) / across) * bin_w
                    if -1 <= y <= height and -1 <= x <= width:
                        inside_y = min(max(y, 0), height - 1)
                        inside_x = min(max(x, 0), width - 1)
                        sample = bilinear(cells, inside_y, inside_x)
                        bins[row][column] = bins[row][column] + sample / (down * across)
    return torch.stack([torch.stack(row) for row in bins])


def encode(place: Tensor, channels: int) -> Tensor:
    """[C] of a point (x, y): sines and cosines of y, then of x."""
    numbers = []
    for angle in (float(place[1]) * 2 * math.pi, float(place[0]) * 2 * math.pi):
        for i in range(channels // 4):
            exponent = 2 * torch.tensor(i, dtype=torch.float32) / (channels // 2)
            scaled = angle / float(10000.0**exponent)
            numbers += [math.sin(scaled), math.cos(scaled)]
    return torch.tensor(numbers, dtype=F64)


def align(
    aligner: SemanticsAligner, state: Tensor, boxes: Tensor, memory: Memory
) -> tuple[Tensor, Tensor, Tensor]:
    """Contents and positions [N, Q, M, C], and the Gaussian's logits [N, M, Q, S]."""
    (height, width), heads = memory.shapes[0], aligner.num_heads
    batch, queries, channels = state.shape
    content = torch.zeros(batch, queries, heads, channels, dtype=F64)
    position = torch.zeros_like(content)
    gaussian = torch.zeros(batch, heads, queries, height * width, dtype=F64)
    middles = torch.tensor([(x, y) for y in range(height) for x in range(width)]) + 0.5
    for image in range(batch):
        cells = memory.tokens[image].view(height, width, channels)
        # The share that an image covers is a float32, as published.
        extent = memory.ratios[image, 0].double() * torch.tensor([width, height])
        for query in range(queries):
            centre, side = boxes[image, query, :2], boxes[image, query, 2:]
            low, high = (centre - side / 2) * extent, (centre + side / 2) * extent
            region = roi_align(cells, low.detach(), high.detach())
            narrow = region @ aligner.narrow.weight.flatten(1).T + aligner.narrow.bias
            x = narrow.relu().permute(2, 0, 1).flatten()
            for layer in aligner.hidden:
                x = layer(x)
            numbers = x @ aligner.points.weight.T + aligner.points.bias
            gates = [
                (state[image, query] @ gate.weight.T + gate.bias).sigmoid().view(heads, channels)
                for gate in (aligner.content_gate, aligner.position_gate)
            ]
            for head in range(heads):
                point = numbers[2 * head : 2 * head + 2].tanh()
                column, row = (point + 1) * 7 / 2 - 0.5
                content[image, query, head] = bilinear(region, row, column) * gates[0][head]
                place = centre + side / 2 * point
                position[image, query, head] = encode(place.detach(), channels) * gates[1][head]
                if aligner.gaussians:
                    scale = numbers[2 * heads + 2 * head : 2 * heads + 2 * head + 2]
                    away = (place * extent - middles) * scale
                    gaussian[image, head, query] = -away.square().sum(-1) / 8
    return content, position, gaussian


def attend(
    attention: AlignedAttention, content: Tensor, position: Tensor, gaussian: Tensor, memory: Memory
) -> Tensor:
    """[N, Q, C]."""
    batch, queries, heads, channels = content.shape
    wide = channels // heads
    output = torch.zeros(batch, queries, channels, dtype=F64)
    for image in range(batch):
        seen = ~memory.padding[image]
        keys = attention.key_proj(memory.tokens[image]) + attention.key_position(
            memory.position[image]
        )
        values = attention.value_proj(memory.tokens[image])
        for query in range(queries):
            parts = []
            for head in range(heads):
                asked = attention.query_proj(content[image, query, head])
                asked = asked + attention.query_position(position[image, query, head])
                logits = keys @ asked / math.sqrt(channels) + gaussian[image, head, query]
                weights = logits[seen].softmax(0)
                parts.append(weights @ values[seen][:, head * wide : (head + 1) * wide])
            output[image, query] = attention.output_proj(torch.cat(parts))
    return output
