"""NaN, infinite, huge, expanded and impossible arguments: an answer or an error, never a crash."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cuda_ops.cases import Case, make_inputs
from cuda_ops.check import check_repeated_images, check_repeated_queries
from cuda_ops.ops import fused_deformable_attention, multi_scale_deformable_attention

SHAPES = ((4, 5), (2, 3))
CASES = [Case(f"{R}-d", N=2, shapes=SHAPES, M=2, D=17, Q=4, K=3, R=R) for R in (2, 4)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def arguments(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """value, reference points, offsets, logits, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    inputs = [x.detach() for x in make_inputs(case, dtype, "cpu", generator, 2.0).leaves()]
    return [*inputs, torch.randn(case.N, case.Q, case.M * case.D, generator=generator).to(dtype)]


def both_operators(case: Case, tensors: list[Tensor]) -> list[list[Tensor]]:
    """Outputs and gradients of the fused operator, and of the plain one with the points as
    locations and the logits as weights."""
    value, points, offsets, logits, grad = tensors
    locations = (points[:, :, None, :, None, :2] + offsets.to(points.dtype) / 8).contiguous()
    results = []
    for operator, others in (
        (fused_deformable_attention, [points, offsets, logits]),
        (multi_scale_deformable_attention, [locations, logits.view(offsets.shape[:-1])]),
    ):
        leaves = [x.clone().requires_grad_() for x in (value, *others)]
        output = operator(leaves[0], case.shapes, *leaves[1:])
        results.append([output, *torch.autograd.grad(output, leaves, grad)])
    return results


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("argument", range(5), ids=["value", "points", "offsets", "logits", "grad"])
def test_special_numbers_anywhere(case: Case, dtype: torch.dtype, argument: int) -> None:
    """One image is spoiled: nothing crashes, and the other image's results do not change."""
    clean = both_operators(case, arguments(case, dtype))
    largest = torch.finfo(dtype).max
    for number in (float("nan"), float("inf"), float("-inf"), largest, -largest, 1e30, 3e9, -3e9):
        everywhere, sparse = arguments(case, dtype), arguments(case, dtype)
        everywhere[argument][0] = number
        sparse[argument][0].view(-1)[::3] = number
        for spoiled in (everywhere, sparse):
            for results, expected in zip(both_operators(case, spoiled), clean, strict=True):
                for result, right in zip(results, expected, strict=True):
                    assert result.shape == right.shape
                    assert torch.equal(result[1], right[1])


def test_far_points_read_nothing() -> None:
    for case in CASES:
        for number in (1e30, -1e30, 3e9, torch.finfo(torch.float32).max):
            value, points, offsets, logits, _ = arguments(case)
            output = fused_deformable_attention(
                value, SHAPES, points, torch.full_like(offsets, number), logits
            )
            assert not output.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_do_not_overflow(dtype: torch.dtype) -> None:
    value, points, offsets, logits, _ = arguments(CASES[0], dtype)
    largest = torch.finfo(dtype).max
    logits[:] = -largest
    logits[..., 2] = largest
    alone = torch.full_like(logits, float("-inf"))
    alone[..., 2] = 0
    outputs = [
        fused_deformable_attention(value, SHAPES, points, offsets, x) for x in (logits, alone)
    ]
    assert outputs[0].isfinite().all()
    assert torch.equal(*outputs)


def test_more_elements_than_32_bits_can_number() -> None:
    """2.2e9 elements of `value`, all of them views of one image's: each image like the first."""
    case = Case("expanded", N=1, shapes=((16, 16),), M=8, D=256, Q=3, K=2)
    generator = torch.Generator().manual_seed(0)
    inputs = make_inputs(case, torch.bfloat16, "cpu", generator, spread=2.0)
    single = [x.detach() for x in inputs.leaves()]
    images = 2**31 // single[0].numel() + 1
    many = [x.expand(images, *x.shape[1:]) for x in single]
    assert many[0].numel() > 2**31
    output = fused_deformable_attention(many[0], case.shapes, *many[1:])
    expected = fused_deformable_attention(single[0], case.shapes, *single[1:])
    assert torch.equal(output, expected.expand_as(output))


def test_images_further_apart_than_32_bits_can_number() -> None:
    apart = 2**31 + 64  # of which only the pages that the images lie on are ever touched
    storage = torch.empty(apart + 26 * 16, dtype=torch.bfloat16)
    value = storage.as_strided((2, 26, 2, 8), (apart, 16, 8, 1))
    case = Case("apart", N=2, shapes=SHAPES, M=2, D=8, Q=4, K=2)
    copy, points, offsets, logits, _ = arguments(case, torch.bfloat16)
    value.copy_(copy)
    outputs = [
        fused_deformable_attention(x, SHAPES, points, offsets, logits) for x in (value, copy)
    ]
    assert torch.equal(*outputs)


def test_large_checks_of_the_gpu_hold_on_the_cpu() -> None:
    """`check` runs these with 2^31 elements on a GPU."""
    for finding in (*check_repeated_images("cpu", 0, 3), *check_repeated_queries("cpu", 0, 70_000)):
        assert finding.passed, finding


def expanded(*shape: int) -> Tensor:
    return torch.zeros(()).expand(shape)


