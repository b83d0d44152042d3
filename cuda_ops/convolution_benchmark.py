"""Time of `modulated_deform_conv2d` beside torchvision's `deform_conv2d`, in the same run.

On the CPU the first must be the faster one, or torchvision's could be called in its place; on a
GPU, where it is torchvision's by default, the attention kernels' way is timed beside it.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from cuda_ops.benchmark import Row, deterministic, times
from cuda_ops.ops import modulated_deform_conv2d

# name: channels, groups, height and width; 3x3, stride 1, one deformable group, batch 1.
CASES = {
    "X101 64x4d C5": (2048, 64, 25, 42),
    "R50 C5": (512, 1, 25, 42),
    "R50 C3": (128, 1, 100, 167),
}


def convolution_benchmark(device: str, seconds: float) -> Iterator[list[Row]]:
    """Yields the rows of one case at a time, float32, ours first; none without torchvision."""
    if find_spec("torchvision") is None:
        return
    for name, sizes in CASES.items():
        yield _compare(name, sizes, device, seconds)


def _compare(name: str, sizes: tuple[int, int, int, int], device: str, seconds: float) -> list[Row]:
    from torchvision.ops import deform_conv2d

    channels, groups, height, width = sizes
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    image, offset = normal(1, channels, height, width), normal(1, 18, height, width)
    mask, weight = normal(1, 9, height, width).sigmoid(), normal(channels, channels // groups, 3, 3)
    leaves = [x.requires_grad_() for x in (image, offset, mask, weight)]

    def theirs() -> Tensor:
        return deform_conv2d(image, offset, weight, None, 1, 1, 1, mask)

    def ours() -> Tensor:
        return modulated_deform_conv2d(image, offset, mask, weight, None, 1, 1)

    contenders: dict[str, Callable[[], Tensor]] = {"ours": ours, "torchvision": theirs}
    if device == "cuda":
        contenders["by attention"] = ours  # the deterministic mode, and named so for it

    def mode(contender: str) -> Any:
        return deterministic() if contender == "by attention" else nullcontext()

    def forward(call: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return call()

        return run

    def both(call: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call().sum(), leaves)

    taken = [
        times({key: kind(call) for key, call in contenders.items()}, device, seconds, mode)
        for kind in (forward, both)
    ]
    return [
        Row(name, "float32", contender, taken[0][contender], taken[1][contender])
        for contender in contenders
    ]
