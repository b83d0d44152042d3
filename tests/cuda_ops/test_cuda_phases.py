"""The CUDA kernels' per-thread code, run on the CPU against the definition.

What this cannot see: barriers, atomics, 16-bit types and launches; those need a GPU
(`test_on_gpu`, or `python -m cuda_ops check --device cuda`).
"""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch

from cuda_ops import reference
from cuda_ops.cases import Case, make_inputs
from cuda_ops.check import check
from cuda_ops.library import SOURCES

CASES = [
    # 16-byte loads; several blocks, the last one part full; strips that split a level.
    (Case("model", 2, ((12, 20), (6, 10), (3, 5)), M=3, D=32, Q=37, K=4), True),
    (Case("boxes", 1, ((12, 20), (6, 10)), M=2, D=32, Q=21, K=4, R=4), True),
    (Case("single channels", 2, ((5, 7), (1, 1), (2, 3)), M=3, D=17, Q=23, K=3), False),
    (Case("more channels than a pass", 1, ((4, 4), (2, 2)), M=2, D=72, Q=5, K=2, R=4), False),
    (Case("wide head", 1, ((4, 4), (2, 2)), M=2, D=160, Q=5, K=2), True),
    (Case("many points", 1, ((6, 6),) * 6, M=1, D=8, Q=9, K=11), True),
    (Case("one point", 1, ((2, 2),), M=1, D=4, Q=1, K=1), True),
]


@pytest.fixture(scope="module")
def phases(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("phases") / "libphases.so"
    subprocess.run(
        [
            *(os.environ.get("CXX", "g++"), "-O1", "-std=c++20", "-shared", "-fPIC", "-Wall"),
            *("-Werror", "-fsanitize=undefined", "-fno-sanitize-recover", "-static-libubsan"),
            *("-D_GLIBCXX_ASSERTIONS", f"-I{SOURCES / 'cuda'}"),
            *(str(Path(__file__).parent / "phases_host.cpp"), "-o", str(library)),
        ],
        check=True,
    )
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("case", "vector"), CASES, ids=[case.name for case, _ in CASES])
def test_phases_agree_with_the_definition(
    phases: ctypes.CDLL, case: Case, vector: bool, dtype: torch.dtype, deterministic: bool
) -> None:
    generator = torch.Generator().manual_seed(5)
    inputs = make_inputs(case, dtype, "cpu", generator, spread=3.0, margin=0.2)
    grad = torch.randn((case.N, case.Q, case.M * case.D), generator=generator).to(dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs.leaves()]
    output = reference.fused_deformable_attention(exact[0], case.shapes, *exact[1:])
    truth = [output, *torch.autograd.grad(output, exact, grad.double())]

    results = _run(phases, case, vector, deterministic, case.R, inputs.leaves(), grad)

    tolerance = 1e-13 if dtype == torch.float64 else 3e-6
    names = ("output", "value", "points", "offsets", "logits")
    for name, result, expected in zip(names, results, truth, strict=True):
        error = (result.double() - expected).norm() / expected.norm().clamp_min(1e-6)
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("deterministic", [False, True])
def test_plain_operator_phases_agree_with_the_definition(
    phases: ctypes.CDLL, deterministic: bool
) -> None:
    case = Case("plain", 2, ((5, 7), (3, 3)), M=2, D=8, Q=19, K=3)
    generator = torch.Generator().manual_seed(6)
    inputs = make_inputs(case, torch.float64, "cpu", generator, spread=3.0, margin=0.2)
    value, points, offsets, logits = (x.detach() for x in inputs.leaves())
    locations = reference.sampling_locations(points, offsets, case.shapes)
    weights = logits.softmax(-1).view(offsets.shape[:-1])
    grad = torch.randn((2, 19, 16), generator=generator).double()
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    output = reference.multi_scale_deformable_attention(leaves[0], case.shapes, *leaves[1:])
    truth = [output, *torch.autograd.grad(output, leaves, grad)]

    arguments = (value, points, locations, weights)
    results = _run(phases, case, True, deterministic, 0, arguments, grad)
    for result, expected in zip(results[:2] + results[3:], truth, strict=True):
        torch.testing.assert_close(result.view(expected.shape), expected, rtol=1e-11, atol=1e-12)


def test_deterministic_phases_give_the_same_bits_as_a_serial_sum_per_token(
    phases: ctypes.CDLL,
) -> None:
    """Every point on one pixel: its gradient is a float32 sum in query order."""
    case = Case("pile", 1, ((1, 1),), M=1, D=4, Q=1000, K=1)
    value = torch.zeros(1, 1, 1, 4)
    points = torch.full((1, 1000, 1, 2), 0.5)
    offsets, logits = torch.zeros(1, 1000, 1, 1, 1, 2), torch.zeros(1, 1000, 1, 1)
    grad = torch.randn(1, 1000, 4, generator=torch.Generator().manual_seed(0))
    result = _run(phases, case, True, True, 2, (value, points, offsets, logits), grad)[1]
    serial = torch.zeros(4)
    for row in grad[0]:
        serial = serial + row
    assert torch.equal(result.view(4), serial)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_gpu() -> None:
    assert [finding for finding in check("cuda", seed=11) if not finding.passed] == []


def _run(
    phases: ctypes.CDLL,
    case: Case,
    vector: bool,
    deterministic: bool,
    numbers: int,
    arguments: tuple[torch.Tensor, ...],
    grad: torch.Tensor,
) -> list[torch.Tensor]:
    """Output and gradients of value, reference points, points and weights."""
    value, points, offsets, logits = (x.detach().contiguous() for x in arguments)
    levels = len(case.shapes)
    nan = float("nan")
    output = torch.full_like(grad, nan)
    grad_value = torch.full_like(value, nan) if deterministic else torch.zeros_like(value)
    placed = torch.full((case.N, case.Q, case.M, levels * case.K, 3), nan, dtype=value.dtype)
    grad_offsets, grad_logits = torch.full_like(offsets, nan), torch.full_like(logits, nan)
    parts = torch.full((case.N, case.Q, case.M, levels, case.R), nan, dtype=value.dtype)
    sizes = (case.N, case.M, case.D, case.Q, levels, case.K, numbers)
    shapes = [size for shape in case.shapes for size in shape]
    run = phases.run_double if value.dtype == torch.float64 else phases.run_float
    run(
        (ctypes.c_int64 * 7)(*sizes),
        (ctypes.c_int64 * len(shapes))(*shapes),
        ctypes.c_int64(vector),
        *(
            ctypes.c_void_p(x.data_ptr() if x is not None else None)
            for x in (
                *(value, points, offsets, logits, output, grad.contiguous(), grad_value),
                *(placed if deterministic else None, grad_offsets, grad_logits, parts),
            )
        ),
    )
    return [output, grad_value, parts.sum(2), grad_offsets, grad_logits]
