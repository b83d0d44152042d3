"""What a recipe costs, beside what was published. Counted on the meta device, without arithmetic,
but for Faster R-CNN, whose proposals depend on values: that one runs, with random weights."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from model.detr import build_model
from pipeline.errors import UserError
from pipeline.machine_errors import naming
from pipeline.recipes import recipe

SIZE = (800, 1066)
"""Height and width of the one image that is counted: a 4:3 image as evaluation resizes it."""

OBJECTS = 7
"""In that image, where training asks for its objects: COCO has 7.3 in an image."""

PUBLISHED = {
    "deformable_detr_r50": (40, 173),
    "deformable_detr_r50_refine": (40, 173),
    "deformable_detr_r50_two_stage": (40, 173),
    "deformable_detr_r50_single_scale": (34, 78),
    "deformable_detr_r50_single_scale_dc5": (34, 128),
    "detr_r50": (41, 86),
    "detr_r50_dc5": (41, 187),
    "detr_r50_dc5_plus": (41, 187),
    "faster_rcnn_r50_fpn": (42, 180),
    "conditional_detr_r50": (44, 90),
    "conditional_detr_r50_dc5": (44, 195),
    "sam_detr_r50": (58, 100),
    "sam_detr_r50_smca": (58, 100),
    "sam_detr_r50_dc5": (58, 210),
    "sam_detr_r50_dc5_smca": (58, 210),
    "sam_detr_r50_multiscale": (55, 203),
    "sam_detr_r50_multiscale_smca": (55, 203),
}
"""Millions of parameters and G of multiply-adds: Table 1 of the paper; the two single-scale rows
are in the official repository's README alone, those of the family in its methods' own."""


@dataclass(frozen=True)
class Cost:
    """One recipe's row. Counts are of one image of `SIZE`; memory is in bytes."""

    recipe: str
    parameters: int
    trainable: int
    multiply_adds: int
    """Of convolutions, linear layers and matrix products, in inference."""
    sampling: int
    """Multiply-adds of deformable sampling, which `multiply_adds` leaves out."""
    state: int
    """Memory of training that no batch changes: weights, gradients and AdamW's two moments."""
    activations: int
    """What a float32 forward keeps for its backward, for each image."""
    published_parameters: int | None
    """Millions."""
    published_multiply_adds: int | None
    """G."""


def describe(name: str) -> Cost:
    """The cost of a recipe. Raises `UserError` for an unknown name."""
    config = recipe(name).model
    with torch.device("cpu" if config.architecture == "faster_rcnn" else "meta"):
        model = build_model(config)
        images = torch.zeros(1, 3, *SIZE)
        padding = torch.zeros(1, *SIZE, dtype=torch.bool)
    products, sampling = multiply_adds(lambda: model.eval()(images, padding))
    kept = activation_bytes(model, lambda: _train_forward(model, images, padding))
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    weights = sum(x.nbytes for x in (*parameters, *model.buffers()))
    published = PUBLISHED.get(name, (None, None))
    return Cost(
        recipe=name,
        parameters=sum(p.numel() for p in parameters),
        trainable=trainable,
        multiply_adds=products,
        sampling=sampling,
        state=weights + trainable * 3 * 4,
        activations=kept,
        published_parameters=published[0],
        published_multiply_adds=published[1],
    )


def _train_forward(model: Any, images: Tensor, padding: Tensor) -> object:
    """A training step's forward, of an image with `OBJECTS` where the model wants to know. Faster
    R-CNN's second stage is the loss's to call, with as many boxes as it draws."""
    targets = []
    if model.config.wants_targets:
        labels = torch.zeros(OBJECTS, dtype=torch.int64)
        targets = [[{"labels": labels, "boxes": torch.full((OBJECTS, 4), 0.5)}]]
    outputs = model.train()(images, padding, *targets)
    if "second_stage" not in outputs:
        return outputs
    drawn = model.config.sampled_proposals
    return outputs, outputs["second_stage"]([boxes[:drawn] for boxes in outputs["proposals"]])


