"""Commands say how they are used, and what is wrong with their options, at once."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Seconds of imports each, torchvision with torch.
HEAVY = ("torch", "scipy", "ray", "mlflow", "deepspeed", "pandas", "transformers")
HELP_OF_ALL = f"""
import importlib, sys
door = importlib.import_module(sys.argv[1] + ".__main__")
for name, command in door.COMMANDS.items():
    try:
        command.run(["--help"])
    except SystemExit as end:
        assert end.code in (0, None), (name, end.code)
    loaded = [module for module in {HEAVY} if module in sys.modules]
    assert not loaded, f"{{name}} --help imports {{loaded}}"
print(len(door.COMMANDS), "commands")
"""


@pytest.mark.parametrize("door", ["pipeline", "jobs"])
def test_help_imports_nothing_that_takes_seconds(door: str) -> None:
    command = [sys.executable, "-c", HELP_OF_ALL, door]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout.splitlines()[-1].split()[0]) >= 10


def test_a_loader_needs_no_torchvision() -> None:
    """Its import holds 90 MB of every process, workers that are forked from it included."""
    program = "import sys, pipeline.data.loader; sys.exit('torchvision' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert ran.returncode == 0
