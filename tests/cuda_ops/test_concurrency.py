"""Threads and processes that call the CPU operators at the same time."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from cuda_ops.cases import Case, make_inputs
from cuda_ops.ops import fused_deformable_attention

CASE = Case("threads", N=2, shapes=((16, 16), (8, 8)), M=4, D=32, Q=200, K=4)


def work(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = make_inputs(CASE, torch.float32, "cpu", generator, spread=2.0).leaves()
    output = fused_deformable_attention(inputs[0], CASE.shapes, *inputs[1:])
    return [output, *torch.autograd.grad(output.square().sum(), inputs)]


def test_threads_do_not_disturb_each_other() -> None:
    expected = [work(seed) for seed in range(4)]
    start = threading.Barrier(4)

    def repeatedly(seed: int) -> bool:
        start.wait()
        return all(
            torch.equal(a, b)
            for _ in range(10)
            for a, b in zip(work(seed), expected[seed], strict=True)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeatedly, range(4)))


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )


PRELUDE = """
import os, time, torch
from cuda_ops.cases import Case, make_inputs
from cuda_ops.ops import fused_deformable_attention
case = Case("fork", N=2, shapes=((20, 20),), M=4, D=32, Q=400, K=4)
inputs = make_inputs(case, torch.float32, "cpu", torch.Generator().manual_seed(0), 2.0).leaves()
def work():
    output = fused_deformable_attention(inputs[0], case.shapes, *inputs[1:])
    return [output, *torch.autograd.grad(output, inputs, torch.ones_like(output))]
def as_expected():
    return all(torch.equal(a, b) for a, b in zip(work(), expected, strict=True))
torch.set_num_threads(2)
expected = work()
"""


def test_forked_loader_workers_can_call_what_the_parent_called() -> None:
    """As with torch's own operators, whose OpenMP pool does not survive a fork, by one thread:
    so the DataLoader sets up its workers."""
    done = python(
        PRELUDE
        + """
class Set(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return as_expected()
loader = torch.utils.data.DataLoader(Set(), num_workers=2, timeout=300)
print([x.item() for x in loader])
"""
    )
    assert done.stdout == "[True, True, True, True]\n", done.stderr


def test_a_forked_process_with_one_thread_does_not_hang() -> None:
    done = python(
        PRELUDE
        + """
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(7 if as_expected() else 1)
for _ in range(600):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
print(os.waitstatus_to_exitcode(status) if ended else "hangs")
"""
    )
    assert done.stdout == "7\n", done.stderr
