"""What an optimizer remembers, by parameter name: one form for every number of processes and every
ZeRO stage, made of tensors and plain values alone.

Collective functions must be called by every rank.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.zero3 import cut, joined, load_weights, whole_shape, without_padding

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def gather(engine: Any) -> dict[str, Any]:
    """The optimizer's state on the CPU, whole on rank 0; elsewhere without moments (collective).

    `moments` maps a parameter's name to its AdamW moments, float32 in the parameter's shape;
    `updates` counts the steps that AdamW has taken.
    """
    if not _torch_optimizer(engine).state:  # every step so far was left out
        _prepare(engine, 0)
    moments: dict[str, dict[str, Tensor]] = {}
    for name, parameter in trained(engine.module):
        whole = {key: _moment(engine, parameter, key) for key in MOMENTS}
        if dist.get_rank() == 0:
            moments[name] = {key: value.to("cpu", copy=True) for key, value in whole.items()}
    return {"moments": moments, "updates": _updates(engine)}


def restore(
    engine: Any, state: Mapping[str, Any], weights: Mapping[str, Tensor], step: int
) -> None:
    """Puts an engine that has not trained yet where `gather` found another, after `step` steps of
    the schedule, `weights` being the model's state dict of then.

    Raises `ValueError` naming parameters that the state does not have, or has in another shape.
    """
    named = dict(trained(engine.module))
    moments = state["moments"]
    if moments.keys() != named.keys():
        raise ValueError(f"optimizer state of other parameters: {_few(moments.keys() ^ named)}")
    odd = [n for n, p in named.items() if moments[n][MOMENTS[0]].shape != whole_shape(p)]
    if odd:
        raise ValueError(f"optimizer state of other shapes: {_few(odd)}")
    load_weights(engine.module, weights)
    if engine.zero_optimization():
        engine.optimizer.refresh_fp32_params()
    _prepare(engine, state["updates"])
    for name, parameter in named.items():
        for key in MOMENTS:
            _set_moment(engine, parameter, key, moments[name][key].to(parameter.device))
    _restore_schedule(engine.lr_scheduler, step)


def trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that the optimizer changes."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def _moment(engine: Any, parameter: nn.Parameter, key: str) -> Tensor:
    state = _torch_optimizer(engine).state
    if not engine.zero_optimization():
        return state[parameter][key]
    if engine.zero_optimization_partition_weights():
        return joined(parameter, engine.optimizer.get_local_fp32_param(parameter, key))
    whole = torch.zeros_like(parameter, dtype=torch.float32).flatten()
    part = _part(engine, parameter, key, whole)
    if part is not None:
        mine, stored = part
        mine.copy_(stored)
    dist.all_reduce(whole)  # of numbers that one rank has and zeros that the others have: exact
    return whole.view_as(parameter)


def _set_moment(engine: Any, parameter: nn.Parameter, key: str, value: Tensor) -> None:
    if not engine.zero_optimization():
        _torch_optimizer(engine).state[parameter][key].copy_(value)
        return
    if engine.zero_optimization_partition_weights():
        stored = engine.optimizer.get_local_fp32_param(parameter, key)
        without_padding(parameter, stored).copy_(cut(value))
        return
    part = _part(engine, parameter, key, value.flatten())
    if part is not None:
        mine, stored = part
        stored.copy_(mine)


def _part(
    engine: Any, parameter: nn.Parameter, key: str, whole: Tensor
) -> tuple[Tensor, Tensor] | None:
    """What this rank keeps of a parameter's moment: its place in `whole`, the moment laid flat, and
    in the optimizer's state. None: nothing."""
    # DeepSpeed's own way, safe_get_full_optimizer_state, knows the first parameter group alone: it
    # is tied to the optimizer's state as soon as that group has taken its first step.
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    stored = _torch_optimizer(engine).state[flat][key]
    inside, mine = mapping.hp_fragment_address, mapping.lp_fragment_address
    return (
        whole.narrow(0, mine.start, mine.numel),
        stored.narrow(0, inside.start, inside.numel),
    )


def _optimized(engine: Any) -> list[Tensor]:
    """The tensors that torch's AdamW updates: parameters, or ZeRO's parts of them laid flat."""
    if engine.zero_optimization_partition_weights():
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    if engine.zero_optimization():
        return list(engine.optimizer.single_partition_of_fp32_groups)
    return [p for _, p in trained(engine.module)]


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer


def _updates(engine: Any) -> int:
    return int(_torch_optimizer(engine).state[_optimized(engine)[0]]["step"])


def _prepare(engine: Any, updates: int) -> None:
    """Gives AdamW the state that its first step would make, with moments of zero."""
    optimizer = _torch_optimizer(engine)
    fused = optimizer.defaults["fused"]
    for tensor in _optimized(engine):
        # As in torch.optim.adam: the count is on the device only where the fused kernel reads it.
        count = torch.tensor(float(updates), device=tensor.device if fused else "cpu")
        zeros = {key: torch.zeros_like(tensor) for key in MOMENTS}
        optimizer.state[tensor] = {"step": count, **zeros}


def _restore_schedule(scheduler: Any, steps: int) -> None:
    scheduler.last_epoch = steps
    rates = [
        base * factor(steps)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _few(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
