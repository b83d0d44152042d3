"""Trainings that are killed, asked to stop, or started twice: nothing is lost, nothing differs."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pipeline.run_folder
import pipeline.stop
from pipeline.__main__ import COMMANDS
from pipeline.checkpoint_store import checkpoint_path, checkpoint_steps
from pipeline.cli import main
from pipeline.engine import stop_process_group
from pipeline.errors import FolderInUse, UserError
from pipeline.recipes import recipe
from pipeline.replay import replay_step
from pipeline.run_folder import hold
from pipeline.stop import stop_request
from pipeline.tracking import MetricsLog
from tests.pipeline.training_runs import (
    ENVIRONMENT,
    ROOT,
    command,
    events,
    kill_once,
    metrics,
    require_same_ends,
    run,
    start,
    wait_for,
)

# With means in the metrics that checkpoints fall into, dropout, and an average of the weights.
OPTIONS = [
    "--schedule.epochs", 4, "--optimizer.batch-size", 8, "--engine.log-every", 3,
    "--engine.precision", "fp32", "--model.dropout", 0.1, "--engine.checkpoint-steps", 2,
    "--optimizer.ema-decay", 0.9, "--schedule.evaluate-every", 3,
]  # fmt: skip
# In three passes a step: a division by three is rounded.
ALONE = [
    "--schedule.epochs", 2, "--optimizer.batch-size", 8, "--engine.log-every", 1,
    "--engine.precision", "fp32", "--model.dropout", 0.1, "--engine.micro-batch", 3,
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(drawn, made_once) -> Path:
    """A run by two processes that nothing disturbed: 4 epochs of 5 steps."""
    options = [*OPTIONS, "--engine.keep-every-epochs", 2]
    return made_once("whole", lambda folder: run(command(drawn, "demo", folder, *options, ranks=2)))


@pytest.mark.slow
def test_the_latest_the_best_and_a_period_of_epochs_are_kept(whole):
    evaluations = [x for x in metrics(whole) if x["kind"] == "evaluation"]
    assert [x["epoch"] for x in evaluations] == [3, 4]
    best = max(evaluations, key=lambda x: (x["AP"], -x["step"]))
    assert set(checkpoint_steps(whole)) == {10, 18, 20, best["step"]}


@pytest.mark.slow
def test_killed_damaged_and_asked_to_stop_it_ends_as_if_undisturbed(drawn, whole, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    # Checkpoints as often as can be: they change nothing.
    often = ["--engine.checkpoint-minutes", 1e-6]
    arguments = command(drawn, "demo", folder, *OPTIONS, *often, ranks=2)
    kill_once(lambda: len(checkpoint_steps(folder)) > 1, arguments, log)
    before = checkpoint_steps(folder)[-1]
    damaged = checkpoint_path(folder, before)
    os.truncate(damaged / "training.pt", 1000)

    process = start(arguments, log)
    wait_for(lambda: checkpoint_steps(folder)[-1] > before, process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=150) == 1  # torchrun's, as docs/training.md says
    assert "SignalException" in log.read_text()
    (stopped,) = events(folder, "stopped")
    assert f"stopped after step {stopped['step']} as asked" in log.read_text()
    assert checkpoint_steps(folder)[-1] == stopped["step"]  # not a step was lost
    assert f"{damaged.name} is passed over: training.pt" in log.read_text()
    assert list(damaged.parent.glob("*.*")) == [damaged.with_suffix(".damaged")]

    run(arguments)
    assert len(events(folder, "start")) == 3
    assert checkpoint_steps(folder)[-2:] == [19, 20]
    require_same_ends(folder, whole)


IN_EVALUATION = """
import os, signal, sys
import psutil
import pipeline.train as trainer
from pipeline.__main__ import COMMANDS
from pipeline.cli import main

detect = trainer.detect

def stopped(*given):
    if not os.path.exists(sys.argv[-1]):
        open(sys.argv[-1], "w").close()
        # As schedulers do, to the processes of the loader, too.
        for process in [*psutil.Process().children(recursive=True), psutil.Process()]:
            process.send_signal(signal.SIGTERM)
    return detect(*given)

