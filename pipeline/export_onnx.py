"""A detector as an ONNX file of standard operators."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.export_check import Run
from pipeline.export_graph import exported
from pipeline.export_metadata import metadata
from pipeline.predict import Detector

OPSET = 18
"""The lowest that torch's exporter writes."""
INPUTS, OUTPUTS = ["images", "sizes"], ["scores", "labels", "boxes"]


def write_onnx(detector: Detector, path: Path) -> None:
    """One file, weights and metadata included. Raises `UserError` as `exported` does."""
    import onnx
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants

    with _silent("torch.onnx"):
        program = torch.onnx.export(
            exported(detector),
            dynamo=True,
            optimize=False,  # its search for patterns takes minutes, and onnxruntime has its own
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=OUTPUTS,
            verbose=False,
        )
    assert program is not None
    fold_constants(program.model)
    passes.CommonSubexpressionEliminationPass()(program.model)
    passes.RemoveUnusedNodesPass()(program.model)
    proto = program.model_proto
    for node in proto.graph.node:  # else each says at which line of which file it was traced
        node.ClearField("metadata_props")
    proto.graph.ClearField("value_info")
    pairs = proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    number, integer = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    described = {
        "images": (onnx.TensorProto.UINT8, ["batch", 3, "height", "width"]),
        "sizes": (integer, ["batch", 2]),
        "scores": (number, ["batch", pairs]),
        "labels": (integer, ["batch", pairs]),
        "boxes": (number, ["batch", pairs, 4]),
    }
    for value in (*proto.graph.input, *proto.graph.output):
        kind, shape = described[value.name]
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shape))
    proto.producer_name = "deformable-detr-pipeline"
    onnx.helper.set_model_props(proto, metadata(detector))
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def onnx_runner(path: Path) -> Run:
    """The file in onnxruntime on the CPU, with as many threads as torch has."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = dict(zip(INPUTS, (images.numpy(), sizes.numpy()), strict=True))
        scores, labels, boxes = (np.asarray(x) for x in session.run(OUTPUTS, given))
        return torch.from_numpy(scores), torch.from_numpy(labels), torch.from_numpy(boxes)

    return run


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """Without a logger's remarks on what the exporter does."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
