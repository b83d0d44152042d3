"""Every mistake of docs/errors.md: one line that says what is wrong and what helps, status not 0,
nothing lost; and the lines of that page are those that are printed."""

import re
from pathlib import Path

import pytest
import torch

from tests.error_table.files import COMMAND_LINES, JSON, PATHS, SHARDS
from tests.error_table.memory import MEMORY
from tests.error_table.place import Mistake, Said, contents, make_place, run
from tests.error_table.training import CHECKPOINTS, CLUSTER, GRIDS, PORT, TRAINING

SECTIONS = {
    "Command lines": COMMAND_LINES,
    "Paths": PATHS,
    "Annotation files": JSON,
    "Shards": SHARDS,
    "Checkpoints and weights": CHECKPOINTS,
    "Training": TRAINING,
    "Clusters and tracking": [*CLUSTER, *MEMORY],
    "Grids": GRIDS,
}
MISTAKES = [(section, mistake) for section, ones in SECTIONS.items() for mistake in ones]
PAGE = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
WITHOUT_A_GPU = (
    "a GPU asked for, and none there",
    "the operators' check on a GPU that is not there",
)
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    make_place(folder)
    return folder


def row(mistake: Mistake, line: str) -> str:
    """The mistake's row of the table."""
    cells = (mistake.situation, f"`{line}`", mistake.remedy)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def shown(line: str, work: Path) -> str:
    """The line as it is on any machine: without the folder of the test, ports and digests."""
    line = line.replace(f"{work}/", "").replace(str(work), ".").replace(str(PORT), "8265")
    line = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{12,64}\b", "…", line)
    line = re.sub(r"0x[0-9a-f]{6,}|x{100,}", "…", line)
    # Lists of commands and recipes grow.
    line = re.sub(r"(\bone of )[\w, .-]+(?=$|; )", r"\1…", line)
    return re.sub(r"/\S*/(?=(libcuda_ops|csrc|cuda_ops/csrc))", "…/", line)


def rows() -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return text[text.index(BEGIN) : text.index(END)].splitlines()


def made(mistake: Mistake, place: Path, tmp_path: Path, debug: bool = False) -> tuple[Said, Path]:
    work = tmp_path / "work"
    said = run(mistake, place, work, debug)
    return said, work


@pytest.mark.parametrize(("section", "mistake"), MISTAKES, ids=[m.situation for _, m in MISTAKES])
def test_a_mistake_is_one_line_that_says_what_helps(place, tmp_path, section, mistake):
    if torch.cuda.is_available() and mistake.situation in WITHOUT_A_GPU:
        pytest.skip("this machine has a GPU, for want of which the command fails elsewhere")
    said, work = made(mistake, place, tmp_path)
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in said.out
    assert said.status == mistake.status
    for part in mistake.says:
        assert part in lines[0]
    assert not (work / "executed").exists()
    for name in mistake.kept:
        before = contents([place / name])
        after = contents([work / name])
        assert {k.removeprefix(str(work)): v for k, v in after.items()} == {
            k.removeprefix(str(place)): v for k, v in before.items()
        }
    assert row(mistake, shown(lines[0], work)) in rows()


def test_the_page_has_no_row_of_its_own():
    table = [line for line in rows() if line.startswith("| ") and "`error: " in line]
    assert len(table) == len(MISTAKES) >= 60
    assert len({mistake.situation for _, mistake in MISTAKES}) == len(MISTAKES)
    assert [line[4:] for line in rows() if line.startswith("### ")] == list(SECTIONS)


@pytest.mark.parametrize(
    "mistake",
    [COMMAND_LINES[2], COMMAND_LINES[6], JSON[0], SHARDS[0], TRAINING[-1], TRAINING[-3]],
    ids=lambda mistake: mistake.situation,
)
def test_with_debug_the_traceback_comes_before_the_line(place, tmp_path, mistake):
    said, _ = made(mistake, place, tmp_path, debug=True)
    *before, last = said.err.splitlines()
    assert before[0] == "Traceback (most recent call last):" or "Traceback" in said.err
    assert last.startswith("error: ")
    assert said.status == mistake.status
    assert "--debug shows" not in last
