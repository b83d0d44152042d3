"""The build, the loading of its products, and `python -m cuda_ops`.

Whatever spoils a library is done in a copy of the package, beside which there is no build yet.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cuda_ops import registers
from cuda_ops.__main__ import main
from cuda_ops.build import CUDA_ARCHITECTURES, BuildError, find_nvcc
from cuda_ops.library import FOLDER, library_path, source_files, sources_digest, stamp_path

PACKAGE = Path(__file__).parents[2] / "cuda_ops"
needs_cuda_library = pytest.mark.skipif(
    torch.version.cuda is None or not library_path("cuda").exists(),
    reason="torch is not a CUDA build, or the CUDA library was left out (--cpu-only)",
)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkout with nothing but the package, not built."""
    shutil.copytree(PACKAGE, tmp_path / "cuda_ops", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def copy_products(to: Path) -> None:
    folder = to / ".build" / "cuda_ops"
    folder.mkdir(parents=True)
    for device in ("cpu", "cuda"):
        for path in (library_path(device), stamp_path(device)):
            if path.exists():
                shutil.copy(path, folder)


def test_missing_library_says_how_to_build(bare: Path) -> None:
    done = python(bare, "-c", "import cuda_ops.ops")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the cpu operators are not built")
    assert last.endswith("build it with: python -m cuda_ops build")


def test_door_reports_a_missing_library_in_one_line(bare: Path) -> None:
    for command in ("check", "benchmark"):
        done = python(bare, "-m", "cuda_ops", command, "--device", "cpu")
        assert done.returncode == 2
        assert done.stderr.startswith("error: the cpu operators are not built")
        assert done.stderr.count("\n") == 1


def test_library_of_other_sources_is_refused(bare: Path) -> None:
    copy_products(bare)
    assert python(bare, "-c", "import cuda_ops.ops").returncode == 0
    source = bare / "cuda_ops" / "csrc" / "cpu" / "kernels.cpp"
    source.write_text(source.read_text() + "// changed\n")
    done = python(bare, "-c", "import cuda_ops.ops")
    assert "was built from other sources" in done.stderr
    assert "python -m cuda_ops build" in done.stderr


def test_torn_library_is_refused(bare: Path) -> None:
    copy_products(bare)
    library = bare / ".build" / "cuda_ops" / library_path("cpu").name
    library.write_bytes(library.read_bytes()[:5000])
    done = python(bare, "-c", "import cuda_ops.ops")
    assert done.returncode == 1
    assert "is not the file that was built" in done.stderr.splitlines()[-1]


def test_library_that_is_built_anew_while_it_is_checked_is_loaded(bare: Path) -> None:
    copy_products(bare)
    program = """
import json, os
import torch
from cuda_ops import library
path, stamp, digest = library.library_path("cpu"), library.stamp_path("cpu"), library.file_digest
def built_meanwhile(file):
    library.file_digest = digest
    new = path.with_suffix(".new")
    new.write_bytes(path.read_bytes() + b"another")
    record = json.loads(stamp.read_text()) | {"library": digest(new)}
    os.replace(new, path)
    new.write_text(json.dumps(record))
    os.replace(new, stamp)
    return digest(file)
library.file_digest = built_meanwhile
library.load("cpu")
print(str(path) in torch.ops.loaded_libraries)
"""
    done = python(bare, "-c", program)
    assert done.stdout == "True\n", done.stderr


def test_what_a_killed_build_left_is_removed(bare: Path) -> None:
    line = f'[ "$1" = --version ] && exec $real --version; touch {bare}/compiling; sleep 60'
    environment = {**os.environ, "PYTHONPATH": str(bare), "CXX": compiler_script(bare, line)}
    command = [sys.executable, "-m", "cuda_ops", "build", "--cpu-only"]
    process = subprocess.Popen(command, cwd=bare, env=environment, start_new_session=True)
    while not (bare / "compiling").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    folder = bare / ".build" / "cuda_ops"
    assert list(folder.glob("cpu-*"))
    line = '[ "$1" = --version ] && exec $real --version; touch "${@: -1}"'
    done = python(bare, "-m", "cuda_ops", "build", "--cpu-only", CXX=compiler_script(bare, line))
    assert done.returncode == 0, done.stderr
    left = {path.name for path in folder.iterdir()}
    assert left == {"libcuda_ops_cpu.so", "cpu.json", "lock"}


def test_library_that_does_not_load_is_an_import_error(bare: Path) -> None:
    copy_products(bare)
    folder = bare / ".build" / "cuda_ops"
    (folder / library_path("cpu").name).write_bytes(b"not a library")
    record = json.loads((folder / "cpu.json").read_text())
    record["library"] = hashlib.sha256(b"not a library").hexdigest()
    (folder / "cpu.json").write_text(json.dumps(record))
    done = python(bare, "-c", "import cuda_ops.ops")
    assert done.stderr.splitlines()[-1].startswith("ImportError")
    assert "does not load" in done.stderr


@needs_cuda_library
def test_without_the_cuda_library_the_cpu_works_and_a_gpu_tensor_is_refused(bare: Path) -> None:
    copy_products(bare)
    (bare / ".build" / "cuda_ops" / library_path("cuda").name).unlink()
    program = """
import torch
from cuda_ops.ops import fused_deformable_attention
from cuda_ops import ops
points = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1)
print(fused_deformable_attention(torch.ones(1, 1, 1, 1), [(1, 1)], *points).shape)
class OnGpu(torch.Tensor):
    is_cuda = True
try:
    ops._check_value(torch.ones(1, 1, 1, 1).as_subclass(OnGpu), [1, 1])
except ImportError as error:
    print(error)
"""
    done = python(bare, "-c", program)
    assert done.stdout.splitlines() == [
        "torch.Size([1, 1, 1])",
        "the cuda operators are not built; build it with: python -m cuda_ops build",
    ], done.stderr


@needs_cuda_library
def test_cuda_library_registers_every_operator_without_a_gpu() -> None:
    import cuda_ops.ops  # noqa: F401  (loads both libraries)

    for name in ("multi_scale_deformable_attention", "fused_deformable_attention"):
        for operator in (name, f"{name}_backward"):
            for key in ("CPU", "CUDA"):
                assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cuda_ops::{operator}", key)


@needs_cuda_library
def test_cuda_library_holds_code_for_every_architecture() -> None:
    """The names of the architectures stand in the compressed code's headers as numbers only, so
    ask the record of the build, and the compiler that made it."""
    stamp = json.loads(stamp_path("cuda").read_text())
    assert stamp["targets"] == [f"sm_{arch}" for arch in CUDA_ARCHITECTURES]
    assert stamp["sources"] == sources_digest("cuda")
    assert b".nv_fatbin" in library_path("cuda").read_bytes()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda_library)])
