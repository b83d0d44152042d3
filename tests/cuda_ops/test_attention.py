"""The attention operators against independent truths: small sums by hand, grid_sample, the
definition in float64, numerical gradients."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import grid_sample

from cuda_ops import reference
from cuda_ops.cases import Case, make_inputs
from cuda_ops.ops import fused_deformable_attention, multi_scale_deformable_attention

SHAPES = ((4, 5), (2, 3))
SMALL = Case("small", N=2, shapes=SHAPES, M=2, D=3, Q=4, K=2)
SMALL_BOXES = Case("small boxes", N=2, shapes=SHAPES, M=2, D=3, Q=4, K=2, R=4)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def inputs_of(
    case: Case,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    spread: float = 2.0,
    clear: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return make_inputs(case, dtype, "cpu", generator, spread, 0.2, clear).leaves()


def check_against_definition(case: Case, dtype: torch.dtype, seed: int, spread: float) -> None:
    """Output and all gradients, with points off the pixels' rows and columns: there float32 may
    fall on another side than float64, and have another derivative."""
    inputs = inputs_of(case, dtype, seed, spread, clear=True)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(case.N, case.Q, case.M * case.D, generator=generator).to(dtype)
    output = fused_deformable_attention(inputs[0], case.shapes, *inputs[1:])
    results = [output, *torch.autograd.grad(output, inputs, grad)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output = reference.fused_deformable_attention(exact[0], case.shapes, *exact[1:])
    truth = [output, *torch.autograd.grad(output, exact, grad.double())]
    tolerance = 1e-12 if dtype == torch.float64 else 3e-5
    for result, expected in zip(results, truth, strict=True):
        assert result.shape == expected.shape
        scale = expected.norm().item() + 1.0
        assert (result.double() - expected).norm().item() < tolerance * scale


def relative_error(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


# A 2x3 image with the numbers 1..6, and a point by hand: pixel = location * (3, 2) - 0.5.
@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ((0.5 / 3, 0.25), 1.0),  # the centre of the first pixel
        ((1.0 / 3, 0.25), 1.5),  # between the first two
        ((1.0 / 3, 0.5), (1 + 2 + 4 + 5) / 4),
        ((0.0, 0.25), 0.5),  # on the left edge: half of a pixel outside, which is zero
        ((0.0, 0.0), 0.25),  # in the corner: three of four outside
        ((1.0, 1.0), 1.5),
        ((-0.2, 0.25), 0.0),  # more than half a pixel outside
        ((float("nan"), 0.25), 0.0),
        ((float("inf"), 0.25), 0.0),
        ((1e30, -1e30), 0.0),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bilinear_sample_by_hand(
    location: tuple[float, float], expected: float, dtype: torch.dtype
) -> None:
    value = torch.arange(1, 7, dtype=dtype).view(1, 6, 1, 1)
    wide = reference.accumulation_dtype(dtype)
    locations = torch.tensor(location, dtype=wide).view(1, 1, 1, 1, 1, 2)
    weights = torch.ones(1, 1, 1, 1, 1, dtype=dtype)
    for operator in (multi_scale_deformable_attention, reference.multi_scale_deformable_attention):
        output = operator(value, [(2, 3)], locations, weights)
        assert output.item() == pytest.approx(expected, abs=1e-6)


def test_softmax_and_offsets_by_hand() -> None:
    value = torch.tensor([10.0, 20.0, 30.0]).view(1, 3, 1, 1)  # one row of three pixels
    reference_points = torch.tensor([0.5, 0.5]).view(1, 1, 1, 2)  # pixel 1
    offsets = torch.tensor([[1.0, 0.0], [-0.5, 0.0]]).view(1, 1, 1, 1, 2, 2)  # pixels 2 and 0.5
    logits = torch.tensor([0.0, math.log(3)]).view(1, 1, 1, 2)  # weights 1/4 and 3/4
    output = fused_deformable_attention(value, [(1, 3)], reference_points, offsets, logits)
    assert output.item() == pytest.approx(30 / 4 + 15 * 3 / 4)


def test_offsets_of_boxes_are_in_half_boxes_over_points() -> None:
    value = torch.arange(8.0).view(1, 8, 1, 1)  # pixel x holds x
    box = torch.tensor([0.5, 0.5, 0.25, 1.0]).view(1, 1, 1, 4)  # centre 3.5 px, 2 px wide
    offsets = torch.tensor([[2.0, 0.0], [-1.0, 0.0]]).view(1, 1, 1, 1, 2, 2)  # K = 2: +1 px, -0.5
    logits = torch.zeros(1, 1, 1, 2)
    output = fused_deformable_attention(value, [(1, 8)], box, offsets, logits)
    assert output.item() == pytest.approx((4.5 + 3.0) / 2)


def test_definition_agrees_with_grid_sample() -> None:
    value, points, offsets, logits = inputs_of(SMALL)
    locations = reference.sampling_locations(points, offsets, SHAPES)
    weights = logits.softmax(-1).view(2, 4, 2, 2, 2)
    expected = torch.zeros(2, 4, 2, 3, dtype=torch.float64)
    start = 0
    for level, (height, width) in enumerate(SHAPES):
        for m in range(2):
            image = value[:, start : start + height * width, m].transpose(1, 2)
            grid = 2 * locations[:, :, m, level] - 1
            sampled = grid_sample(image.unflatten(2, (height, width)), grid, align_corners=False)
            expected[:, :, m] += (sampled * weights[:, None, :, m, level]).sum(-1).transpose(1, 2)
        start += height * width
    output = reference.multi_scale_deformable_attention(value, SHAPES, locations, weights)
    torch.testing.assert_close(output, expected.flatten(2))


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 3),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
    M=st.integers(1, 4),
    D=st.integers(1, 70),
    Q=st.integers(1, 20),
    K=st.integers(1, 8),
    R=st.sampled_from([2, 4]),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_any_sizes(
    N: int,
    shapes: list[tuple[int, int]],
    M: int,
    D: int,
    Q: int,
    K: int,
    R: int,
    spread: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    check_against_definition(Case("any", N, tuple(shapes), M, D, Q, K, R), dtype, seed, spread)


@pytest.mark.parametrize("D", [1, 7, 8, 16, 17, 31, 32, 48, 64, 65])
def test_every_number_of_levels_points_and_channels(D: int) -> None:
    levels = ((7, 5), (4, 6), (5, 1), (3, 3), (1, 4), (2, 2))
    for L in range(1, 7):
        for K in range(1, 9):
            case = Case("grid", N=1, shapes=levels[:L], M=2, D=D, Q=5, K=K, R=2 + K % 2 * 2)
            check_against_definition(case, torch.float32, seed=10 * L + K, spread=2.0)


@pytest.mark.parametrize("case", [SMALL, SMALL_BOXES], ids=lambda case: case.name)
def test_numerical_gradients(case: Case) -> None:
    value, points, offsets, logits = inputs_of(case, spread=0.3)
    assert torch.autograd.gradcheck(
        lambda *x: fused_deformable_attention(x[0], SHAPES, *x[1:]),
        (value, points, offsets, logits),
    )
    # Of a seed: at the middle of a pixel, where the slope changes, the numerical one is another.
    generator = torch.Generator().manual_seed(0)
    locations, weights = (
        torch.rand(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((2, 4, 2, 2, 2, 2), (2, 4, 2, 2, 2))
    )
    assert torch.autograd.gradcheck(
        lambda *x: multi_scale_deformable_attention(x[0], SHAPES, *x[1:]),
        (value, locations, weights),
    )


def test_opcheck() -> None:
    sizes = [4, 5, 2, 3]
    value, points, offsets, logits = inputs_of(SMALL)
    fused = torch.ops.cuda_ops.fused_deformable_attention.default
    torch.library.opcheck(fused, (value, sizes, points, offsets, logits))
    torch.library.opcheck(fused, (value, sizes, *inputs_of(SMALL_BOXES)[1:]))
    locations = reference.sampling_locations(points, offsets, SHAPES).detach().requires_grad_()
    weights = torch.rand(2, 4, 2, 2, 2, dtype=torch.float64).requires_grad_()
    plain = torch.ops.cuda_ops.multi_scale_deformable_attention.default
    torch.library.opcheck(plain, (value, sizes, locations, weights))
    grad = torch.randn(2, 4, 6, dtype=torch.float64)
    detached = [x.detach() for x in (value, points, offsets, logits, locations, weights)]
    backward = torch.ops.cuda_ops.fused_deformable_attention_backward.default
    for wanted in (True, False):
        torch.library.opcheck(backward, (grad, detached[0], sizes, *detached[1:4], wanted))
    backward = torch.ops.cuda_ops.multi_scale_deformable_attention_backward.default
    torch.library.opcheck(backward, (grad, detached[0], sizes, *detached[4:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("R", [2, 4])
def test_16_bit_error_is_that_of_rounding_inputs_and_output(dtype: torch.dtype, R: int) -> None:
    """Against float64 on the same rounded inputs only the result's own rounding may remain."""
    case = Case("16 bit", 2, ((16, 20), (8, 10), (4, 5), (2, 3)), M=4, D=32, Q=50, K=4, R=R)
    inputs = inputs_of(case, dtype)
    assert inputs[1].dtype == torch.float32  # reference points stay wide
    grad = torch.randn(2, 50, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    output = fused_deformable_attention(inputs[0], case.shapes, *inputs[1:])
    results = [output, *torch.autograd.grad(output, inputs, grad)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output = reference.fused_deformable_attention(exact[0], case.shapes, *exact[1:])
    truth = [output, *torch.autograd.grad(output, exact, grad.double())]
    for result, expected, x in zip(results, truth, (inputs[0], *inputs), strict=True):
        assert result.dtype == x.dtype
        # Rounding to nearest errs by up to eps / 2, and by eps / (2 sqrt 3) in the mean.
        assert relative_error(result, expected) < 0.5 * torch.finfo(result.dtype).eps + 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: torch.dtype) -> None:
    case = Case("strides", 2, SHAPES, M=2, D=8, Q=4, K=2)
    value, points, offsets, logits = (x.detach() for x in inputs_of(case, dtype))
    points = points[:1, :, :1]  # as the model's: the same for every image and level
    arguments = [value, points.expand(2, 4, 2, 2), offsets, logits]
    expected = fused_deformable_attention(arguments[0], SHAPES, *(x.clone() for x in arguments[1:]))
    by_channel = value.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    strided = torch.zeros(2, 26, 2, 16, dtype=dtype)[..., ::2]
    strided.copy_(value)
    for same_value in (by_channel, strided):
        assert not same_value.is_contiguous()
        turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments[2:]]
        output = fused_deformable_attention(same_value, SHAPES, arguments[1], *turned)
        assert torch.equal(output, expected)
    expanded = value[:1].expand(2, -1, -1, -1).requires_grad_()
    output = fused_deformable_attention(expanded, SHAPES, *arguments[1:])
    (grad,) = torch.autograd.grad(output.sum(), expanded)  # an expanded grad_output, too
    copied = value[:1].repeat(2, 1, 1, 1).requires_grad_()
    again = fused_deformable_attention(copied, SHAPES, *arguments[1:])
    assert torch.equal(output, again)
    assert torch.equal(grad, torch.autograd.grad(again, copied, torch.ones_like(again))[0])


