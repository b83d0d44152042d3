"""Time and memory of `fused_deformable_attention` against the grid_sample formulation.

The latter is how attention is written without a kernel of one's own, and what transformers ships:
softmax and locations in separate operations, one `grid_sample` per level, a stack, a weighted sum.
"""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from cuda_ops import ops
from cuda_ops.cases import Case, Inputs, make_inputs

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
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Row:
    """Median milliseconds of one case; `both` is forward + backward, `deterministic` the same in
    torch's deterministic mode (the CPU's kernels always are, so None there)."""

    case: str
    dtype: str
    forward: float
    both: float
    deterministic: float | None
    grid_forward: float
    grid_both: float


def grid_sample_attention(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """The comparison: arguments and result as `fused_deformable_attention`, 2-d references."""
    batch, queries, heads, levels, points, _ = sampling_offsets.shape
    channels = value.shape[3]
    sizes = sampling_offsets.new_tensor([(w, h) for h, w in shapes])
    locations = reference_points[:, :, None, :, None] + sampling_offsets / sizes[:, None]
    grids = (2 * locations - 1).to(value.dtype)
    weights = attention_logits.softmax(-1).view(batch, queries, heads, 1, levels * points)
    sampled = []
    tokens = value.split([h * w for h, w in shapes], 1)
    for level, (height, width) in enumerate(shapes):
        image = tokens[level].permute(0, 2, 3, 1).reshape(-1, channels, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(grid_sample(image, grid, align_corners=False))
    stacked = torch.stack(sampled, -2).flatten(-2)  # [N * M, D, Q, L * K]
    weights = weights.permute(0, 2, 3, 1, 4).reshape(-1, 1, queries, levels * points)
    summed = (stacked * weights).sum(-1).view(batch, heads * channels, queries)
    return summed.transpose(1, 2).contiguous()


def benchmark(device: str, spread: float, seconds: float) -> list[Row]:
    """Times every case, each measurement for about `seconds` after a warm-up."""
    rows = []
    for case in CUDA_CASES if device == "cuda" else CPU_CASES:
        for dtype in DTYPES:
            inputs = make_inputs(case, dtype, device, torch.Generator().manual_seed(0), spread)
            forward, both = _times(ops.fused_deformable_attention, inputs, case, seconds)
            deterministic = _deterministic(inputs, case, seconds) if device == "cuda" else None
            grid = _times(grid_sample_attention, inputs, case, seconds)
            name = str(dtype).removeprefix("torch.")
            rows.append(Row(case.name, name, forward, both, deterministic, *grid))
    return rows


def _deterministic(inputs: Inputs, case: Case, seconds: float) -> float:
    # The mode also fills fresh memory, for debugging, which would be measured along.
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        return _times(ops.fused_deformable_attention, inputs, case, seconds)[1]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]


def table(rows: Sequence[Row]) -> str:
    """The rows as text: milliseconds, and in brackets how many times grid_sample takes longer."""
    head = (
        f"{'case':<18}{'dtype':<10}{'forward':>18}{'forward+backward':>21}{'deterministic':>18}"
        f"{'grid_sample f':>15}{'f+b':>10}"
    )
    lines = [head]
    for row in rows:
        lines.append(
            f"{row.case:<18}{row.dtype:<10}"
            f"{_against(row.forward, row.grid_forward):>18}"
            f"{_against(row.both, row.grid_both):>21}"
            f"{_against(row.deterministic, row.grid_both):>18}"
            f"{row.grid_forward:>15.3f}{row.grid_both:>10.3f}"
        )
    return "\n".join(lines)


def _against(time: float | None, grid: float) -> str:
    return "-" if time is None else f"{time:.3f} ({grid / time:.1f}x)"


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
            f"or uniform (decoder); offsets normal, standard deviation {spread} px of their level"
        ),
        "comparison": "grid_sample formulation in the same dtype, softmax and locations included",
        "unit": "median milliseconds per call",
    }
    if device == "cuda":
        facts["cuda"] = torch.version.cuda
    return facts


def report(rows: Sequence[Row], facts: dict[str, Any]) -> dict[str, Any]:
    """What `--output` writes."""
    return {**facts, "rows": [asdict(row) for row in rows]}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _times(
    operator: Callable[..., Tensor], inputs: Inputs, case: Case, seconds: float
) -> tuple[float, float]:
    """Milliseconds of the forward without, and of forward + backward with gradients."""
    value, points, offsets, logits = inputs.leaves()
    # The encoder's reference points are constants; the decoder's are learned.
    points = points.detach().requires_grad_(case.Q != case.S)
    leaves = [x for x in (value, points, offsets, logits) if x.requires_grad]

    def forward() -> None:
        with torch.no_grad():
            operator(value, case.shapes, points, offsets, logits)

    grad = torch.ones_like(operator(value, case.shapes, points, offsets, logits))

    def both() -> None:
        output = operator(value, case.shapes, points, offsets, logits)
        torch.autograd.grad(output, leaves, grad)

    return _median(forward, value.device, seconds), _median(both, value.device, seconds)


def _median(call: Callable[[], None], device: torch.device, seconds: float) -> float:
    clock = _milliseconds_on_gpu if device.type == "cuda" else _milliseconds
    call()
    estimate = max(clock(call), 1e-3)
    repeats = min(1000, max(5, int(1000 * seconds / estimate)))
    for _ in range(max(1, repeats // 10)):
        call()
    return sorted(clock(call) for _ in range(repeats))[repeats // 2]


def _milliseconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def _milliseconds_on_gpu(call: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
