"""What the documentation says can be done: every command, option, link and file of it."""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml

from tests.markdown_text import (
    DOORS,
    ROOT,
    Command,
    anchors,
    blocks,
    command_words,
    commands,
    guides,
    inline_code,
    links,
)


def carried(command: Command) -> Command | None:
    """The command of ours that another program's line has within it."""
    words = list(command.words)
    if words[0] == "sbatch":  # whose script hands its arguments to `jobs submit`
        script = next(at for at, word in enumerate(words) if word.endswith("train.sh"))
        assert (ROOT / words[script]).is_file(), command
        inner = ["python", "-m", "jobs", "submit", *words[script + 1 :], "--no-wait"]
    elif words[0] in ("docker", "torchrun") and "-m" in words:
        inner = ["python", *words[words.index("-m") :]]
    elif words[0] == "kubectl" and "--" in words:
        inner = words[words.index("--") + 1 :]
    else:
        return None
    return Command(command.file, command.line, tuple(inner))


COMMANDS = [command for file in guides() for command in commands(file)]
OTHERS = [command for command in COMMANDS if not command.door[0]]
OURS = [command for command in COMMANDS if command.door[0]]
OURS += [inner for command in OTHERS if (inner := carried(command))]
RAY_JOB = "deploy/kuberay/job.yaml"
OURS.append(
    Command(
        RAY_JOB,
        0,
        command_words(
            yaml.safe_load((ROOT / RAY_JOB).read_text())["spec"]["entrypoint"].split(" && ")[1]
        ),
    )
)

# Commands that the scenario below does not run as they are written, and which test runs them.
ELSEWHERE = {
    ("jobs", "submit"): ("needs a cluster", "tests/jobs/test_ray_jobs.py"),
    ("jobs", "logs"): ("needs a cluster", "tests/jobs/test_ray_jobs.py"),
    ("jobs", "stop"): ("needs a cluster", "tests/jobs/test_ray_jobs.py"),
    ("jobs", "resume"): ("needs a cluster", "tests/jobs/test_resume.py"),
    ("jobs", "status"): ("needs a cluster or a grid", "tests/jobs/test_grid_on_ray.py"),
    ("jobs", "grid"): ("hours; --dry-run is run below", "tests/jobs/test_grid_on_ray.py"),
    ("jobs", "train"): ("a cluster and minutes", "tests/jobs/test_own_data.py"),
    ("jobs", "serve"): ("goes on until it is ended", "tests/jobs/test_serve.py"),
    ("cuda_ops", "check"): ("a minute, and a GPU", "tests/cuda_ops/test_check.py"),
    ("cuda_ops", "benchmark"): ("minutes, and a GPU", "tests/cuda_ops/test_benchmark.py"),
    ("pipeline", "replay"): ("as long as a training", "tests/pipeline/test_bad_step.py"),
    ("pipeline", "benchmark-step"): ("minutes", "tests/pipeline/test_benchmark_step.py"),
}  # fmt: skip
# Single command lines, by a piece of their text, likewise.
LINES_ELSEWHERE = {
    "--weights plain": ("only with averaged weights", "tests/pipeline/test_evaluate.py"),
    "outputs/own/run": ("what jobs train leaves", "tests/jobs/test_own_data.py"),
    "--format onnx": ("a minute", "tests/pipeline/test_export.py"),
    "--format transformers": ("wants a ResNet, minutes", "tests/pipeline/test_export.py"),
    "s3://raw": ("no such store here", "tests/data_prep/test_storage.py"),
    "build --report": ("compiles for a minute", "tests/cuda_ops/test_build_and_door.py"),
    "detr_r50_dc5_plus_demo": ("one training is enough", "tests/pipeline/test_demo_scale.py"),
    "--model.num-points 8": ("one training is enough", "tests/pipeline/test_demo_scale.py"),
    "--output /runs/r50": ("one training is enough", "tests/pipeline/test_demo_scale.py"),
    "jobs compare table2": ("needs the grid", "tests/jobs/test_compare_page.py"),
    "jobs compare /shared/grids/mine": ("needs a grid", "tests/jobs/test_compare_page.py"),
    "jobs compare outputs/grids/family_demo": ("needs the grid", "tests/jobs/test_compare_page.py"),
}
# Options of programs that are not ours, or of the environment.
FOREIGN_OPTIONS = {
    "--agent-manager-port", "--block", "--dashboard-agent-grpc-port", "--dashboard-host",
    "--dashboard-agent-listen-port", "--host", "--metrics-export-port", "--node-manager-port",
    "--num-cpus", "--object-manager-port", "--ray-client-server-port", "--runtime-env-agent-port",
    "--nproc-per-node", "--nodes", "--signal", "--requeue", "--time", "--gres", "--account",
    "--partition", "--shm-size", "--gpus-per-node", "--exclusive", "--nodelist", "--nnodes",
    "--standalone", "--rdzv-endpoint", "--local-addr", "--master-addr", "--master-port",
    "--shutdown-timeout",
}  # fmt: skip