trainer.detect = stopped
sys.exit(main("stopped", "", COMMANDS, sys.argv[1:-1]))
"""


@pytest.fixture(scope="module")
def plain(drawn, made_once) -> Path:
    """A run by one process, 2 epochs of 5 steps, each of which has a line of metrics."""
    return made_once("plain", lambda folder: run(command(drawn, "demo", folder, *ALONE)))


@pytest.mark.slow
def test_asked_to_stop_in_an_evaluation_it_evaluates_after_the_next_start(drawn, plain, tmp_path):
    script, done = tmp_path / "script.py", tmp_path / "done"
    script.write_text(IN_EVALUATION)
    folder = tmp_path / "run"
    workers = ["--engine.loader-workers", 2]
    arguments = [*command(drawn, "demo", folder, *ALONE, *workers, script=str(script)), str(done)]
    first = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert first.returncode == 128 + signal.SIGTERM
    assert first.stderr == ""
    assert checkpoint_steps(folder) == [5]
    assert not (folder / "evaluations").exists()

    (folder / "stop").touch()
    second = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert second.returncode == 128 + signal.SIGTERM
    assert "stopped after step" in second.stdout
    assert checkpoint_steps(folder)[-1] == events(folder, "stopped")[-1]["step"] < 10
    (folder / "stop").unlink()
    run(arguments)
    require_same_ends(folder, plain)


@pytest.mark.slow
def test_a_step_is_taken_again_to_the_last_bit(plain, capsys):
    replayed = replay_step(plain, 8, torch.device("cpu"))
    assert (replayed.step, replayed.start, replayed.applied) == (8, 5, True)
    (line,) = [x for x in metrics(plain) if x["kind"] == "train" and x["step"] == 8]
    assert replayed.grad_norm == line["grad_norm"]
    assert len(replayed.losses) > 10
    for name, value in replayed.losses.items():
        assert value == line[name], name
    stop_process_group()
    for arguments, words in [
        ((plain, 11), "step: got 11, expected one of 1 to 10"),
        ((plain,), "step: got 0, expected one of 1 to 10"),
        ((plain.parent, 3), "has no config.json"),
    ]:
        capsys.readouterr()
        given = ["replay", *map(str, arguments)]
        assert main("python -m pipeline", "", COMMANDS, given) == 2
        said = capsys.readouterr().err
        assert words in said
        assert len(said.splitlines()) == 1


FULL_AT_4 = """
import resource, sys, time
from pipeline.__main__ import COMMANDS
from pipeline.checkpoint_store import checkpoint_steps
from pipeline.cli import main
from pipeline.tracking import MetricsLog

write = MetricsLog.write

def full(self, kind, step, *given, **values):
    if step == 4:  # every file that is written from now on is too long
        while checkpoint_steps(self.path.parent) != [2]:
            time.sleep(0.01)
        size = self.path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, size + 20))
    write(self, kind, step, *given, **values)

MetricsLog.write = full
sys.exit(main("full", "", COMMANDS, sys.argv[1:]))
"""


@pytest.mark.slow
def test_without_room_for_metrics_it_says_what_is_saved_and_goes_on_from_there(
    drawn, plain, tmp_path
):
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(FULL_AT_4)
    options = [*ALONE, "--engine.checkpoint-steps", 2]
    arguments = command(drawn, "demo", folder, *options, script=str(script))
    done = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {folder}/metrics.jsonl: File too large; raise the limit on the size of files "
        f"(ulimit -f); the run's checkpoints are intact, and the same command goes on from "
        f"step-00000002\n"
    )
    assert not (folder / "metrics.jsonl").read_bytes().endswith(b"\n")  # cut short, indeed
    run(command(drawn, "demo", folder, *options))
    require_same_ends(folder, plain)


FAILS_WHILE_IT_WRITES = """
import sys, threading, time
from filelock import FileLock, Timeout
import pipeline.checkpoint
from pipeline.__main__ import COMMANDS
from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.tracking import MetricsLog

