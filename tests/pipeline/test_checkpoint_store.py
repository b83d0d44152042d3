"""Damaged checkpoints are found and passed over; nothing but whole ones is loaded or kept."""

import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pipeline.checkpoint_store
from pipeline import storage
from pipeline.checkpoint import CheckpointWriter
from pipeline.checkpoint_store import (
    Progress,
    check,
    checkpoint_path,
    checkpoint_steps,
    load_model,
    load_progress,
    load_training,
    newest_intact,
    prune,
    take_over,
    write,
)
from pipeline.data.labels import Labels
from pipeline.errors import UserError
from pipeline.evaluate import Evaluation
from pipeline.follow import Tail
from pipeline.machine_errors import of_the_system
from pipeline.recipes import recipe
from pipeline.run_folder import (
    best_evaluated,
    publish_best,
    saying_what_is_saved,
    write_evaluation,
)
from pipeline.tracking import MetricsLog, read_lines


def saved(folder, step, **best):
    labels = {"category_of": [1], "names": ["cat"]}
    model = {"model": {"w": torch.ones(2)}, "config": "{}", "labels": labels, "step": step}
    return write(folder, Progress(step, 1, **best), model, {"moments": torch.rand(100)})


def test_a_checkpoint_reads_back_and_is_intact(tmp_path):
    path = saved(tmp_path, 10, best_ap=0.25, best_step=5)
    assert check(path) is None
    assert newest_intact(tmp_path, pytest.fail) == path
    assert load_progress(path) == Progress(10, 1, 0, 0.25, 5)
    assert load_training(path)["moments"].shape == (100,)
    assert load_model(path)["step"] == 10
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def flip_byte(path):
    file = path / "training.pt"
    data = bytearray(file.read_bytes())
    data[50] ^= 1
    file.write_bytes(data)


def as_folder(file):
    file.unlink()
    file.mkdir()


def forget(manifest, name):
    content = json.loads(manifest.read_text())
    del content[name]
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: as_folder(path / "manifest.json"), r"no manifest\.json"),
        (lambda path: as_folder(path / "model.pt"), r"model\.pt is missing"),
        (lambda path: as_folder(path / "progress.json"), r"progress\.json is missing"),
        (flip_byte, "SHA-256"),
        (lambda path: (path / "model.pt").unlink(), r"model\.pt is missing"),
        (lambda path: (path / "manifest.json").unlink(), r"no manifest\.json"),
        (lambda path: (path / "manifest.json").write_text('{"a"'), "not JSON"),
        (lambda path: (path / "manifest.json").write_text("{}"), "does not name the files"),
        (lambda path: forget(path / "manifest.json", "model.pt"), "does not name the files"),
        (lambda path: (path / "model.pt").write_bytes(b""), "SHA-256"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage, message):
    before, newest = saved(tmp_path, 10), saved(tmp_path, 20)
    damage(newest)
    warnings = []
    assert newest_intact(tmp_path, warnings.append) == before
    assert len(warnings) == 1
    assert "step-00000020" in warnings[0]
    assert re.search(message, warnings[0])


def test_an_unfinished_checkpoint_is_not_looked_at(tmp_path):
    whole = saved(tmp_path, 10)
    checkpoint_path(tmp_path, 20).with_suffix(".partial").mkdir()
    assert newest_intact(tmp_path, pytest.fail) == whole


def test_a_checkpoint_of_another_version_is_one_clear_error(tmp_path):
    path = saved(tmp_path, 10)
    (path / "progress.json").write_text('{"step": 10, "epoch": 1, "step_in_epoch": 3}')
    with pytest.raises(UserError, match="written by another version"):
        load_progress(path)


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_what_was_passed_over_does_not_count_as_the_latest(tmp_path):
    """The run goes on from 5, whose checkpoint stays until a newer one is intact."""
    for step in (5, 10, 20):
        saved(tmp_path, step)
    flip_byte(checkpoint_path(tmp_path, 10))
    flip_byte(checkpoint_path(tmp_path, 20))
    said = []
    assert take_over(tmp_path, said.append) == checkpoint_path(tmp_path, 5)
    problem = "is passed over: training.pt is not what was written (SHA-256 differs)"
    assert said == [
        f"checkpoint step-{step:08d} {problem}; it is kept as step-{step:08d}.damaged"
        for step in (20, 10)
    ]
    for step, left in ((7, [5, 7]), (8, [7, 8])):
        saved(tmp_path, step)
        prune(tmp_path, step, 2, set(), pytest.fail)
        assert checkpoint_steps(tmp_path) == left
    assert newest_intact(tmp_path, pytest.fail) == checkpoint_path(tmp_path, 8)

    flip_byte(checkpoint_path(tmp_path, 8))  # the earlier ones give way: the disk does not fill
    assert take_over(tmp_path, said.append) == checkpoint_path(tmp_path, 7)
    assert names(tmp_path) == ["step-00000007", "step-00000008.damaged"]