class Parsed(BaseException):
    """Raised in place of what a command would do, once its options are accepted."""


def door(command: Command) -> None:
    """Runs `python -m DOOR …` in this process."""
    arguments = list(command.words[2:])
    sys.argv = [f"python -m {arguments[0]}", *arguments[1:]]
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=False)


@pytest.fixture(autouse=True)
def as_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command changes of its process is put back."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(signal, "signal", lambda number, handler: signal.SIG_DFL)


@pytest.fixture
def only_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_after(real: Callable[..., Any]) -> Callable[..., Any]:
        def parse(*args: Any, **options: Any) -> Any:
            real(*args, **options)
            raise Parsed

        return parse

    monkeypatch.setattr(tyro, "cli", stop_after(tyro.cli))
    monkeypatch.setattr(
        tyro.extras, "subcommand_cli_from_dict", stop_after(tyro.extras.subcommand_cli_from_dict)
    )
    monkeypatch.setattr(
        argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args)
    )


def accepts(command: Command) -> bool:
    """Whether the real parser takes the command's options; what it says otherwise is printed."""
    try:
        door(command)
    except Parsed:
        return True
    except SystemExit as stop:
        return not stop.code
    return False


def test_commands_are_found():
    assert len(OURS) > 45
    assert {command.door[0] for command in OURS} == set(DOORS)


@pytest.mark.parametrize("command", OURS, ids=str)
def test_a_command_of_ours_is_accepted(command, only_parse):
    assert accepts(command)


@pytest.mark.parametrize(
    "text",
    [
        "python -m pipeline train demo --output x --data.trian y",
        "python -m pipeline trian demo --output x",
        "python -m pipeline train deformable_detr_r5 --output x",
        "python -m data_prep convert --image x --annotations y --output z",
        "python -m cuda_ops check --devise cuda",
        "python -m jobs submit demo --output x --wokers 2",
    ],
)
def test_a_command_with_a_mistake_is_not(text, only_parse, capsys):
    assert not accepts(Command("", 0, command_words(text)))


def test_every_other_command_is_of_a_known_program():
    """Ray's, MLflow's, torchrun's and make's are held below; of the rest only the program."""
    checked = {"make", "mlflow", "ray", "torchrun"}
    outside = {"curl", "docker", "export", "ffmpeg", "git", "kubectl", "helm", "pip", "sbatch",
               "scancel", "ssh", "srun"}  # fmt: skip
    for command in OTHERS:
        program = command.words[0]
        if program == "python":  # a script of the checkout
            module = command.words[1] == "-m"
            assert module or (ROOT / command.words[1]).is_file(), command
            assert not module or command.words[2] in ("mlflow", "pytest"), command
        else:
            assert program in checked | outside, command


def test_make_has_the_targets():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = [c.words[1] for c in OTHERS if c.words[0] == "make"]
    for file in guides():
        named += [m[1] for code in inline_code(file) if (m := re.match(r"make ([\w-]+)", code))]
    assert named
    assert set(named) <= targets


def test_torchrun_takes_its_options(only_parse):
    from torch.distributed.run import get_args_parser

    lines = [command for command in OTHERS if "torchrun" in command.words]
    assert lines
    for command in lines:
        words = list(command.words[command.words.index("torchrun") + 1 :])
        with pytest.raises(Parsed):
            get_args_parser().parse_args(words)


