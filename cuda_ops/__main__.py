"""The operators' door: `python -m cuda_ops build|check|benchmark`."""

import argparse
import json
import os
import secrets
import sys
import traceback
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NoReturn

import torch

from cuda_ops import registers
from cuda_ops.build import BuildError, build

DEBUG = "--debug"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 1 for a failed check or a bug, 2 for a
    mistake. With `--debug` anywhere in the arguments, or DETR_DEBUG=1 in the environment, the
    traceback of an error comes before its line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in words or os.environ.get("DETR_DEBUG") == "1"
    options = _parser().parse_args([word for word in words if word != DEBUG])
    try:
        return int(options.run(options))
    except Exception as error:
        if debug:
            traceback.print_exc()
        line, status = " ".join(str(error).split()) or type(error).__name__, 2
        if not isinstance(error, BuildError | ImportError | OSError | ValueError):
            hint = "" if debug else f" ({DEBUG} shows where)"
            line = (
                f"{type(error).__name__}: {line}; this is a bug of ours: docs/errors.md says "
                f"where to report it{hint}"
            )
            status = 1
        print(f"error: {line}", file=sys.stderr)
        return status


class _Parser(argparse.ArgumentParser):
    """A mistake in the options is one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m cuda_ops", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="build|check|benchmark")

    command = _command(
        commands,
        "build",
        "Compile the operators for the CPU and, where torch is a CUDA build, for CUDA.",
        "python -m cuda_ops build --cpu-only",
    )
    command.add_argument("--cpu-only", action="store_true", help="leave the CUDA library out")
    command.add_argument("--force", action="store_true", help="rebuild what is up to date")
    command.add_argument(
        "--report",
        metavar="ARCHITECTURE",
        help="compile the CUDA kernels for it (e.g. 90) and print their registers and spills",
    )
    command.set_defaults(run=_build)

    command = _command(
        commands,
        "check",
        "Compare the operators with their float64 definition on random inputs, in every dtype.",
        "python -m cuda_ops check --device cuda",
    )
    _device(command)
    command.add_argument("--seed", type=int, help="of the inputs (default: a fresh one)")
    command.add_argument(
        "--large",
        action=argparse.BooleanOptionalAction,
        help="also the sizes of training at 800x1333 (default: on a GPU only)",
    )
    command.set_defaults(run=_check)

    command = _command(
        commands,
        "benchmark",
        "Time the fused operator, and measure its memory, against the grid_sample formulation; "
        "and deformable convolution against torchvision's.",
        "python -m cuda_ops benchmark --threads 2 --output benchmark.json",
    )
    _device(command)
    command.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    command.add_argument(
        "--spread", type=float, default=2.0, help="pixels of offset, standard deviation (2)"
    )
    command.add_argument("--seconds", type=float, default=1.0, help="for each measurement (1)")
    command.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="NAME=MODULE:FUNCTION",
        help="time another implementation too, with the arguments of the official "
        "MSDeformAttnFunction.apply; may be given several times",
    )
    command.add_argument("--output", type=Path, help="write the figures as JSON, too")
    command.set_defaults(run=_benchmark)
    return parser


def _command(
    commands: "argparse._SubParsersAction[_Parser]",
    name: str,
    description: str,
    example: str,
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=description, description=description, epilog=f"example: {example}"
    )


def _device(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU"
    )


def _build(options: argparse.Namespace) -> int:
    for built in build(cpu_only=options.cpu_only, force=options.force):
        done = f"built in {built.seconds:.1f} s" if built.seconds else "up to date"
        print(f"{built.device}: {done}, for {', '.join(built.targets)}, by {built.compiler}")
        print(f"  {built.path}")
    if options.report is not None:
        print(registers.table(registers.registers(options.report)))
    return 0


def _check(options: argparse.Namespace) -> int:
    device = _chosen_device(options)
    # torch's deterministic mode, one of those checked, wants it before the first matrix product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Not above: `build` must run where there is nothing to import yet.
    from cuda_ops.check import check, left_out

    seed = options.seed if options.seed is not None else secrets.randbelow(2**31)
    large = options.large if options.large is not None else device == "cuda"
    print(f"checking on {device}, seed {seed}")
    findings = list(check(device, seed, large))
    failed = [finding for finding in findings if not finding.passed]
    for dtype in dict.fromkeys(finding.dtype for finding in findings):
        for tensor in dict.fromkeys(finding.tensor for finding in findings):
            mine = [
                f for f in findings if f.dtype == dtype and f.tensor == tensor and f.allowed > 0
            ]
            if not mine:
                continue
            worst = max(mine, key=lambda f: f.error / f.allowed)
            print(
                f"  {str(dtype).removeprefix('torch.'):<9} {tensor:<14} {len(mine):3d} compared, "
                f"worst relative error {worst.error:.1e} of {worst.allowed:.1e} allowed "
                f"({worst.operator}, {worst.case})"
            )
    same = [finding for finding in findings if finding.allowed == 0]
    print(f"  {len(same)} compared bit by bit")
    for finding in failed:
        print(f"FAILED: {finding}")
    for reason in left_out(device):
        print(f"not checked: {reason}")
    print(f"{len(findings) - len(failed)} of {len(findings)} comparisons passed")
    return 1 if failed else 0


def _benchmark(options: argparse.Namespace) -> int:
    device = _chosen_device(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    from cuda_ops.benchmark import HEAD, Row, benchmark, report, surroundings, table
    from cuda_ops.convolution_benchmark import convolution_benchmark

    facts = surroundings(device, options.spread)
    for name, fact in facts.items():
        print(f"{name}: {fact}")
    rows: list[Row] = []
    attention = benchmark(device, options.spread, options.seconds, options.beside)
    for compared in chain(attention, convolution_benchmark(device, options.seconds)):
        if not rows:
            print(HEAD)
        rows += compared
        print(table(compared), flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(report(rows, facts), indent=2) + "\n")
        print(f"written: {options.output}")
    return 0


def _chosen_device(options: argparse.Namespace) -> str:
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise ValueError("--device cuda, but torch sees no GPU here")
    return str(options.device or ("cuda" if available else "cpu"))


if __name__ == "__main__":
    sys.exit(main())
