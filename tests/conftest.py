"""A small set of drawn pictures as shards, shared by the tests of training and jobs.

Also what several test processes (`make test`) need to get along.
"""

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# The same examples each time, and no limit to the time of one: who changes something else, or has a
# busy machine, sees no failure of chance. `--hypothesis-profile default` draws others.
settings.load_profile("ci")

ONE_OF_SEVERAL = "PYTEST_XDIST_WORKER" in os.environ  # processes that run the tests
if ONE_OF_SEVERAL:
    # A core each; set before torch is imported, and for the processes that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"
    # Ray's would be 15, behind the tests that do not wait for them.
    os.environ.update(RAY_worker_niceness="0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each of several processes begins with an equal stretch of the tests. Long ones come first in
    it, lest one process is left with them at the end, and a file's in one stretch, so that what
    they share is made once. Every other stretch has its files in reverse: no two processes in a
    row begin with clusters."""
    if not ONE_OF_SEVERAL:
        return
    processes = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    long = [item for item in items if item.get_closest_marker("slow")]
    short = iter([item for item in items if not item.get_closest_marker("slow")])
    files = list(dict.fromkeys(item.path for item in long))
    ordered: list[pytest.Item] = []
    for k in range(processes):
        own = files[k::processes][:: -1 if k % 2 else 1]
        stretch = [item for file in own for item in long if item.path == file]
        left = (len(items) - len(ordered)) // (processes - k)
        ordered += [*stretch, *islice(short, max(0, left - len(stretch)))]
    items[:] = [*ordered, *short]


@pytest.fixture(scope="module", autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """After each file of tests: glibc would keep gigabytes of freed models, of which Ray's memory
    monitor, near a machine's end, kills the workers of other tests."""
    yield
    gc.collect()
    gc.freeze()  # half a million objects of imported libraries, not to be searched each time
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


@dataclass(frozen=True)
class DrawnData:
    """COCO-format originals and their shards, for a train and a val split."""

    coco: Path
    shards: Path

    def annotations(self, split: str) -> dict:
        return json.loads((self.coco / "annotations" / f"instances_{split}.json").read_text())


MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """`made_once(name, make)`: the folder of that name, which `make(folder)` has filled once for
    all processes of the tests. They leave it as it is."""
    place = tmp_path_factory.getbasetemp()
    place = (place.parent if ONE_OF_SEVERAL else place) / "made_once"
    place.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = place / name, place / f"{name}.done"
        with FileLock(place / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def drawn(made_once: MadeOnce) -> DrawnData:
    folder = made_once("drawn", draw)
    return DrawnData(folder / "coco", folder / "shards")


def draw(folder: Path) -> None:
    coco = folder / "coco"
    module("data_prep", "synthesize", "--output", coco, "--train", 40, "--val", 12)
    for split in ("train", "val"):
        module(
            "data_prep", "convert", "--images", coco / split,
            "--annotations", coco / "annotations" / f"instances_{split}.json",
            "--output", folder / "shards" / split, "--samples-per-shard", 16,
        )  # fmt: skip


def module(*arguments: object) -> str:
    """Runs `python -m …` in the checkout and returns what it printed."""
    done = run_module(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_module(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


@pytest.fixture(scope="session")
def run_command():
    """`run_command("pipeline", "train", …)`: a real process, its status and its output."""
    return run_module