@pytest.mark.parametrize(
    ("program", "files"),
    [
        ("ray", ["scripts/scripts.py", "dashboard/modules/job/cli.py"]),
        ("mlflow", ["cli/__init__.py", "utils/cli_args.py"]),
    ],
)
def test_options_of_ray_and_mlflow_exist(program, files):
    """In the sources of the installed version: to import the two command lines takes 20 s."""
    lines = [command for command in OTHERS if command.words[0] == program]
    assert lines
    spec = importlib.util.find_spec(program)
    assert spec
    assert spec.origin
    names: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse((Path(spec.origin).parent / file).read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
            elif isinstance(node, ast.FunctionDef):
                names.add(node.name)
    assert "--definitely-not-an-option" not in names
    for command in lines:
        assert command.words[1] in names, command
        for word in command.words[2:]:
            if word.startswith("--"):
                assert word.split("=")[0] in names, f"{command}: {word}"


# --- run for real ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(drawn: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the paths that the guides take for granted exist, with drawn pictures."""
    folder = tmp_path_factory.mktemp("docs")
    for coco in (folder, folder / "coco"):
        (coco / "annotations").mkdir(parents=True)
        for split in ("train", "val"):
            (coco / f"{split}2017").symlink_to(drawn.coco / split)
            file = drawn.coco / "annotations" / f"instances_{split}.json"
            (coco / "annotations" / f"instances_{split}2017.json").symlink_to(file)
    (folder / "outputs").mkdir()
    for pictures in ("pictures", "photos", "frames"):
        (folder / pictures).symlink_to(drawn.coco / "val")
    shutil.copy(next((drawn.coco / "train").iterdir()), folder / "street.jpg")
    return folder


# Order of the scenario: what later commands need comes first. Each has the options that make it
# small, appended where the command line has not said otherwise.
SMALL = (
    "--schedule.epochs", "1", "--engine.loader-workers", "0", "--engine.precision", "fp32",
    "--model.num-queries", "10", "--model.encoder-layers", "1", "--model.decoder-layers", "2",
)  # fmt: skip
SCENARIO = {
    ("data_prep", "synthesize"): ("--train", "4", "--val", "2"),
    ("data_prep", "convert"): (),
    ("data_prep", "verify"): (),
    ("data_prep", "stats"): (),
    ("data_prep", "export"): (),
    ("cuda_ops", "build"): ("--cpu-only",),
    ("pipeline", "train"): SMALL,
    ("pipeline", "evaluate"): (),
    ("pipeline", "predict"): (),
    ("pipeline", "visualize"): ("--threshold", "0.01"),
    ("pipeline", "universal"): (),
    ("pipeline", "describe"): (),
    ("pipeline", "recipes"): (),
    ("jobs", "compare"): ("--resamples", "20"),
}


def real(command: Command, place: Path, drawn: Any) -> list[str]:
    """The command line with what a test has in place of a cluster's storage and COCO's size."""
    ids = [str(image["id"]) for image in drawn.annotations("val")["images"][:2]]
    words, given = [], list(command.words)
    if "--init.backbone" in given:  # the small backbone has no published weights
        at = given.index("--init.backbone")
        del given[at : at + 2]
    for word in given:
        if command.door[1] in ("train",) and word.startswith(("deformable_", "detr_")):
            word = word if word.endswith("_demo") else f"{word}_demo"
        words.append(word.replace("/shared/", f"{place}/"))
    if words[2:4] == ["pipeline", "describe"] and len(words) == 4:
        words.append("demo")  # all recipes take half a minute
    if words[2:4] == ["data_prep", "synthesize"]:
        words = words[: words.index("--train")]
    for documented, here in (("139", ids[0]), ("285", ids[1])):
        words = [here if word == documented else word for word in words]
    for side, here in (("600", "48"), ("800", "64"), ("1000", "80"), ("1200", "96")):
        if "--tta-sides" in words:
            words = [here if word == side else word for word in words]
    return [*words, *SCENARIO[command.door]]


def here(command: Command) -> int | str | None:
    """Runs it in this process and returns its exit status."""
    try:
        door(command)
    except SystemExit as stop:
        return stop.code
    return 0


def in_a_process(command: Command) -> int:
    """DeepSpeed trains once in a process."""
    return subprocess.run([sys.executable, *command.words[1:]], timeout=600).returncode


def elsewhere(command: Command) -> bool:
    return (command.door in ELSEWHERE and "--dry-run" not in command.words) or any(
        piece in command.text for piece in LINES_ELSEWHERE
    )


def scenario() -> list[Command]:
    """Each command line once, in an order that works."""
    lines = {}
    for command in OURS:
        if not elsewhere(command) and command.door in SCENARIO:
            lines.setdefault(command.text, command)
    order = list(SCENARIO)
    return sorted(lines.values(), key=lambda command: order.index(command.door))


def test_the_commands_do_what_they_say(place, drawn, monkeypatch, capfd):
    """All of them, in one folder, one after the other; each must end with status 0."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for processes that commands start
    for command in scenario():
        if command.door == ("jobs", "compare"):
            shutil.copytree("runs/r50", "runs/r50_refine", dirs_exist_ok=True)
        if command.door in (("pipeline", "predict"), ("pipeline", "evaluate")):
            for at, word in enumerate(command.words[:-1]):  # several guides write one folder
                if word == "--output":
                    folder = real(command, place, drawn)[at + 1]
                    shutil.rmtree(folder, ignore_errors=True)
        run = Command(command.file, command.line, tuple(real(command, place, drawn)))
        status = in_a_process(run) if command.door == ("pipeline", "train") else here(run)
        assert not status, f"{command}\nrun as: {run.text}\n{capfd.readouterr().err}"
    assert (place / "runs/r50/best.json").is_file()
    assert (place / "shards/train/manifest.json").is_file()
    assert (place / "found/detections.json").is_file()
    assert (place / "outputs/comparison/compare.html").is_file()


def test_a_dry_run_of_the_papers_grid(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    lines = [c for c in OURS if c.door == ("jobs", "grid") and "--dry-run" in c.words]
    assert lines
    for command in lines:
        data = ("--data.train", "a", "--data.val", "b", "--backbones", str(place))
        for name in ("resnet50", "resnet101", "resnext101_64x4d"):
            (place / f"{name}.pth").touch()
        with contextlib.suppress(SystemExit):
            door(Command(command.file, command.line, (*command.words, *data)))
        assert "num_points" in capsys.readouterr().out


def test_every_command_is_run_here_or_elsewhere():
    """And nothing is excused that the guides no longer have, or by a test that is gone."""
    for command in OURS:
        assert elsewhere(command) or command.door in SCENARIO or "--dry-run" in command.words, (
            f"{command}: add it to SCENARIO, or to ELSEWHERE with the test that runs it"
        )
    doors = {command.door for command in OURS}
    assert set(ELSEWHERE) <= doors
    assert set(SCENARIO) - {("pipeline", "recipes")} <= doors
    for piece in LINES_ELSEWHERE:
        assert any(piece in command.text for command in OURS), piece
    for _, test in [*ELSEWHERE.values(), *LINES_ELSEWHERE.values()]:
        assert (ROOT / test).is_file(), test


# --- options, links, files, code --------------------------------------------------------------


def options_of_ours() -> set[str]:
    """Every option in the help of every command of the four doors."""
    found: set[str] = set()
    for package in DOORS:
        listed = help_of(package)
        names = re.findall(r"^\W*([a-z][a-z-]+)\b", listed, flags=re.M)
        for name in dict.fromkeys(names):
            text = help_of(package, name)
            found |= set(re.findall(r"--[a-z][\w.-]*\w", text))
    return found


def help_of(package: str, *command: str) -> str:
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        door(Command("", 0, ("python", "-m", package, *command, "--help")))
    return said.getvalue()


def test_every_option_that_is_mentioned_exists(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    known = options_of_ours()
    assert {"--optimizer.ema-decay", "--tta-sides", "--strict", "--cpu-only", "--prune"} <= known
    known |= {f"--no-{option[2:]}" for option in known} | FOREIGN_OPTIONS | {"--debug"}
    for script in (ROOT / "tests").rglob("*.py"):  # those that the guides name
        if "ArgumentParser" in (text := script.read_text(encoding="utf-8")):
            known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', text))
    wrong = []
    for file in guides():
        # What was, under the names of its day; mistakes, which tests/test_error_table.py makes.
        if file.name in ("log.md", "CHANGELOG.md", "errors.md"):
            continue
        for code in inline_code(file):
            for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", code):
                plain = re.sub(r"\.no-", ".", option)
                if plain not in known and option.rstrip(".") not in known:
                    wrong.append(f"{file.name}: {option}")
    assert not wrong


def test_links_lead_somewhere():
    wrong = []
    for file in [*guides(), *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in links(file):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            there = (file.parent / path).resolve() if path else file
            if not there.exists():
                wrong.append(f"{file.relative_to(ROOT)}: {target}")
            elif anchor and anchor not in anchors(there):
                wrong.append(f"{file.relative_to(ROOT)}: no heading {anchor!r} in {path or 'it'}")
    assert not wrong


def test_files_that_are_named_exist():
    """Paths in code style that begin with a folder of the checkout."""
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()} - {".git", ".build", ".venv"}
    wrong, seen = [], 0
    for file in guides():
        for code in inline_code(file):
            if not re.fullmatch(r"[\w./-]+", code) or code.split("/")[0] not in tops - {"outputs"}:
                continue
            if "/" in code:
                seen += 1
                if not (ROOT / code).exists():
                    wrong.append(f"{file.name}: {code}")
    assert seen > 10
    assert not wrong


def test_the_readme_is_short_and_its_tree_is_there():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 110
    tree = [line.split()[0] for line in lines if re.match(r"    \w+/ {2,}\S", line)]
    assert len(tree) >= 7
    assert all((ROOT / folder).is_dir() for folder in tree)


def python_code() -> Iterator[tuple[str, str]]:
    for file in guides():
        for block in blocks(file):
            text = block.content
            is_python = block.info.strip() == "python" or (
                not block.info.strip() and re.match(r"(from [\w.]+ import|import )", text)
            )
            if is_python:
                yield f"{file.name}:{(block.map or [0])[0] + 1}", text


def test_the_variant_of_the_guide_is_a_recipe():
    made: dict[str, Any] = {}
    (text,) = [t for where, t in python_code() if where.startswith("extending.md")]
    exec(compile(text, "docs/extending.md", "exec"), made)
    config = made["deformable_detr_r50_two_stage_points8"]()
    assert config.model.num_points == 8
    assert config.recipe == "deformable_detr_r50_two_stage_points8"
    assert config.model.two_stage


def test_the_shapes_of_the_architecture_page():
    """Every tensor of a forward of two images, without its numbers, stands in the table."""
    import torch

    from model.detr import build_model
    from pipeline.recipes import recipe

    with torch.device("meta"):
        model = build_model(recipe("deformable_detr_r50").model).eval()
        seen: list[list[int]] = []
        for part in (model.backbone, model.neck, model.encoder[-1], model.decoder[-1], model.heads):
            part.register_forward_hook(lambda _, __, out: seen.extend(shapes(out)))
        images, mask = torch.zeros(2, 3, 800, 1333), torch.zeros(2, 800, 1333, dtype=torch.bool)
        model(images, mask)
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    assert len(seen) > 10
    for shape in [*seen, [2, 3, 800, 1333], [2, 800, 1333]]:
        assert str(shape) in table


def shapes(value: Any) -> list[list[int]]:
    """Of all tensors in nested lists."""
    if isinstance(value, list | tuple):
        return [shape for part in value for shape in shapes(part)]
    return [list(value.shape)]


@pytest.mark.parametrize(("where", "text"), list(python_code()), ids=lambda value: value[:24])
def test_python_in_the_guides_names_what_exists(where, text):
    """It parses, and every name that it imports from our packages is there."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        if node.module.split(".")[0] in (*DOORS, "model"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{where}: {node.module}.{alias.name}"


def test_grid_files_of_the_guide_load(tmp_path):
    from jobs.grid_file import find_grid

    texts = [block.content for block in blocks(ROOT / "docs/grids.md")]
    for name in ("points.yaml", "widths.py"):
        text = next(text for text in texts if text.startswith(f"# {name}"))
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert len(find_grid(str(tmp_path / name)).cells) > 1


def test_the_licence_is_named_where_it_is_looked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{project['version']}]" in changes


def test_no_path_of_one_machine():
    """Placeholders such as /shared and /tmp are fine; homes and workplaces are not."""
    for file in guides():
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(home|root|work)/\w", text), file
        assert os.environ.get("HOME", "/root") + "/" not in text, file