@pytest.mark.parametrize(
    ("value", "shapes", "K", "message"),
    [
        (expanded(1, 6, 1, 1 << 24), ((2, 3),), 1, "got D = 16777216 and L .* less than 16777216"),
        # Its scratch would have 2^66 bytes, which are 0 to 64 bits.
        (expanded(1, 1 << 29, 1, 1 << 33), ((1 << 15, 1 << 14),), 1, "got D = 8589934592"),
        (expanded(1, (1 << 23) * 257, 1, 1), ((1 << 23, 257),), 1, r"tokens .* less than 2\^31"),
        (expanded(1, 1 << 24, 1, 1), ((1 << 24, 1),), 1, "expected sizes of 1 to 16777215"),
        (expanded(1, 6, 1, 1), ((2, 3),), 1 << 24, "L . K = 16777216, expected less"),
    ],
    ids=["channels", "scratch", "tokens", "height", "points"],
)
def test_sizes_beyond_the_kernels_are_refused_before_memory_is_touched(
    value: Tensor, shapes: tuple[tuple[int, int], ...], K: int, message: str
) -> None:
    points, logits = expanded(1, 1, 1, 2), expanded(1, 1, 1, K)
    offsets = expanded(1, 1, 1, 1, K, 2)
    with pytest.raises(RuntimeError, match=message):
        fused_deformable_attention(value, shapes, points, offsets, logits)
    with pytest.raises(RuntimeError, match=message):
        multi_scale_deformable_attention(value, shapes, offsets, logits.view(1, 1, 1, 1, K))


def test_scratch_that_does_not_fit_is_an_error_not_a_crash() -> None:
    program = """
import resource, torch
from cuda_ops.ops import fused_deformable_attention
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
tokens = 1 << 28
points = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1)
value = torch.zeros(()).expand(1, tokens, 1, 64)
try:
    fused_deformable_attention(value, [(1 << 14, 1 << 14)], *points)
except (RuntimeError, MemoryError) as error:
    print("refused:", type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("refused:"), done.stderr


class TestDirectCalls:
    """torch.ops bypasses ops.py; the library's own checks must hold."""

    value = torch.zeros(2, 26, 2, 3)
    locations, weights = torch.zeros(2, 4, 2, 2, 2, 2), torch.zeros(2, 4, 2, 2, 2)
    points, logits = torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 4)
    grad, sizes = torch.zeros(2, 4, 6), (4, 5, 2, 3)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"value": value[0]}, r"value has 3 dimensions, expected \[N, S, M, D\]"),
            ({"value": value.long()}, "dtype Long, expected float64"),
            ({"value": value[..., :0]}, "at least 1, got M = 2, D = 0"),
            ({"sizes": (4, 5, 2, 4)}, "26 tokens, expected 28"),
            ({"sizes": (4, 5)}, "2 numbers, expected .* 2 levels"),
            ({"locations": locations[0]}, "5 dimensions, expected"),
            ({"locations": locations[:1]}, r"sampling_locations has shape \[1, .*\[2, 4, 2, 2, 2"),
            ({"locations": locations.double()}, "dtype Double, expected Float"),
            ({"weights": weights[..., :1]}, r"attention_weights has shape .*, expected \[2, 4"),
            ({"weights": weights.half()}, "dtype Half, expected Float"),
            ({"grad": grad[..., :5]}, r"grad_output has shape \[2, 4, 5\], expected \[2, 4, 6\]"),
            ({"grad": grad.double()}, "grad_output has dtype Double, expected Float"),
        ],
        ids=str,
    )  # fmt: skip
    def test_plain(self, change: dict, message: str) -> None:
        names = ("value", "sizes", "locations", "weights", "grad")
        given = {name: getattr(self, name) for name in names} | change
        value, sizes, *others, grad = (given[name] for name in names)
        operators = torch.ops.cuda_ops
        if "grad" not in change:
            with pytest.raises(RuntimeError, match=message):
                operators.multi_scale_deformable_attention(value, sizes, *others)
        with pytest.raises(RuntimeError, match=message):
            operators.multi_scale_deformable_attention_backward(grad, value, sizes, *others)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"value": value.int()}, "dtype Int, expected float64"),
            ({"sizes": (-4, -5, 2, 3)}, "expected sizes of 1"),
            ({"points": points[..., :1]}, r"reference_points has shape \[2, 4, 2, 1\], expected"),
            ({"points": points.half()}, "dtype Half, expected Float"),
            ({"locations": locations[:, :3]}, "reference_points has shape"),
            ({"locations": locations[..., :0, :]}, "got M = 2, D = 3, K = 0"),
            ({"logits": logits[..., :1]}, r"attention_logits has shape .*expected \[2, 4, 2, 4\]"),
            ({"logits": logits.bfloat16()}, "dtype BFloat16, expected Float"),
            ({"grad": grad[:1]}, r"grad_output has shape \[1, 4, 6\], expected \[2, 4, 6\]"),
        ],
        ids=str,
    )  # fmt: skip
    def test_fused(self, change: dict, message: str) -> None:
        names = ("value", "sizes", "points", "locations", "logits", "grad")
        given = {name: getattr(self, name) for name in names} | change
        value, sizes, *others, grad = (given[name] for name in names)
        operators = torch.ops.cuda_ops
        if "grad" not in change:
            with pytest.raises(RuntimeError, match=message):
                operators.fused_deformable_attention(value, sizes, *others)
        for wanted in (True, False):
            with pytest.raises(RuntimeError, match=message):
                operators.fused_deformable_attention_backward(grad, value, sizes, *others, wanted)
