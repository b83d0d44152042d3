"""What `benchmark-predict` times: our model, and the same weights in other hands.

N batch, H x W size of the images, which have no padding.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.detr import build_model
from pipeline.data.batch import Batch
from pipeline.data.labels import Labels
from pipeline.engine import AUTOCAST, choose_device
from pipeline.errors import UserError
from pipeline.evaluate import predict
from pipeline.export_graph import exported
from pipeline.export_onnx import onnx_runner, write_onnx
from pipeline.export_transformers import write_for_transformers
from pipeline.predict import Detector
from pipeline.recipes import RECIPES, recipe

OTHERS = ("transformers", "onnx", "torch")


@dataclass(frozen=True)
class Contender:
    """One of the implementations whose prediction is timed."""

    name: str
    what: str
    """What exactly runs, for the report."""
    detect: Callable[[Tensor, Tensor], list[Tensor]]
    """(images uint8 [N, 3, H, W], sizes int64 [N, 2]), both on the host, to each image's scores,
    best first. Boxes and labels are computed along."""


def detector_of(target: str, device: Any, precision: Any) -> Detector:
    """A checkpoint's, or a recipe's with the weights that training starts from.

    Raises `UserError` for what is neither.
    """
    if Path(target).exists():
        detector = Detector.load(Path(target), device)
    elif target in RECIPES or "/" not in target:
        config = recipe(target)
        config = replace(config, engine=replace(config.engine, device=device, precision="fp32"))
        torch.manual_seed(config.seed)
        chosen = choose_device(config.engine, "--device")
        columns = range(config.model.num_classes)
        labels = Labels(tuple(columns), tuple(f"class {column}" for column in columns))
        detector = Detector(build_model(config.model).to(chosen).eval(), labels, config, chosen)
    else:
        raise UserError(f"{target!r} does not exist: expected a checkpoint, or a recipe's name")
    engine = replace(detector.config.engine, precision=precision)
    return replace(detector, config=replace(detector.config, engine=engine))


def require(name: str, detector: Detector) -> None:
    """Raises `UserError` for a contender that is unknown, or cannot run here."""
    if name not in OTHERS:
        raise UserError(f"--beside: got {name!r}, expected some of {', '.join(OTHERS)}")
    if name == "transformers" and importlib.util.find_spec(name) is None:
        raise UserError("--beside transformers: not installed; pip install it, or leave it out")
    if name != "transformers":
        if detector.device.type != "cpu":
            raise UserError(f"--beside {name}: is timed on the CPU; leave it out of a GPU's run")
        if detector.config.engine.precision != "fp32":
            raise UserError(f"--beside {name}: its file is in fp32; use --precision fp32")


def build_contender(name: str, detector: Detector) -> Contender:
    """`name` with the detector's weights. Raises `UserError` for a model that it does not know."""
    if name == "ours":
        return _ours(detector)
    if name == "transformers":
        return _transformers(detector)
    if name == "torch":
        run: Callable[..., Any] = exported(detector).module()
        what = "the graph of `export --format torch`, run by torch"
    else:
        import onnxruntime  # type: ignore[import-untyped]

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "detector.onnx"
            write_onnx(detector, path)
            run = onnx_runner(path)
        what = f"the file of `export --format onnx` in onnxruntime {onnxruntime.__version__}"

    def detect(images: Tensor, sizes: Tensor) -> list[Tensor]:
        with torch.no_grad():
            scores, _, _ = run(images, sizes)
        return list(scores)

    return Contender(name, what, detect)


def _batch(images: Tensor, sizes: Tensor, device: torch.device) -> Batch:
    padding = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)
    return Batch(images, padding, [], [], sizes).to(device)


def _ours(detector: Detector) -> Contender:
    dtype = AUTOCAST.get(detector.config.engine.precision)

    def detect(images: Tensor, sizes: Tensor) -> list[Tensor]:
        with torch.no_grad():
            found = predict(detector.model, _batch(images, sizes, detector.device), dtype)
        return [result["scores"] for result in found]

    return Contender("ours", "our model, the fused operator", detect)


def _transformers(detector: Detector) -> Contender:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection, __version__

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "detector"
        write_for_transformers(detector, folder)
        processor = AutoImageProcessor.from_pretrained(folder)
        model = AutoModelForObjectDetection.from_pretrained(folder).to(detector.device).eval()
    dtype = AUTOCAST.get(detector.config.engine.precision)

    def detect(images: Tensor, sizes: Tensor) -> list[Tensor]:
        batch = _batch(images, sizes, detector.device)
        with (
            torch.no_grad(),
            torch.autocast(detector.device.type, dtype=dtype, enabled=dtype is not None),
        ):
            mask = (~batch.padding_mask).long()
            outputs = model(pixel_values=batch.normalized_images(), pixel_mask=mask)
        found = processor.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=sizes.to(detector.device)
        )
        return [result["scores"].sort(descending=True).values for result in found]

    what = (
        f"{type(model).__name__} of transformers {__version__} with our weights and its "
        "post_process_object_detection; images normalised as ours are"
    )
    return Contender("transformers", what, detect)
