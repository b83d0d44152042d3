"""The CUDA kernels, run on the CPU against the definition.

`kernels_on_host.cpp` compiles the very kernels and launches with `host_cuda/` in place of CUDA's
headers: each GPU thread is a fiber, scheduled at random between barriers. Addresses are checked
(ASan), outputs and shared memory start as NaN. What this cannot see are real races of memory, and
time; those need a GPU (`python -m cuda_ops check --device cuda`).
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cuda_ops import reference
from cuda_ops.cases import Case, make_inputs
from cuda_ops.check import check
from cuda_ops.library import SOURCES

HERE = Path(__file__).parent
NAMES = ("output", "value", "reference points", "points", "weights")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

CASES = (
    # Queries are the tokens: tiles of queries, part full at the edges; two heads a cache line.
    Case("encoder", 2, ((9, 13), (5, 7), (3, 4)), M=3, D=32, Q=164, K=4),
    # Several groups of chunks for the owners' four warps, and tiles that share points.
    Case("decoder", 1, ((12, 20), (6, 10)), M=2, D=32, Q=533, K=4),
    Case("boxes", 2, ((12, 20), (6, 10), (3, 5)), M=3, D=32, Q=37, K=4, R=4),
    Case("single channels", 2, ((5, 7), (1, 1), (2, 3)), M=3, D=17, Q=23, K=3),
    Case("several passes over channels", 1, ((4, 4), (2, 2)), M=2, D=72, Q=5, K=2, R=4),
    Case("wide head", 1, ((4, 4), (2, 2)), M=2, D=160, Q=5, K=2),
    Case("narrow head", 1, ((4, 4), (2, 2)), M=5, D=8, Q=20, K=4),
    Case("many points", 1, ((6, 6),) * 6, M=1, D=8, Q=9, K=23),
    Case("one of each", 1, ((2, 2),), M=1, D=1, Q=1, K=1),
)


@pytest.fixture(scope="module")
def program(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return made_once("kernels", compile_kernels) / "kernels_on_host"


def compile_kernels(folder: Path) -> None:
    subprocess.run(
        [
            *(os.environ.get("CXX", "g++"), "-O1", "-std=c++20", "-Wall", "-Werror"),
            *("-Wno-unknown-pragmas", "-fsanitize=address,undefined", "-fno-sanitize-recover"),
            *(f"-I{HERE / 'host_cuda'}", f"-I{SOURCES / 'cuda'}"),
            f"-I{Path(torch.__file__).parent / 'include'}",
            *(str(HERE / "kernels_on_host.cpp"), "-o", str(folder / "kernels_on_host")),
        ],
        check=True,
    )


def run_kernels(
    program: Path,
    folder: Path,
    case: Case,
    tensors: tuple[Tensor, Tensor | None, Tensor, Tensor],
    grad: Tensor,
    seed: int = 0,
) -> list[Tensor]:
    """Output and gradients in the order of NAMES; `tensors` are value, reference points, points
    and weights, the second None for the plain operator. `seed` orders the threads."""
    value, points, offsets, weights = tensors
    numbers = 0 if points is None else case.R
    dtype = value.dtype
    header = [DTYPES.index(dtype), seed, case.N, case.M, case.D, case.Q]
    header += [len(case.shapes), case.K, numbers, *(size for pair in case.shapes for size in pair)]
    given = [value, offsets.new_empty(0) if points is None else points, offsets, weights, grad]
    content = np.array(header, dtype=np.int64).tobytes() + b"".join(map(_bytes, given))
    (folder / "in").write_bytes(content)
    done = subprocess.run(
        [program, folder / "in", folder / "out"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = (case.N, case.Q, case.M)
    wide = reference.accumulation_dtype(dtype)
    shapes = [(grad.shape, dtype), (value.shape, dtype)]
    shapes += [((*rows, len(case.shapes), numbers), wide), (offsets.shape, offsets.dtype)]
    shapes += [(weights.shape, dtype)]
    written = bytearray((folder / "out").read_bytes())
    results = []
    for shape, kind in shapes:
        count = torch.Size(shape).numel()
        size = count * kind.itemsize
        flat = torch.frombuffer(written[:size] or bytearray(8), dtype=kind)[:count]
        results.append(flat.view(shape).clone())
        del written[:size]
    assert not written
    results[2] = results[2].sum(2)
    return results


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def inputs_of(
    case: Case, dtype: torch.dtype, seed: int = 5
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = make_inputs(case, dtype, "cpu", generator, spread=3.0, margin=0.2)
    # Off the tokens' centres: 16-bit offsets are often whole pixels, where derivatives jump.
    inputs.reference_points.data[..., :2] += 0.013
    grad = torch.randn((case.N, case.Q, case.M * case.D), generator=generator).to(dtype)
    return inputs.leaves(), grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fused_kernels_agree_with_the_definition(
    program: Path, tmp_path: Path, case: Case, dtype: torch.dtype
) -> None:
    leaves, grad = inputs_of(case, dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    output = reference.fused_deformable_attention(exact[0], case.shapes, *exact[1:])
    truth = [output, *torch.autograd.grad(output, exact, grad.double())]
    results = run_kernels(program, tmp_path, case, leaves, grad)
    for name, result, expected in zip(NAMES, results, truth, strict=True):
        # 16-bit results differ from exact ones of the same inputs by their own rounding only.
        tolerance = {torch.float64: 1e-13, torch.float32: 3e-6}.get(
            result.dtype, 0.5 * torch.finfo(result.dtype).eps + 3e-6
        )
        error = (result.double() - expected).norm() / expected.norm().clamp_min(1e-6)
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_plain_kernels_agree_with_the_definition(
    program: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    case = Case("plain", 2, ((5, 7), (3, 3)), M=2, D=16, Q=19, K=3)
    (value, points, offsets, logits), grad = inputs_of(case, dtype)
    wide = reference.accumulation_dtype(dtype)
    locations = reference.sampling_locations(points, offsets.to(wide), case.shapes).detach()
    weights = logits.softmax(-1).view(offsets.shape[:-1]).detach()
    exact = [x.detach().double().requires_grad_() for x in (value, locations, weights)]
    output = reference.multi_scale_deformable_attention(exact[0], case.shapes, *exact[1:])
    truth = [output, *torch.autograd.grad(output, exact, grad.double())]
    results = run_kernels(program, tmp_path, case, (value, None, locations, weights), grad)
    del results[2]
    for result, expected in zip(results, truth, strict=True):
        tolerance = 1e-13 if dtype == torch.float64 else torch.finfo(result.dtype).eps / 2 + 1e-6
        assert (result.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize(
    "case",
    [
        # More points than lanes, so that what lanes hand each other is overwritten.
        Case("chunks", 1, ((5, 6), (3, 3), (2, 2)), M=2, D=32, Q=30, K=4),
        # Owners that find 32 points and more at a time.
        Case("one tile", 1, ((6, 6),), M=1, D=8, Q=300, K=4),
    ],
    ids=lambda case: case.name,
)
def test_results_do_not_depend_on_the_order_of_threads(
    program: Path, tmp_path: Path, case: Case
) -> None:
    """Nor would they with a barrier missing and luck; hence several orders."""
    leaves, grad = inputs_of(case, torch.float32)
    leaves[1].data.clamp_(0.4, 0.6)
    leaves[2].data.mul_(0.2)
    first = run_kernels(program, tmp_path, case, leaves, grad)
    for seed in range(1, 5):
        again = run_kernels(program, tmp_path, case, leaves, grad, seed)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_points_that_touch_nothing_and_numbers_that_are_none(program: Path, tmp_path: Path) -> None:
    """NaN, infinite and huge places read nothing; NaN in a row stays in that row."""
    case = Case("none", 1, ((6, 6), (3, 3)), M=1, D=8, Q=6, K=2)
    (value, points, offsets, logits), grad = inputs_of(case, torch.float32)
    clean = run_kernels(program, tmp_path, case, (value, points, offsets, logits), grad)
    points, offsets, logits = points.detach().clone(), offsets.detach(), logits.detach()
    points[0, 0] = float("nan")
    points[0, 1] = float("inf")
    points[0, 2] = -1e30
    points[0, 3] = 1e30
    logits[0, 4] = float("nan")
    results = run_kernels(program, tmp_path, case, (value, points, offsets, logits), grad)
    assert not results[0][0, :4].any()
    assert not results[3][0, :4].any()
    assert results[0][0, 4].isnan().all()
    for result, expected in zip((results[0], results[3]), (clean[0], clean[3]), strict=True):
        assert torch.equal(result[0, 5], expected[0, 5])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_gpu() -> None:
    assert [finding for finding in check("cuda", seed=11) if not finding.passed] == []
