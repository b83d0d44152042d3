"""The operators on CUDA devices: every mode of check, no waiting for the GPU, streams, graphs."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from cuda_ops import check
from cuda_ops.cases import Case, make_inputs
from cuda_ops.library import library_path
from cuda_ops.ops import (
    fused_deformable_attention,
    modulated_deform_conv2d,
    multi_scale_deformable_attention,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(
        not library_path("cuda").exists(), reason="the CUDA library was left out (--cpu-only)"
    ),
]
SHAPES = ((16, 20), (8, 10))
CASE = Case("gpu", N=2, shapes=SHAPES, M=4, D=32, Q=70, K=4)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def attend(value: Tensor, points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    locations = points[:, :, None, :, None] + offsets.to(points.dtype) / 16
    weights = logits.softmax(-1).view(offsets.shape[:-1])
    fused = fused_deformable_attention(value, SHAPES, points, offsets, logits)
    return fused + multi_scale_deformable_attention(value, SHAPES, locations, weights)


def convolve(image: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    return modulated_deform_conv2d(image, offset, mask, weight, padding=1)


def leaves(operator: Callable[..., Tensor], device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    if operator is attend:
        return list(make_inputs(CASE, dtype, device, generator, spread=2.0, clear=True).leaves())
    shapes = [(2, 8, 9, 9), (2, 18, 9, 9), (2, 9, 9, 9), (4, 8, 3, 3)]
    return [
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in shapes
    ]


def step(operator: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    output = operator(*inputs)
    return [output, *torch.autograd.grad(output.square().sum(), inputs)]


def test_every_comparison_of_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    findings = list(check.check("cuda", seed=0))
    assert [finding for finding in findings if not finding.passed] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_and_gpu_agree(dtype: torch.dtype) -> None:
    on_cpu = step(attend, leaves(attend, "cpu", dtype))
    on_gpu = step(attend, leaves(attend, "cuda", dtype))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        error = (cpu.double() - gpu.cpu().double()).norm() / cpu.double().norm()
        assert error < tolerance


@pytest.mark.parametrize("operator", [attend, convolve])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_the_gpu(operator: Callable[..., Tensor], dtype: torch.dtype) -> None:
    if operator is convolve:
        pytest.importorskip("torchvision")
    inputs = leaves(operator, "cuda", dtype)
    step(operator, inputs)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # a second and more, before the work
    awake = torch.cuda.Event()
    awake.record()
    torch.cuda.set_sync_debug_mode("error")  # names the place, where torch itself waits
    try:
        step(operator, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not awake.query()


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("operator", [attend, convolve])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_mode_repeats_its_bits(
    operator: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    inputs = leaves(operator, "cuda", dtype)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = step(operator, inputs)
        others = [step(operator, inputs) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_current_stream_is_used() -> None:
    inputs = leaves(attend, "cuda", torch.float32)
    expected = step(attend, inputs)
    stream = torch.cuda.Stream()
    value = torch.zeros_like(inputs[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what runs on another stream would read zeros
        value.copy_(inputs[0].detach())
        late = step(attend, [value.requires_grad_(), *inputs[1:]])
    torch.cuda.synchronize()
    for result, right in zip(late, expected, strict=True):
        torch.testing.assert_close(result, right)


@pytest.mark.parametrize("mode", [False, True], ids=["default", "deterministic"])
def test_cuda_graphs(mode: bool) -> None:
    inputs = leaves(attend, "cuda", torch.bfloat16)
    torch.use_deterministic_algorithms(mode)
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(attend, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(attend, inputs)
        with torch.no_grad():
            inputs[0].mul_(-0.5)
        graph.replay()
        for result, right in zip(captured, step(attend, inputs), strict=True):
            torch.testing.assert_close(result, right, rtol=2e-2, atol=2e-2)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device only")
def test_tensors_on_another_device_than_the_current_one() -> None:
    inputs = leaves(attend, "cuda:1", torch.float32)
    assert torch.cuda.current_device() == 0
    results = step(attend, inputs)
    assert {result.device for result in results} == {torch.device("cuda", 1)}
    expected = step(attend, leaves(attend, "cuda:0", torch.float32))
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu(), right.cpu())
    with pytest.raises(ValueError, match="is on cuda:1, expected cuda:0 as value is"):
        fused_deformable_attention(inputs[0].to("cuda:0"), SHAPES, *inputs[1:])


def test_devices_are_not_mixed() -> None:
    value, *others = (x.detach() for x in leaves(attend, "cuda", torch.float32))
    with pytest.raises(ValueError, match="is on cpu, expected cuda:0 as value is"):
        fused_deformable_attention(value, SHAPES, others[0].cpu(), *others[1:])
    sizes = [size for shape in SHAPES for size in shape]
    operator = torch.ops.cuda_ops.fused_deformable_attention
    for i in range(3):
        mixed = [x.cpu() if i == j else x for j, x in enumerate(others)]
        with pytest.raises(RuntimeError, match="is on another device than value"):
            operator(value, sizes, *mixed)
    with pytest.raises(RuntimeError, match="is on another device than value"):
        operator(value.cpu(), sizes, *others)


def test_shapes_on_the_gpu_are_refused() -> None:
    value, *others = (x.detach() for x in leaves(attend, "cuda", torch.float32))
    with pytest.raises(ValueError, match=r"tensor on cuda:0, expected torch\.int64 on cpu"):
        fused_deformable_attention(value, torch.tensor(SHAPES).cuda(), *others)


def test_autocast() -> None:
    inputs = leaves(attend, "cuda", torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        output = fused_deformable_attention(inputs[0], SHAPES, *inputs[1:])
    assert output.dtype == torch.bfloat16
    grads = torch.autograd.grad(output.float().sum(), inputs)
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_special_numbers_leave_the_device_usable() -> None:
    clean = [x.detach() for x in leaves(attend, "cuda", torch.float32)]
    for i in range(4):
        for number in (float("nan"), float("inf"), 1e30, torch.finfo(torch.float32).max):
            spoiled = [x.clone() for x in clean]
            spoiled[i][0] = number
            results = step(attend, [x.requires_grad_() for x in spoiled])
            torch.cuda.synchronize()
            assert results[0].shape == (2, CASE.Q, 128)
    expected = step(attend, [x.clone().requires_grad_() for x in clean])
    assert all(result.isfinite().all() for result in expected)
