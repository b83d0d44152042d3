"""The documentation's Markdown, read by markdown-it: commands, code, links, anchors."""

import itertools
import re
import shlex
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
PARSER = MarkdownIt("commonmark").enable("table")
# First words that make a line of a code block a command.
PROGRAMS = {
    "curl", "docker", "export", "ffmpeg", "git", "helm", "kubectl", "make", "mlflow", "pip",
    "python", "python3", "ray", "sbatch", "scancel", "ssh", "torchrun", "unzip", "wget",
}  # fmt: skip
ELLIPSIS = ("…", "...")


@dataclass(frozen=True)
class Command:
    """A command line of a code block. `words`: without comments, assignments before it and
    taskset; an ellipsis at the end is dropped."""

    file: str
    line: int
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(self.words)

    @property
    def door(self) -> tuple[str, str]:
        """("pipeline", "train") of `python -m pipeline train …`; else ("", "")."""
        if self.words[:2] == ("python", "-m") and self.words[2] in DOORS:
            return self.words[2], self.words[3] if len(self.words) > 3 else ""
        return "", ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


DOORS = ("cuda_ops", "data_prep", "pipeline", "jobs")


def guides() -> list[Path]:
    """What a user reads: not reports that commands write, and not the generated reference."""
    top = sorted(ROOT.glob("*.md"))
    return top + sorted((ROOT / "docs").glob("*.md")) + [ROOT / "docs/benchmarks/README.md"]


def blocks(file: Path) -> Iterator[Token]:
    """Code blocks, fenced and indented; `info` is the language and `map` the lines."""
    for token in PARSER.parse(file.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            yield token


def commands(file: Path) -> Iterator[Command]:
    where = file.relative_to(ROOT).as_posix()
    for block in blocks(file):
        if block.info.strip() not in ("", "sh", "bash", "console", "shell"):
            continue
        first = (block.map or [0])[0] + (2 if block.type == "fence" else 1)
        pending, start = "", 0
        for number, line in enumerate(block.content.splitlines()):
            start = start if pending else number
            pending += line
            if pending.endswith("\\"):
                pending = pending[:-1] + " "
                continue
            if words := command_words(pending):
                yield Command(where, first + start, words)
            pending = ""


def command_words(line: str) -> tuple[str, ...]:
    """Of a line that is a command; nothing of any other."""
    try:
        words = shlex.split(line.replace("$(", "§(").strip(), comments=True)
    except ValueError:  # prose or output with a quotation mark
        return ()
    while words and re.fullmatch(r"[A-Za-z_]+=\S*", words[0]):
        words = words[1:]
    if words[:2] == ["taskset", "-c"]:
        words = words[3:]
    if not words or words[0].removeprefix(".venv/bin/") not in PROGRAMS:
        return ()
    words[0] = words[0].removeprefix(".venv/bin/").replace("python3", "python")
    if words[-1] == "&":
        words = words[:-1]
    return tuple(word for word in words if word not in ELLIPSIS)


def inline_code(file: Path) -> Iterator[str]:
    for token in _inlines(file):
        if token.type == "code_inline":
            yield token.content


def links(file: Path) -> Iterator[str]:
    """Targets of links and pictures."""
    for token in _inlines(file):
        if token.type in ("link_open", "image"):
            yield str(token.attrs["href" if token.type == "link_open" else "src"])


def anchors(file: Path) -> set[str]:
    """Of headings, as GitHub makes them: lower case, spaces to hyphens, punctuation dropped."""
    tokens, found = PARSER.parse(file.read_text(encoding="utf-8")), set()
    for heading, text in itertools.pairwise(tokens):
        if heading.type == "heading_open":
            plain = "".join(t.content for t in text.children or ())
            kept = "".join(
                c for c in plain.lower() if c in " -_" or unicodedata.category(c)[0] in "LN"
            )
            found.add(kept.replace(" ", "-"))
    return found


def _inlines(file: Path) -> Iterator[Token]:
    for token in PARSER.parse(file.read_text(encoding="utf-8")):
        yield from token.children or ()
