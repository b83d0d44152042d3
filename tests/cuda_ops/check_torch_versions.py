"""One CPU binary on every torch it is meant for: `python tests/cuda_ops/check_torch_versions.py`.

The oldest and the newest torch each build the CPU library once, in a bare copy of `cuda_ops`; both
binaries then pass `python -m cuda_ops check --device cpu` under every torch. Each torch lives in a
throw-away environment with nothing else in it, one at a time, made by uv. Minutes and, with the
wheels of the default index, some 5 GB at a time; UV_TORCH_BACKEND=cpu takes the small ones where
uv can reach their index.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "cuda_ops"
VERSIONS = ("2.11.0", "2.12.*", "2.13.*", "2.14.*", "2.15.*")  # oldest first


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Checks that one CPU binary serves every torch.",
        epilog="example: python tests/cuda_ops/check_torch_versions.py --versions 2.11.0 '2.14.*'",
    )
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="of torch, oldest first")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter or version of it (default: this one)"
    )
    options = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory(prefix="torch-versions-") as name:
        folder = Path(name)
        builders = list(dict.fromkeys((options.versions[0], options.versions[-1])))
        checkouts = {}
        for version in builders:
            checkout = folder / f"built-by-{version.removesuffix('.*')}"
            shutil.copytree(
                PACKAGE, checkout / "cuda_ops", ignore=shutil.ignore_patterns("__pycache__")
            )
            with torch_environment(folder, version, options.python) as python:
                done = run(python, "-m", "cuda_ops", "build", "--cpu-only", cwd=checkout)
                if done.returncode != 0:
                    print(f"torch {version} does not build: {done.stderr}")
                    return 1
                checkouts[installed(python)] = checkout
        for version in options.versions:
            with torch_environment(folder, version, options.python) as python:
                for builder, checkout in checkouts.items():
                    done = run(python, "-m", "cuda_ops", "check", "--device", "cpu", cwd=checkout)
                    failures += done.returncode != 0
                    last = done.stdout.strip().splitlines()[-1:] or ["no output"]
                    print(f"{installed(python)}, built by {builder}: {last[0]}", flush=True)
                    if done.returncode != 0:
                        print(done.stdout + done.stderr, flush=True)
    return 1 if failures else 0


@contextmanager
def torch_environment(folder: Path, version: str, interpreter: str) -> Iterator[Path]:
    """The Python of an environment that holds torch alone; removed afterwards."""
    place = folder / "environment"
    python = place / "bin" / "python"
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        raise SystemExit("there is no uv beside this Python or in $PATH; pip install uv")
    try:
        for command in (
            [uv, "venv", "--quiet", "--python", interpreter, str(place)],
            [uv, "pip", "install", "--quiet", "--python", str(python), f"torch=={version}"],
        ):
            subprocess.run(command, check=True)
        yield python
    finally:
        shutil.rmtree(place, ignore_errors=True)


def installed(python: Path) -> str:
    program = "import platform, torch; print(platform.python_version(), 'torch', torch.__version__)"
    return "Python " + run(python, "-c", program, cwd=python.parent).stdout.strip()


def run(python: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(python), *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


if __name__ == "__main__":
    sys.exit(main())