@pytest.mark.parametrize(("N", "Q"), [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("R", [2, 4])
def test_nothing_to_do(N: int, Q: int, R: int) -> None:
    inputs = inputs_of(Case("empty", N, SHAPES, M=2, D=3, Q=Q, K=2, R=R))
    output = fused_deformable_attention(inputs[0], SHAPES, *inputs[1:])
    assert output.shape == (N, Q, 6)
    grads = torch.autograd.grad(output.sum(), inputs)
    for grad, x in zip(grads, inputs, strict=True):
        assert grad.shape == x.shape
        assert not grad.any()  # without queries, value has a gradient, of zeros


def test_batch_equals_single_images() -> None:
    case = Case("batch 33", 33, SHAPES, M=2, D=8, Q=5, K=3)
    inputs = [x.detach() for x in inputs_of(case, torch.float32)]
    batch = fused_deformable_attention(inputs[0], SHAPES, *inputs[1:])
    for n in range(33):
        single = [x[n : n + 1] for x in inputs]
        assert torch.equal(batch[n], fused_deformable_attention(single[0], SHAPES, *single[1:])[0])


def test_infinite_and_nan_inputs_stay_where_they_are() -> None:
    case = Case("nan", 1, ((6, 6),), M=1, D=4, Q=4, K=2)
    value, points, offsets, logits = (x.detach() for x in inputs_of(case, torch.float32))
    points[:] = 0.5
    offsets[:] = 0
    clean = fused_deformable_attention(value, case.shapes, points, offsets, logits)
    value[0, 0] = float("inf")  # a corner which no query reads
    offsets[0, 1, 0, 0, 0, 0] = float("nan")
    logits[0, 2] = float("nan")
    points[0, 3] = float("-inf")
    inputs = [x.requires_grad_() for x in (value, points, offsets, logits)]
    output = fused_deformable_attention(inputs[0], case.shapes, *inputs[1:])
    assert torch.equal(output[0, 0], clean[0, 0])
    assert output[0, 1].isfinite().all()  # a point without a place reads nothing
    assert output[0, 2].isnan().all()  # weights without a value
    assert not output[0, 3].any()
    torch.autograd.grad(output.sum(), inputs)  # does not crash


def test_minus_infinity_masks_a_point() -> None:
    case = Case("mask", 1, ((4, 4),), M=1, D=4, Q=3, K=3)
    for dtype in DTYPES:
        value, points, offsets, logits = (x.detach() for x in inputs_of(case, dtype, spread=0.5))
        logits[..., 1] = float("-inf")
        output = fused_deformable_attention(value, case.shapes, points, offsets, logits)
        others = [0, 2]
        expected = fused_deformable_attention(
            value, case.shapes, points, offsets[..., others, :], logits[..., others]
        )
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(("M", "counts"), [(2, (1, 2, 3, 4, 7)), (8, (1, 8, 16, 32))])
def test_gradients_are_the_same_bits_for_any_number_of_threads(
    M: int, counts: tuple[int, ...]
) -> None:
    # Fewer heads than threads, so that levels and queries are split, too.
    case = Case("threads", 1, ((16, 16), (8, 8), (4, 4), (2, 2)), M=M, D=32, Q=500, K=4)
    inputs = inputs_of(case, torch.float32)
    grad = torch.randn(1, 500, 32 * M, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            output = fused_deformable_attention(inputs[0], case.shapes, *inputs[1:])
            results.append([output, *torch.autograd.grad(output, inputs, grad)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_every_instruction_set_agrees_with_the_definition() -> None:
    """`check` in a process of its own per set, since the choice is made once in a process."""
    program = """
from cuda_ops import check
check.MODES, check.CONVOLUTIONS = ("default",), ()
findings = list(check.check("cpu", seed=1))
print(len(findings), [finding for finding in findings if not finding.passed])
"""
    said = []
    for name in ("baseline", "avx2", "avx512"):  # one the machine lacks falls back to baseline
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "CUDA_OPS_CPU": name, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(done.stdout.split(maxsplit=1))
    assert all(int(count) > 350 and failed == "[]\n" for count, failed in said), said


def test_autocast_rounds_all_but_the_reference_points() -> None:
    value, points, offsets, logits = inputs_of(SMALL, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = fused_deformable_attention(value, SHAPES, points, offsets, logits)
    assert output.dtype == torch.bfloat16
    by_hand = fused_deformable_attention(
        value.bfloat16(), SHAPES, points, offsets.bfloat16(), logits.bfloat16()
    )
    assert torch.equal(output, by_hand)
    grads = torch.autograd.grad(output.float().sum(), (value, points, offsets, logits))
    assert {grad.dtype for grad in grads} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        locations = reference.sampling_locations(points, offsets, SHAPES)
        weights = logits.softmax(-1).view(2, 4, 2, 2, 2)
        plain = multi_scale_deformable_attention(value, SHAPES, locations, weights)
        wide = fused_deformable_attention(
            value.double(), SHAPES, points.double(), offsets.double(), logits.double()
        )
    assert plain.dtype == torch.bfloat16
    assert wide.dtype == torch.float64


def test_reference_points_in_the_dtype_of_value() -> None:
    value, points, offsets, logits = inputs_of(SMALL, torch.bfloat16)
    low = points.detach().bfloat16().requires_grad_()
    output = fused_deformable_attention(value, SHAPES, low, offsets, logits)
    expected = fused_deformable_attention(value, SHAPES, low.detach().float(), offsets, logits)
    assert torch.equal(output, expected)
    assert torch.autograd.grad(output.sum(), low)[0].dtype == torch.bfloat16


def test_shapes_as_a_tensor() -> None:
    value, points, offsets, logits = inputs_of(SMALL)
    expected = fused_deformable_attention(value, SHAPES, points, offsets, logits)
    given_tensor = fused_deformable_attention(value, torch.tensor(SHAPES), points, offsets, logits)
    assert torch.equal(given_tensor, expected)


def test_meta_tensors_give_shapes() -> None:
    value, *others = (x.detach().to("meta") for x in inputs_of(SMALL))
    locations = torch.zeros(2, 4, 2, 2, 2, 2, dtype=torch.float64, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        fused = fused_deformable_attention(value, SHAPES, *others)
        plain = multi_scale_deformable_attention(value, SHAPES, locations, locations[..., 0])
    for output in (fused, plain):
        assert output.is_meta
        assert output.shape == (2, 4, 6)


def test_one_graph_serves_images_of_any_size() -> None:
    compilations = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        nonlocal compilations
        compilations += 1
        return graph.forward

    def attend(value: Tensor, shapes: list[tuple[int, int]], *others: Tensor) -> Tensor:
        return fused_deformable_attention(value, shapes, *others)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=count)
    for shapes in ([(6, 5), (3, 4)], [(7, 9), (4, 5)], [(10, 8), (5, 6)]):
        case = Case("dynamic", 2, tuple(shapes), M=2, D=4, Q=sum(h * w for h, w in shapes), K=2)
        inputs = inputs_of(case, torch.float32)
        output = compiled(inputs[0], shapes, *inputs[1:])
        assert torch.equal(output, fused_deformable_attention(inputs[0], shapes, *inputs[1:]))
    assert compilations == 1
    torch._dynamo.reset()


def test_compiled_gradients_equal_eager_ones() -> None:
    torch._dynamo.reset()
    inputs = inputs_of(SMALL_BOXES)

    def loss(*x: Tensor) -> Tensor:
        return fused_deformable_attention(x[0], SHAPES, *x[1:]).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for result, exact in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(result, exact)
    torch._dynamo.reset()


def test_only_the_inputs_are_saved_for_backward() -> None:
    inputs = inputs_of(SMALL, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.data_ptr()) or x, lambda x: x
    ):
        fused_deformable_attention(inputs[0], SHAPES, *inputs[1:])
    assert sorted(saved) == sorted(x.data_ptr() for x in inputs)


def bad(change: str) -> tuple[tuple[Tensor, object, Tensor, Tensor, Tensor], str]:
    """Arguments with one mistake, and what the message must say."""
    value, points, offsets, logits = (x.detach() for x in inputs_of(SMALL, torch.float32))
    shapes: object = SHAPES
    message = ""
    match change:
        case "tokens":
            shapes, message = ((4, 5), (2, 4)), r"value has 26 tokens, expected 28"
        case "empty level":
            shapes, message = ((26, 1), (0, 3)), r"\(0, 3\), expected 1 or more"
        case "triple":
            shapes, message = ((4, 5, 1), (2, 3, 1)), r"\(4, 5, 1\), expected \(h, w\)"
        case "dimensions":
            value, message = value[0], r"shape \[26, 2, 3\], expected \[N, S, M, D\]"
        case "integers":
            value, message = value.long(), r"torch.int64, expected float64, float32"
        case "levels":
            points = points[:, :, :1]
            message = r"reference_points has shape \[2, 4, 1, 2\], expected \[2, 4, 2, 2\]"
        case "numbers":
            points = torch.cat([points, points[..., :1]], -1)
            message = r"reference_points has shape \[2, 4, 2, 3\], expected \[2, 4, 2, 2\]"
        case "offsets":
            offsets = offsets[..., 0]
            message = r"sampling_offsets has shape .*, expected \[N, Q, M, L, K, 2\]"
        case "heads":
            offsets, message = offsets[:, :, :1], r"sampling_offsets .* expected \[2, 4, 2, 2, 2, 2"
        case "logits":
            logits, message = (
                logits[..., :3],
                r"attention_logits has .*3\], expected \[2, 4, 2, 4\]",
            )
        case "dtype":
            logits, message = logits.double(), r"float64, expected torch.float32 as value"
        case "reference dtype":
            points, message = points.double(), r"reference_points has dtype torch.float64"
        case "device":
            logits, message = logits.to("meta"), r"attention_logits is on meta, expected cpu"
        case "shapes on meta":
            shapes, message = (
                torch.tensor(SHAPES).to("meta"),
                r"on meta, expected torch.int64 on cpu",
            )
    return (value, shapes, points, offsets, logits), message


@pytest.mark.parametrize(
    "change",
    [
        *("tokens", "empty level", "triple", "dimensions", "integers", "levels", "numbers"),
        *("offsets", "heads", "logits", "dtype", "reference dtype", "device", "shapes on meta"),
    ],
)
def test_mistakes_are_refused_with_got_and_expected(change: str) -> None:
    arguments, message = bad(change)
    with pytest.raises(ValueError, match=message):
        fused_deformable_attention(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": torch.zeros(26, 2, 3)}, r"value has shape \[26, 2, 3\], expected \[N, S"),
        ({"value": torch.zeros(2, 26, 2, 3).int()}, "torch.int32, expected float64, float32"),
        ({"value": torch.zeros(2, 26, 2, 0)}, "expected at least one head, channel and level"),
        ({"value": torch.zeros(2, 0, 2, 3), "shapes": ()}, "0 levels, expected at least one head"),
        ({"shapes": ((4, 5), (2, 4))}, "value has 26 tokens, expected 28"),
        ({"locations": torch.zeros(4, 2, 2, 2, 2)}, r"sampling_locations has .*expected \[N, Q, M"),
        ({"locations": torch.zeros(2, 4, 2, 2, 0, 2)}, "0 points per head and level, expected at"),
        ({"locations": torch.zeros(2, 4, 2, 1, 2, 2)}, r"expected \[2, 4, 2, 2, 2, 2\]"),
        ({"locations": torch.zeros(2, 4, 2, 2, 2, 2).double()}, "dtype torch.float64, expected"),
        ({"locations": torch.zeros(2, 4, 2, 2, 2, 2).long()}, "dtype torch.int64, expected"),
        ({"weights": torch.zeros(2, 4, 2, 4)}, r"\[2, 4, 2, 4\], expected \[2, 4, 2, 2, 2\]"),
        ({"weights": torch.zeros(2, 4, 2, 2, 2).half()}, "dtype torch.float16, expected torch.flo"),
        ({"weights": torch.zeros(2, 4, 2, 2, 2).to("meta")}, "is on meta, expected cpu as value"),
    ],
)  # fmt: skip
def test_plain_operator_refuses_mistakes(change: dict, message: str) -> None:
    given = {
        "value": torch.zeros(2, 26, 2, 3),
        "shapes": SHAPES,
        "locations": torch.zeros(2, 4, 2, 2, 2, 2),
        "weights": torch.zeros(2, 4, 2, 2, 2),
    } | change
    with pytest.raises(ValueError, match=message):
        multi_scale_deformable_attention(*given.values())
