"""Values of a device's tensor on the host, without a wait before they are needed."""

import torch
from torch import Tensor


class OnHost:
    """A copy that is under way: the device makes it behind what it was told before."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if tensor.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> Tensor:
        """The values; waits until they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy
