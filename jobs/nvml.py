"""Use of a node's GPUs, asked of the NVIDIA driver's own library (NVML), which is there wherever
CUDA runs: no package is needed, and no CUDA context is made."""

import ctypes
from ctypes import byref, c_uint, c_ulonglong, c_void_p
from typing import Any

LIBRARY = "libnvidia-ml.so.1"


class _Memory(ctypes.Structure):
    _fields_ = (("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong))


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", c_uint), ("memory", c_uint))


class Gpus:
    """All GPUs of this node, whichever of them this process may use; none without the library."""

    def __init__(self, library: str = LIBRARY) -> None:
        self.handles: list[c_void_p] = []
        try:
            self.nvml: Any = ctypes.CDLL(library)
        except OSError:  # a node without NVIDIA's driver
            return
        if self.nvml.nvmlInit_v2():  # a driver without a GPU
            return
        count = c_uint()
        self._ask("nvmlDeviceGetCount_v2", byref(count))
        for index in range(count.value):
            handle = c_void_p()
            if self._ask("nvmlDeviceGetHandleByIndex_v2", c_uint(index), byref(handle)):
                self.handles.append(handle)

    def sample(self) -> dict[str, float]:
        """By MLflow's names, without what a GPU does not tell: parts of one (MIG) have no
        utilization of their own."""
        values: dict[str, float] = {}
        for i, handle in enumerate(self.handles):
            memory, busy, power, limit = _Memory(), _Utilization(), c_uint(), c_uint()
            if self._ask("nvmlDeviceGetMemoryInfo", handle, byref(memory)):
                values[f"gpu_{i}_memory_usage_megabytes"] = memory.used / 1e6
                values[f"gpu_{i}_memory_usage_percentage"] = 100 * memory.used / memory.total
            if self._ask("nvmlDeviceGetUtilizationRates", handle, byref(busy)):
                values[f"gpu_{i}_utilization_percentage"] = busy.gpu
            if self._ask("nvmlDeviceGetPowerUsage", handle, byref(power)):  # milliwatts
                values[f"gpu_{i}_power_usage_watts"] = power.value / 1000
                self._ask("nvmlDeviceGetEnforcedPowerLimit", handle, byref(limit))
                if limit.value:
                    values[f"gpu_{i}_power_usage_percentage"] = 100 * power.value / limit.value
        return values

    def _ask(self, function: str, *arguments: Any) -> bool:
        return getattr(self.nvml, function)(*arguments) == 0
