"""`python -m cuda_ops check` must fail for a kernel that is wrong in any way that it looks for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cuda_ops import check, ops, reference
from cuda_ops.__main__ import main
from cuda_ops.cases import CLEARANCE, Case, make_inputs

CASE = Case("mutation", N=2, shapes=((16, 20), (8, 10), (4, 5), (2, 3)), M=8, D=32, Q=60, K=4)
right = ops.fused_deformable_attention


@pytest.fixture(autouse=True)
def _one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "CASES", (CASE,))
    monkeypatch.setattr(check, "CONVOLUTIONS", check.CONVOLUTIONS[:1])


def failed(monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Tensor]) -> list[check.Finding]:
    monkeypatch.setattr(ops, "fused_deformable_attention", wrong)
    return [finding for finding in check.check("cpu", seed=7) if not finding.passed]


def test_the_right_kernels_pass() -> None:
    findings = list(check.check("cpu", seed=7))
    assert all(finding.passed for finding in findings)
    assert {finding.mode for finding in findings} == {
        *("default", "strided", "shifted", "deterministic", "repeated")
    }
    assert {finding.dtype for finding in findings} == set(check.DTYPES)
    assert {finding.operator for finding in findings} == {"fused", "plain", "deform_conv2d"}


def in_16_bits(
    value: Tensor,
    shapes: tuple[tuple[int, int], ...],
    points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    coordinates: torch.dtype,
    sums: torch.dtype,
) -> Tensor:
    """The definition with a running sum in `sums` and locations in `coordinates`."""
    locations = reference.sampling_locations(
        points.to(coordinates), offsets.to(coordinates), shapes
    ).to(points.dtype)
    weights = logits.to(points.dtype).softmax(-1).view(offsets.shape[:-1])
    total = torch.zeros((), dtype=sums)
    start = 0
    for level, (height, width) in enumerate(shapes):
        tokens = value[:, start : start + height * width].to(points.dtype)
        for k in range(offsets.shape[4]):
            term = reference.multi_scale_deformable_attention(
                tokens,
                [(height, width)],
                locations[:, :, :, level : level + 1, k : k + 1],
                weights[:, :, :, level : level + 1, k : k + 1],
            )
            total = total + term.to(sums)
        start += height * width
    return total.to(value.dtype)


@pytest.mark.parametrize(
    ("coordinates", "sums", "caught"),
    [("wide", "wide", False), ("wide", "narrow", True), ("narrow", "wide", True)],
)
def test_16_bit_sums_or_coordinates_are_caught(
    monkeypatch: pytest.MonkeyPatch, coordinates: str, sums: str, caught: bool
) -> None:
    def wrong(value: Tensor, shapes: tuple[tuple[int, int], ...], *others: Tensor) -> Tensor:
        kinds = {"wide": reference.accumulation_dtype(value.dtype), "narrow": value.dtype}
        return in_16_bits(value, shapes, *others, kinds[coordinates], kinds[sums])

    found = failed(monkeypatch, wrong)
    assert {finding.dtype for finding in found} == (
        {torch.bfloat16, torch.float16} if caught else set()
    )
    if caught:
        assert "output" in {finding.tensor for finding in found}


def test_a_single_wrong_number_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*x: object) -> Tensor:
        output = right(*x)
        last = torch.zeros_like(output)
        last[-1, -1, -1] = output.detach().abs().mean()
        return output + last

    found = failed(monkeypatch, wrong)
    assert {finding.dtype for finding in found} == set(check.DTYPES)
    assert {finding.tensor for finding in found} == {"output"}


def test_a_nan_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*x: object) -> Tensor:
        output = right(*x)
        hole = torch.zeros_like(output)
        hole[0, 0, 0] = float("nan")
        return output + hole

    assert {finding.tensor for finding in failed(monkeypatch, wrong)} == {"output"}


def test_a_kernel_that_takes_strides_for_granted_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(value: Tensor, *others: object) -> Tensor:
        return right(value.as_strided(value.shape, value.new_empty(value.shape).stride()), *others)

    assert {finding.mode for finding in failed(monkeypatch, wrong)} == {"strided"}


def test_a_deterministic_mode_that_varies_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1000))

    def wrong(*x: object) -> Tensor:
        output = right(*x)
        return output * (1 + next(calls) % 2 * torch.finfo(output.dtype).eps)

    modes = {finding.mode for finding in failed(monkeypatch, wrong)}
    assert "repeated" in modes


@pytest.mark.parametrize("dtype", check.DTYPES, ids=str)
@pytest.mark.parametrize("R", [2, 4])
def test_clear_points_keep_off_rows_and_columns(dtype: torch.dtype, R: int) -> None:
    for case in (
        Case("uniform", N=2, shapes=((9, 7), (4, 3)), M=4, D=1, Q=50, K=8, R=R),
        Case("encoder", N=1, shapes=((9, 7), (4, 3)), M=4, D=1, Q=75, K=8, R=R),
    ):
        generator = torch.Generator().manual_seed(0)
        inputs = make_inputs(case, dtype, "cpu", generator, spread=2.0, clear=True)
        _, points, offsets, _ = (x.detach().double() for x in inputs.leaves())
        for level, (height, width) in enumerate(case.shapes):
            locations = reference.sampling_locations(
                points[:, :, level : level + 1], offsets[:, :, :, level : level + 1],
                [(height, width)],
            )  # fmt: skip
            pixels = locations * torch.tensor([width, height]) - 0.5
            assert (pixels - pixels.round()).abs().min() >= CLEARANCE * (1 - 1e-9)


def test_a_seed_gives_the_same_inputs_again(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for seed in (5, 5, 6):
        assert main(["check", "--device", "cpu", "--seed", str(seed)]) == 0
        said.append(capsys.readouterr().out.splitlines()[1:])
    assert said[0] == said[1] != said[2]


def test_large_cases_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "LARGE_CASES", (Case("huge", 1, ((4, 4),), 2, 8, 2500, 2),))
    for arguments, expected in (([], False), (["--no-large"], False), (["--large"], True)):
        assert main(["check", "--device", "cpu", "--seed", "1", *arguments]) == 0
        # float32 and bfloat16, both operators, five or four tensors, four modes and a repeat
        count = int(capsys.readouterr().out.splitlines()[-1].split()[0])
        assert count == 300 + 90 * expected, count
