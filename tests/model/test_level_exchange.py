"""Table 2 without multi-scale attention: each level attends to itself only."""

from collections.abc import Callable

import torch
from torchvision.ops import deform_conv2d

from model.attention import DeformableAttention
from model.config import ModelConfig
from model.transformer import EncoderLayer

SHAPES = [(6, 8), (3, 4), (2, 2)]
SIZES = [48, 12, 4]


def test_a_level_hears_of_no_other(small_config: Callable[..., ModelConfig]) -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(small_config(num_levels=3, level_exchange=False))
    exchanging = EncoderLayer(small_config(num_levels=3))
    tokens = torch.randn(2, 64, 64, requires_grad=True)
    position, references = torch.randn(2, 64, 64), torch.rand(2, 64, 3, 2)
    padding = torch.zeros(2, 64, dtype=torch.bool)
    for module, hears in ((layer, False), (exchanging, True)):
        with torch.no_grad():
            module.attention.sampling_offsets.weight.normal_(std=0.1)
        output = module(tokens, position, references, SHAPES, padding)
        for level, part in enumerate(output.split(SIZES, 1)):
            (grad,) = torch.autograd.grad(part.square().sum(), tokens, retain_graph=True)
            for other, piece in enumerate(grad.split(SIZES, 1)):
                assert bool(piece.any()) == (hears or other == level)


def test_each_level_is_an_attention_over_one_level(
    small_config: Callable[..., ModelConfig],
) -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(small_config(num_levels=3, level_exchange=False)).eval()
    tokens, position, references = (
        torch.randn(1, 64, 64),
        torch.randn(1, 64, 64),
        torch.rand(1, 64, 3, 2),
    )
    padding = torch.zeros(1, 64, dtype=torch.bool)
    output = layer(tokens, position, references, SHAPES, padding)
    middle = slice(48, 60)
    attended = layer.attention(
        (tokens + position)[:, middle],
        references[:, middle, 1:2],
        tokens[:, middle],
        [SHAPES[1]],
        padding[:, middle],
    )
    expected = layer.feedforward(layer.norm(tokens[:, middle] + attended))
    torch.testing.assert_close(output[:, middle], expected)


def test_one_point_on_one_level_is_a_deformable_convolution() -> None:
    """Section 4.1: with L = K = 1 and W' the identity, each head is a tap of the kernel."""
    torch.manual_seed(0)
    heads, width, height, columns = 4, 32, 5, 7
    attention = DeformableAttention(width, heads, num_levels=1, num_points=1).double()
    with torch.no_grad():
        attention.value_proj.weight.copy_(torch.eye(width))
        attention.sampling_offsets.weight.normal_(std=0.2)
    image = torch.randn(1, width, height, columns, dtype=torch.float64)
    tokens = image.flatten(2).transpose(1, 2)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(columns), indexing="ij")
    centres = torch.stack(((x.double() + 0.5) / columns, (y.double() + 0.5) / height), dim=-1)
    output = attention(
        tokens,
        centres.view(1, -1, 1, 2),
        tokens,
        [(height, columns)],
        torch.zeros(1, height * columns, dtype=torch.bool),
    )

    # A kernel of 1 x 4 taps; tap m reads the channels of head m alone.
    weight = torch.zeros(width, width, 1, heads, dtype=torch.float64)
    part = width // heads
    for m in range(heads):
        own = slice(m * part, (m + 1) * part)
        weight[:, own, 0, m] = attention.output_proj.weight.detach()[:, own]
    offsets = attention.sampling_offsets(tokens).view(height, columns, heads, 2)
    taps = torch.arange(heads, dtype=torch.float64)
    # A tap's own place in the kernel is taken off: the attention's offsets are from the centre.
    by_tap = torch.stack((offsets[..., 1], offsets[..., 0] - taps), dim=-1)
    offset = by_tap.flatten(2).permute(2, 0, 1)[None]
    padded = torch.nn.functional.pad(image, (0, heads - 1))
    expected = deform_conv2d(padded, offset, weight)[..., :columns]
    bias = attention.output_proj.bias.detach()
    torch.testing.assert_close(
        output.transpose(1, 2).view_as(image), expected + bias[:, None, None]
    )
