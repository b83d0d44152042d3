"""docs/api is what docs/build_api.py makes of the sources; public names have docstrings."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_api", ROOT / "docs/build_api.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date(builder, capsys):
    assert builder.main(["--check"]) == 0, capsys.readouterr().out


def test_every_public_function_and_class_has_a_docstring(builder):
    """But for what --help tells: options of commands, what runs them, and entries of programs."""
    left = []
    for name in builder.undocumented():
        last = name.rpartition(".")[2]
        if last != "main" and not last.endswith("Options") and not last.startswith("run_"):
            left.append(name)
    assert not left


def test_what_stands_in_the_reference(builder, tmp_path):
    """One function and one class, as a reader sees them."""
    source = '''
"""A module."""
class Box(Base):
    """A box."""
    side: float = 1.0
    """In pixels."""
    _hidden: int = 0
    def area(self, *, scale: int = 2) -> float:
        """Square pixels."""
        return self.side**2 * scale
    def _secret(self): ...
def very_long(first_argument: int, /, second: str = "two words", *rest: object, third_argument: bool = True, **more: int) -> None:
    """Long."""
'''  # noqa: E501
    box, function = builder.public(builder.ast.parse(source).body)
    text = "\n".join([*builder.entry(box), *builder.entry(function)])
    assert "class Box(Base)\n    side: float = 1.0\n        # In pixels.\n```\n\nA box.\n" in text
    assert "### Box.area\n\n```python\ndef area(self, *, scale: int=2) -> float\n```" in text
    assert "_hidden" not in text
    assert "_secret" not in text
    assert (
        "def very_long(\n    first_argument: int,\n    /,\n    second: str = 'two words',\n"
        "    *rest: object,\n    third_argument: bool = True,\n    **more: int,\n) -> None"
    ) in text


def test_a_stale_or_extra_page_is_named(builder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(builder, "OUTPUT", tmp_path)
    assert builder.main([]) == 0
    assert builder.main(["--check"]) == 0
    (tmp_path / "model.md").write_text("# model\n")
    (tmp_path / "old.md").write_text("")
    assert builder.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "docs/api/model.md is not up to date" in said
    assert "docs/api/old.md" in said