def test_where_none_is_intact_all_are_kept_aside(tmp_path):
    for step in (10, 20):
        flip_byte(saved(tmp_path, step))
    assert take_over(tmp_path, lambda _: None) is None
    assert names(tmp_path) == ["step-00000010.damaged", "step-00000020.damaged"]
    assert take_over(tmp_path, pytest.fail) is None  # and stay
    assert names(tmp_path) == ["step-00000010.damaged", "step-00000020.damaged"]


class Killed(BaseException):
    """Ends a process that can do nothing more."""


def test_killed_while_a_step_is_written_again_it_has_the_one_of_before(tmp_path, monkeypatch):
    path = saved(tmp_path, 10, best_step=5)

    def rename(one, other):
        os.replace(one, other)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        with pytest.raises(Killed):
            saved(tmp_path, 10, best_step=10)
    assert names(tmp_path) == ["step-00000010.old", "step-00000010.partial"]
    assert take_over(tmp_path, pytest.fail) == path
    assert load_progress(path).best_step == 5
    assert names(tmp_path) == ["step-00000010"]


def test_one_that_is_replaced_stays_until_the_new_one_is_seen_to_be_whole(tmp_path):
    path = saved(tmp_path, 10, best_step=5)
    path.rename(path.with_suffix(".old"))
    flip_byte(saved(tmp_path, 11).rename(path))  # and killed before the removal of the old one
    assert take_over(tmp_path, pytest.fail) == path
    assert load_progress(path).best_step == 5
    assert names(tmp_path) == ["step-00000010"]


def test_what_a_killed_process_left_half_done_is_removed(tmp_path):
    path = saved(tmp_path, 10)
    for name in ("step-00000020.partial", "step-00000010.old"):
        (path.parent / name).mkdir()
        (path.parent / name / "model.pt").write_bytes(b"x" * 1000)
    assert take_over(tmp_path, pytest.fail) == path
    assert names(tmp_path) == ["step-00000010"]


def test_other_names_are_no_checkpoints(tmp_path):
    saved(tmp_path, 10)
    path = saved(tmp_path, 123456789)
    for name in ("step-0000003x9", "step-99", "step-000000011", "step-00000012.damaged", "x"):
        (path.parent / name).mkdir()
    (path.parent / "step-00000099").touch()
    assert checkpoint_steps(tmp_path) == [10, 123456789]
    assert take_over(tmp_path, pytest.fail) == path
    prune(tmp_path, 123456789, 1, set(), pytest.fail)
    assert checkpoint_steps(tmp_path) == [123456789]


def test_one_that_is_removed_while_it_is_read_is_passed_over(tmp_path, monkeypatch):
    """As `predict` may find it, beside a training that prunes."""
    before, newest = saved(tmp_path, 10), saved(tmp_path, 20)
    read = pipeline.checkpoint_store._sha256

    def too_late(file):
        if file.parent == newest:
            file.unlink()
        return read(file)

    monkeypatch.setattr(pipeline.checkpoint_store, "_sha256", too_late)
    said = []
    assert newest_intact(tmp_path, said.append) == before
    assert said == ["checkpoint step-00000020 is passed over: model.pt is missing"]