def test_libraries_use_nothing_but_the_stable_abi(device: str) -> None:
    """C++ symbols of torch or symbols of Python would tie a library to one release of either."""
    listed = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", str(library_path(device))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    ours = [symbol for symbol in symbols if "@" not in symbol and not symbol.startswith("_")]
    assert "aoti_torch_library_def" in ours or device == "cuda"
    assert "torch_call_dispatcher" in ours
    assert [x for x in ours if not x.startswith(("aoti_torch_", "torch_"))] == []
    other = [symbol for symbol in symbols if symbol not in ours]
    assert [x for x in other if x.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch", "_Py"))] == []


def test_build_says_what_it_built_and_for_which_architectures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """This test runs on what was built before; the others see a library being made."""
    assert main(["build", *([] if library_path("cuda").exists() else ["--cpu-only"])]) == 0
    said = capsys.readouterr().out
    assert said.startswith("cpu: up to date, for baseline")
    assert str(library_path("cpu")) in said
    if library_path("cuda").exists():
        assert "cuda: up to date, for sm_80, sm_90, sm_100, sm_120, by Cuda compilation" in said
        assert str(library_path("cuda")) in said


PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4copyIfLi4EEvPT_' for 'sm_90'
ptxas info    : Function properties for _Z4copyIfLi4EEvPT_
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compile time = 12.345 ms
ptxas info    : Compiling entry function '_Z3setPd' for 'sm_90'
ptxas info    : Function properties for _Z3setPd
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 22 registers, used 0 barriers
"""


def test_registers_and_spills_are_read_from_ptxas(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = registers.parse(PTXAS)
    assert [(k.registers, k.stack, k.spilled, k.shared) for k in kernels] == [
        (80, 16, 32, 1024),
        (22, 0, 0, 0),
    ]
    if shutil.which("c++filt"):
        assert [kernel.name for kernel in kernels] == ["copy<float, 4>", "set"]
    assert "| 80 | 32 | 16 | 1024 |" in registers.table(kernels)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert registers.parse(PTXAS)[1].name == "_Z3setPd"


@needs_cuda_library
def test_report_of_one_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "cuda").mkdir()
    source = tmp_path / "cuda" / "tiny.cu"
    source.write_text(
        "__global__ void tiny(float* x) { __shared__ float y[8]; y[0] = *x; *x = y[threadIdx.x]; }"
    )
    monkeypatch.setattr(registers, "SOURCES", tmp_path)
    (kernel,) = registers.registers("80")
    assert kernel.name in ("tiny", "_Z4tinyPf")
    assert kernel.registers > 0
    assert (kernel.spilled, kernel.shared) == (0, 32)
    assert main(["build", "--report", "80"]) == 0
    assert f"| {kernel.name} | {kernel.registers} | 0 | 0 | 32 |" in capsys.readouterr().out
    source.write_text("no CUDA")
    assert main(["build", "--report", "80"]) == 2
    assert "tiny.cu" in capsys.readouterr().err


def test_report_of_an_unknown_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [] if library_path("cuda").exists() else ["--cpu-only"]
    assert main(["build", *arguments, "--report", "77"]) == 2
    assert capsys.readouterr().err == (
        "error: got architecture 77, expected one of 80, 90, 100, 120\n"
    )


def compiler_script(folder: Path, line: str) -> str:
    """A compiler of our own: `line` is bash, with the real one in $real."""
    script = folder / "compiler"
    script.write_text(f'#!/bin/bash\nreal="{os.environ.get("CXX", "g++")}"\n{line}\n')
    script.chmod(0o755)
    return str(script)


def test_build_of_a_bare_checkout_by_two_processes_at_once(bare: Path) -> None:
    """One builds, the other waits and finds it done; a third time nothing is left to do."""
    compiler = compiler_script(bare, 'exec $real "${@/-O3/-O0}"')  # unoptimised: quicker to build
    command = [sys.executable, "-m", "cuda_ops", "build", "--cpu-only"]
    environment = {**os.environ, "PYTHONPATH": str(bare), "CXX": compiler}
    both = [
        subprocess.Popen(
            command, cwd=bare, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("up to date" in out for out, _ in said) == [False, True]
    assert all("for baseline" in out for out, _ in said)
    assert python(bare, "-c", "import cuda_ops.ops").returncode == 0
    left = {path.name for path in (bare / ".build" / "cuda_ops").iterdir()}
    assert left == {"libcuda_ops_cpu.so", "cpu.json", "lock"}


def test_up_to_date_until_sources_flags_or_library_change(bare: Path) -> None:
    log = bare / "log"
    fake = f'[ "$1" = --version ] && exec $real --version; echo "$@" >> {log}; touch "${{@: -1}}"'
    program = f"""
from pathlib import Path
import cuda_ops.build as subject
from cuda_ops.library import SOURCES, library_path
log = Path({str(log)!r})
def compiled():
    log.write_text("")
    (built,) = subject.build(cpu_only=True)
    commands = log.read_text().count(chr(10))
    assert (built.seconds == 0) == (commands == 0)
    return commands
counts = [compiled(), compiled()]
source = SOURCES / "checks.h"
source.write_text(source.read_text() + "// changed")
counts += [compiled(), compiled()]
subject.HOST_FLAGS[0] = "-O2"
counts += [compiled(), compiled()]
library_path("cpu").write_bytes(b"torn")
counts += [compiled(), compiled()]
print(*(int(count > 0) for count in counts))
"""
    done = python(bare, "-c", program, CXX=compiler_script(bare, fake))
    assert done.stdout == "1 0 1 0 1 0 1 0\n", done.stderr


def test_failing_build_says_what_failed_and_keeps_the_library(bare: Path) -> None:
    copy_products(bare)
    library = bare / ".build" / "cuda_ops" / library_path("cpu").name
    before = library.read_bytes()
    fail = '[ "$1" = --version ] && exec $real --version; echo "bad line in $2" >&2; exit 1'
    compiler = compiler_script(bare, fail)
    done = python(bare, "-m", "cuda_ops", "build", "--cpu-only", CXX=compiler)
    assert done.returncode == 2
    assert "bad line in" in done.stderr
    assert "Traceback" not in done.stderr
    assert library.read_bytes() == before


def test_missing_compiler_is_named(bare: Path) -> None:
    done = python(bare, "-m", "cuda_ops", "build", "--cpu-only", CXX="no-such-compiler")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no no-such-compiler; install a C++ compiler")


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is not a CUDA build")
def test_missing_nvcc_is_an_error_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cuda_ops.build.TORCH", tmp_path / "torch")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"no nvcc in .*install nvidia-cuda-nvcc.*--cpu-only"):
        find_nvcc()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch()
    assert find_nvcc() == nvcc


def test_digest_covers_contents_and_names(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [sources_digest("cpu"), sources_digest("cuda")]
    csrc = bare / "cuda_ops" / "csrc"
    monkeypatch.setattr("cuda_ops.library.SOURCES", csrc)
    assert [sources_digest("cpu"), sources_digest("cuda")] == expected
    (csrc / "cuda" / "attention.cu").write_text("// changed\n")
    assert sources_digest("cpu") == expected[0]
    assert sources_digest("cuda") != expected[1]
    (csrc / "checks.h").rename(csrc / "check.h")
    assert sources_digest("cpu") != expected[0]


def test_products_lie_in_an_ignored_folder() -> None:
    assert FOLDER.relative_to(PACKAGE.parent) == Path(".build/cuda_ops")
    assert all(path.is_relative_to(PACKAGE) for path in source_files("cpu"))


@pytest.mark.parametrize("command", ["build", "check", "benchmark"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"example: python -m cuda_ops {command}" in capsys.readouterr().out


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["mend"])
    assert end.value.code == 2
    assert "invalid choice: 'mend'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--device", "cuda"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_check_fails_when_a_kernel_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cuda_ops import check, ops

    right = ops.fused_deformable_attention
    monkeypatch.setattr(ops, "fused_deformable_attention", lambda *x: right(*x) * 1.0001)
    monkeypatch.setattr(check, "CASES", check.CASES[2:3])
    monkeypatch.setattr(check, "CONVOLUTIONS", ())
    assert main(["check", "--device", "cpu", "--seed", "1"]) == 1
    assert "FAILED" in capsys.readouterr().out
