"""Damaged files for every reader: `python -m tests.fuzz.run --inputs 20000 --seed 0` (`make fuzz`).

Each must be accepted, or refused by a ValueError or OSError of one line. Anything else is a
finding, which is kept below outputs/fuzz: another exception, the end of the process, more time or
memory than the limits, code of the file that is executed. Input i of a reader is a function of
(seed, reader, i), so a finding comes again.
"""

import argparse
import json
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.readers import Reader, readers

SECONDS = 60  # of processor time for one input; the slowest take one
GIGABYTES = 4  # more than there were before the first input
LONGEST = 2000  # characters of a message


@dataclass
class Tally:
    """Of one reader: outcomes, and findings as (input, what happened)."""

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[int, str]] = field(default_factory=list)
    slowest: float = 0.0

    @property
    def inputs(self) -> int:
        return self.accepted + self.refused.total() + len(self.findings)


class TooLong(BaseException):
    """No Exception, which a reader could take for a damaged file."""


def outcome(reader: Reader, made: Any) -> tuple[str, str]:
    """("accepted" | "refused" | "finding", the exception's name or what is wrong)."""
    try:
        reader.read(made)
    except (ValueError, OSError) as error:
        said = str(error)
        if not said.strip() or len(said.splitlines()) > 1 or len(said) > LONGEST:
            return "finding", f"{type(error).__name__} of other than one line: {said[:200]!r}"
        return "refused", type(error).__name__
    except TooLong:
        return "finding", f"more than {SECONDS} s of processor time"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return (
            "finding",
            f"{type(error).__name__}: {str(error)[:120]} ({where.filename}:{where.lineno})",
        )
    return "accepted", ""


def fuzz(reader: Reader, count: int, seed: int, marker: Path) -> Tally:
    """Has the reader read `count` inputs, in processes of their own: one that dies is a finding,
    and the next goes on behind it."""
    tally, first = Tally(), 0
    while first < count:
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            os.close(ours)
            status = 1
            try:
                with os.fdopen(theirs, "w") as pipe:
                    read_in_child(reader, range(first, count), seed, marker, pipe)
                status = 0
            finally:
                os._exit(status)
        os.close(theirs)
        with os.fdopen(ours) as pipe:
            for line in pipe:
                kind, said, seconds = json.loads(line)
                tally.slowest = max(tally.slowest, seconds)
                if kind == "accepted":
                    tally.accepted += 1
                elif kind == "refused":
                    tally.refused[said] += 1
                else:
                    tally.findings.append((first, said))
                first += 1
        _, status = os.waitpid(child, 0)
        if status:
            tally.findings.append((first, f"the process died, status {status}"))
            first += 1
    return tally


def read_in_child(reader: Reader, numbers: range, seed: int, marker: Path, pipe: Any) -> None:
    def too_long(*_: Any) -> None:
        raise TooLong

    warnings.simplefilter("ignore")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)  # what C libraries say of damaged images
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0)  # pytest's
    signal.signal(signal.SIGVTALRM, too_long)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + GIGABYTES * 2**30,) * 2)
    for number in numbers:
        made = reader.make(Random(f"{seed} {reader.name} {number}"))
        begun = time.process_time()
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        kind, said = outcome(reader, made)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if marker.exists():
            marker.unlink()
            kind, said = "finding", "code of the file was executed"
        print(json.dumps([kind, said, time.process_time() - begun]), file=pipe, flush=True)


def keep(reader: Reader, seed: int, number: int, said: str) -> Path:
    """Saves an input for a look at it."""
    made = reader.make(Random(f"{seed} {reader.name} {number}"))
    folder = Path("outputs/fuzz")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{reader.name.replace(' ', '-')}-{seed}-{number}"
    path.write_bytes(made if isinstance(made, bytes) else pickle.dumps(made))
    path.with_suffix(".txt").write_text(said)
    return path


def table(tallies: dict[str, Tally]) -> str:
    rows = [
        "| Reader | Inputs | Accepted | Refused | Findings | Slowest (s) |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    rows += [
        f"| {name} | {t.inputs} | {t.accepted} | {t.refused.total()} | {len(t.findings)} | "
        f"{t.slowest:.1f} |"
        for name, t in tallies.items()
    ]
    each = list(tallies.values())
    rows.append(
        f"| all | {sum(t.inputs for t in each)} | {sum(t.accepted for t in each)} | "
        f"{sum(t.refused.total() for t in each)} | {sum(len(t.findings) for t in each)} | "
        f"{max(t.slowest for t in each):.1f} |"
    )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=22_000, help="over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers with this in their name")
    options = parser.parse_args()
    tallies = {}
    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder) / "executed"
        for reader in readers(Path(folder), marker):
            if options.only not in reader.name:
                continue
            begun = time.monotonic()
            tally = fuzz(reader, max(1, round(options.inputs * reader.share)), options.seed, marker)
            tallies[reader.name] = tally
            print(f"{reader.name}: {tally.inputs} in {time.monotonic() - begun:.0f} s", flush=True)
            for said, count in Counter(said for _, said in tally.findings).most_common(12):
                number = next(n for n, other in tally.findings if other == said)
                print(f"  {count} x {said}\n    {keep(reader, options.seed, number, said)}")
    print(table(tallies))
    return int(any(tally.findings for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
