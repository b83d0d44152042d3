"""Peak memory of one call, beyond what its inputs hold; its output and gradients count.

On the CPU a fresh process does the call: `python -m cuda_ops.memory`, which `measure` starts.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from cuda_ops.cases import Case, Inputs, make_inputs
from cuda_ops.contenders import contender

CLEAR_PEAK = "5"  # proc(5), /proc/pid/clear_refs
SMALL = Case("small", N=1, shapes=((4, 4),), M=2, D=8, Q=16, K=2)


def forward_and_both(spec: str, case: Case, inputs: Inputs) -> list[Callable[[], object]]:
    """The two calls that are measured: the forward without gradients, and both passes."""
    operator = contender(spec)
    value, points, offsets, logits = inputs.leaves()
    # The encoder's reference points are constants; the decoder's are learned.
    points = points.detach().requires_grad_(case.Q != case.S)
    leaves = [x for x in (value, points, offsets, logits) if x.requires_grad]
    grad = value.new_ones(case.N, case.Q, case.M * case.D)

    def forward() -> object:
        with torch.no_grad():
            return operator(value, case.shapes, points, offsets, logits)

    def both() -> object:
        output = operator(value, case.shapes, points, offsets, logits)
        return output, torch.autograd.grad(output, leaves, grad)

    return [forward, both]


def measure(spec: str, case: Case, inputs: Inputs) -> list[float] | None:
    """MiB of the forward and of both passes; None where the system does not tell (not Linux)."""
    if inputs.value.is_cuda:
        return [_of_allocator(call) for call in forward_and_both(spec, case, inputs)]
    if not Path("/proc/self/clear_refs").exists():
        return None
    options = [
        spec,
        json.dumps(asdict(case)),
        str(inputs.value.dtype),
        str(torch.get_num_threads()),
    ]
    # Freed blocks go back to the system at once, so that each call is seen whole.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "cuda_ops.memory", *options],
        env={**os.environ, **malloc, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr[-2000:]}")
    figures: list[float] = json.loads(done.stdout)
    return figures


def _of_allocator(call: Callable[[], object]) -> float:
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _of_process(call: Callable[[], object]) -> float:
    Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
    before = _status("VmRSS")
    result = call()
    extra = _status("VmHWM") - before
    del result
    return extra / 2**10


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _main(spec: str, case_json: str, dtype_name: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    dtype = getattr(torch, dtype_name.removeprefix("torch."))
    fields = json.loads(case_json)
    case = Case(**{**fields, "shapes": tuple(tuple(shape) for shape in fields["shapes"])})
    generator = torch.Generator().manual_seed(0)
    # What a first call loads and starts is not the operator's.
    for call in forward_and_both(spec, SMALL, make_inputs(SMALL, dtype, "cpu", generator, 2.0)):
        call()
    inputs = make_inputs(case, dtype, "cpu", generator, 2.0)
    calls = forward_and_both(spec, case, inputs)
    print(json.dumps([_of_process(call) for call in calls]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
