"""Damage to valid files, drawn from a seeded generator: bytes, JSON trees, zips, pickles."""

import copy
import gzip
import io
import json
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

# Texts that stand in a dumped tree for what `json.dumps` itself would refuse.
HUGE, DEEP, DEEP_OBJECT = "@HUGE@", "@DEEP@", "@DEEP-OBJECT@"
RAW = {
    json.dumps(HUGE): "1" * 5000,
    json.dumps(DEEP): "[" * 50_000 + "]" * 50_000,
    json.dumps(DEEP_OBJECT): '{"a":' * 2000 + "1" + "}" * 2000,
}
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**400,
    1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"), "", "x", "1", "x" * 3000,
    "nul\0", "\ud800", "../../etc/passwd", "/dev/zero", "é", [], {}, [[]], [None], {"": 0},
    [1, 2], [1, 2, 3, 4], [-5, -5, 0, 0], ["a"] * 4, [float("nan")] * 4, [10**400] * 4,
    {"id": 1}, HUGE, DEEP, DEEP_OBJECT,
)  # fmt: skip
EDGES = (b"\0", b"\xff", b"\x7f", b"\x80", b"\n", b"{", b"[", b'"', b"9", b"-")


def damaged(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One to four changes of the bytes: flips, edges, cuts, repeats, splices with other files."""
    for _ in range(random.randint(1, 4)):
        size = len(data)
        if not size:
            return random.randbytes(random.randint(0, 600))
        at, length = random.randrange(size), random.choice((1, 2, 4, 16, 100, 512))
        kind = random.randrange(9)
        if kind == 0:
            flipped = data[at] ^ (1 << random.randrange(8))
            data = data[:at] + bytes([flipped]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + random.choice(EDGES) + data[at + 1 :]
        elif kind == 2:
            data = data[:at] + random.randbytes(length) + data[at + length :]
        elif kind == 3:
            data = data[:at] + random.choice((b"\0", b"\xff")) * length + data[at + length :]
        elif kind == 4:
            data = data[:at] + data[at + length :]
        elif kind == 5:
            data = data[:at] + data[at : at + length] * random.randint(2, 4) + data[at + length :]
        elif kind == 6:
            data = data[:at]
        elif kind == 7:
            other = random.choice(others) if others else data
            data = data[:at] + other[random.randrange(len(other) + 1) :]
        else:
            data = data[:at] + random.randbytes(length) + data[at:]
    return data


def same_size(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """As `damaged`, of the size of `data`, so that what compares sizes first lets it pass."""
    return damaged(random, data, others)[: len(data)].ljust(len(data), b"\0")


def changed_tree(random: Random, tree: Any) -> Any:
    """A copy of a JSON tree with one to three of its places changed, removed or repeated."""
    tree = json.loads(json.dumps(tree))
    for _ in range(random.randint(1, 3)):
        holder, key = random.choice(list(places({"": tree})) or [({"": tree}, "")])
        kind = random.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[random.choice((str(key) + "x", "", "__class__", "\0"))] = holder.pop(key)
        elif kind == 2 and isinstance(holder, list):
            holder.insert(key, holder[key])
        else:
            value = copy.deepcopy(random.choice(HOSTILE))  # it may be changed in its turn
            if holder.__class__ is dict and key == "" and holder.get("") is tree:
                return value
            holder[key] = value
    return tree


def places(tree: Any) -> Any:
    """(holder, key) of every value in a tree but the outermost."""
    for outer in tree.values():
        stack = [outer]
        while stack:
            node = stack.pop()
            items = node.items() if isinstance(node, dict) else enumerate(node)
            if isinstance(node, dict | list):
                for key, value in list(items):
                    yield node, key
                    if isinstance(value, dict | list):
                        stack.append(value)


def as_text(tree: Any) -> bytes:
    text = json.dumps(tree)
    for stand_in, raw in RAW.items():
        text = text.replace(stand_in, raw)
    return text.encode()


def json_file(random: Random, tree: Any, others: Sequence[bytes]) -> bytes:
    """A damaged JSON file: most often valid JSON with wrong content, else damaged bytes or another
    encoding."""
    kind = random.randrange(10)
    if kind < 6:
        return as_text(changed_tree(random, tree))
    data = as_text(tree)
    if kind == 6:
        return random.choice(
            (
                b"\xef\xbb\xbf" + data,
                data.decode().encode("utf-16"),
                gzip.compress(data),
                data.decode().replace("a", "é").encode("latin-1"),
                data.replace(b"}", b',"id":1}'),
                data + data,
            )
        )
    return damaged(random, data, others)


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (open, (str(self.marker), "w"))


def bombs(marker: Path) -> list[bytes]:
    """Pickles that make the marker file where code in them is executed, in every protocol, by
    builtins and by other modules."""
    own = [pickle.dumps({"model": Bomb(marker)}, protocol) for protocol in range(6)]
    text = str(marker)
    others = [
        f"c{module}\n{name}\n(V{argument}\ntR.".encode()
        for module, name, argument in (
            ("os", "system", f"touch {text}"),
            ("posix", "system", f"touch {text}"),
            ("subprocess", "getoutput", f"touch {text}"),
            ("builtins", "eval", f"open({text!r}, 'w')"),
            ("builtins", "exec", f"open({text!r}, 'w')"),
            ("pathlib", "Path.touch", text),
            ("runpy", "run_path", text),
            ("torch.serialization", "load", text),
        )
    ]
    return own + others


def rezipped(data: bytes, change: Any) -> bytes:
    """A zip with one of its entries changed by `change(name, content)` and its sums set right."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as made:
        for name in source.namelist():
            made.writestr(name, change(name, source.read(name)))
    return target.getvalue()