def test_a_power_cut_finds_all_of_a_checkpoint_and_what_was_logged_before(tmp_path, monkeypatch):
    """What has reached the disk when the folder gets its name; the name itself, soon after."""
    MetricsLog(tmp_path).write("train", 10, 0.5)
    synced, fsync, rename = [], os.fsync, os.rename

    def record(descriptor):
        synced.append(str(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path)))
        fsync(descriptor)

    def renamed(one, other):
        synced.append(f"name {Path(other).name}")
        rename(one, other)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", renamed)
    saved(tmp_path, 10)
    named, aside = synced.index("name step-00000010"), "checkpoints/step-00000010.partial"
    files = {f"{aside}/{x}" for x in ("model.pt", "training.pt", "progress.json", "manifest.json")}
    assert {*files, aside, "metrics.jsonl", "."} <= set(synced[:named])
    assert synced[named + 1 :] == ["checkpoints"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    whole = saved(tmp_path, 10)

    def mkdir(path, **_):
        os.mkdir(path)
        (path / "training.pt").symlink_to("/dev/full")  # a disk without room

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(OSError, match="No space left on device"):
        saved(tmp_path, 20)
    assert [p.name for p in whole.parent.iterdir()] == [whole.name]
    assert newest_intact(tmp_path, pytest.fail) == whole


def test_a_damaged_checkpoint_is_written_again(tmp_path):
    path = saved(tmp_path, 10)
    flip_byte(path)
    assert check(path) is not None
    assert saved(tmp_path, 10) == path
    assert check(path) is None


def test_the_latest_and_the_best_are_kept(tmp_path):
    for step in (10, 20, 30, 40):
        saved(tmp_path, step)
    prune(tmp_path, 40, keep=2, kept_steps={10}, warn=pytest.fail)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000010", "step-00000030", "step-00000040"]


def failing(monkeypatch, where, name, fails):
    """Has `where.name(path, …)` fail as a disk does, for the paths (or names) of which `fails`."""
    whole = getattr(where, name)

    def failed(path, *given, **named):
        if fails(str(path)):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return whole(path, *given, **named)

    monkeypatch.setattr(where, name, failed)


@pytest.fixture
def tries(monkeypatch):
    """Seconds of the pauses so far, which take none."""
    slept = []
    monkeypatch.setattr(storage.time, "sleep", slept.append)
    return slept


def test_one_that_the_disk_does_not_give_gives_way_and_stays(tmp_path, monkeypatch, tries):
    """It is neither removed as damaged nor, later, as old; nor does it make the others old."""
    for step in (5, 10, 20):
        saved(tmp_path, step)
    flip_byte(checkpoint_path(tmp_path, 10))
    said = []
    with monkeypatch.context() as patched:
        failing(patched, Path, "open", lambda path: "20/training.pt" in path)
        assert take_over(tmp_path, said.append) == checkpoint_path(tmp_path, 5)
        assert tries == list(storage.PAUSES)
        saved(tmp_path, 7)
        prune(tmp_path, 7, 1, set(), pytest.fail)
        assert newest_intact(tmp_path, lambda _: None) == checkpoint_path(tmp_path, 7)
    assert "step-00000010 is passed over: training.pt is not what was written" in said[0]
    assert said[1:] == [
        "checkpoint step-00000020 is passed over: it cannot be read (Input/output error); it stays"
    ]
    assert names(tmp_path) == ["step-00000007", "step-00000010.damaged", "step-00000020"]
    assert take_over(tmp_path, pytest.fail) == checkpoint_path(tmp_path, 20)


def test_a_disk_that_is_away_for_a_moment_costs_nothing(tmp_path, monkeypatch, tries):
    saved(tmp_path, 10)
    newest = saved(tmp_path, 20)
    for where, name in ((os, "scandir"), (Path, "open"), (Path, "stat")):
        tries.clear()
        with monkeypatch.context() as patched:
            failing(patched, where, name, lambda _: len(tries) < 2)
            assert take_over(tmp_path, pytest.fail) == newest
        assert len(tries) == 2


def test_where_none_can_be_read_nothing_begins_anew(tmp_path, monkeypatch, tries):
    flip_byte(saved(tmp_path, 10))
    saved(tmp_path, 20)
    for where, name in ((os, "scandir"), (Path, "open")):
        for take in (take_over, newest_intact):
            with monkeypatch.context() as patched:
                failing(patched, where, name, lambda path: not path.endswith(".damaged"))
                with pytest.raises(OSError, match="Input/output error"):
                    take(tmp_path, lambda _: None)
    assert take_over(tmp_path, lambda _: None) == checkpoint_path(tmp_path, 20)


def test_a_model_that_the_disk_does_not_give_is_not_called_damaged(tmp_path, monkeypatch):
    """Of a job it would be the user's mistake, with which no start is tried again."""
    path = saved(tmp_path, 10)
    failing(monkeypatch, torch.serialization, "_open_file_like", lambda _: True)
    with pytest.raises(OSError, match="Input/output error") as told:
        load_model(path)
    assert of_the_system(told.value).startswith(f"{path}/model.pt: Input/output error")


def test_damaged_ones_that_cannot_be_moved_or_removed_keep_no_run_from_going_on(
    tmp_path, monkeypatch
):
    before = saved(tmp_path, 10)
    flip_byte(saved(tmp_path, 20))
    (before.parent / "step-00000030.damaged").mkdir()
    said = []
    with monkeypatch.context() as patched:
        failing(patched, os, "rmdir", lambda _: True)
        failing(patched, os, "rename", lambda _: True)
        assert take_over(tmp_path, said.append) == before
    assert "step-00000020 is passed over: training.pt is not what" in said[0]
    assert "; it stays (" in said[0]
    saved(tmp_path, 11)
    prune(tmp_path, 11, 1, set(), pytest.fail)  # which the damaged one, of a later step, spares
    assert take_over(tmp_path, lambda _: None) == checkpoint_path(tmp_path, 11)


def test_an_old_one_that_cannot_be_removed_is_told_and_the_others_are(tmp_path, monkeypatch):
    for step in (10, 20, 30):
        saved(tmp_path, step)
    failing(monkeypatch, pipeline.checkpoint_store.shutil, "rmtree", lambda path: "10" in path)
    said = []
    prune(tmp_path, 30, 1, set(), said.append)
    (told,) = said
    assert told.startswith(
        f"an old checkpoint cannot be removed: {checkpoint_path(tmp_path, 10)}: Input/output error"
    )
    assert names(tmp_path) == ["step-00000010", "step-00000030"]


def written(folder, steps, warn):
    """Checkpoints of the steps, as training has them written: the last one is kept."""
    config = recipe("demo")
    config = replace(config, engine=replace(config.engine, keep_checkpoints=1))
    kept = frozenset()
    writer = CheckpointWriter(folder, config, Labels((1,), ("a",)), kept, lambda _: None, warn)
    for step in steps:
        writer._write(Progress(step), {"w": torch.ones(2)}, {})
        writer.wait()


def test_a_run_goes_on_where_old_ones_cannot_be_removed_and_it_is_told_once(tmp_path, monkeypatch):
    failing(monkeypatch, pipeline.checkpoint_store.shutil, "rmtree", lambda path: path[-2:] == "10")
    said = []
    written(tmp_path, (10, 20, 30), lambda progress, text: said.append((progress.step, text)))
    ((step, text),) = said
    assert step == 20
    assert "an old checkpoint cannot be removed" in text
    assert names(tmp_path) == ["step-00000010", "step-00000030"]


def test_a_checkpoint_is_written_again_after_the_disk_was_away(tmp_path, monkeypatch, tries):
    """Wherever it failed; the step before is not lost, nor is training ended."""
    for where, name in ((os, "rename"), (os, "fsync"), (Path, "open"), (os, "mkdir")):
        tries.clear()
        with monkeypatch.context() as patched:
            failing(patched, where, name, lambda _: not tries)
            written(tmp_path, (10,), pytest.fail)
        assert len(tries) == 1
        assert check(checkpoint_path(tmp_path, 10)) is None
        assert names(tmp_path) == ["step-00000010"]
    failing(monkeypatch, os, "rename", lambda _: True)
    with pytest.raises(OSError, match=r"the checkpoint after step 20 cannot be written: .*Input"):
        written(tmp_path, (20,), pytest.fail)


def test_a_full_disk_is_named_by_its_folder(tmp_path, monkeypatch):
    """The system's own words for it are "No space left on device", and no file."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pipeline.checkpoint, "write", full)
    with pytest.raises(OSError, match="cannot be written") as caught:
        written(tmp_path, (10,), pytest.fail)
    assert f"cannot be written: {tmp_path}: [Errno 28] No space left on device" in str(caught.value)


def test_a_run_folder_gives_its_best_checkpoint(tmp_path):
    saved(tmp_path, 10)
    saved(tmp_path, 20)
    assert load_model(tmp_path)["step"] == 20
    (tmp_path / "best.json").write_text(json.dumps({"checkpoint": "step-00000010"}))
    assert load_model(tmp_path)["step"] == 10
    assert load_model(checkpoint_path(tmp_path, 20))["step"] == 20


@pytest.mark.parametrize("best", [True, False])
@pytest.mark.parametrize("moment", ["as it is checked", "once it is checked"])
def test_one_that_training_removes_meanwhile_gives_way_to_its_successor(
    tmp_path, monkeypatch, capsys, best, moment
):
    def goes_on(step):
        """As the training does: the new one is written, named the best, and the old one goes."""
        saved(tmp_path, step)
        if best:
            saved(tmp_path, 90)  # newer, and not the best
            (tmp_path / "best.json").write_text(json.dumps({"checkpoint": f"step-{step:08d}"}))
        prune(tmp_path, 90, 1, {step}, pytest.fail)

    def checked(path):
        monkeypatch.undo()
        if moment == "as it is checked":
            goes_on(30)
        problem = check(path)
        if moment == "once it is checked":
            goes_on(30)
        return problem

    goes_on(10)
    monkeypatch.setattr(pipeline.checkpoint_store, "check", checked)
    assert load_model(tmp_path)["step"] == 30
    assert capsys.readouterr().err == ""


def test_a_damaged_best_gives_way_to_the_newest_and_it_is_said(tmp_path, capsys):
    saved(tmp_path, 20)
    flip_byte(saved(tmp_path, 10))
    (tmp_path / "best.json").write_text(json.dumps({"checkpoint": "step-00000010"}))
    assert load_model(tmp_path)["step"] == 20
    assert "step-00000010 is passed over: training.pt" in capsys.readouterr().err


def test_the_best_that_is_left_is_found(tmp_path):
    """Step 10 was the best until 30, which removed it and was then damaged itself."""
    for step in (20, 25, 30):
        saved(tmp_path, step)
    flip_byte(checkpoint_path(tmp_path, 30))
    for step, ap in ((10, 0.5), (20, 0.3), (25, 0.4), (30, 0.6)):
        evaluation = Evaluation({"AP": ap}, {}, [])
        write_evaluation(tmp_path, step, 1, evaluation)
    assert best_evaluated(tmp_path, Progress(25, 2, 0, 0.5, 10)) == (0.4, 25)
    assert best_evaluated(tmp_path, Progress(22, 2, 0, 0.5, 10)) == (0.3, 20)
    assert best_evaluated(tmp_path, Progress(5, 0, 0, 0.5, 3)) == (-1.0, -1)
    # Killed after the evaluation of step 25, which comes again: its checkpoint is of before it.
    write_evaluation(tmp_path, 25, 3, Evaluation({"AP": 0.7}, {}, []))
    assert best_evaluated(tmp_path, Progress(25, 2, 0, 0.5, 20)) == (0.3, 20)


def test_the_best_stays_the_best_while_the_disk_does_not_give_it(tmp_path, monkeypatch, tries):
    """Else pruning would remove it."""
    for step, ap in ((10, 0.5), (20, 0.3)):
        saved(tmp_path, step)
        write_evaluation(tmp_path, step, 1, Evaluation({"AP": ap}, {}, []))
    failing(monkeypatch, Path, "open", lambda path: "10/model.pt" in path)
    assert best_evaluated(tmp_path, Progress(20, 1, 0, 0.5, 10)) == (0.5, 10)


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b"[]", b'{"epoch": 1}', b"[" * 10**5])
def test_a_damaged_evaluation_is_made_again_from_the_log(tmp_path, damage):
    saved(tmp_path, 10)
    write_evaluation(tmp_path, 10, 1, Evaluation({"AP": 0.5, "AP50": 0.7}, {"a/b": 0.25}, []))
    path = tmp_path / "evaluations" / "step-00000010.json"
    before = json.loads(path.read_text())
    path.write_bytes(damage)
    progress = Progress(10, 1, 0, 0.5, 10)
    MetricsLog(tmp_path).write("train", 10, 1.0, loss=1.0)
    with pytest.raises(UserError, match=r"step-00000010\.json is damaged, and metrics\.jsonl"):
        publish_best(tmp_path, progress)
    MetricsLog(tmp_path).write("evaluation", 10, 1.0, AP=0.5, AP50=0.7, **{"AP/a/b": 0.25})
    assert best_evaluated(tmp_path, progress) == (0.5, 10)
    assert json.loads(path.read_text()) == before
    publish_best(tmp_path, progress)
    assert json.loads((tmp_path / "best.json").read_text())["summary"] == before["summary"]


def test_a_best_whose_evaluation_is_gone_is_told(tmp_path):
    saved(tmp_path, 10)
    with pytest.raises(UserError, match=r"step-00000010\.json, of the best checkpoint, is missing"):
        publish_best(tmp_path, Progress(10, 1, 0, 0.5, 10))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a checkpoint"):
        load_model(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no intact checkpoint"):
        load_model(tmp_path)


class Payload:
    def __reduce__(self):
        return (open, ("/nonexistent/owned", "w"))


def test_a_file_that_would_execute_code_is_refused(tmp_path):
    torch.save({"model": Payload()}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_model(tmp_path)


def test_metrics_are_rewound_to_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3, 4):
        log.write("train", step, step / 10, loss=1.0 / step)
    with log.path.open("a") as file:
        file.write('{"kind": "train", "step": 5, "lo')  # cut short by a crash
    log.rewind(2, 0)
    assert [line["step"] for line in read_lines(log.path)] == [1, 2]
    log.write("evaluation", 2, 1.0, AP=0.5)
    log.rewind(2, 1)
    assert [line["kind"] for line in read_lines(log.path)] == ["train", "train", "evaluation"]
    log.rewind(2, 0)  # a checkpoint of just before the evaluation
    assert [line["kind"] for line in read_lines(log.path)] == ["train", "train"]
    log.write("train", 3, 0.3, loss=0.5)
    assert [line["loss"] for line in read_lines(log.path)] == [1.0, 0.5, 0.5]


def test_what_is_no_line_of_metrics_is_left_out(tmp_path):
    log = MetricsLog(tmp_path)
    log.write("train", 1, 0.1, loss=1.0)
    bad = (
        b"{}", b"[1]", b"null", b'{"kind": "train", "step": "2"}', b'{"kind": "event", "step": 1}',
        b'{"kind": "tr\xffin", "step": 2}', b"\x00" * 20, b"[" * 100_000,
    )  # fmt: skip
    with log.path.open("ab") as file:
        file.write(b"\n".join(bad) + b"\n")
    log.write("train", 2, 0.2, loss=0.5)
    assert [line["loss"] for line in read_lines(log.path)] == [1.0, 0.5]
    tail = Tail(log.path)
    assert [line["loss"] for line in tail.new_lines()] == [1.0, 0.5]
    log.write("train", 3, 0.3, loss=0.25)
    assert [line["loss"] for line in tail.new_lines()] == [0.25]
    log.rewind(2, 0)
    assert [line["loss"] for line in read_lines(log.path)] == [1.0, 0.5]
    assert len(log.path.read_bytes().splitlines()) == 2


def test_a_disk_without_room_for_a_line_is_told_with_what_is_saved(tmp_path, monkeypatch, tries):
    log = MetricsLog(tmp_path)
    full = f"{log.path}: No space left on device; free some, or choose a place on another disk"

    def said():
        log.path.symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space") as told, saying_what_is_saved(tmp_path):
            log.write("train", 1, 0.1)
        return of_the_system(told.value)

    assert said() == full
    log.path.unlink()
    saved(tmp_path, 10)
    flip_byte(saved(tmp_path, 20))
    with monkeypatch.context() as patched:  # nor can the checkpoints be read
        failing(patched, os, "scandir", lambda _: True)
        assert said() == full
    log.path.unlink()
    assert said() == (
        f"{full}; the run's checkpoints are intact, and the same command goes on from step-00000010"
    )


def test_a_run_folder_of_a_training_that_has_only_begun_is_told_as_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no checkpoint yet; training writes one"):
        load_model(tmp_path)
