"""Where the compiled operators lie, whether they fit the sources, and how they are loaded."""

import hashlib
import json
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
FOLDER = Path(__file__).parent.parent / ".build" / "cuda_ops"
REMEDY = "build it with: python -m cuda_ops build"


def source_files(device: str) -> list[Path]:
    """Every file that the library of `device` ("cpu" or "cuda") is compiled from."""
    files = [path for path in SOURCES.iterdir() if path.is_file()]
    files += [path for path in (SOURCES / device).iterdir() if path.is_file()]
    return sorted(files)


def sources_digest(device: str) -> str:
    """SHA-256 over the names and contents of `source_files`."""
    digest = hashlib.sha256()
    for path in source_files(device):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(SOURCES)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def library_path(device: str) -> Path:
    """Where the library for "cpu" or "cuda" lies once it is built."""
    return FOLDER / f"libcuda_ops_{device}.so"


def stamp_path(device: str) -> Path:
    """The JSON record of what `library_path(device)` was built from; written after it."""
    return FOLDER / f"{device}.json"


def load(device: str) -> None:
    """Registers the kernels of `device` with torch.

    Raises:
        ImportError: the library was never built, is not of these sources, or does not load.
    """
    path = library_path(device)
    if not path.exists() or not stamp_path(device).exists():
        raise ImportError(f"the {device} operators are not built (no {path}); {REMEDY}")
    written = stamp_path(device).read_text()
    record = json.loads(written)
    if record["sources"] != sources_digest(device):
        raise ImportError(
            f"{path} was built from other sources than those in {SOURCES}; re{REMEDY}"
        )
    # Loading a file that a copy left incomplete would end the process, not raise.
    if record["library"] != file_digest(path):
        if stamp_path(device).read_text() != written:  # a build has put both there meanwhile
            return load(device)
        raise ImportError(f"{path} is not the file that was built, a torn copy?; re{REMEDY}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(f"{path} does not load ({error}); re{REMEDY}") from error
