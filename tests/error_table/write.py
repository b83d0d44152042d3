"""Writes the table of docs/errors.md anew: `python -m tests.error_table.write`."""

import tempfile
from pathlib import Path

from tests.error_table.place import make_place, run
from tests.test_error_table import BEGIN, END, PAGE, SECTIONS, row, shown


def main() -> None:
    lines = [BEGIN]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "place"
        make_place(place)
        for section, mistakes in SECTIONS.items():
            lines += ["", f"### {section}", ""]
            lines += ["| What went wrong | What is printed | What helps |", "|---|---|---|"]
            for number, mistake in enumerate(mistakes):
                work = Path(folder) / f"{section}-{number}" / "work"
                work.parent.mkdir()
                said = run(mistake, place, work)
                printed = shown(said.err.strip(), work)
                lines.append(row(mistake, printed))
                wrong = [part for part in mistake.says if part not in printed]
                if said.status != mistake.status or wrong or "\n" in printed:
                    print(
                        f"--- {mistake.situation}: status {said.status}, lacks {wrong}\n{printed}"
                    )
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    table = "\n".join([*lines, "", END])
    PAGE.write_text(head + table + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
