"""Process group, device and the DeepSpeed engine: everything computed from the `RunConfig`."""

import math
import os
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from model.parameters import parameter_groups
from pipeline.config import EngineConfig, RunConfig, ScheduleConfig
from pipeline.data.loader import micro_batch_size
from pipeline.errors import Unreachable, UserError
from pipeline.parent import end_with_parent
from pipeline.process_group import join_group
from pipeline.zero3 import without_weights

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""dtype of each precision that is not full."""

KEPT_WHOLE = 2**14
"""Most numbers of a parameter that is whole on every rank between its uses in ZeRO stage 3: below,
a message costs more than the memory does. Half the parameters of the paper's model, by number, are
as small; together they are 0.4% of it."""


def set_determinism(deterministic: bool) -> None:
    """As `--engine.deterministic` says, before anything is computed on a GPU: cuBLAS needs a
    workspace of fixed size for it, and torch refuses its products otherwise."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def choose_device(config: EngineConfig, option: str = "--engine.device") -> torch.device:
    """The device of this process. Raises `UserError` where what was asked for is not there.

    option: what the command calls it.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{option}: got cuda, but this machine has no usable CUDA device; "
            f"use {option} cpu, or a machine with a GPU"
        )
    cuda = config.device != "cpu" and torch.cuda.is_available()
    if config.precision == "fp16" and not cuda:
        raise UserError("engine.precision: fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if not cuda:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def start_process_group(device: torch.device, timeout: float = 600.0) -> tuple[int, int]:
    """Joins the process group and returns (rank, world size).

    The group is the one that a launcher has already made (Ray), the one in the environment
    (torchrun), or one of this process alone. `timeout`: seconds to wait for others in it.
    """
    # DeepSpeed looks for GPUs at import unless told.
    os.environ["DS_ACCELERATOR"] = device.type
    with hidden("mlflow"):
        import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")  # steps left out are in the run's own log
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce (a minute, -march=native) that serves
        # inference only; training reduces through gloo.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        join_group(backend, timeout)
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    return dist.get_rank(), dist.get_world_size()


@contextmanager
def hidden(module: str) -> Iterator[None]:
    """Where it is not imported yet, an import of it fails meanwhile.

    DeepSpeed's autotuner, which is never used here, takes MLflow with it where that is installed:
    three seconds and 100 MiB of each process.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


@contextmanager
def naming_timeouts(seconds: float) -> Iterator[None]:
    """Makes `Unreachable` of the error of a collective in which another process took no part.

    On GPUs NCCL's own watch ends the process instead, after the same time.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        waited = re.search("timed? ?out", text, re.IGNORECASE) is not None
        if not waited and not re.search("connection (closed|reset|refused)", text, re.IGNORECASE):
            raise
        rank = dist.get_rank() if dist.is_initialized() else 0
        what = "another process is gone"
        if waited:
            what = (
                f"waited {seconds:g} s (engine.collective_timeout) for another process in vain: it "
                f"hangs or cannot be reached"
            )
        first = text.strip().splitlines()[0]
        raise Unreachable(f"rank {rank}: {what}; the same command goes on ({first})") from error


@contextmanager
def naming_memory(shape: tuple[int, ...]) -> Iterator[None]:
    """Makes a `UserError` of a training's pass that needed more memory than there is, with what to
    lower.

    shape: of the micro-batch's images, [N, 3, H, W].
    """
    try:
        yield
    except RuntimeError as error:
        if not (said := _out_of_memory(error)):
            raise
        images, _, height, width = shape
        ways = ["--model.activation-checkpointing", "a smaller --augment.max-side"]
        if images > 1:
            pixels = images * height * width // 2
            ways = [
                f"--engine.micro-batch {images // 2}",
                f"--engine.max-padded-pixels {pixels} (the same run goes on with either)",
                *ways,
            ]
        raise UserError(
            f"{said} at a micro-batch of {_sides(shape)}; use {', or '.join(ways)}"
        ) from error


@contextmanager
def naming_inference_memory(shape: tuple[int, ...]) -> Iterator[None]:
    """As `naming_memory`, of a forward pass in a prediction or an evaluation.

    shape: of the batch's images, [N, 3, H, W].
    """
    try:
        yield
    except RuntimeError as error:
        if not (said := _out_of_memory(error)):
            raise
        half = shape[0] // 2
        remedy = "use --device cpu, or a GPU" if "GPU" in said else "use a machine"
        remedy += " with more memory"
        if half:
            remedy = f"use --batch-size {half} (while training, --engine.evaluation-batch {half})"
        raise UserError(f"{said} at a batch of {_sides(shape)}; {remedy}") from error


def _out_of_memory(error: RuntimeError) -> str:
    """Where, and how much more was asked for; empty where it is another error."""
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    if not on_gpu and "DefaultCPUAllocator: can't allocate memory" not in str(error):
        return ""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    return f"out of memory on the {'GPU' if on_gpu else 'CPU'}" + (
        f", where {asked[1]} more were asked for," if asked else ""
    )


def _sides(shape: tuple[int, ...]) -> str:
    return f"{' x '.join(map(str, shape))} (images x channels x height x width)"


def end_with_torchrun() -> None:
    """Has this process killed when its torchrun dies.

    torchrun starts its processes in sessions of their own. Killed itself, it would leave them
    training in a run folder that the next start goes on with.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds every generator of this process for one optimizer step.

    Dropout is thereby a function of (seed, step, rank): a resumed run needs no saved RNG state.
    """
    value = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def learning_rate_factor(config: ScheduleConfig, steps_per_epoch: float) -> Callable[[int], float]:
    """step -> factor on every learning rate: linear warm-up, then drops by ten or a cosine."""
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup_fraction * total)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.kind == "step":
            return 0.1 ** sum(step >= e * steps_per_epoch for e in config.drop_epochs)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return config.final_factor + (1 - config.final_factor) * cosine

    return factor


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW with the paper's three rates: backbone, offset and reference projections, the rest."""
    optimizer = config.optimizer
    rates = {
        "backbone": optimizer.backbone_lr,
        "offsets": optimizer.lr * optimizer.offsets_lr_factor,
        "rest": optimizer.lr,
    }
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": rates[name], "name": name}
        for name, parameters in parameter_groups(model).items()
        if parameters
    ]
    return torch.optim.AdamW(
        groups, lr=optimizer.lr, weight_decay=optimizer.weight_decay, fused=True
    )


