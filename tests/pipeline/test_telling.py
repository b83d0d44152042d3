"""What is told of an error, by which process, and how helps show their examples."""

import errno
import shlex
from unittest.mock import Mock

import pytest
import torch

import data_prep.machine_errors as of_data_prep
import pipeline.machine_errors as of_pipeline
from data_prep.cli import main as data_prep_main
from jobs.driver import of_ray
from jobs.launch import last_error
from pipeline import cli
from pipeline.__main__ import COMMANDS
from pipeline.data.augment import Example
from pipeline.data.batch import collate
from pipeline.data.labels import Labels
from pipeline.engine import naming_inference_memory, naming_memory
from pipeline.errors import UserError
from pipeline.evaluate import infer
from pipeline.predict import Detector
from pipeline.predict_images import Prepared
from tests.pipeline.made_up_detector import save_checkpoint

GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0")
CPU_FULL = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
NO_OBJECTS = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Detector:
    path = tmp_path_factory.mktemp("detector") / "model.pt"
    save_checkpoint(path, Labels((1, 2), ("cat", "dog")))
    return Detector.load(path, device="cpu")


def test_both_packages_know_the_same_remedies():
    assert of_data_prep.REMEDIES == of_pipeline.REMEDIES
    full = OSError(errno.ENOSPC, "No space left on device", "out/a.tar")
    expected = "out/a.tar: No space left on device; free some, or choose a place on another disk"
    assert of_data_prep.in_a_line(full) == of_pipeline.in_a_line(full) == expected


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ModuleNotFoundError("No module named 'scipy'", name="scipy.x"), "package scipy is not"),
        (ImportError("the cpu operators are not built; run: x"), "operators are not built"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nmore"), "lower the batch"),
        (ImportError("cannot import name 'x'", name="pipeline.cli"), None),
        (ModuleNotFoundError("No module named 'pipeline.x'", name="pipeline.x"), None),
        (KeyError("x"), None),
        (ValueError("of a library"), None),
        (RuntimeError("of a library"), None),
    ],
)
def test_a_failure_of_the_machine_is_told_and_a_bug_is_called_one(capsys, error, line):
    said = of_pipeline.in_a_line(error)
    assert (line in said) if line else said is None
    assert cli.tell(error) == (2 if line else 1)
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith("error: ")
    assert ("this is a bug of ours" in printed) == (line is None)


def test_other_processes_of_a_machine_wait_to_be_ended(monkeypatch, capsys):
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    for rank, expected in (("0", []), ("3", [cli.OTHERS_PATIENCE])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        cli.tell(UserError("no data"))
        assert waited == expected
    assert capsys.readouterr().err == "error: no data\n" * 2


def test_a_bug_of_data_prep_is_one_line_and_status_1(monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise KeyError("gone")

    monkeypatch.setattr("data_prep.cli.collect", fail)
    assert data_prep_main(["stats", "x"]) == 1
    assert "KeyError: 'gone'; this is a bug of ours" in capsys.readouterr().err
    assert data_prep_main(["stats", "--debug", "x"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "--debug shows" not in said


def test_memory_says_the_batch_and_what_keeps_the_run():
    with (
        pytest.raises(UserError, match=r"4 x 3 x 800 x 1333 .*--engine\.micro-batch 2") as told,
        naming_memory((4, 3, 800, 1333)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0")
    assert "20.00 MiB" in str(told.value)
    with pytest.raises(UserError) as alone, naming_memory((1, 3, 8, 8)):
        raise RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried")
    assert "micro-batch 0" not in str(alone.value)
    assert "on the CPU" in str(alone.value)
    with pytest.raises(RuntimeError, match="shapes"), naming_memory((1, 3, 8, 8)):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize(
    ("shape", "error", "words"),
    [
        ((5, 3, 800, 1333), GPU_FULL, ["on the GPU", "20.00 MiB", "5 x 3 x 800", "--batch-size 2"]),
        ((4, 3, 64, 96), CPU_FULL, ["on the CPU", "4 x 3 x 64 x 96", "--batch-size 2 "]),
        ((1, 3, 800, 1333), GPU_FULL, ["on the GPU", "--device cpu"]),
        ((1, 3, 64, 96), CPU_FULL, ["on the CPU", "use a machine with more memory"]),
    ],
)
def test_memory_of_a_prediction_and_an_evaluation(monkeypatch, detector, shape, error, words):
    """Both name the batch and what to lower; not an option of training alone."""
    monkeypatch.setattr(detector.model, "forward", Mock(side_effect=error))
    images, _, height, width = shape
    batch = [Example(torch.zeros(3, height, width, dtype=torch.uint8), *NO_OBJECTS)] * images
    records = [{"id": i, "height": height, "width": width} for i in range(images)]
    for run in (
        lambda: detector.detect([Prepared(example, width, height) for example in batch]),
        lambda: infer(detector.model, collate(batch, records), None),
    ):
        with pytest.raises(UserError) as told:
            run()
        for word in words:
            assert word in str(told.value)
        assert "micro-batch" not in str(told.value)
        assert ("--batch-size" in str(told.value)) == (images > 1)


def test_other_errors_of_a_prediction_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes") as told, naming_inference_memory((4, 3, 8, 8)):
        raise RuntimeError("shapes differ")
    assert not isinstance(told.value, UserError)


def test_a_jobs_last_error_and_a_worker_killed_for_memory_are_told():
    assert last_error("epoch 1\nerror: one\nerror: data.train is gone\nbye\n") == (
        ": data.train is gone"
    )
    assert last_error("Traceback\n") == ""
    text = "Memory on the node (IP: 10.0.0.1, ID: 3d40) was 22GB used / 23GB limit (0.95)"
    assert "--engine.loader-workers" in of_ray(RuntimeError(text))


@pytest.mark.parametrize("name", [n for n in COMMANDS if n != "recipes"])
def test_examples_of_a_help_can_be_copied(capsys, name):
    """A shell joins the lines of each to one command of this door."""
    with pytest.raises(SystemExit) as stop:
        cli.main("python -m pipeline", "", COMMANDS, [name, "--help"])
    assert not stop.value.code
    _, found, examples = capsys.readouterr().out.partition("\nexamples:\n")
    assert found
    commands = examples.strip().replace("\\\n", " ").splitlines()
    assert commands
    for command in commands:
        words = shlex.split(command)
        assert {"-m", "pipeline", name} <= set(words), command
    assert all(len(line) <= 107 for line in examples.splitlines())
