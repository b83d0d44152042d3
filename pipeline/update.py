"""The update of the weights: loss scale, clipping by the true global norm, AdamW.

Collective: every rank comes to the same decision, because it is made of the reduced gradient.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pipeline.config import RunConfig

GROWTH_STEPS = 2000  # as torch's GradScaler


@dataclass
class LossScale:
    """fp16's factor on the loss, which keeps small gradients from vanishing: halved at each
    overflow, doubled after a stretch without. 1 and constant in other precisions."""

    value: float = 1.0
    dynamic: bool = False
    steps: int = 0
    """Since it last changed."""

    @staticmethod
    def of(precision: str) -> "LossScale":
        return LossScale(2.0**16, dynamic=True) if precision == "fp16" else LossScale()

    def update(self, applied: bool) -> None:
        if not self.dynamic:
            return
        self.steps += 1
        if not applied:
            self.value, self.steps = max(1.0, self.value / 2), 0
        elif self.steps == GROWTH_STEPS:
            self.value, self.steps = self.value * 2, 0


class Updater:
    """Backward passes and optimizer steps of a DeepSpeedEngine.

    DeepSpeed's own loss scale for autocast is switched off: with ZeRO (0.19.8) it clips the
    gradient before the scale is taken out, and never lowers the scale after an overflow.
    """

    def __init__(self, engine: Any, config: RunConfig) -> None:
        self.engine, self.scale = engine, LossScale.of(config.engine.precision)
        self.clip_norm = config.optimizer.clip_norm
        engine.torch_autocast_z0_gradscaler = None
        if engine.zero_optimization():
            engine.optimizer.torch_autocast_gradscaler = None
        self.grad_norm = 0.0
        """Of the last applied step: 2-norm of the whole gradient before clipping."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of `loss`, averaged over ranks. `last`: of this step's passes."""
        self.engine.set_gradient_accumulation_boundary(last)
        if self.engine.zero_optimization():
            # ZeRO takes it out again before it clips.
            self.engine.optimizer.custom_loss_scaler = self.scale.dynamic
            self.engine.optimizer.external_loss_scale = self.scale.value
        else:
            loss = loss * self.scale.value
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts the pass

    def counts_if_skipped(self) -> bool:
        """Whether a gradient that is not finite is a fault, no smaller loss scale being left."""
        return self.scale.value <= 1

    def step(self) -> bool:
        """Updates the weights, and the learning rate. False where the gradient is not finite: then
        weights and moments stay as they are."""
        engine = self.engine
        if engine.zero_optimization():
            engine.step()
            applied = engine.was_step_applied()
            if not applied:
                engine.lr_scheduler.step()  # the schedule follows the data, not the updates
            norm = engine.get_global_grad_norm()
        else:
            norm = self._unscaled_norm()
            applied = bool(norm.isfinite())
            if not applied:
                engine.module.zero_grad(set_to_none=True)  # AdamW leaves these parameters alone
            elif self.clip_norm:
                clip_grads_with_norm_(engine.module.parameters(), self.clip_norm, norm)
            engine.step()
        if applied:
            self.grad_norm = float(norm)
        self.scale.update(applied)
        return applied

    def _unscaled_norm(self) -> Tensor:
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        if self.scale.value != 1:
            torch._foreach_mul_(gradients, 1 / self.scale.value)
        return get_total_norm(gradients)
