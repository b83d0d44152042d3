"""An exponential moving average of a model's weights."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from pipeline.zero3 import load_weights, own_part


class Ema:
    """`module` is the average; every rank holds the same one, as every rank holds the weights, or
    the same part of it (ZeRO stage 3, after `partition`).

    It follows faster at first, by (1 + n) / (10 + n) after n updates where that is less than
    `decay`, so that the random weights of the start are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the weights after a step. Buffers, statistics of their own, are copied."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        mine = [own_part(p) for p in self.module.parameters()]
        theirs = [own_part(p) for p in model.parameters()]
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        for own, other in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(other)

    def restore(self, weights: dict[str, Tensor], updates: int) -> None:
        load_weights(self.module, weights)
        self.updates = updates
