"""Correctness on the device at hand, against the float64 definition in `cuda_ops.reference`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_ops import ops, reference
from cuda_ops.cases import Case, Inputs, make_inputs

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CASES = (
    Case("model", N=2, shapes=((16, 20), (8, 10), (4, 5), (2, 3)), M=8, D=32, Q=425, K=4),
    Case("boxes", N=2, shapes=((16, 20), (8, 10), (4, 5), (2, 3)), M=8, D=32, Q=50, K=4, R=4),
    Case("one of each", N=1, shapes=((7, 9),), M=1, D=1, Q=33, K=1),
    Case("odd sizes", N=3, shapes=((1, 1), (5, 3), (2, 11)), M=3, D=17, Q=31, K=5),
    Case("wide head", N=1, shapes=((6, 6), (3, 3)), M=2, D=72, Q=20, K=8, R=4),
    Case("many levels", N=2, shapes=((8, 8), (6, 6), (5, 5), (4, 4), (3, 3), (2, 2)), M=4, D=8,
         Q=40, K=3),
    Case("batch 33", N=33, shapes=((4, 4), (2, 2)), M=2, D=16, Q=9, K=2),
    Case("no queries", N=2, shapes=((4, 4),), M=2, D=8, Q=0, K=2),
    Case("no images", N=0, shapes=((4, 4),), M=2, D=8, Q=3, K=2),
)  # fmt: skip
NAMES = ("output", "grad value", "grad points", "grad offsets", "grad logits")
# Relative errors of sums of a few hundred terms. 16-bit results have their own measure below.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

Operator = Callable[..., Tensor]


@dataclass(frozen=True)
class Finding:
    """One compared tensor: its relative error (Frobenius norm) and the largest allowed one."""

    case: str
    operator: str
    dtype: torch.dtype
    deterministic: bool
    tensor: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def check(device: str, seed: int) -> list[Finding]:
    """Runs every case in every dtype, in torch's default and deterministic modes.

    float64 and float32 must agree with the float64 definition to `TOLERANCE`. 16-bit results may
    err from it by at most twice what the definition does when evaluated at that precision (plus
    one rounding). Memory that the operators allocate is poisoned with NaN beforehand: in
    deterministic mode by torch itself, otherwise by freeing NaN blocks of the same sizes.
    """
    findings = []
    for dtype in DTYPES:
        for number, case in enumerate(CASES):
            generator = torch.Generator().manual_seed(seed + number)
            inputs = make_inputs(case, dtype, device, generator, spread=3.0, margin=0.2)
            grad = torch.randn((case.N, case.Q, case.M * case.D), generator=generator).to(
                device, dtype
            )
            for name in ("fused", "plain"):
                arguments = _arguments(name, inputs, case)
                truth = _run(
                    _definition(name), [x.double() for x in arguments], case, grad.double()
                )
                rounded = _run(_definition(name), arguments, case, grad)
                for deterministic in (False, True):
                    torch.use_deterministic_algorithms(deterministic)
                    try:
                        _poison([*truth, *arguments], dtype)
                        results = _run(_operator(name), arguments, case, grad)
                    finally:
                        torch.use_deterministic_algorithms(False)
                    for tensor, result, exact, round_off in zip(
                        NAMES, results, truth, rounded, strict=False
                    ):
                        allowed = TOLERANCE.get(
                            dtype, 2 * _error(round_off, exact) + torch.finfo(dtype).eps / 2
                        )
                        error = _error(result, exact)
                        findings.append(
                            Finding(case.name, name, dtype, deterministic, tensor, error, allowed)
                        )
    return findings


def _operator(name: str) -> Operator:
    if name == "fused":
        return ops.fused_deformable_attention
    return ops.multi_scale_deformable_attention


def _definition(name: str) -> Operator:
    if name == "fused":
        return reference.fused_deformable_attention
    return reference.multi_scale_deformable_attention


def _arguments(name: str, inputs: Inputs, case: Case) -> list[Tensor]:
    """The tensor arguments of the operator; for the plain one, locations and weights."""
    if name == "fused":
        return [x.detach() for x in inputs.leaves()]
    value, points, offsets, logits = (x.detach() for x in inputs.leaves())
    locations = reference.sampling_locations(points, offsets.to(points.dtype), case.shapes)
    weights = logits.to(points.dtype).softmax(-1).view(offsets.shape[:-1])
    return [value, locations, weights.to(value.dtype)]


def _run(operator: Operator, arguments: list[Tensor], case: Case, grad: Tensor) -> list[Tensor]:
    """The operator's output and the gradients of all its tensors."""
    value, *others = (x.detach().requires_grad_() for x in arguments)
    output = operator(value, case.shapes, *others)
    return [output.detach(), *torch.autograd.grad(output, (value, *others), grad)]


def _poison(tensors: list[Tensor], dtype: torch.dtype) -> None:
    blocks = [
        torch.full_like(x, float("nan"), dtype=kind)
        for x in tensors
        for kind in (dtype, reference.accumulation_dtype(dtype))
    ]
    del blocks


def _error(result: Tensor, exact: Tensor) -> float:
    if result.shape != exact.shape:
        return float("inf")
    size = exact.norm().item()
    difference = (result.double() - exact).norm().item()
    # A gradient that is zero by symmetry (one point: its weight is 1) is compared absolutely.
    return difference / size if size > 1e-12 else difference
