"""`python -m cuda_ops benchmark`: what it compares is equal, and what it reports is measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cuda_ops import benchmark, convolution_benchmark
from cuda_ops.__main__ import main
from cuda_ops.cases import Case, make_inputs
from cuda_ops.contenders import contender, grid_sample_attention
from cuda_ops.ops import fused_deformable_attention

TINY = Case("tiny", N=1, shapes=((4, 4), (2, 2)), M=2, D=8, Q=20, K=2)
EQUAL = Case("equal", N=2, shapes=((5, 4), (2, 3)), M=2, D=8, Q=7, K=3)
ROOT = Path(__file__).parents[2]
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)


def equal_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return make_inputs(EQUAL, torch.float64, "cpu", generator, 2.0, margin=0.2).leaves()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One small case in float32, one convolution, and the options for them."""
    monkeypatch.setattr(benchmark, "CPU_CASES", (TINY,))
    monkeypatch.setattr(benchmark, "DTYPES", {"cpu": (torch.float32,)})
    monkeypatch.setattr(convolution_benchmark, "CASES", {"small": (8, 2, 5, 6)})
    return ["benchmark", "--device", "cpu", "--seconds", "0.01"]


@needs_proc
def test_table_and_json(
    quick: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "figures.json"
    threads = torch.get_num_threads()
    try:
        options = ["--threads", "1", "--spread", "3", "--output", str(output)]
        assert main([*quick, *options]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "tiny" in printed
    assert "(1.0x)" in printed
    figures = json.loads(output.read_text())
    assert figures["threads"] == 1
    assert figures["torch"] == torch.__version__
    assert figures["instruction set"] in ("baseline", "avx2", "avx512")
    assert "standard deviation 3.0 px" in figures["inputs"]
    *attention, ours, theirs = figures["rows"]
    assert [row["contender"] for row in attention] == ["fused", "grid_sample"]
    assert [row["contender"] for row in (ours, theirs)] == ["ours", "torchvision"]
    assert all(row["both"]["median"] > 0 for row in (ours, theirs))
    for row in attention:
        assert row["failed"] is None
        assert row["dtype"] == "float32"
        assert row["forward"]["median"] < row["both"]["median"]
        for timing in (row["forward"], row["both"]):
            assert 0 < timing["low"] <= timing["median"] <= timing["high"]
        assert row["forward_memory"] >= 0
        assert row["both_memory"] >= 0
    assert 0 < figures["rows"][1]["difference"] < 1e-4


PEAK = """
import torch
from cuda_ops import memory

def call():
    torch.ones(16 << 20).sum()  # 64 MiB, freed
    return torch.ones(8 << 20)  # 32 MiB, kept

print(memory._of_process(call))
"""


@needs_proc
def test_memory_is_the_peak_beyond_what_was_there_before() -> None:
    """In a process of its own, as `measure` does: in this one, earlier tests have left blocks that
    the allocator hands out again."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 62 < float(done.stdout) < 80


def test_the_grid_sample_formulation_computes_the_same_attention() -> None:
    inputs = equal_inputs()
    results = [
        operator(inputs[0], EQUAL.shapes, *inputs[1:])
        for operator in (grid_sample_attention, fused_deformable_attention)
    ]
    torch.testing.assert_close(*results)


def test_the_grid_sample_formulation_is_that_of_transformers() -> None:
    source = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    value, points, offsets, logits = equal_inputs()
    sizes = torch.tensor(EQUAL.shapes)
    starts = torch.tensor([0, 20])
    # As in its attention module: normalise offsets by (w, h), softmax over all points.
    normaliser = torch.stack([sizes[:, 1], sizes[:, 0]], -1)
    locations = points[:, :, None, :, None] + offsets / normaliser[None, None, None, :, None]
    weights = logits.softmax(-1).view(offsets.shape[:-1])
    theirs = source.MultiScaleDeformableAttention()
    expected = theirs(value, sizes, list(EQUAL.shapes), starts, locations, weights, 64)
    result = grid_sample_attention(value, EQUAL.shapes, points, offsets, logits)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    leaves = (value, offsets, logits)
    grads = [torch.autograd.grad(x.square().sum(), leaves) for x in (result, expected)]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


OTHERS = """
import torch
from cuda_ops.reference import multi_scale_deformable_attention

class Right:
    @staticmethod
    def apply(value, spatial_shapes, level_start_index, locations, weights, im2col_step):
        assert spatial_shapes.dtype == level_start_index.dtype == torch.int64
        assert level_start_index.tolist() == [0, 16] and im2col_step == 64
        return multi_scale_deformable_attention(value, spatial_shapes.tolist(), locations, weights)

def wrong(value, spatial_shapes, *others):
    return 1.1 * Right.apply(value, spatial_shapes, *others)

def narrow(value, *others):
    raise RuntimeError(f"not implemented for {value.dtype}\\nand a backtrace")
"""


def test_other_implementations_are_checked_before_they_are_timed(
    quick: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "others.py").write_text(OTHERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(benchmark, "measure", lambda *_: None)
    entries = ["right=others:Right.apply", "wrong=others:wrong", "narrow=others:narrow"]
    output = tmp_path / "figures.json"
    options = [option for entry in entries for option in ("--beside", entry)]
    assert main([*quick, *options, "--output", str(output)]) == 0
    rows = {row["contender"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows["right"]["failed"] is None
    assert rows["right"]["both"]["median"] > 0
    assert rows["wrong"]["forward"] is rows["wrong"]["both"] is None
    assert rows["wrong"]["failed"].startswith("disagrees: relative error 1.0e-01")
    assert rows["narrow"]["failed"] == "RuntimeError: not implemented for torch.float32"
    assert "not implemented for torch.float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    "entry", ["nothing", "=os:getcwd", "fused=os:getcwd", "x=os:no_such", "x=no.module:f", "x=os"]
)
def test_a_mistake_in_beside_is_one_line(
    entry: str, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*quick, "--beside", entry]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --beside got")
    assert error.count("\n") == 1


def test_a_contender_is_called_with_locations_and_weights_in_the_dtype_of_value(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "seen.py").write_text(
        "def f(value, sizes, starts, locations, weights, step):\n"
        "    return value, locations, weights\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    inputs = make_inputs(TINY, torch.bfloat16, "cpu", torch.Generator().manual_seed(0), 2.0)
    value, *others = inputs.leaves()
    seen = contender("seen:f")(value, TINY.shapes, *others)
    assert [x.dtype for x in seen] == [torch.bfloat16] * 3
    assert [list(x.shape) for x in seen[1:]] == [[1, 20, 2, 2, 2, 2], [1, 20, 2, 2, 2]]


def test_deterministic_mode_is_measured_without_filling_and_left_as_it_was() -> None:
    seen = []

    def call() -> None:
        filling = torch.utils.deterministic.fill_uninitialized_memory
        seen.append((torch.are_deterministic_algorithms_enabled(), filling))

    calls = {"deterministic": call, "fused": call}
    timings = benchmark.times(calls, "cpu", 0.0, benchmark._mode)
    assert timings["fused"].median >= 0
    assert set(seen) == {(True, False), (False, True)}
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_instruction_set_is_the_one_in_use() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from cuda_ops.benchmark import *; print(instruction_set())"],
        env={**os.environ, "CUDA_OPS_CPU": "baseline"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "baseline\n"
