"""A trained checkpoint in a form that runs without this repository."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pipeline.errors import UserError
from pipeline.export_check import check
from pipeline.export_graph import check_has_graph
from pipeline.export_onnx import onnx_runner, write_onnx
from pipeline.export_torch import (
    archive_runner,
    write_archive,
    write_safetensors,
)
from pipeline.export_transformers import write_for_transformers
from pipeline.predict import Detector

Format = Literal["onnx", "torch", "safetensors", "transformers"]
_WRITERS: dict[Format, tuple[str, Callable[[Detector, Path], None]]] = {
    "onnx": (".onnx", write_onnx),
    "torch": (".pt2", write_archive),
    "safetensors": (".safetensors", write_safetensors),
    "transformers": ("", write_for_transformers),
}
_RUNNERS = {"onnx": onnx_runner, "torch": archive_runner}


def export(checkpoint: Path, kind: Format, output: Path, say: Callable[[str], None]) -> None:
    """Writes `output`, a new file or for transformers a new folder, once it has been checked.

    The file of a graph is run and compared with the checkpoint; what begins, and each result, is
    told to `say`. Raises `UserError` for a checkpoint that cannot be read, a model that the format
    has no room for, an `output` that is there already or has another suffix, or a comparison that
    fails; nothing is left behind then.
    """
    suffix, write = _WRITERS[kind]
    if output.exists():
        expected = "a new file" if suffix else "a new folder"
        raise UserError(f"--output: {str(output)!r} exists already, expected {expected}")
    if suffix and output.suffix != suffix:
        raise UserError(f"--output: got {str(output)!r}, expected a name ending in {suffix}")
    if not output.parent.is_dir():
        raise UserError(f"--output: folder {str(output.parent)!r} does not exist")
    detector = Detector.load(checkpoint, "cpu")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as aside:
        made = Path(aside) / output.name
        if kind in _RUNNERS:
            check_has_graph(detector.config.model)
            say(f"tracing {checkpoint} on the CPU: a minute or two for a ResNet-50")
        write(detector, made)
        if kind in _RUNNERS:
            check(detector, _RUNNERS[kind](made), say)
        os.replace(made, output)
