"""Correctness on the device at hand, against the float64 definitions in `cuda_ops.reference`.

float64 and float32 results must agree with the definition to `TOLERANCE`; 16-bit ones may err by at
most twice as much as the definition evaluated at that precision (with float32 coordinates). Errors
are relative, in two norms: Frobenius, and the largest element's, which sees a single wrong number.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from cuda_ops import ops, reference
from cuda_ops.cases import CLEARANCE, Case, make_inputs

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CASES = (
    Case("model", N=2, shapes=((16, 20), (8, 10), (4, 5), (2, 3)), M=8, D=32, Q=425, K=4),
    Case("boxes", N=2, shapes=((16, 20), (8, 10), (4, 5), (2, 3)), M=8, D=32, Q=50, K=4, R=4),
    Case("one of each", N=1, shapes=((7, 9),), M=1, D=1, Q=33, K=1),
    Case("odd sizes", N=3, shapes=((1, 1), (5, 3), (2, 11)), M=3, D=17, Q=31, K=5),
    Case("wide head", N=1, shapes=((6, 6), (3, 3)), M=2, D=72, Q=20, K=8, R=4),
    Case("many levels", N=2, shapes=((8, 8), (6, 6), (5, 5), (4, 4), (3, 3), (2, 2)), M=4, D=8,
         Q=40, K=3),
    Case("D 64", N=2, shapes=((9, 7), (4, 4)), M=3, D=64, Q=37, K=4),
    Case("D 128", N=1, shapes=((9, 7), (4, 4)), M=2, D=128, Q=21, K=3, R=4),
    Case("batch 33", N=33, shapes=((4, 4), (2, 2)), M=2, D=16, Q=9, K=2),
    Case("no queries", N=2, shapes=((4, 4),), M=2, D=8, Q=0, K=2),
    Case("no images", N=0, shapes=((4, 4),), M=2, D=8, Q=3, K=2),
)  # fmt: skip
LARGE_CASES = (
    Case("800x1333 encoder", N=2, shapes=((100, 167), (50, 84), (25, 42), (13, 21)), M=8, D=32,
         Q=22223, K=4),
    Case("800x1333 decoder", N=2, shapes=((100, 167), (50, 84), (25, 42), (13, 21)), M=8, D=32,
         Q=300, K=4, R=4),
    Case("70001 queries", N=1, shapes=((31, 33), (16, 17)), M=2, D=16, Q=70001, K=2),
)  # fmt: skip
LARGE_DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("output", "grad value", "grad points", "grad offsets", "grad logits")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
CHUNK = 1024  # queries that the definition takes at a time: a gigabyte in the largest case

MODES = ("default", "strided", "shifted", "deterministic")

Operator = Callable[..., Tensor]


@dataclass(frozen=True)
class Convolution:
    """One call of `modulated_deform_conv2d`; G deformable groups, k x k taps."""

    name: str
    N: int
    C: int
    size: tuple[int, int]
    outputs: int
    groups: int
    G: int
    k: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1


CONVOLUTIONS = (
    Convolution("3x3", N=2, C=16, size=(9, 11), outputs=8, groups=1, G=1),
    Convolution("groups", N=3, C=24, size=(8, 7), outputs=12, groups=4, G=2, stride=2),
    Convolution("dilated", N=1, C=64, size=(16, 13), outputs=32, groups=2, G=1, padding=2,
                dilation=2),
    Convolution("1x1", N=2, C=6, size=(5, 4), outputs=3, groups=3, G=6, k=1, padding=0),
)  # fmt: skip
CONVOLUTION_NAMES = ("output", "grad input", "grad offset", "grad mask", "grad weight", "grad bias")


@dataclass(frozen=True)
class Finding:
    """One compared tensor: its relative error and the largest allowed one.

    `mode`: default, deterministic, strided (non-contiguous arguments), shifted (contiguous ones
    that begin one element behind an aligned address), or repeated (the deterministic mode once
    more, which must give the same bits)."""

    case: str
    operator: str
    dtype: torch.dtype
    mode: str
    tensor: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def check(device: str, seed: int, large: bool = False) -> Iterator[Finding]:
    """Runs every case in every dtype and mode, and yields what it finds as it goes.

    Memory that the operators allocate is poisoned with NaN beforehand: in deterministic mode by
    torch itself, otherwise by freeing NaN blocks of the same sizes. The gaps of strided arguments
    hold NaN, too.

    Args:
        device: "cpu" or "cuda".
        seed: of all inputs.
        large: also `LARGE_CASES`, and on a GPU tensors of more than 2^31 elements.
    """
    for dtype in DTYPES:
        for number, case in enumerate(CASES):
            yield from _check_attention(case, dtype, device, seed + number)
        for number, convolution in enumerate(CONVOLUTIONS):
            yield from _check_convolution(convolution, dtype, device, seed + number)
    if not large:
        return
    for dtype in LARGE_DTYPES:
        for number, case in enumerate(LARGE_CASES):
            yield from _check_attention(case, dtype, device, seed + number)
    if device == "cuda":
        yield from check_repeated_images(device, seed, images=3200)
        yield from check_repeated_queries(device, seed, queries=1_100_000)


def left_out(device: str) -> list[str]:
    """What cannot be checked here, in words."""
    if device == "cuda" and find_spec("torchvision") is None:
        return [
            "modulated_deform_conv2d in the default mode: it is torchvision's on a GPU, which is "
            "not installed"
        ]
    return []


@dataclass(frozen=True)
class _Trial:
    """An operator, what it is given, and what its output and gradients must be."""

    case: str
    operator: str
    dtype: torch.dtype
    names: Sequence[str]
    function: Operator
    arguments: list[Tensor]
    grad: Tensor
    truth: list[Tensor]
    rounded: list[Tensor]  # by the definition at `dtype`
    scale: float = 1.0  # of `TOLERANCE`

    def findings(self, modes: Sequence[str]) -> Iterator[Finding]:
        for mode in modes:
            results = self._results(mode)
            for tensor, result, exact, like in zip(
                self.names, results, self.truth, self.rounded, strict=True
            ):
                error, allowed = _compare(result, exact, like, self.scale)
                yield self._finding(mode, tensor, error, allowed)
            if mode == "deterministic":
                again = self._results(mode)
                for tensor, first, second in zip(self.names, results, again, strict=True):
                    difference = 0.0 if torch.equal(first, second) else 1.0
                    yield self._finding("repeated", tensor, difference, 0.0)

    def _results(self, mode: str) -> list[Tensor]:
        arguments, grad = self.arguments, self.grad
        if mode == "strided":
            arguments, grad = [_strided(x) for x in arguments], _strided(grad)
        if mode == "shifted":
            arguments, grad = [_shifted(x) for x in arguments], _shifted(grad)
        torch.use_deterministic_algorithms(mode == "deterministic")
        try:
            _poison([*self.truth, *self.arguments], self.dtype)
            return _run(self.function, arguments, grad)
        finally:
            torch.use_deterministic_algorithms(False)

    def _finding(self, mode: str, tensor: str, error: float, allowed: float) -> Finding:
        return Finding(self.case, self.operator, self.dtype, mode, tensor, error, allowed)


def _check_attention(case: Case, dtype: torch.dtype, device: str, seed: int) -> Iterator[Finding]:
    generator = torch.Generator().manual_seed(seed)
    inputs = make_inputs(case, dtype, device, generator, spread=3.0, margin=0.2, clear=True)
    grad = torch.randn((case.N, case.Q, case.M * case.D), generator=generator).to(device, dtype)
    value, points, offsets, logits = (x.detach() for x in inputs.leaves())
    locations = reference.sampling_locations(points, offsets.to(points.dtype), case.shapes)
    weights = logits.to(points.dtype).softmax(-1).view(offsets.shape[:-1]).to(dtype)
    # The distance of neighbouring float32 coordinates doubles with the side of a level.
    scale = max(1.0, max(max(shape) for shape in case.shapes) / 64)
    for name, arguments, names, operator, definition in (
        ("fused", [value, points, offsets, logits], NAMES, ops.fused_deformable_attention,
         reference.fused_deformable_attention),
        ("plain", [value, locations, weights], (*NAMES[:2], "grad locations", "grad weights"),
         ops.multi_scale_deformable_attention, reference.multi_scale_deformable_attention),
    ):  # fmt: skip

        def attend(value: Tensor, *others: Tensor, operator: Operator = operator) -> Tensor:
            return operator(value, case.shapes, *others)

        truth = _in_chunks(definition, [x.double() for x in arguments], case, grad.double())
        rounded = truth if dtype in TOLERANCE else _in_chunks(definition, arguments, case, grad)
        yield from _Trial(
            case.name, name, dtype, names, attend, arguments, grad, truth, rounded, scale
        ).findings(MODES)


def _check_convolution(
    case: Convolution, dtype: torch.dtype, device: str, seed: int
) -> Iterator[Finding]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    reach = case.dilation * (case.k - 1) + 1
    out = [(size + 2 * case.padding - reach) // case.stride + 1 for size in case.size]
    offset = normal(case.N, 2 * case.G * case.k**2, *out)
    while (near := (offset - offset.round()).abs() < CLEARANCE).any():
        offset = torch.where(near, normal(*offset.shape), offset)
    arguments = [
        normal(case.N, case.C, *case.size),
        offset,
        normal(case.N, case.G * case.k**2, *out).sigmoid(),
        normal(case.outputs, case.C // case.groups, case.k, case.k),
        normal(case.outputs),
    ]
    grad = normal(case.N, case.outputs, *out)

    convolve, define = (
        partial(operator, stride=case.stride, padding=case.padding, dilation=case.dilation)
        for operator in (ops.modulated_deform_conv2d, reference.modulated_deform_conv2d)
    )
    truth = _run(define, [x.double() for x in arguments], grad.double())
    rounded = truth if dtype in TOLERANCE else _run(define, arguments, grad)
    yield from _Trial(
        case.name,
        "deform_conv2d",
        dtype,
        CONVOLUTION_NAMES,
        convolve,
        arguments,
        grad,
        truth,
        rounded,
    ).findings(MODES[-1:] if left_out(device) else MODES)


def check_repeated_images(device: str, seed: int, images: int) -> Iterator[Finding]:
    """Many times the same image, in bfloat16: each must give what one gives alone. With 3200
    images `value` has 2.2e9 elements, more than 32 bits can number; some 25 GB."""
    case = Case("2^31 values", N=1, shapes=((16, 16), (8, 8), (4, 4), (2, 2)), M=8, D=256, Q=40,
                K=4)  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    inputs = make_inputs(case, torch.bfloat16, device, generator, spread=3.0)
    single = [x.detach() for x in inputs.leaves()]
    grad = torch.randn((1, case.Q, case.M * case.D), generator=generator).to(device, torch.bfloat16)

    def attend(value: Tensor, *others: Tensor) -> Tensor:
        return ops.fused_deformable_attention(value, case.shapes, *others)

    torch.use_deterministic_algorithms(True)
    try:
        alone = _run(attend, single, grad)
        repeated = [x.expand(images, *x.shape[1:]) for x in single]
        results = _run(attend, repeated, grad.expand(images, -1, -1))
    finally:
        torch.use_deterministic_algorithms(False)
    for tensor, result, expected in zip(NAMES, results, alone, strict=True):
        wrong = sum(not torch.equal(image, expected[0]) for image in result)
        yield Finding(
            case.name, "fused", torch.bfloat16, "deterministic", tensor, wrong / images, 0.0
        )


def check_repeated_queries(device: str, seed: int, queries: int) -> Iterator[Finding]:
    """The same query many times, forward, in bfloat16; 1.1 million have 2.2e9 outputs."""
    case = Case("2^31 outputs", N=1, shapes=((16, 16),), M=8, D=256, Q=1, K=1)
    generator = torch.Generator().manual_seed(seed)
    inputs = make_inputs(case, torch.bfloat16, device, generator, spread=3.0)
    value, *others = (x.detach() for x in inputs.leaves())
    expected = ops.fused_deformable_attention(value, case.shapes, *others)
    repeated = [x.expand(-1, queries, *x.shape[2:]) for x in others]
    output = ops.fused_deformable_attention(value, case.shapes, *repeated)
    wrong = sum(
        not torch.equal(part, expected.expand_as(part)) for part in output.split(100_000, 1)
    )
    yield Finding(case.name, "fused", torch.bfloat16, "default", "output", float(wrong), 0.0)


def _run(operator: Operator, arguments: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The operator's output and the gradients of all its tensors."""
    leaves = [x.detach().requires_grad_() for x in arguments]
    output = operator(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def _in_chunks(
    definition: Operator, arguments: list[Tensor], case: Case, grad: Tensor
) -> list[Tensor]:
    """`_run` of a definition, so many queries at a time that they fit in memory."""
    value, *others = arguments
    wide = reference.accumulation_dtype(value.dtype)
    grad_value = torch.zeros_like(value, dtype=wide)
    outputs: list[Tensor] = []
    grads: list[list[Tensor]] = []
    for first in range(0, max(case.Q, 1), CHUNK):
        part = slice(first, first + CHUNK)
        output, of_value, *of_others = _run(
            lambda value, *x: definition(value, case.shapes, *x),
            [value, *(x[:, part] for x in others)],
            grad[:, part],
        )
        outputs.append(output)
        grad_value += of_value
        grads.append(of_others)
    joined = [torch.cat(parts, 1) for parts in zip(*grads, strict=True)]
    return [torch.cat(outputs, 1), grad_value.to(value.dtype), *joined]


def _strided(tensor: Tensor) -> Tensor:
    """Equal, but every other element in memory is NaN, and dimensions lie in reverse order."""
    reverse = list(range(tensor.dim()))[::-1]
    turned = tensor.permute(reverse).contiguous()
    gaps = torch.stack([turned, torch.full_like(turned, float("nan"))], -1)
    return gaps[..., 0].permute(reverse)


def _shifted(tensor: Tensor) -> Tensor:
    memory = tensor.new_empty(tensor.numel() + 1)
    return memory[1:].copy_(tensor.flatten()).view(tensor.shape)


def _poison(tensors: list[Tensor], dtype: torch.dtype) -> None:
    blocks = [
        torch.full_like(x, float("nan"), dtype=kind)
        for x in tensors
        for kind in (dtype, reference.accumulation_dtype(dtype))
    ]
    del blocks


def _compare(result: Tensor, exact: Tensor, rounded: Tensor, scale: float) -> tuple[float, float]:
    """The relative error and the allowed one, in the norm in which the former is the greater part
    of the latter."""
    if result.shape != exact.shape:
        return float("inf"), 0.0
    measured = []
    for order in (2.0, float("inf")):
        if result.dtype in TOLERANCE:
            allowed = TOLERANCE[result.dtype] * scale
        else:
            # Of a few numbers, all may happen to need next to no rounding.
            least = torch.finfo(result.dtype).eps / 4
            allowed = max(2 * _error(rounded, exact, order), least)
        measured.append((_error(result, exact, order), allowed))
    # A NaN must not lose.
    return max(measured, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else 1e300)


def _error(result: Tensor, exact: Tensor, order: float) -> float:
    if exact.numel() == 0:
        return 0.0
    size = torch.linalg.vector_norm(exact, order).item()
    difference = torch.linalg.vector_norm(result.double() - exact, order).item()
    # A gradient that is zero by symmetry (one point: its weight is 1) is compared absolutely.
    return difference / size if size > 1e-12 else difference
