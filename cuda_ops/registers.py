"""What ptxas says of each CUDA kernel: registers, spills, stack and shared memory."""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from cuda_ops.build import CUDA_ARCHITECTURES, BuildError, checked_nvcc, cuda_flags
from cuda_ops.library import SOURCES

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    """One kernel; registers a thread, the others in bytes. `shared` is what it declares itself,
    without what a launch adds."""

    name: str
    registers: int
    stack: int
    spilled: int  # stores and loads
    shared: int


def registers(architecture: str) -> list[Kernel]:
    """Compiles csrc/cuda for one architecture ("90"), and returns its kernels by name.

    Raises:
        BuildError: nvcc is missing, does not fit torch or fails, or torch has no CUDA.
        ValueError: not an architecture that `build` compiles for.
    """
    if architecture not in CUDA_ARCHITECTURES:
        raise ValueError(
            f"got architecture {architecture}, expected one of {', '.join(CUDA_ARCHITECTURES)}"
        )
    if torch.version.cuda is None:
        raise BuildError("torch is not a CUDA build, so there are no CUDA kernels to report on")
    nvcc, _ = checked_nvcc()
    target = ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((SOURCES / "cuda").glob("*.cu")):
            command = [str(nvcc), "-c", str(source), *cuda_flags(), *target, "-Xptxas", "-v"]
            done = subprocess.run(
                [*command, "-o", str(Path(folder) / "object.o")], capture_output=True, text=True
            )
            if done.returncode != 0:
                raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}".rstrip())
            kernels += parse(done.stdout + done.stderr)
    return sorted(kernels, key=lambda kernel: kernel.name)


def parse(said: str) -> list[Kernel]:
    """The kernels in ptxas' verbose output."""
    kernels = []
    for entry in ENTRY.finditer(said):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        kernels.append(
            Kernel(
                _readable(entry["name"]),
                int(entry["registers"]),
                int(entry["stack"]),
                int(entry["stores"]) + int(entry["loads"]),
                int(shared[1]) if shared else 0,
            )
        )
    return kernels


def table(kernels: list[Kernel]) -> str:
    """A Markdown table."""
    rows = [f"| {k.name} | {k.registers} | {k.spilled} | {k.stack} | {k.shared} |" for k in kernels]
    head = "| kernel | registers | spilled bytes | stack bytes | static shared bytes |"
    return "\n".join([head, "|---|---|---|---|---|", *rows])


def _readable(symbol: str) -> str:
    """Demangled, without namespaces and parameters, where the compiler's c++filt is at hand."""
    if shutil.which("c++filt") is None:
        return symbol
    name = subprocess.run(
        ["c++filt", symbol], capture_output=True, text=True, check=True
    ).stdout.strip()
    name = name.replace("cuda_ops::", "").replace("(anonymous namespace)::", "")
    name = name.removeprefix("void ")
    return f"{name.rsplit('>(', 1)[0]}>" if ">(" in name else name.split("(")[0]
