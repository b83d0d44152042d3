"""Mistakes with checkpoints, training, clusters and grids."""

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from pipeline.parent import end_with_parent
from tests.error_table.files import TRAIN, VISUALIZE, text, void
from tests.error_table.place import Mistake
from tests.fuzz.mutate import bombs
from tests.ports import free_port

FILE = "python -m pipeline visualize model.pt --data shards/val --output new"
MODEL = Path("run/checkpoints/step-00000002/model.pt")
UNIVERSAL = "python -m pipeline universal run --output new"
CPU = f"{TRAIN} --engine.device cpu --engine.loader-workers 0"


def saved(content: Callable[[dict[str, Any]], Any], path: str = "model.pt") -> Callable[[], None]:
    def save() -> None:
        torch.save(content(torch.load(MODEL, weights_only=True)), path)

    return save


def config_of(change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
    def changed(content: dict[str, Any]) -> dict[str, Any]:
        config = json.loads(content["config"])
        change(config)
        return {**content, "config": json.dumps(config)}

    return changed


def as_safetensors() -> None:
    from safetensors.torch import save_file

    weights = torch.load(MODEL, weights_only=True)["model"]
    save_file(
        {name: value.clone().contiguous() for name, value in weights.items()}, "model.safetensors"
    )


def fewer_classes(content: dict[str, Any]) -> dict[str, Any]:
    labels = content["labels"]
    columns, names = labels["category_of"][:-1], labels["names"][:-1]
    config = json.loads(content["config"])
    config["model"]["num_classes"] = len(columns)
    model = {n: x[:-1] if "classes" in n else x for n, x in content["model"].items()}
    return {
        **content,
        "model": model,
        "labels": {"category_of": columns, "names": names},
        "config": json.dumps(config),
    }


def without_numbers(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "model": {n: x * torch.nan for n, x in content["model"].items()}}


def held() -> None:
    """Another training has the folder."""
    import pipeline.run_folder

    pipeline.run_folder.DYING = 0.05
    reader, writer = os.pipe()
    if not os.fork():
        end_with_parent()
        lock = FileLock("run/lock")
        lock.acquire()
        os.write(writer, b"x")
        signal.pause()
    os.read(reader, 1)


def out_of_gpu_memory() -> None:
    def forward(*_: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.37 GiB. GPU 0 has a total capacity of 15.77 "
            "GiB of which 1.12 GiB is free.\nSee documentation for Memory Management"
        )

    from model.deformable_detr import DeformableDETR

    DeformableDETR.forward = forward  # type: ignore[method-assign, assignment]


def small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))


def no_room_for_metrics() -> None:
    """From the second step on, when the checkpoint of the first is whole."""
    from pipeline.checkpoint_store import checkpoint_steps
    from pipeline.tracking import MetricsLog

    write = MetricsLog.write

    def full(self: MetricsLog, kind: str, step: int, *given: Any, **values: Any) -> None:
        if step == 2:
            while not checkpoint_steps(self.path.parent):
                time.sleep(0.01)
            size = self.path.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        write(self, kind, step, *given, **values)

    MetricsLog.write = full  # type: ignore[method-assign]


def killed_loader() -> None:
    def take_step(*_: Any) -> None:
        raise RuntimeError(
            "DataLoader worker (pid 4711) is killed by signal: Bus error. It is possible that "
            "dataloader's workers are out of shared memory."
        )

    import pipeline.train

    pipeline.train.take_step = take_step  # type: ignore[assignment]


def operators(damage: str) -> Callable[[], None]:
    def apply() -> None:
        import cuda_ops
        import cuda_ops.library as library

        for name in ("ops", "check"):
            sys.modules.pop(f"cuda_ops.{name}", None)
            cuda_ops.__dict__.pop(name, None)
        if damage == "missing":
            library.library_path = lambda device: Path("nowhere.so")  # type: ignore[assignment]
        else:
            library.sources_digest = lambda device: "other"  # type: ignore[assignment]

    return apply


