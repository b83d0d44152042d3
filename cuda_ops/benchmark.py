"""Time and memory of `fused_deformable_attention` and of others, in one run.

Measurements take turns: in each round every contender is called a few times, so that whatever else
the machine does falls on all of them.
"""

import ctypes
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cuda_ops.cases import Case, Inputs, make_inputs
from cuda_ops.contenders import contender
from cuda_ops.library import library_path
from cuda_ops.memory import forward_and_both, measure

CPU_CASES = (
    Case("demo encoder", N=8, shapes=((16, 16), (8, 8), (4, 4), (2, 2)), M=2, D=32, Q=340, K=4),
    Case("demo decoder", N=8, shapes=((16, 16), (8, 8), (4, 4), (2, 2)), M=2, D=32, Q=30, K=4),
    Case("256x256 encoder", N=2, shapes=((32, 32), (16, 16), (8, 8), (4, 4)), M=8, D=32, Q=1360,
         K=4),
    Case("480x640 encoder", N=1, shapes=((60, 80), (30, 40), (15, 20), (8, 10)), M=8, D=32, Q=6380,
         K=4),
    Case("480x640 decoder", N=1, shapes=((60, 80), (30, 40), (15, 20), (8, 10)), M=8, D=32, Q=300,
         K=4),
)  # fmt: skip
CUDA_CASES = (
    *CPU_CASES,
    Case("800x1333 encoder", N=2, shapes=((100, 167), (50, 84), (25, 42), (13, 21)), M=8, D=32,
         Q=22223, K=4),
    Case("800x1333 decoder", N=2, shapes=((100, 167), (50, 84), (25, 42), (13, 21)), M=8, D=32,
         Q=300, K=4),
)  # fmt: skip
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
# Calls on a GPU go through copies of the inputs in turn: one set alone might stay in its L2 cache.
INPUT_SETS = {"cpu": 1, "cuda": 3}
# Largest relative error (Frobenius norm, outputs and gradients) against the fused operator. A
# location that rounding moves into the next pixel turns its whole gradient; in 16 bits, where the
# others round locations too, that happens to many.
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.5, torch.float16: 0.5}
ROUNDS = (5, 200)  # fewest and most


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median and quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One contender on one case. `failed` says why there are no figures; `difference` is its
    relative error against the fused operator; memory is in MiB, output and gradients included."""

    case: str
    dtype: str
    contender: str
    forward: Timing | None = None
    both: Timing | None = None
    forward_memory: float | None = None
    both_memory: float | None = None
    difference: float | None = None
    failed: str | None = None


def benchmark(
    device: str, spread: float, seconds: float, beside: Sequence[str] = ()
) -> Iterator[list[Row]]:
    """Yields the rows of one case and dtype at a time, the fused operator's first.

    Args:
        device: "cpu" or "cuda".
        spread: standard deviation of the offsets in pixels.
        seconds: for each contender's forward, and for its both passes.
        beside: further contenders as NAME=MODULE:FUNCTION, see `contenders.beside`.

    Raises:
        ValueError: an entry of `beside` is malformed or cannot be imported.
    """
    specs = {"fused": "fused", "grid_sample": "grid_sample"}
    for entry in beside:
        name, equals, spec = entry.partition("=")
        if not (name and equals and spec) or name in specs:
            raise ValueError(f"--beside got {entry!r}, expected a new NAME=MODULE:FUNCTION")
        contender(spec)
        specs[name] = spec
    for case in CUDA_CASES if device == "cuda" else CPU_CASES:
        for dtype in DTYPES[device]:
            yield _compare(case, dtype, device, spread, seconds, specs)


def _compare(
    case: Case, dtype: torch.dtype, device: str, spread: float, seconds: float,
    specs: dict[str, str],
) -> list[Row]:  # fmt: skip
    sets = [
        make_inputs(case, dtype, device, torch.Generator().manual_seed(seed), spread)
        for seed in range(INPUT_SETS[device])
    ]
    expected = _results(specs["fused"], case, sets[0])
    rows: dict[str, dict[str, Any]] = {}
    forward: dict[str, Callable[[], object]] = {}
    both: dict[str, Callable[[], object]] = {}
    for name, spec in specs.items():
        rows[name] = {"case": case.name, "dtype": _short(dtype), "contender": name}
        try:
            difference = _difference(_results(spec, case, sets[0]), expected)
        except Exception as error:  # of code that is not ours, which may raise anything
            if spec in ("fused", "grid_sample"):
                raise
            message = str(error).strip().splitlines() or [""]
            rows[name]["failed"] = f"{type(error).__name__}: {message[0]}"
            continue
        if name != "fused":
            rows[name]["difference"] = difference
        if not difference <= TOLERANCE[dtype]:
            rows[name]["failed"] = f"disagrees: relative error {difference:.1e}"
            continue
        calls = [forward_and_both(spec, case, inputs) for inputs in sets]
        forward[name] = _in_turn([call[0] for call in calls])
        both[name] = _in_turn([call[1] for call in calls])
    if device == "cuda":
        rows["deterministic"] = {**rows["fused"], "contender": "deterministic"}
        both["deterministic"] = both["fused"]
    for field, calls_of in (("forward", forward), ("both", both)):
        for name, timing in times(calls_of, device, seconds, _mode).items():
            rows[name][field] = timing
    for name in forward:
        memory = measure(specs[name], case, sets[0])
        if memory is not None:
            rows[name]["forward_memory"], rows[name]["both_memory"] = memory
    return [Row(**row) for row in rows.values()]


def _results(spec: str, case: Case, inputs: Inputs) -> list[Tensor]:
    value, points, offsets, logits = inputs.leaves()
    output = contender(spec)(value, case.shapes, points.detach(), offsets, logits)
    grad = torch.linspace(-1, 1, output.numel(), device=value.device).view_as(output)
    grads = torch.autograd.grad(output, (value, offsets, logits), grad.to(output.dtype))
    return [output.detach(), *grads]


def _difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    errors = [
        ((a.double() - b.double()).norm() / b.double().norm()).item()
        for a, b in zip(results, expected, strict=True)
    ]
    return max(errors)


def _in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """One call that is each of `calls` in turn."""
    number = 0

    def call() -> object:
        nonlocal number
        number += 1
        return calls[number % len(calls)]()

    return call


def times(
    calls: dict[str, Callable[[], object]],
    device: str,
    seconds: float,
    mode: Callable[[str], AbstractContextManager[None]],
) -> dict[str, Timing]:
    """Each of `calls` in turns, under its `mode`, until the slowest took about `seconds`."""
    clock = _milliseconds_on_gpu if device == "cuda" else _milliseconds
    estimates = {}
    for name, call in calls.items():
        with mode(name):
            call()
            estimates[name] = max(clock(call), 1e-3)
    slowest = max(estimates.values())
    rounds = min(ROUNDS[1], max(ROUNDS[0], int(1000 * seconds / slowest)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            with mode(name):
                call()  # what the one before left in the caches is not this one's
                for _ in range(min(5, max(1, int(slowest / estimates[name])))):
                    samples[name].append(clock(call))
    return {name: _timing(sorted(taken)) for name, taken in samples.items()}


def _timing(taken: list[float]) -> Timing:
    low, median, high = (taken[int(len(taken) * share)] for share in (0.25, 0.5, 0.75))
    return Timing(round(median, 4), round(low, 4), round(high, 4))


def _mode(name: str) -> AbstractContextManager[None]:
    return deterministic() if name == "deterministic" else nullcontext()


@contextmanager
def deterministic() -> Iterator[None]:
    """torch's deterministic mode for as long as it lasts."""
    # The mode also fills fresh memory, for debugging, which would be measured along.
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]