def multiply_adds(run: Callable[[], object]) -> tuple[int, int]:
    """(convolutions, linear layers and matrix products, deformable sampling) of what `run` does.

    Sampling counts five for each channel of each sample, four to interpolate and one to weigh, as
    in the paper's A.1. Autograd must be on: torch's counter fails on views of parameters without.
    """
    samplers = {
        torch.ops.cuda_ops.fused_deformable_attention: _sampling_flops,
        torch.ops.cuda_ops.multi_scale_deformable_attention: _sampling_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=samplers)
    with counter:
        run()
    flops = counter.get_flop_counts()["Global"]
    sampling = sum(flops.pop(operator, 0) for operator in samplers)
    return sum(flops.values()) // 2, sampling // 2


def _sampling_flops(
    value: torch.Size, sizes: list[int], points: torch.Size, third: torch.Size, *rest: Any, **_: Any
) -> int:
    """From the operator's shapes. Fused: value [N, S, M, D], references, offsets [N, Q, M, L, K,
    2], logits. Plain: value, locations [N, Q, M, L, K, 2], weights [N, Q, M, L, K]."""
    samples = third[:5] if len(third) == 6 else points[:5]
    return 2 * 5 * math.prod(samples) * value[3]


def activation_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Bytes that autograd keeps at the end of `run`, a forward on the meta device, each storage
    once and the model's own weights left out. Not the peak: temporaries come on top."""
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    # Holding a storage keeps its address from being given to another.
    kept: dict[int, torch.UntypedStorage] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), _FusedAsOnGpu():
        run()
    return sum(storage.nbytes() for storage in kept.values())


class _FusedAsOnGpu(TorchFunctionMode):
    """Attention and dropout by the operators that a GPU has for them. The meta device takes them
    apart and would keep the products of all queries with all keys, and dropout's mask as floats."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _memory_efficient_attention(*args, **kwargs)
        if func is F.dropout:
            return _fused_dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Keeps its inputs, its output and a number for each query and head."""
    bias = None
    if mask is not None:
        shape = (*query.shape[:3], key.shape[2])
        bias = mask.to(query.dtype).expand(shape)
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    return operator(query, key, value, bias, True, dropout)[0]


def _fused_dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    """Keeps a mask of one byte for each number."""
    assert not inplace
    return torch.native_dropout(x, p, training)[0] if training and p > 0 else x


HEADER = (
    "recipe",
    "parameters M",
    "trainable M",
    "multiply-adds G",
    "sampling G",
    "state MiB",
    "activations MiB",
    "published M / G",
)


def table(costs: list[Cost]) -> str:
    """A Markdown table, aligned so that it reads in a terminal, too."""
    rows = [HEADER, *(_cells(cost) for cost in costs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return f"| {first[0]:<{first[1]}} | " + " | ".join(f"{c:>{w}}" for c, w in rest) + " |"

    rule = "|" + "|".join([f":{'-' * (widths[0] + 1)}", *(f"{'-' * (w + 1)}:" for w in widths[1:])])
    return "\n".join([line(rows[0]), f"{rule}|", *map(line, rows[1:])])


def _cells(cost: Cost) -> tuple[str, ...]:
    paper = (cost.published_parameters, cost.published_multiply_adds)
    return (
        cost.recipe,
        f"{cost.parameters / 1e6:.2f}",
        f"{cost.trainable / 1e6:.2f}",
        f"{cost.multiply_adds / 1e9:.1f}",
        f"{cost.sampling / 1e9:.2f}",
        f"{cost.state / 2**20:.0f}",
        f"{cost.activations / 2**20:.0f}",
        "" if None in paper else f"{paper[0]} / {paper[1]}",
    )


def check_output(path: Path) -> None:
    """Raises `UserError` where `write` could not know the format."""
    if path.suffix not in (".json", ".md"):
        raise UserError(f"--output: got {str(path)!r}, expected a name that ends in .json or .md")


def write(costs: list[Cost], path: Path) -> None:
    """As JSON, exact, or as the Markdown table, by the ending of `path`."""
    check_output(path)
    if path.suffix == ".json":
        content = json.dumps(
            {"size": SIZE, "recipes": [dataclasses.asdict(cost) for cost in costs]}, indent=1
        )
    else:
        content = table(costs)
    with naming(path):
        path.write_text(content + "\n", encoding="utf-8")
