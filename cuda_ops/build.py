"""Compiles the operators into shared libraries under `.build/cuda_ops`, with plain compiler calls.

Two libraries: the CPU's, always; CUDA's, wherever torch is a CUDA build. Both use the LibTorch
stable ABI at target 2.11, so one binary serves torch 2.11 and later. A library is rebuilt only
when its sources, flags, compiler or torch have changed.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from cuda_ops.library import FOLDER, SOURCES, file_digest, library_path, sources_digest, stamp_path

CUDA_ARCHITECTURES = ("80", "90", "100", "120")

TORCH = Path(torch.__file__).parent
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
INCLUDES = [f"-I{TORCH / 'include'}"]
HOST_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden"]
# Errno and floating point traps keep loops with calls or comparisons from vectorising; unlike
# -ffast-math, these two leave infinities, NaN and the order of sums alone.
KERNEL_FLAGS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}


class BuildError(Exception):
    """The operators cannot be built here; the message says why and what to do."""


@dataclass(frozen=True)
class Built:
    """One library: where it lies, what it runs on, and the seconds its build took (0: kept)."""

    device: str
    path: Path
    targets: tuple[str, ...]
    compiler: str
    seconds: float


def build(cpu_only: bool = False, force: bool = False) -> list[Built]:
    """Builds what is missing or out of date, and returns every library.

    Args:
        cpu_only: leave CUDA out though torch is a CUDA build.
        force: rebuild what is up to date.

    Raises:
        BuildError: a compiler is missing, does not fit torch, or fails.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with _lock(FOLDER / "lock"):
        for left in FOLDER.glob("*-*/"):  # by a build that was killed; jobs would take it along
            shutil.rmtree(left, ignore_errors=True)
        built = [_build_cpu(force)]
        if torch.version.cuda is not None and not cpu_only:
            built.append(_build_cuda(force))
    return built