def a_bug() -> None:
    import pipeline.commands.describe as describe
    from pipeline.__main__ import COMMANDS
    from pipeline.cli import Command

    def run(_: Any) -> None:
        describe.RECIPES["not there"]

    COMMANDS["describe"] = Command(run, "")


def answers(status: int, content: Any) -> Callable[[], None]:
    """A server on port.txt's port that gives the same answer to everything; PORT in the command
    is a port that was free."""

    def serve() -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(
                    [] if "/jobs" in self.path and isinstance(content, dict) else content
                ).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Nothing on stderr."""

        server = ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()

    return serve


PORT = free_port()
ADDRESS = f"--address http://127.0.0.1:{PORT}"


def no_head() -> None:
    import jobs.cluster

    jobs.cluster.STARTED = "never said"
    jobs.cluster.STARTS = 1
    Path("bin").mkdir()
    Path("bin/ray").write_text("#!/bin/sh\necho 'Failed to start: port 6379 is in use'\nexit 1\n")
    Path("bin/ray").chmod(0o755)
    jobs.cluster.sys = type("sys", (), {"executable": str(Path("bin/python").resolve())})


CHECKPOINTS = [
    Mistake("a file that is no checkpoint", FILE, ("model.pt cannot be read as a checkpoint",),
            "Give a run folder, a checkpoint in it or its model.pt.", text("model.pt", "hello")),
    Mistake("an empty checkpoint", FILE, ("cannot be read as a checkpoint", "the file is empty"),
            "Copy it again.", text("model.pt", "")),
    Mistake("a checkpoint cut short", FILE, ("cannot be read", "is it cut short"), "Copy it again.",
            lambda: void(Path("model.pt").write_bytes(MODEL.read_bytes()[:20_000]))),
    Mistake("a file with code in it", FILE,
            ("it refers to", "nothing but tensors and plain values is read"), "Do not trust it.",
            lambda: void(Path("model.pt").write_bytes(bombs(Path("executed").resolve())[2]))),
    Mistake("a state dict alone", FILE, ("is not a model.pt",),
            "Start from it: --init.weights.", saved(lambda c: c["model"])),
    Mistake("a published checkpoint where one of ours belongs", FILE,
            ("is not a model.pt of ours", "it has no config", "--init.weights"),
            "Start from it: --init.weights.", saved(lambda c: {"model": c["model"]})),
    Mistake("a safetensors file",
            FILE.replace("model.pt", "model.safetensors"),
            ("model.safetensors is not a model.pt",),
            "Give the model.pt it was made from.", as_safetensors),
    Mistake("a checkpoint of a newer version", FILE,
            ("got momentum", "expected fields of this version", "written by a newer one"),
            "Update the checkout.",
            saved(config_of(lambda c: c["optimizer"].update(momentum=0.9)))),
    Mistake("a checkpoint whose config was edited", FILE,
            ("model.hidden_dim", "got 'wide'", "expected a whole number"),
            "Take the file as it was written.",
            saved(config_of(lambda c: c["model"].update(hidden_dim="wide")))),
    Mistake("data with categories that the checkpoint lacks", FILE,
            ("categories that the checkpoint lacks: [7]",),
            "Evaluate on the data it was trained for, or fine-tune: --init.weights.",
            saved(fewer_classes)),
    Mistake("a best.json that was edited", VISUALIZE, ("best.json is damaged", "expected step-"),
            "Give a checkpoint itself.", text("run/best.json", '{"checkpoint": "../../etc"}')),
    Mistake("weights that are not finite", FILE,
            ("predictions are not finite", "give others"), "Give others, such as an earlier one.",
            saved(without_numbers)),
    Mistake("a universal checkpoint into a folder that is there", UNIVERSAL.replace("new", "coco"),
            ("'coco' exists already", "expected a new folder"), "Choose another name.",
            kept=("coco/annotations",)),
    Mistake("a universal checkpoint of a model.pt alone", UNIVERSAL.replace("run", "model.pt"),
            ("not a whole checkpoint", "give a run folder"), "Give the run folder.",
            saved(lambda c: c)),
    Mistake("a universal checkpoint of weights alone", UNIVERSAL,
            ("training.pt does not fit", "no state of an optimizer"),
            "Give a checkpoint that a training has written."),
    Mistake("weights that are not there", f"{TRAIN} --init.weights none.pth",
            ("'none.pth'", "no such file or folder on this machine"), "Check the path."),
    Mistake("a backbone that is not there", f"{TRAIN} --init.backbone none.pth",
            ("'none.pth'", "no such file on this machine"), "Check the path."),
    Mistake("a backbone's file for a detector's", f"{TRAIN} --init.weights r50.pth",
            ("no class head", "--init.backbone"), "Give it as --init.backbone.",
            saved(lambda c: {"conv1.weight": torch.zeros(1)}, "r50.pth")),
    Mistake("weights of another architecture",
            f"{TRAIN} --init.weights model.pt --model.hidden-dim 96",
            ("another architecture", "model.hidden_dim: got 64, expected 96"),
            "Give the options it was trained with.", saved(lambda c: c)),
    Mistake("weights that refer to code", f"{TRAIN} --init.weights model.pt",
            ("init.weights", "it refers to"), "Do not trust it.",
            lambda: void(Path("model.pt").write_bytes(bombs(Path("executed").resolve())[3]))),
]  # fmt: skip
TRAINING = [
    Mistake("a GPU asked for, and none there", f"{TRAIN} --engine.device cuda",
            ("no usable CUDA device", "--engine.device cpu"), "Train on a CPU, or on a GPU node."),
    Mistake("fp16 without a GPU", f"{TRAIN} --engine.device cpu --engine.precision fp16",
            ("fp16 needs a GPU", "bf16 or fp32"), "Take bf16 or fp32."),
    Mistake("a run folder of another config", CPU.replace("new", "run") + " --optimizer.lr 1e-3",
            ("belongs to another config", "optimizer.lr: got 0.001", "another --output"),
            "Give the old options, or another folder.",
            kept=("run/config.json", "run/checkpoints")),
    Mistake("a run folder of other data",
            CPU.replace("new", "run").replace("shards/val", "shards/train"),
            ("belongs to another data.val", "another --output"),
            "Give the old data, or another folder.", kept=("run/config.json", "run/checkpoints")),
    Mistake("a run folder in use by another training", CPU.replace("new", "run"),
            ("in use by another training", "stop it first"), "Stop it, or choose another folder.",
            held, kept=("run/checkpoints",)),
    Mistake("a GPU with too little memory", CPU,
            ("out of memory on the GPU", "2.37 GiB", "16 x 3 x", "--engine.micro-batch 8",
             "--engine.max-padded-pixels", "--model.activation-checkpointing"),
            "Lower what the line names; the same run goes on.", out_of_gpu_memory),
    Mistake("a bound below the largest image", f"{CPU} --engine.max-padded-pixels 10000",
            ("engine.max_padded_pixels: got 10000, expected", "raise it"),
            "Raise it to the number that the line names."),
    Mistake("a limit on the size of files", f"{CPU} --optimizer.batch-size 8 --schedule.epochs 1",
            ("the checkpoint after step 3 cannot be written", "File too large",
             "goes on from there"),
            "Raise the limit, or use another disk.", small_files_only),
    Mistake("the same limit, met by the log of metrics",
            f"{CPU} --optimizer.batch-size 8 --engine.log-every 1 --engine.checkpoint-steps 1",
            ("new/metrics.jsonl", "File too large", "ulimit -f", "checkpoints are intact",
             "the same command goes on from step-00000001"),
            "Raise the limit, and give the same command.", no_room_for_metrics,
            kept=("shards",)),
    Mistake("a config.json of a run that is cut short", CPU.replace("new", "run"),
            ("run/config.json is damaged: it is not JSON", "put a copy of it back",
             "--init.weights run"),
            "Do as it says.", lambda: os.truncate("run/config.json", 100),
            kept=("run/checkpoints",)),
    Mistake("too little shared memory for the loader", CPU,
            ("a loader process was killed", "--engine.loader-workers", "--shm-size"),
            "docker run --shm-size 8g, or fewer loader processes.", killed_loader),
    Mistake("a training that diverges",
            f"{CPU} --optimizer.batch-size 8 --schedule.epochs 1 --optimizer.lr 1e30",
            ("after step 3 the predictions are not finite", "lower --optimizer.lr", "is saved in"),
            "Begin anew with a lower rate, or a longer warm-up.", status=1),
    Mistake("replay of a step that was never taken", "python -m pipeline replay run 60",
            ("step: got 60", "expected one of"), "Give one that the run has taken.",
            text("run/metrics.jsonl",
                 '{"kind": "event", "event": "start", "step": 0, "world": 1, "steps": 90}\n')),
    Mistake("operators that are not built", "python -m cuda_ops check --device cpu",
            ("not built", "python -m cuda_ops build"), "Build them.", operators("missing")),
    Mistake("operators built before a change", "python -m cuda_ops check --device cpu",
            ("other sources", "python -m cuda_ops build"), "Build them anew.", operators("old")),
    Mistake("the operators' check on a GPU that is not there",
            "python -m cuda_ops check --device cuda",
            ("--device cuda", "no GPU here"), "Use --device cpu."),
    Mistake("a bug of ours", "python -m pipeline describe",
            ("KeyError: 'not there'", "bug of ours", "--debug", "docs/errors.md"),
            "Report it, see below.", a_bug, status=1),
]  # fmt: skip

SUBMIT = TRAIN.replace("pipeline train", "jobs submit")
CLUSTER = [
    Mistake("an address where nobody answers", f"python -m jobs status {ADDRESS}",
            ("no Ray cluster answers", "http://HOST:8265"), "Give the dashboard's address."),
    Mistake("an address that is no Ray", f"python -m jobs status {ADDRESS}",
            ("no Ray cluster answers", "404"), "Give the dashboard's address.",
            answers(404, "nothing here")),
    Mistake("a cluster with another Ray", f"python -m jobs status {ADDRESS}",
            ("got 2.40.0 on the cluster", "expected the same"), "Start it with the pinned Ray.",
            answers(200, {"version": "4", "ray_version": "2.40.0", "ray_commit": "x"})),
    Mistake("a cluster that wants a token", f"python -m jobs status {ADDRESS}",
            ("wants a token", "RAY_AUTH_TOKEN"), "Set both variables.",
            answers(401, "Unauthorized: Missing authentication token")),
    Mistake("a job that the cluster does not have",
            f"python -m jobs logs --job r50-0 {ADDRESS}", ("no job 'r50-0'", "expected one of []"),
            "python -m jobs status lists them.",
            answers(200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "x"})),
    Mistake("neither a cluster nor a grid", "python -m jobs status",
            ("--address http://HOST:8265", "--grid FOLDER"), "Give one."),
    Mistake("a local Ray that does not start", SUBMIT,
            ("a local Ray did not start", "port 6379 is in use"), "Mend what it says.", no_head),
    Mistake("no worker", f"{SUBMIT} --workers 0", ("workers 0", "at least 1"), "Give 1 or more."),
    Mistake("more workers at least than at most", f"{SUBMIT} --min-workers 4 --workers 2",
            ("min-workers: got 4", "0 to --workers 2"), "Lower --min-workers."),
    Mistake("more workers than images in a batch", f"{SUBMIT} --workers 17",
            ("got 16 images for 17 processes", "expected 17 or more"),
            "Fewer workers, or a larger --optimizer.batch-size."),
    Mistake("a batch that ZeRO 2 cannot share out",
            f"{SUBMIT} --workers 3 --engine.zero-stage 2 --engine.micro-batch 5",
            ("16 images over 3 processes", "--engine.zero-stage 1"), "Do as it says."),
    Mistake("an MLflow URI of a wrong scheme", f"{SUBMIT} --tracking-uri mlruns",
            ("tracking-uri: got 'mlruns'", "expected http://HOST:PORT"),
            "Give one of those forms."),
    Mistake("a password in the MLflow URI", f"{SUBMIT} --tracking-uri http://me:secret@host:5000",
            ("user or password", "MLFLOW_TRACKING_PASSWORD"),
            "Set the variables where Ray starts."),
    Mistake("a model name that MLflow refuses", f"{SUBMIT} --model-name a/b",
            ("model-name: got 'a/b'", "expected letters"), "Choose another."),
    Mistake("a port of the service that is taken", f"python -m jobs serve run --port {PORT}",
            ("cannot listen at 127.0.0.1", "in use", "--port"), "Do as it says.",
            answers(200, {})),
    Mistake("resume of what is no run", "python -m jobs resume coco",
            ("no folder of a run or a grid", "ray/job.json"), "Give its folder."),
    Mistake("a comparison of what is not there", "python -m jobs compare nowhere",
            ("nowhere",), "Give a grid, or run folders."),
]  # fmt: skip

GRID = "python -m jobs grid g.yaml --dry-run"
BASE = "baseline: demo\n"
GRIDS = [
    Mistake("an unknown grid", "python -m jobs grid table4", ("'table4'", "table1", ".yaml"),
            "Take the paper's, or a file."),
    Mistake("a grid without a baseline", GRID,
            ("g.yaml", "baseline: got None", "expected a recipe"),
            "Name a recipe.", text("g.yaml", "axes: {model.num_points: [1]}")),
    Mistake("an unknown key", GRID, ("got 'axis'", "did you mean 'axes'"), "Take the one proposed.",
            text("g.yaml", f"{BASE}axis: {{}}")),
    Mistake("an unknown field", GRID, ("'model.num_point'", "did you mean 'model.num_points'"),
            "Take the one proposed.", text("g.yaml", f"{BASE}axes: {{model.num_point: [1, 2]}}")),
    Mistake("a value of a wrong type", GRID, ("model.num_points", "many"), "Give a number.",
            text("g.yaml", f"{BASE}axes: {{model.num_points: [many]}}")),
    Mistake("a key given twice", GRID, ("line 3", "'axes' twice"), "Join them.",
            text("g.yaml", f"{BASE}axes: {{model.num_points: [1]}}\naxes: {{}}\n")),
    Mistake("an alias", GRID, ("the alias *a", "expected the value itself"), "Write it out.",
            text("g.yaml", f"{BASE}set: &a {{seed: 1}}\naxes: *a\n")),
    Mistake("a file that is no YAML", GRID, ("g.yaml", "line 2"), "Mend the line.",
            text("g.yaml", "baseline: [demo\n")),
    Mistake("neither axes nor cells", GRID, ("neither axes nor cells",), "Add some.",
            text("g.yaml", BASE)),
    Mistake("combinations without number", GRID, ("got 4096 combinations", "at most 1000"),
            "Fewer values.", text("g.yaml", BASE + "axes:\n" + "".join(
                f"  {name}: [1, 2, 3, 4, 5, 6, 7, 8]\n" for name in (
                    "model.num_points", "model.encoder_layers", "model.decoder_layers",
                    "schedule.epochs")))),
    Mistake("a Python file that fails", "python -m jobs grid g.py --dry-run",
            ("g.py", "line 2", "ZeroDivisionError"), "Mend the line.",
            text("g.py", "def grid():\n    return 1 / 0\n")),
]  # fmt: skip
