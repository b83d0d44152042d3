"""Use of a node's GPUs, asked of NVIDIA's driver, without a CUDA context of their own."""

from collections.abc import Callable
from typing import Any

import pynvml


class Gpus:
    """All GPUs of this node, whichever of them this process may use; none without a driver."""

    def __init__(self) -> None:
        self.handles: list[Any] = []
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            self.handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        except pynvml.NVMLError:  # a node without NVIDIA's driver, or with one and no GPU
            return

    def sample(self) -> dict[str, float]:
        """By MLflow's names, without what a GPU does not tell: parts of one (MIG) have no
        utilization of their own."""
        values: dict[str, float] = {}
        for i, handle in enumerate(self.handles):
            memory = told(pynvml.nvmlDeviceGetMemoryInfo, handle)
            busy = told(pynvml.nvmlDeviceGetUtilizationRates, handle)
            power = told(pynvml.nvmlDeviceGetPowerUsage, handle)  # milliwatts
            limit = told(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)
            if memory is not None:
                values[f"gpu_{i}_memory_usage_megabytes"] = memory.used / 1e6
                values[f"gpu_{i}_memory_usage_percentage"] = 100 * memory.used / memory.total
            if busy is not None:
                values[f"gpu_{i}_utilization_percentage"] = busy.gpu
            if power is not None:
                values[f"gpu_{i}_power_usage_watts"] = power / 1000
            if power is not None and limit:
                values[f"gpu_{i}_power_usage_percentage"] = 100 * power / limit
        return values


def told(question: Callable[[Any], Any], handle: Any) -> Any:
    """The answer; None where the GPU has none."""
    try:
        return question(handle)
    except pynvml.NVMLError:
        return None
