"""The shape of the repository: layers, documented packages, pinned set-up."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cuda_ops", "data_prep", "jobs", "model", "pipeline")
# What each package may import of the others.
LAYERS = {
    "cuda_ops": set(),
    "data_prep": set(),
    "model": {"cuda_ops"},
    "pipeline": {"cuda_ops", "model"},
    "jobs": {"cuda_ops", "model", "pipeline"},
}


def imports(file: Path) -> set[str]:
    """Dotted names of every module that a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module)
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_the_layers_below(package):
    for file in sources(package):
        tops = {name.split(".")[0] for name in imports(file)}
        forbidden = (tops & set(PACKAGES)) - LAYERS[package] - {package}
        assert not forbidden, f"{file.relative_to(ROOT)} imports {sorted(forbidden)}"


def test_cluster_libraries_stay_in_their_layer():
    for package in PACKAGES:
        for file in sources(package):
            tops = {name.split(".")[0] for name in imports(file)}
            where = file.relative_to(ROOT).as_posix()
            if where == "data_prep/on_ray.py":
                # convert --ray: this one file, which is imported only when that is asked for.
                tops -= {"ray"}
            if package != "jobs":
                assert not tops & {"ray", "mlflow"}, where
            if where != "pipeline/engine.py":
                assert "deepspeed" not in tops, where


def test_our_modules_are_imported_by_name():
    for package in PACKAGES:
        for file in sources(package):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    plain = {alias.name.split(".")[0] for alias in node.names}
                    assert not plain & set(PACKAGES), f"{file}: import {plain}"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_come_from_the_checkout_and_say_what_lives_there(package):
    imported = importlib.import_module(package)
    assert Path(imported.__file__) == ROOT / package / "__init__.py"
    assert "may import" in imported.__doc__.lower()


def test_tests_are_not_packages():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_the_lock_pins_what_the_set_up_promises():
    lock = (ROOT / "requirements.lock").read_text()
    pins = dict(re.findall(r"^([\w.-]+)(?:\[[^]]*\])?==(\S+)", lock, flags=re.M))
    expected = {
        "torch": "2.14.1", "torchvision": "0.29.2", "deepspeed": "0.19.8", "ray": "2.60.0",
        "mlflow": "3.17.2", "webdataset": "1.0.2", "pycocotools": "2.0.11",
        "nvidia-cuda-nvcc": "13.0.88", "nvidia-cuda-crt": "13.0.88", "nvidia-nvvm": "13.0.88",
    }  # fmt: skip
    assert {name: pins.get(name) for name in expected} == expected
    assert "://" not in lock


def test_every_direct_dependency_is_locked():
    project = (ROOT / "pyproject.toml").read_text()
    block = project[project.index("dependencies = [") : project.index("[tool.uv]")]
    names = set(re.findall(r'^\s*"([A-Za-z0-9_.-]+)', block, flags=re.M))
    lock = (ROOT / "requirements.lock").read_text()
    missing = {n for n in names if not re.search(rf"^{re.escape(n)}(\[|==)", lock, flags=re.M)}
    assert len(names) > 15
    assert not missing