write, failed = pipeline.checkpoint.write, threading.Event()

def slow(folder, *content):
    failed.wait()
    time.sleep(1)  # in which the training ends, but for this thread
    try:
        FileLock(folder / "lock", timeout=0).acquire()
        print("another training may begin")
    except Timeout:
        print("held")
    return write(folder, *content)

def fail(self, kind, step, *given, **values):
    if step == 2:
        failed.set()
        raise UserError("it failed")

pipeline.checkpoint.write, MetricsLog.write = slow, fail
sys.exit(main("fails", "", COMMANDS, sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_failed_training_has_its_folder_until_its_checkpoint_is_written(drawn, tmp_path):
    """Written later, it would be the newest beside those of the next training, and remove them."""
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(FAILS_WHILE_IT_WRITES)
    options = [*ALONE, "--engine.checkpoint-steps", 1]
    arguments = command(drawn, "demo", folder, *options, script=str(script))
    done = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: it failed\n")
    assert done.stdout.splitlines()[-1] == "held"
    assert checkpoint_steps(folder) == [1]


KEPT_OPEN = """
import errno, os, shutil, sys
from pipeline.__main__ import COMMANDS
from pipeline.cli import main

rmtree = shutil.rmtree

def refused(path, *given, **named):
    if str(path).endswith("step-00000002"):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(path))
    rmtree(path, *given, **named)

shutil.rmtree = refused
sys.exit(main("kept open", "", COMMANDS, sys.argv[1:]))
"""


@pytest.mark.slow
def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(drawn, plain, tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(KEPT_OPEN)
    options = [*ALONE, "--engine.checkpoint-steps", 2]
    run(command(drawn, "demo", folder, *options, script=str(script)))
    (said,) = [x["text"] for x in events(folder, "message") if "removed" in x["text"]]
    assert said == (
        f"an old checkpoint cannot be removed: {checkpoint_path(folder, 2)}: Operation not "
        f"permitted; change its permissions, or choose another place"
    )
    assert checkpoint_steps(folder)[0] == 2
    require_same_ends(folder, plain)


@pytest.mark.parametrize(("saved", "last"), [("checkpoints/step-00000016", 16), ("", 15)])
def test_a_step_that_the_run_has_not_taken_is_refused(tmp_path, saved, last):
    """Of 60 steps it has logged 15; a checkpoint or a bad step that it saved may be later."""
    digests = dict.fromkeys(("config_digest", "train_digest", "val_digest"), "")
    identity = {"config": json.loads(recipe("demo").to_json()), **digests}
    (tmp_path / "config.json").write_text(json.dumps(identity))
    log = MetricsLog(tmp_path)
    log.write("event", 0, 0.0, event="start", steps=60, world=1)
    log.write("train", 10, 1.0, loss=2.0)
    log.write("event", 15, 1.5, event="message", text="said")
    (tmp_path / saved).mkdir(parents=True, exist_ok=True)
    expected = f"step: got {{}}, expected one of 1 to {last}, the steps that {tmp_path} has taken"
    with pytest.raises(UserError, match=re.escape(expected.format(last + 1))):
        replay_step(tmp_path, last + 1, torch.device("cpu"))
    (tmp_path / "non_finite").mkdir()
    (tmp_path / "non_finite" / "step-00000017-rank-1.pt").touch()
    with pytest.raises(UserError, match="step: got 60, expected one of 1 to 17"):
        replay_step(tmp_path, 60, torch.device("cpu"))
    with pytest.raises(UserError, match=r"data\.train"):  # which this folder's config lacks
        replay_step(tmp_path, 17, torch.device("cpu"))


# A process of its own: DeepSpeed keeps a process group, and this one needs the first.
REPLAY = """
import json, sys
from pathlib import Path
import torch
from pipeline.replay import replay_step
replayed = replay_step(Path(sys.argv[1]), int(sys.argv[2]), torch.device("cpu"))
found = {name: getattr(replayed, name) for name in ("start", "images", "losses")}
print(json.dumps({**found, "deterministic": torch.are_deterministic_algorithms_enabled()}))
"""


@pytest.mark.slow
def test_steps_by_changing_numbers_of_processes_are_taken_again(drawn, tmp_path):
    """Two, then one, in smaller passes: dropout draws other numbers where the shares or the passes
    are others."""
    folder = tmp_path / "run"
    options = [*ALONE, "--engine.checkpoint-steps", 1, "--engine.deterministic"]
    name = "deformable_detr_r50_refine_demo"  # without a choice that rounding decides
    two = command(drawn, name, folder, *options, ranks=2)
    kill_once(lambda: checkpoint_steps(folder), two, tmp_path / "log")
    run(command(drawn, name, folder, *options, "--engine.micro-batch", 2))
    changed = events(folder, "start")[-1]["step"]
    assert 1 <= changed < 8
    for step in checkpoint_steps(folder):
        if step <= changed + 1:
            shutil.rmtree(checkpoint_path(folder, step))
    done = subprocess.run(
        [sys.executable, "-c", REPLAY, str(folder), str(changed + 2)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    replayed = json.loads(done.stdout.splitlines()[-1])
    assert replayed["deterministic"]
    assert (replayed["start"], len(replayed["images"])) == (0, 1)
    (line,) = [x for x in metrics(folder) if x["kind"] == "train" and x["step"] == changed + 2]
    for name, value in replayed["losses"].items():
        assert value == pytest.approx(line[name], rel=1e-4), name


HOLDING = """
import sys, time
from pathlib import Path
from pipeline.replay import replay_step
from pipeline.run_folder import hold
with hold(Path(sys.argv[1]), True):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_training_has_a_folder_and_a_killed_one_leaves_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.run_folder, "DYING", 0.3)
    folder = tmp_path / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(folder)],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(FolderInUse, match="is in use by another training"), hold(folder, True):
        pass
    with hold(folder, False):  # not rank 0
        pass
    other.kill()
    other.wait()
    with hold(folder, True):
        pass


def test_a_stop_is_heard_by_signal_and_by_file(tmp_path):
    before = signal.getsignal(signal.SIGTERM)  # Ray's, where a test before had one in this process
    with stop_request(tmp_path, look=True) as request:
        assert not request.asked
        signal.raise_signal(signal.SIGTERM)
        assert request.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # asked already: at once
    (tmp_path / "stop").touch()
    with stop_request(tmp_path, look=False) as request:
        time.sleep(0.05)
        assert not request.asked
    with stop_request(tmp_path, look=True) as request:
        deadline = time.monotonic() + 60
        while not request.asked and time.monotonic() < deadline:
            time.sleep(0.01)
        assert request.asked
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stop_is_heard_after_the_storage_was_away(tmp_path, monkeypatch):
    exists, away = Path.exists, [True, True]

    def seldom(path):
        if away and away.pop():
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return exists(path)

    monkeypatch.setattr(pipeline.stop, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(Path, "exists", seldom)
    (tmp_path / "stop").touch()
    with stop_request(tmp_path, look=True) as request:
        deadline = time.monotonic() + 60
        while not request.asked and time.monotonic() < deadline:
            time.sleep(0.01)
        assert request.asked


HANGING = """
import signal, sys, time
import pipeline.step
from pipeline.__main__ import COMMANDS
from pipeline.cli import main

seed = pipeline.step.seed_step

def hangs(value, step, rank):
    if step == 3 and rank == 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, which waits 30 s after it
        time.sleep(600)
    seed(value, step, rank)

pipeline.step.seed_step = hangs
sys.exit(main("hanging", "", COMMANDS, sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_in_time_and_is_named(drawn, tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(HANGING)
    options = ["--optimizer.batch-size", 8, "--engine.collective-timeout", 15]
    arguments = command(drawn, "demo", folder, *options, ranks=2, script=str(script))
    began = time.monotonic()
    done = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode != 0
    assert time.monotonic() - began < 250  # it would hang for 600
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr[-3000:]
    assert "rank 0: waited 15 s (engine.collective_timeout) for another process in vain" in said[0]
