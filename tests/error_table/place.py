"""Where a mistake is made: a folder with small data, a run and a checkpoint; and a process for it.

Each command runs in a fork of the test process, which has imported all that takes long: what is
patched, limited or taken away there is gone with it.
"""

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from cuda_ops.__main__ import main as cuda_ops_main
from data_prep.cli import main as data_prep_main
from data_prep.convert import convert
from data_prep.synthesize import synthesize
from jobs.__main__ import COMMANDS as JOBS
from model.detr import build_model
from pipeline.__main__ import COMMANDS as PIPELINE
from pipeline.checkpoint_store import Progress, write
from pipeline.cli import main
from pipeline.dataset import open_dataset
from pipeline.recipes import recipe
from pipeline.run_folder import claim

DOORS: dict[str, Callable[[list[str]], int]] = {
    "cuda_ops": cuda_ops_main,
    "data_prep": data_prep_main,
    "jobs": lambda argv: main("python -m jobs", "", JOBS, argv),
    "pipeline": lambda argv: main("python -m pipeline", "", PIPELINE, argv),
}
DEADLINE = 300.0  # seconds; a command here takes less than ten, on a slow machine too


@dataclass(frozen=True)
class Mistake:
    """What a user does wrong.

    `prepare(folder)` makes the situation, in the process of the command. `says` are parts of the
    line that must be there, whatever docs/errors.md has; `kept` are files and folders below the
    place that must be after it what they were before.
    """

    situation: str
    command: str
    says: tuple[str, ...]
    remedy: str
    prepare: Callable[[], None] = lambda: None
    status: int = 2
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str


def make_place(folder: Path) -> None:
    """coco/ and shards/ with 24 and 8 pictures, and run/, a run of demo with one checkpoint."""
    import_what_takes_long()
    synthesize(folder / "coco", 24, 8, 0, 1)
    annotations = folder / "coco" / "annotations"
    for split in ("train", "val"):
        file = annotations / f"instances_{split}.json"
        convert(folder / "coco" / split, file, folder / "shards" / split)
    config = recipe("demo")
    data = replace(
        config.data, train=str(folder / "shards" / "train"), val=str(folder / "shards" / "val")
    )
    config = replace(config, data=data)
    dataset = open_dataset(config)
    config = replace(config, model=replace(config.model, num_classes=dataset.labels.num_classes))
    (folder / "run").mkdir()
    claim(folder / "run", config, dataset)
    torch.manual_seed(0)
    model = {
        "model": build_model(config.model).state_dict(),
        "config": config.to_json(),
        "labels": asdict(dataset.labels),
        "progress": asdict(Progress(2, 1, 0, 0.5, 2)),
    }
    write(folder / "run", Progress(2, 1, 0, 0.5, 2), model, {})
    (folder / "run" / "best.json").write_text('{"checkpoint": "step-00000002"}')


def import_what_takes_long() -> None:
    """Here once, rather than in each fork."""
    import ray.job_submission  # noqa: F401

    import pipeline.look_inside
    import pipeline.train  # noqa: F401

    if not torch.cuda.is_available():  # it chooses its device at import
        import deepspeed  # noqa: F401


def run(mistake: Mistake, place: Path, work: Path, debug: bool = False) -> Said:
    """Copies the place, and has a fork make the mistake there."""
    shutil.copytree(place, work, dirs_exist_ok=True)
    out, err = work.parent / "stdout", work.parent / "stderr"
    child = os.fork()
    if not child:
        status = 99
        try:
            status = in_child(mistake, work, out, err, debug)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return Said(wait(child), out.read_text(), err.read_text(errors="backslashreplace"))


def in_child(mistake: Mistake, work: Path, out: Path, err: Path, debug: bool) -> int:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout's
    signal.setitimer(signal.ITIMER_REAL, 0)
    for file, number in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(  # noqa: SIM115
        2, "w", encoding="utf-8", errors="backslashreplace", closefd=False
    )
    os.chdir(work)
    torch.set_num_threads(1)
    mistake.prepare()
    _, _, door, *argv = shlex.split(mistake.command)
    try:
        return DOORS[door]([*argv, *(["--debug"] if debug else [])])
    except SystemExit as stop:
        if isinstance(stop.code, str):  # as the interpreter does
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 1


def wait(child: int) -> int:
    """The exit status of a process, which is killed at the deadline."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


def without_privileges() -> None:
    """What root may do beyond its files' permissions is taken from this process."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def contents(paths: list[Path]) -> dict[str, bytes]:
    """Every file at or below the paths."""
    files = [f for p in paths for f in ([p] if p.is_file() else sorted(p.rglob("*")))]
    with contextlib.suppress(FileNotFoundError):
        return {str(f): f.read_bytes() for f in files if f.is_file()}
    raise AssertionError("a file went away while it was read")
