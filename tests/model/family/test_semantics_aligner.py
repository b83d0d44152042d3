"""The semantics aligner against loops over queries, heads, bins and samples."""

import pytest
import torch
from torch import Tensor, nn

from model.family.semantics_aligner import AlignedAttention, AlignedQueries, SemanticsAligner
from model.parts import Memory
from tests.model.family import plain_sam

C, M = 8, 2
BOXES = torch.tensor(
    [
        [[0.5, 0.5, 0.9, 0.3], [0.95, 0.9, 0.6, 0.7], [0.3, 0.6, 1e-4, 1e-4]],
        [[0.1, 0.8, 0.5, 0.9], [0.5, 0.5, 0.9, 1.1], [0.02, 0.02, 0.2, 0.1]],
    ],
    dtype=torch.float64,
)


def case(gaussians: bool) -> tuple[SemanticsAligner, AlignedAttention, Tensor, Memory]:
    torch.manual_seed(0)
    aligner = SemanticsAligner(C, M, gaussians).double()
    attention = AlignedAttention(C, M, dropout=0.1).double().eval()
    for module in (aligner, attention):
        for name, parameter in module.named_parameters():
            nn.init.normal_(parameter, std=0.5 if name.endswith("bias") else 0.3)
    memory = plain_sam.memory_of(5, 11, C, valid=[(5, 7), (3, 11)])
    return aligner, attention, torch.randn(2, 3, C, dtype=torch.float64), memory


@pytest.mark.parametrize("gaussians", [False, True])
def test_queries_and_attention(gaussians: bool) -> None:
    aligner, attention, state, memory = case(gaussians)
    found = aligner(state, BOXES, memory)
    with torch.no_grad():
        content, position, gaussian = plain_sam.align(aligner, state, BOXES, memory)
        expected = plain_sam.attend(attention, content, position, gaussian, memory)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(found.content, content, **close)
    torch.testing.assert_close(found.position, position, **close)
    torch.testing.assert_close(attention(found, memory), expected, **close)
    if gaussians:
        assert found.gaussian is not None
        shift = found.gaussian - gaussian  # the same for all tokens
        torch.testing.assert_close(shift, shift[..., :1].expand_as(shift), **close)
    else:
        assert found.gaussian is None


def test_the_nearest_cell_of_an_image_has_logit_zero_however_narrow_the_gaussian() -> None:
    """So that float16, which ends at 65504, has a cell to look at."""
    aligner, attention, state, memory = case(gaussians=True)
    with torch.no_grad():
        aligner.points.bias[2 * M :] = 3000.0
    queries = aligner(state, BOXES, memory)
    assert queries.gaussian is not None
    inside = queries.gaussian.masked_fill(memory.padding[:, None, None], float("-inf"))
    assert torch.equal(inside.amax(-1), torch.zeros(2, M, 3, dtype=torch.float64))
    half = AlignedQueries(*(x.half() for x in queries if x is not None))
    halved = memory._replace(tokens=memory.tokens.half(), position=memory.position.half())
    assert attention.half()(half, halved).isfinite().all()


def test_padding_beside_an_image_is_read_but_not_attended_to() -> None:
    """As published: RoIAlign interpolates across the border, attention does not cross it."""
    aligner, attention, state, memory = case(gaussians=False)
    queries = aligner(state, BOXES, memory)
    other = memory.tokens + memory.padding[..., None]
    padded = memory._replace(tokens=other)
    assert torch.equal(attention(queries, memory), attention(queries, padded))
    moved = (aligner(state, BOXES, padded).content - queries.content).abs().amax((2, 3))
    assert moved[0, 1] > 1e-3  # its box reaches past the right border of the image
    assert moved[0, 2] == 0.0  # a small one inside


@pytest.mark.parametrize("gaussians", [False, True])
def test_where_gradients_pass(gaussians: bool) -> None:
    """Neither RoIAlign nor the encoding passes any to the box; the Gaussian does."""
    aligner, attention, state, memory = case(gaussians)
    boxes = BOXES.clone().requires_grad_()
    queries = aligner(state, boxes, memory)
    queries.position.sum().backward(retain_graph=True)
    assert boxes.grad is None or not boxes.grad.any()
    assert aligner.points.weight.grad is None or not aligner.points.weight.grad.any()
    attention(queries, memory).square().sum().backward()
    for name, parameter in aligner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    if gaussians:
        assert boxes.grad is not None
        assert boxes.grad.any()
    else:
        assert boxes.grad is None or not boxes.grad.any()


def test_gradients_are_derivatives() -> None:
    """Of one query's features and Gaussian; RoIAlign holds the features still where a box moves,
    so that boxes are tried without features."""
    aligner, _, state, memory = case(gaussians=True)
    start = aligner.points.bias.detach()

    def features(tokens: Tensor, state: Tensor, bias: Tensor) -> Tensor:
        inputs = (state, BOXES, memory._replace(tokens=tokens))
        return torch.func.functional_call(aligner, {"points.bias": bias}, inputs).content[:, 2]

    def gaussian(boxes: Tensor, bias: Tensor) -> Tensor:
        inputs = (state, boxes, memory._replace(tokens=torch.zeros_like(memory.tokens)))
        logits = torch.func.functional_call(aligner, {"points.bias": bias}, inputs).gaussian
        return logits[:, :, 2] - logits[:, :, 2, :1]

    for function, inputs in (
        (features, (memory.tokens, state, start)),
        (gaussian, (BOXES, start)),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_points_learn_from_the_middle_of_a_bin() -> None:
    """A point that starts at the region's centre lies on a bin's: the interpolation has a kink
    there, and a slope of 0 would hold the point for ever."""
    aligner, _, state, memory = case(gaussians=False)
    with torch.no_grad():
        aligner.points.weight.zero_()
        aligner.points.bias.zero_()
    aligner(state, BOXES, memory).content.square().sum().backward()
    assert aligner.points.bias.grad is not None
    assert (aligner.points.bias.grad != 0).all()
