"""Writes docs/api: signatures and docstrings of the packages, read from the sources.

    python docs/build_api.py            # writes
    python docs/build_api.py --check    # status 1 and the names, where files are not up to date

Nothing is imported. Public is what has no underscore before its name, at the top of a module or in
a public class; `__main__` and what only runs commands belong to `--help`.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "docs/api"
PACKAGES = ("cuda_ops", "model", "data_prep", "pipeline", "jobs")
WIDTH = 100
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def main(arguments: list[str]) -> int:
    pages = {f"{package}.md": page(package) for package in PACKAGES}
    pages["README.md"] = index()
    if arguments == ["--check"]:
        stale = [name for name, text in pages.items() if not same(OUTPUT / name, text)]
        stale += [file.name for file in OUTPUT.glob("*.md") if file.name not in pages]
        for name in stale:
            print(f"docs/api/{name} is not up to date: run python docs/build_api.py")
        return int(bool(stale))
    OUTPUT.mkdir(exist_ok=True)
    for name, text in pages.items():
        (OUTPUT / name).write_text(text, encoding="utf-8")
    return 0


def same(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8") == text


def index() -> str:
    """The table of packages and their modules."""
    lines = [
        "# API reference",
        "",
        "Built from the docstrings by `python docs/build_api.py`, which a test compares with the",
        "sources. Tensors' shapes are in brackets, their letters explained at the top of a module.",
        "",
        "| package | |",
        "|---|---|",
    ]
    for package in PACKAGES:
        first = first_sentence(ast.get_docstring(tree(ROOT / package / "__init__.py")) or "")
        lines.append(f"| [{package}]({package}.md) | {first} |")
    return "\n".join(lines) + "\n"


def page(package: str) -> str:
    lines = [f"# {package}", "", ast.get_docstring(tree(ROOT / package / "__init__.py")) or ""]
    for file in modules(package):
        module = tree(file)
        entries = [line for found in public(module.body) for line in entry(found)]
        if entries:
            lines += ["", f"## {dotted(file)}", "", ast.get_docstring(module) or "", *entries]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def modules(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    return [file for file in files if not file.name.startswith("__")]


def dotted(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def public(body: list[ast.stmt]) -> Iterator[Definition]:
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node


def entry(node: Definition, owner: str = "") -> Iterator[str]:
    """Heading, signature and docstring of a function or class; of a class, its methods too."""
    yield from ("", f"### {owner}{node.name}", "", "```python")
    yield from signature(node)
    yield from ("```", "", ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        for method in public(node.body):
            if ast.get_docstring(method):  # one without is a base class's, told there
                yield from entry(method, f"{node.name}.")


def signature(node: Definition) -> Iterator[str]:
    """As in the source without the body; of a class the fields, each with what is said of it."""
    for decorator in node.decorator_list:
        yield f"@{ast.unparse(decorator)}"
    if not isinstance(node, ast.ClassDef):
        arguments, returns = node.args, f" -> {ast.unparse(node.returns)}" if node.returns else ""
        line = f"def {node.name}({ast.unparse(arguments)}){returns}"
        if len(line) <= WIDTH:
            yield line
        else:
            yield f"def {node.name}("
            yield from (f"    {argument}," for argument in split(arguments))
            yield f"){returns}"
        return
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    yield f"class {node.name}({bases})" if bases else f"class {node.name}"
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and not ast.unparse(field.target).startswith("_"):
            yield f"    {ast.unparse(field)}"
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                words = str(after.value.value).split("\n")
                yield from (f"        # {line.strip()}" for line in words)


def split(arguments: ast.arguments) -> list[str]:
    """One text for each argument, `/` and `*` included."""
    return [text for text in _split(arguments) if text]


def _split(arguments: ast.arguments) -> Iterator[str]:
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    for number, (argument, default) in enumerate(zip(plain, defaults, strict=True), start=1):
        yield one(argument, default)
        if number == len(arguments.posonlyargs):
            yield "/"
    if arguments.vararg:
        yield f"*{ast.unparse(arguments.vararg)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield one(argument, default)
    if arguments.kwarg:
        yield f"**{ast.unparse(arguments.kwarg)}"


def one(argument: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else "")


def first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def undocumented() -> list[str]:
    """Public functions and classes without a docstring, by dotted names."""
    return [
        f"{dotted(file)}.{node.name}"
        for package in PACKAGES
        for file in modules(package)
        for node in public(tree(file).body)
        if not ast.get_docstring(node)
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
