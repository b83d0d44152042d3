import math

import pytest
import torch
from torch import nn

from model.attention import DeformableAttention, SelfAttention


def test_the_start_of_the_offsets() -> None:
    """A.4: eight heads look along the axes and diagonals, point k at k cells, on every level."""
    attention = DeformableAttention(hidden_dim=32, num_heads=8, num_levels=3, num_points=4)
    offsets = attention.sampling_offsets.bias.detach().view(8, 3, 4, 2)
    rays = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, ray in enumerate(rays):
        for level in range(3):
            expected = torch.tensor([[k * x for x in ray] for k in (1, 2, 3, 4)]).float()
            torch.testing.assert_close(offsets[head, level], expected, atol=1e-5, rtol=0)
    for layer in (attention.sampling_offsets, attention.attention_logits):
        assert layer.weight.abs().sum() == 0
    assert attention.attention_logits.bias.abs().sum() == 0


@pytest.mark.parametrize(
    ("layer", "bound"),
    [("value_proj", math.sqrt(6 / 64)), ("output_proj", math.sqrt(6 / 64))],
)
def test_the_start_of_the_projections(layer: str, bound: float) -> None:
    attention = DeformableAttention(hidden_dim=32, num_heads=4, num_levels=1, num_points=1)
    weight = getattr(attention, layer).weight
    assert 0.9 * bound < weight.abs().max() <= bound
    assert getattr(attention, layer).bias.abs().sum() == 0


def test_at_the_start_a_constant_map_is_read_as_itself() -> None:
    attention = DeformableAttention(hidden_dim=32, num_heads=4, num_levels=2, num_points=2)
    shapes = [(12, 12), (10, 10)]
    tokens = torch.randn(1, 1, 32).expand(1, 244, 32)
    padding = torch.zeros(1, 244, dtype=torch.bool)
    references = torch.full((1, 3, 2, 2), 0.5)
    found = attention(torch.randn(1, 3, 32), references, tokens, shapes, padding)
    expected = attention.output_proj(attention.value_proj(tokens[:, :3]))
    torch.testing.assert_close(found, expected)
    nothing = attention(torch.randn(1, 3, 32), references, tokens, shapes, ~padding)
    torch.testing.assert_close(nothing, torch.zeros(1, 3, 32))


def test_self_attention_is_pytorchs() -> None:
    torch.manual_seed(0)
    ours = SelfAttention(hidden_dim=32, num_heads=4, dropout=0.0).double()
    theirs = nn.MultiheadAttention(32, 4, batch_first=True).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
        theirs.in_proj_weight.copy_(torch.cat((ours.query_key_proj.weight, ours.value_proj.weight)))
        theirs.in_proj_bias.copy_(torch.cat((ours.query_key_proj.bias, ours.value_proj.bias)))
        theirs.out_proj.load_state_dict(ours.output_proj.state_dict())
    x, position = torch.randn(2, 2, 7, 32, dtype=torch.float64)
    expected, _ = theirs(x + position, x + position, x)
    torch.testing.assert_close(ours(x, position), expected, rtol=1e-10, atol=1e-12)


def test_self_attention_drops_out_in_training_only() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(hidden_dim=32, num_heads=4, dropout=0.5)
    x, position = torch.randn(2, 1, 5, 32)
    assert not torch.equal(attention(x, position), attention(x, position))
    attention.eval()
    assert torch.equal(attention(x, position), attention(x, position))
