"""The operators' door: `python -m cuda_ops build|check|benchmark`."""

import argparse
import sys
from collections.abc import Sequence

from cuda_ops.build import BuildError, build


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 1 for a failed check, 2 for a mistake."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (BuildError, ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cuda_ops", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="build|check|benchmark")

    command = _command(
        commands,
        "build",
        "Compile the operators for the CPU and, where torch is a CUDA build, for CUDA.",
        "python -m cuda_ops build --cpu-only",
    )
    command.add_argument("--cpu-only", action="store_true", help="leave the CUDA library out")
    command.add_argument("--force", action="store_true", help="rebuild what is up to date")
    command.set_defaults(run=_build)
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    description: str,
    example: str,
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=description, description=description, epilog=f"example: {example}"
    )


def _build(options: argparse.Namespace) -> int:
    for built in build(cpu_only=options.cpu_only, force=options.force):
        done = f"built in {built.seconds:.1f} s" if built.seconds else "up to date"
        print(f"{built.device}: {done}, for {', '.join(built.targets)}, by {built.compiler}")
        print(f"  {built.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
