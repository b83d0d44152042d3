"""What a node's processors, memory, disk and GPUs do, by MLflow's names and in a file of lines."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from jobs.gpus import Gpus
from jobs.spec import ROOT
from jobs.system_metrics import SYSTEM_FILE, Sampler, SystemMetrics
from pipeline.tracking import read_lines


def test_names_and_units_are_those_of_mlflows_own_sampler(tmp_path):
    mine, theirs = Sampler(tmp_path).sample(), {}
    for monitor in (CPUMonitor(), DiskMonitor(), NetworkMonitor()):
        monitor.collect_metrics()
        theirs |= monitor.aggregate_metrics()
    assert {name for name in mine if not name.startswith("gpu_")} == set(theirs)
    name = "system_memory_usage_megabytes"  # which changes little between two looks
    assert mine[name] == pytest.approx(theirs[name], rel=0.5)
    disk = os.statvfs(tmp_path)
    free = disk.f_bavail * disk.f_frsize / 1e6
    assert mine["disk_available_megabytes"] == pytest.approx(free, rel=0.5)


def written(folder: Path, lines: int) -> list[dict]:
    """What a sampler has written once it is that many lines."""
    with SystemMetrics(folder, every=0.01):
        deadline = time.monotonic() + 120
        while not (folder / SYSTEM_FILE).exists() or len(read_lines(folder / SYSTEM_FILE)) < lines:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    return read_lines(folder / SYSTEM_FILE)


def test_a_restart_goes_on_counting_behind_a_torn_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    first = written(tmp_path, 3)
    assert [line["step"] for line in first] == list(range(len(first)))
    with (tmp_path / SYSTEM_FILE).open("a") as file:
        file.write('{"kind": "system", "st')  # killed here
    second = written(tmp_path, len(first) + 2)
    assert second[: len(first)] == first
    assert [line["step"] for line in second] == list(range(len(second)))
    for text in (tmp_path / SYSTEM_FILE).read_text().splitlines():
        assert json.loads(text)["kind"] == "system"


def test_a_folder_that_is_no_run_yet_stays_empty(tmp_path):
    # Training refuses a folder with other things in it.
    with SystemMetrics(tmp_path, every=0.01):
        time.sleep(0.05)
    assert not list(tmp_path.iterdir())


def test_storage_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / SYSTEM_FILE).mkdir()
    sampler = SystemMetrics(tmp_path, every=0.01)
    with sampler:
        time.sleep(0.1)
        assert sampler.is_alive()
        (tmp_path / SYSTEM_FILE).rmdir()
        deadline = time.monotonic() + 120
        while not (tmp_path / SYSTEM_FILE).is_file():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert read_lines(tmp_path / SYSTEM_FILE)[0]["step"] == 0


def test_gpus_as_nvidias_library_tells_of_them(tmp_path):
    library = tmp_path / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("fake_nvml.c")
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-x", "c", "-shared", "-fPIC", "-o", library, source], check=True)
    # In a process of its own, whose loader finds it under the name of the driver's.
    ask = "import json; from jobs.gpus import Gpus; print(json.dumps(Gpus().sample()))"
    said = subprocess.run(
        [sys.executable, "-c", ask], cwd=ROOT, check=True, capture_output=True, text=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
    )  # fmt: skip
    assert json.loads(said.stdout) == {
        "gpu_0_memory_usage_megabytes": 20000.0,
        "gpu_0_memory_usage_percentage": 25.0,
        "gpu_0_utilization_percentage": 93,
        "gpu_0_power_usage_watts": 350.0,
        "gpu_0_power_usage_percentage": 50.0,
        "gpu_1_memory_usage_megabytes": 40000.0,
        "gpu_1_memory_usage_percentage": 50.0,
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="this node has NVIDIA's driver")
def test_a_node_without_nvidias_driver_has_no_gpus():
    assert Gpus().sample() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_real_gpus():
    held = torch.zeros(2**28, device="cuda")  # 1.07 GB
    values = Gpus().sample()
    used = max(value for name, value in values.items() if name.endswith("memory_usage_megabytes"))
    assert used > held.numel() * 4 / 1e6
    assert all(0 <= v <= 100 for name, v in values.items() if name.endswith("_percentage"))