HEAD = (
    f"{'case':<18}{'dtype':<10}{'':<15}{'forward ms':>12}{'':>9}{'fwd+bwd ms':>12}{'':>9}"
    f"{'MiB':>9}{'':>9}{'MiB f+b':>9}{'':>9}"
)


def table(rows: Sequence[Row]) -> str:
    """The rows of one case as text; in brackets, how many times the fused operator's figure."""
    fused = rows[0]
    lines = []
    for row in rows:
        line = f"{row.case:<18}{row.dtype:<10}{row.contender:<15}"
        if row.failed is not None:
            lines.append(line + row.failed)
            continue
        line += _against(_median(row.forward), _median(fused.forward), digits=3)
        line += _against(_median(row.both), _median(fused.both), digits=3)
        line += _against(row.forward_memory, fused.forward_memory, digits=1, width=9)
        line += _against(row.both_memory, fused.both_memory, digits=1, width=9)
        lines.append(line.rstrip())
    return "\n".join(lines)


def _median(timing: Timing | None) -> float | None:
    return None if timing is None else timing.median


def _against(figure: float | None, base: float | None, digits: int, width: int = 12) -> str:
    if figure is None or not base:
        return f"{'-':>{width}}{'':>9}"
    ratio = f"({figure / base:.1f}x)"
    return f"{figure:>{width}.{digits}f}{ratio:>9}"


def surroundings(device: str, spread: float) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "inputs": (
            "values and logits standard normal; reference points at the tokens' centres (encoder) "
            f"or uniform (decoder); offsets normal, standard deviation {spread} px of their level; "
            f"calls take turns on {INPUT_SETS[device]} set(s) of them, caches are not flushed"
        ),
        "comparison": (
            "all in one run, in turns, in the same dtype, softmax and locations included; "
            "grid_sample is the formulation that transformers ships"
        ),
        "unit": (
            "milliseconds a call, median and quartiles; peak MiB of one call beyond its inputs, "
            "output and gradients included"
        ),
    }
    if device == "cuda":
        facts["cuda"] = torch.version.cuda
    else:
        facts["instruction set"] = instruction_set()
    return facts


def instruction_set() -> str:
    """The one that the CPU's kernels use: "baseline", "avx2" or "avx512"."""
    name = ctypes.CDLL(str(library_path("cpu"))).cuda_ops_instruction_set
    name.restype = ctypes.c_char_p
    return str(name().decode())


def report(rows: Sequence[Row], facts: dict[str, Any]) -> dict[str, Any]:
    """What `--output` writes."""
    return {**facts, "rows": [asdict(row) for row in rows]}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def _milliseconds_on_gpu(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