def find_nvcc() -> Path:
    """nvcc from $CUDA_HOME, else from PyPI's packages beside torch, else from $PATH."""
    assert torch.version.cuda is not None
    major = torch.version.cuda.split(".")[0]
    places = [TORCH.parent / "nvidia" / f"cu{major}" / "bin" / "nvcc"]
    if "CUDA_HOME" in os.environ:
        places.insert(0, Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc")
    on_path = shutil.which("nvcc")
    if on_path is not None:
        places.append(Path(on_path).resolve())
    for place in places:
        if place.exists():
            return place
    raise BuildError(
        f"torch is built for CUDA {torch.version.cuda}, but there is no nvcc in $CUDA_HOME, "
        f"{places[-1].parent} or $PATH; install nvidia-cuda-nvcc, nvidia-cuda-crt, nvidia-nvvm "
        f"and nvidia-cuda-cccl {major}.* from PyPI, or build with --cpu-only"
    )


def _build_cpu(force: bool) -> Built:
    compiler = os.environ.get("CXX", "g++")
    flags = [*HOST_FLAGS, *DEFINES, *INCLUDES]
    sets = INSTRUCTION_SETS if platform.machine() == "x86_64" else {"baseline": []}
    cpu = SOURCES / "cpu"
    units = {
        "ops": [str(SOURCES / "ops.cpp"), *flags],
        "attention": [str(cpu / "attention.cpp"), *flags],
        "dispatch": [str(cpu / "dispatch.cpp"), *flags],
    }
    for name, instructions in sets.items():
        units[name] = [
            str(cpu / "kernels.cpp"),
            *(*HOST_FLAGS, *KERNEL_FLAGS, *instructions, f"-DCUDA_OPS_KERNELS={name}"),
        ]
    link = ["-shared", f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    return _build("cpu", compiler, compiler, tuple(sets), units, link, force)


def _build_cuda(force: bool) -> Built:
    nvcc, major = checked_nvcc()
    flags = cuda_flags()
    for arch in CUDA_ARCHITECTURES:
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    # The newest architecture also as PTX, for GPUs that are newer still.
    newest = CUDA_ARCHITECTURES[-1]
    flags += ["-gencode", f"arch=compute_{newest},code=compute_{newest}"]
    units = {path.stem: [str(path), *flags] for path in sorted((SOURCES / "cuda").glob("*.cu"))}
    runtime = _cuda_runtime(nvcc, major)
    link = ["-shared", str(runtime), f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"]
    linker = os.environ.get("CXX", "g++")
    targets = tuple(f"sm_{arch}" for arch in CUDA_ARCHITECTURES)
    return _build("cuda", str(nvcc), linker, targets, units, link, force)


def checked_nvcc() -> tuple[Path, str]:
    """`find_nvcc`, once it is known to fit torch, and its major release."""
    assert torch.version.cuda is not None
    nvcc = find_nvcc()
    major = torch.version.cuda.split(".")[0]
    release = _version(str(nvcc)).split("release ")[-1].split(",")[0]
    if release.split(".")[0] != major:
        raise BuildError(
            f"{nvcc} is of CUDA {release}, but torch is built for CUDA {torch.version.cuda}; "
            "point CUDA_HOME to a toolkit of the same major release, or build with --cpu-only"
        )
    return nvcc, major


def cuda_flags() -> list[str]:
    """nvcc's arguments, but for the architectures."""
    flags = [*DEFINES, "-DUSE_CUDA", *INCLUDES, "-O3", "-std=c++20", "--expt-relaxed-constexpr"]
    flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0"]
    if "CXX" in os.environ:
        flags += ["-ccbin", os.environ["CXX"]]
    return flags


def _cuda_runtime(nvcc: Path, major: str) -> Path:
    """The shared CUDA runtime: the one that torch loads where it lies beside torch, else nvcc's."""
    root = nvcc.parent.parent
    beside_torch = TORCH.parent / "nvidia" / f"cu{major}" / "lib"
    for folder in (beside_torch, root / "lib64", root / "lib", *root.glob("targets/*/lib")):
        for library in sorted(folder.glob("libcudart.so*")):
            return library
    raise BuildError(
        f"no libcudart.so in {beside_torch} or below {root}; install nvidia-cuda-runtime {major}.* "
        "from PyPI, or build with --cpu-only"
    )


def _build(
    device: str,
    compiler: str,
    linker: str,
    targets: tuple[str, ...],
    units: dict[str, list[str]],
    link: list[str],
    force: bool,
) -> Built:
    """Compiles `units` (name -> arguments) side by side and links them, unless it was done."""
    version = _version(compiler)
    stamp = {
        "sources": sources_digest(device),
        "commands": hashlib.sha256(json.dumps([linker, units, link]).encode()).hexdigest(),
        "compiler": version,
        "torch": torch.__version__,
        "targets": list(targets),
    }
    library, record = library_path(device), stamp_path(device)
    made = library.exists() and record.exists()
    if (
        made
        and not force
        and json.loads(record.read_text())
        == {
            **stamp,
            "library": file_digest(library),
        }
    ):
        return Built(device, library, targets, version, 0.0)

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix=f"{device}-") as folder:
        objects = [str(Path(folder) / f"{name}.o") for name in units]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(
                pool.map(
                    lambda arguments, target: _run([compiler, "-c", *arguments, "-o", target]),
                    units.values(),
                    objects,
                )
            )
        linked = Path(folder) / library.name
        _run([linker, *objects, *link, "-o", str(linked)])
        written = Path(folder) / record.name
        written.write_text(json.dumps({**stamp, "library": file_digest(linked)}, indent=2))
        # The record goes last: a build cut off in between leaves one that no longer matches.
        os.replace(linked, library)
        os.replace(written, record)
    return Built(device, library, targets, version, time.perf_counter() - start)


def _version(compiler: str) -> str:
    lines = _run([compiler, "--version"]).splitlines()
    return next((line for line in lines if "release" in line), lines[0])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise BuildError(
            f"there is no {command[0]}; install a C++ compiler (g++), or set CXX"
        ) from error
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds `path` locked, so that of two builders the second finds the work done."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