def deepspeed_config(config: RunConfig, world: int) -> dict[str, Any]:
    """DeepSpeed's dictionary for this run."""
    micro = micro_batch_size(config, world)
    share = -(-config.optimizer.batch_size // world)
    stage = config.engine.zero_stage if world > 1 else 0  # alone there is nothing to partition
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        # Of the ranks with the largest shares; each tells the engine where its own passes end.
        "gradient_accumulation_steps": -(-share // micro),
        # Without ZeRO `pipeline.update` clips, by the norm that it needs anyway.
        "gradient_clipping": config.optimizer.clip_norm if stage else 0.0,
        "zero_optimization": {"stage": stage, **(parameters_apart() if stage == 3 else {})},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if config.engine.precision != "fp32":
        # Autocast keeps fp32 parameters; no module is "safe" for gradients of lower precision,
        # so they are reduced in fp32.
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[config.engine.precision]
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": dtype,
            "lower_precision_safe_modules": [],
        }
    return settings


def parameters_apart() -> dict[str, int | bool]:
    """DeepSpeed's settings of stage 3. Its defaults leave a model of less than 10**9 parameters
    whole from its forward to the end of its backward pass, and gradients a buffer of 2 GB."""
    return {
        "stage3_param_persistence_threshold": KEPT_WHOLE,
        "stage3_max_reuse_distance": 0,  # freed after forward, gathered again for backward
        # It would replace torch.nn.functional.linear in the whole process, evaluation too, by one
        # that in bf16 rounds before it adds the bias.
        "memory_efficient_linear": False,
        "stage3_prefetch_bucket_size": 2**23,
        "reduce_bucket_size": 2**24,
    }


def build_engine(model: nn.Module, config: RunConfig, steps_per_epoch: float) -> Any:
    """A DeepSpeedEngine over the model: ZeRO, mixed precision, clipping and the schedule."""
    import deepspeed

    # ZeRO keeps parameters in one flat buffer, and DeepSpeed broadcasts only contiguous ones.
    channels_last = [p for p in model.parameters() if not p.is_contiguous()]
    model = model.to(memory_format=torch.contiguous_format)
    factor = learning_rate_factor(config.schedule, steps_per_epoch)
    settings = deepspeed_config(config, dist.get_world_size())
    skeleton = without_weights(model) if settings["zero_optimization"]["stage"] == 3 else None
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        config=settings,
        dist_init_required=False,
    )
    if dist.get_world_size() == 1:
        # It would still copy all gradients into buckets and back.
        engine.enable_backward_allreduce = False
        for parameter in channels_last:  # as the backbone wants them: 3% of a step on a CPU
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    engine.skeleton = skeleton  # what is evaluated becomes whole in it
    return engine


def stop_process_group() -> None:
    """Leaves the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
