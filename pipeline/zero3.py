"""ZeRO stage 3: of every parameter, trained or frozen, a rank keeps a part of its own.

DeepSpeed lays a parameter flat, pads it to a multiple of the number of ranks, and cuts it into
equal parts; `ds_tensor` is this rank's. The whole is there only while its module runs. A parameter
without one, as all are in the other stages, is whole on every rank.

Collective functions must be called by every rank.
"""

from collections.abc import Mapping
from copy import deepcopy

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_partitioned(module: nn.Module) -> bool:
    """Whether ZeRO stage 3 has spread the module's parameters over the processes."""
    return hasattr(next(module.parameters()), "ds_tensor")  # all of them or none


def whole_shape(parameter: Tensor) -> torch.Size:
    """A parameter's shape before it was spread over processes."""
    return getattr(parameter, "ds_shape", parameter.shape)


def own_part(parameter: Tensor) -> Tensor:
    """What this rank keeps of a parameter, to read and to write: flat and maybe empty, or all of
    one that is whole."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    return without_padding(parameter, parameter.ds_tensor)


def without_padding(parameter: Tensor, part: Tensor) -> Tensor:
    """The numbers of this rank's `part`, of a partitioned parameter or of something laid out like
    it. What pads the last ranks' parts is arbitrary."""
    start, end = _bounds(whole_shape(parameter), part.numel())
    return part.narrow(0, 0, end - start)


def cut(whole: Tensor) -> Tensor:
    """This rank's part of a tensor, without padding."""
    start, end = _bounds(whole.shape, -(-whole.numel() // dist.get_world_size()))
    return whole.flatten()[start:end]


def joined(parameter: Tensor, part: Tensor) -> Tensor:
    """The tensor, in the parameter's shape, of which every rank gives its padded part
    (collective)."""
    flat = part.new_empty(dist.get_world_size() * part.numel())
    dist.all_gather_into_tensor(flat, part.detach())
    shape = whole_shape(parameter)
    return flat[: shape.numel()].view(shape)


def partition(module: nn.Module) -> None:
    """Leaves of a module's whole parameters this rank's parts, in the form that DeepSpeed's have;
    the module cannot run any more."""
    for parameter in module.parameters():
        whole = parameter.detach()
        padded = whole.new_zeros(-(-whole.numel() // dist.get_world_size()))
        parameter.ds_shape, parameter.ds_tensor = whole.shape, padded  # type: ignore[attr-defined]
        own_part(parameter).copy_(cut(whole))
        parameter.data = whole.new_empty(0)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads a whole state dict. Raises `ValueError` where names or shapes differ."""
    state = module.state_dict(keep_vars=True)
    expected = {name: whole_shape(value) for name, value in state.items()}
    found = {name: value.shape for name, value in weights.items()}
    if found != expected:
        odd = {name for name, _ in found.items() ^ expected.items()}
        raise ValueError(f"weights of another model: {len(odd)} tensors differ, as {min(odd)}")
    with torch.no_grad():
        for name, value in state.items():
            partitioned = hasattr(value, "ds_tensor")
            own_part(value).copy_(cut(weights[name]) if partitioned else weights[name])


def weights_on_host(module: nn.Module, wanted: bool) -> dict[str, Tensor]:
    """A module's whole state dict on the CPU, in memory of its own, on the ranks that want it;
    elsewhere empty (collective where the module is partitioned)."""
    found: dict[str, Tensor] = {}
    if not wanted and not is_partitioned(module):
        return found
    for name, value in module.state_dict(keep_vars=True).items():
        whole = _whole(value)
        if wanted:
            found[name] = whole.detach().to("cpu", copy=True)
    return found


def whole_copy(module: nn.Module, skeleton: nn.Module) -> nn.Module:
    """A module that runs by itself, with the weights of a partitioned one (collective). `skeleton`:
    the module with parameters that have shapes alone."""
    copy = deepcopy(skeleton)
    state = module.state_dict(keep_vars=True)
    copy.load_state_dict({n: _whole(value).detach() for n, value in state.items()}, assign=True)
    return copy


def without_weights(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters have shapes alone, and no memory."""
    empty = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()}
    return deepcopy(module, empty)


def _whole(value: Tensor) -> Tensor:
    return joined(value, value.ds_tensor) if hasattr(value, "ds_tensor") else value


def _bounds(shape: torch.Size, size: int) -> tuple[int, int]:
    start = dist.get_rank() * size
    return min(start, shape.numel()), min(start + size, shape.numel())
