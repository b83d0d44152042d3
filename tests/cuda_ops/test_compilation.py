"""torch.compile and torch.export: one graph, any size, the same numbers."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache

from cuda_ops.cases import Case, make_inputs
from cuda_ops.ops import (
    fused_deformable_attention,
    modulated_deform_conv2d,
    multi_scale_deformable_attention,
)


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def image_and_points(N: int, height: int, width: int, Q: int) -> tuple[Tensor, ...]:
    """A feature map, and reference points, offsets and logits for 2 heads of 4 channels."""
    generator = torch.Generator().manual_seed(0)
    case = Case("image", N, ((height, width),), M=2, D=4, Q=Q, K=3)
    inputs = make_inputs(case, torch.float32, "cpu", generator, spread=1.0, clear=True)
    image = torch.randn(N, 8, height, width, generator=generator).requires_grad_()
    return (image, inputs.reference_points, inputs.sampling_offsets, inputs.attention_logits)


def attend(image: Tensor, points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """Attention to a feature map whose size is read from the tensor, as in the model."""
    value = image.flatten(2).transpose(1, 2).unflatten(2, (2, 4))
    shapes = [tuple(image.shape[2:])]
    fused = fused_deformable_attention(value, shapes, points, offsets, logits)
    locations = points[:, :, None, :, None] + offsets / 8
    weights = logits.softmax(-1).view(offsets.shape[:-1])
    return fused + multi_scale_deformable_attention(value, shapes, locations, weights)


@pytest.fixture
def _no_compiled_graphs_of_before() -> Iterator[None]:
    """inductor keeps graphs between processes, by names and sources that do not hold ours."""
    with fresh_cache():
        yield


@pytest.mark.usefixtures("_no_compiled_graphs_of_before")
@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.chaos)],  # a minute
)
def test_one_graph_with_its_backward_for_any_size(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    # No two sizes of the first call are equal: torch takes equal ones to stay so.
    for sizes in ((5, 6, 11, 9), (3, 7, 13, 14), (2, 12, 4, 30)):
        inputs = image_and_points(*sizes)
        output, expected = compiled(*inputs), attend(*inputs)
        torch.testing.assert_close(output, expected)
        grads = torch.autograd.grad(output.square().sum(), inputs)
        truth = torch.autograd.grad(expected.square().sum(), inputs)
        for grad, right in zip(grads, truth, strict=True):
            torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_compiled_autocast_training_step() -> None:
    inputs = image_and_points(2, 6, 5, 9)

    def loss(*x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attend(*x).float().square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    result = torch.autograd.grad(compiled(*inputs), inputs)
    for grad, right in zip(result, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(grad, right)


@pytest.mark.parametrize("deterministic", [False, True])
def test_compiled_in_either_mode(deterministic: bool) -> None:
    inputs = image_and_points(2, 6, 5, 9)
    torch.use_deterministic_algorithms(deterministic)
    try:
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), attend(*inputs))
    finally:
        torch.use_deterministic_algorithms(False)


def convolve(image: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return modulated_deform_conv2d(image, offset, mask, weight, bias, padding=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_of_the_convolution(dtype: torch.dtype) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(convolve, fullgraph=True, backend=counter)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    # Sides between the same two powers of two; the next such pair is another graph.
    for height, width in ((9, 10), (12, 16), (15, 11)):
        inputs = [normal(2, 4, height, width), normal(2, 18, height, width),
                  normal(2, 9, height, width), normal(6, 4, 3, 3), normal(6)]  # fmt: skip
        for x in inputs[:3]:
            for dim in (2, 3):
                torch._dynamo.mark_dynamic(x, dim)
        output, expected = compiled(*inputs), convolve(*inputs)
        torch.testing.assert_close(output, expected)
        grads = torch.autograd.grad(output.float().sum(), inputs)
        truth = torch.autograd.grad(expected.float().sum(), inputs)
        for grad, right in zip(grads, truth, strict=True):
            torch.testing.assert_close(grad, right)
    assert counter.frame_count == 1


class Attention(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def test_export_with_dynamic_batch_image_and_queries() -> None:
    auto = torch.export.Dim.AUTO
    example = [x.detach() for x in image_and_points(2, 6, 5, 9)]
    dynamic = ({0: auto, 2: auto, 3: auto}, {0: auto, 1: auto}, {0: auto, 1: auto},
               {0: auto, 1: auto})  # fmt: skip
    program = torch.export.export(
        Attention(attend), tuple(example), dynamic_shapes={"inputs": dynamic}
    )
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "cuda_ops.fused_deformable_attention.default" in called
    for sizes in ((3, 9, 4, 11), (5, 2, 13, 2)):
        inputs = [x.detach() for x in image_and_points(*sizes)]
        torch.testing.assert_close(program.module()(*inputs), attend(*inputs))
