"""A step cut into more passes by a bound on padding, over two ranks: the same loss and gradient."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.tracking import read_lines

ROOT = Path(__file__).resolve().parents[2]


SECONDS = 0.02  # that each image takes longer in SLOW
SLOW = f"""
import sys, time
from pipeline.cli import main
from pipeline.__main__ import COMMANDS
from pipeline.data import loader

decode = loader.decode

def slow(*given):
    time.sleep({SECONDS})
    return decode(*given)

loader.decode = slow
sys.exit(main("slow", "", COMMANDS, sys.argv[1:]))
"""


def train(drawn, folder: Path, program: list[object], *options: object) -> list[dict]:
    arguments = [
        sys.executable, *program, "train", "demo", "--output", folder,
        "--data.train", drawn.shards / "train", "--data.val", drawn.shards / "val",
        "--optimizer.batch-size", 16, "--schedule.epochs", 1, "--engine.log-every", 1,
        "--engine.precision", "fp32",
        # Without padding: it would change the group norms of the small backbone.
        "--augment.crop-probability", 1, "--augment.crop-short-sides", 96,
        "--augment.crop-sides", 64, 64, *options,
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, arguments)), cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return read_lines(folder / "metrics.jsonl")


@pytest.mark.slow
def test_more_passes_give_the_same_steps(drawn, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    plain = train(drawn, tmp_path / "plain", [tmp_path / "slow.py"], "--engine.loader-workers", 0)
    require_waits(plain)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
                "-m", "pipeline"]  # fmt: skip
    # Stage 2 reduces gradients after each pass. test_update.py has the other stages.
    cut = train(
        drawn, tmp_path / "cut", torchrun, "--engine.group-by-shape",
        "--engine.max-padded-pixels", 3 * 64 * 64, "--engine.zero-stage", 2,
        "--engine.loader-workers", 1,
    )  # fmt: skip
    compare(plain, cut)


def compare(plain: list[dict], cut: list[dict]) -> None:
    steps = [[line for line in lines if line["kind"] == "train"] for lines in (plain, cut)]
    # 40 images in batches of 16: the third step ends the epoch and begins the next.
    for lines in steps:
        assert [(line["step"], line["epoch"]) for line in lines] == [(1, 0.4), (2, 0.8), (3, 1.0)]
    first, second, _ = zip(*steps, strict=True)
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=1e-5)
    assert first[1]["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=1e-4)
    # After Adam's first step, which is as long for the smallest gradient as for the largest.
    assert second[1]["loss"] == pytest.approx(second[0]["loss"], rel=1e-4)
    assert second[1]["grad_norm"] == pytest.approx(second[0]["grad_norm"], rel=0.02)
    assert all(0 < line["data_wait"] <= 16 / line["images_per_second"] for line in steps[1])
    for lines in (plain, cut):
        assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [3]


def require_waits(lines: list[dict]) -> None:
    """The wait for data is that for the slow loader: of 16 images, and no more than the step."""
    for line in lines:
        if line["kind"] == "train":
            assert 16 * SECONDS <= line["data_wait"] <= 16 / line["images_per_second"]
