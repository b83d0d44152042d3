"""The files for containers, Kubernetes and Slurm, as far as can be seen without those."""

import contextlib
import copy
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml

from jobs.cluster import local_cluster
from jobs.submit import EXCLUDES
from pipeline.tracking import read_lines

ROOT = Path(__file__).resolve().parents[1]
KUBERAY = ROOT / "deploy/kuberay"
SLURM = ROOT / "deploy/slurm/train.sh"
LOCK = (ROOT / "requirements.lock").read_text()


def locked(name: str) -> str:
    found = re.search(rf"^{name}(?:\[.*\])?==(\S+)", LOCK, flags=re.M)
    assert found
    return found[1]


# --- Dockerfile ---------------------------------------------------------------------------------


def stages(text: str) -> dict[str, list[tuple[str, str]]]:
    """Instructions of each stage by its name ("" for the last), continuation lines joined."""
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.M))
    found: dict[str, list[tuple[str, str]]] = {}
    for line in filter(None, map(str.strip, joined.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            name = rest.split(" AS ")[1] if " AS " in rest else ""
            found[name] = []
        found[name].append((instruction, rest.strip()))
    return found


@pytest.fixture(scope="module")
def image() -> dict[str, list[tuple[str, str]]]:
    return stages((ROOT / "Dockerfile").read_text())


KNOWN = {"FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER", "VOLUME", "CMD"}


def test_dockerfile_has_known_instructions_and_stages(image):
    assert list(image) == ["base", "environment", ""]
    assert {instruction for stage in image.values() for instruction, _ in stage} <= KNOWN
    for name, stage in image.items():
        base = stage[0][1].split()[0]
        assert (name == "base") != (base in image), f"stage {name!r} from {base!r}"
        for instruction, rest in stage:
            if source := re.match(r"--from=(\S+)", rest):
                assert instruction == "COPY"
                assert source[1] in image


def test_dockerfile_python_is_the_locks(image):
    """The lock is resolved for this Python (`make lock`)."""
    base = re.match(r"python:(\d+\.\d+)-", image["base"][0][1])
    resolved = re.search(r"--python-version (\S+)", (ROOT / "Makefile").read_text())
    assert base
    assert resolved
    assert base[1] == resolved[1]


def copied(stage: list[tuple[str, str]]) -> list[tuple[list[str], str]]:
    """(sources, destination) of what comes from the checkout."""
    plain = [rest.split() for what, rest in stage if what == "COPY" and "--from" not in rest]
    return [(words[:-1], words[-1]) for words in plain]


def test_dockerfile_copies_what_is_tracked_and_not_ignored(image):
    kept = re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), flags=re.M)
    sources = {s for stage in image.values() for found, _ in copied(stage) for s in found}
    assert sources == set(kept)
    for source in sources:
        assert (ROOT / source).exists(), source


def test_the_final_stage_has_every_package_and_what_a_job_ships(image):
    """`jobs submit` ships the checkout from inside the image, too."""
    destinations = {destination for _, destination in copied(image[""])}
    assert {"cuda_ops", "data_prep", "model", "pipeline", "jobs"} <= destinations
    assert ("COPY", "--from=environment /opt/deformable-detr/.build .build") in image[""]
    assert "/.venv" in EXCLUDES


def test_dockerfile_does_not_run_as_root_and_has_ray_on_its_path(image):
    final = dict(image[""])
    assert final["USER"] == "detr"
    assert "/opt/deformable-detr/.venv/bin:$PATH" in final["ENV"]
    assert json.loads(final["VOLUME"]) == ["/data", "/runs"]
    users = [at for at, (what, _) in enumerate(image[""]) if what == "USER"]
    assert all(what != "RUN" for what, _ in image[""][users[0] :])
    assert json.loads(final["CMD"])[:2] == ["python", "-m"]


def test_the_make_targets_of_the_dockerfile_need_no_more_than_it_copies(image, tmp_path):
    """By `make --dry-run` in a folder that has just what was copied until then."""
    ran = 0
    for instruction, rest in image["environment"]:
        if instruction == "COPY":
            *sources, destination = rest.split()
            for source in sources:
                (tmp_path / destination).mkdir(exist_ok=True)
                subprocess.run(["cp", "-r", ROOT / source, tmp_path / destination], check=True)
        elif instruction == "RUN" and rest.startswith("make "):
            command = ["make", "--dry-run", *rest.split()[1:]]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "uv pip install" in done.stdout or "cuda_ops build" in done.stdout
            ran += 1
    assert ran == 2


# --- KubeRay ------------------------------------------------------------------------------------


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(KUBERAY.glob("*.yaml")):
        for content in yaml.safe_load_all(file.read_text()):
            yield f"{file.name}: {content['kind']}", content


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """KubeRay's own, reduced: fields that it does not know are errors, as the API server's strict
    validation has it."""
    kinds = json.loads((ROOT / "tests/kuberay_schema.json").read_text())["kinds"]
    for schema in kinds.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    return kinds


OF_RAY = [(name, content) for name, content in manifests() if content["kind"].startswith("Ray")]


@pytest.mark.parametrize("content", [c for _, c in OF_RAY], ids=[name for name, _ in OF_RAY])
def test_manifests_fit_kuberays_schema(content, schemas):
    assert content["apiVersion"] == "ray.io/v1"
    jsonschema.validate(content, schemas[content["kind"]])


def without_group_name(content: dict[str, Any]) -> None:
    del cluster(content)["workerGroupSpecs"][0]["groupName"]


def replicas_as_text(content: dict[str, Any]) -> None:
    cluster(content)["workerGroupSpecs"][0]["replicas"] = "two"


def misspelled(content: dict[str, Any]) -> None:
    cluster(content)["headGroupSpec"]["rayStartParam"] = {}


def unknown_mode(content: dict[str, Any]) -> None:
    cluster(content)["authOptions"]["mode"] = "password"


@pytest.mark.parametrize("spoil", [without_group_name, replicas_as_text, misspelled, unknown_mode])
@pytest.mark.parametrize("content", [c for _, c in OF_RAY], ids=[name for name, _ in OF_RAY])
def test_a_spoilt_manifest_does_not(content, spoil, schemas):
    spoilt = copy.deepcopy(content)
    spoil(spoilt)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spoilt, schemas[content["kind"]])


def cluster(content: dict[str, Any]) -> dict[str, Any]:
    spec = content["spec"]
    return spec.get("rayClusterSpec", spec)


def groups(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster(content)["headGroupSpec"], *cluster(content)["workerGroupSpecs"]]


@pytest.mark.parametrize("content", [c for _, c in OF_RAY], ids=[name for name, _ in OF_RAY])
def test_clusters_are_of_the_locked_ray_and_closed(content):
    assert cluster(content)["rayVersion"] == locked("ray")
    assert cluster(content)["authOptions"] == {"mode": "token"}
    head = cluster(content)["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert head["enableIngress"] is False
    assert head["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("content", [c for _, c in OF_RAY], ids=[name for name, _ in OF_RAY])
def test_pods_are_the_images_user_with_gpus_time_to_save_and_storage(content, image):
    uid = re.search(r"useradd .*--uid (\d+)", dict(image[""])["RUN"])
    assert uid
    storage = {c["metadata"]["name"] for _, c in manifests() if "Claim" in c["kind"]}
    for group in groups(content):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"].startswith("registry.example.com/deformable-detr:")
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == int(uid[1])
        claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if len(v) and
                  "persistentVolumeClaim" in v]  # fmt: skip
        assert set(claims) == storage
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["requests"]["memory"]
    for group in cluster(content)["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert int(container["resources"]["limits"]["nvidia.com/gpu"]) >= 1
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        drain = int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert pod["terminationGracePeriodSeconds"] > drain


def test_the_policy_names_the_pods():
    (policy,) = [content for _, content in manifests() if content["kind"] == "NetworkPolicy"]
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    for _, content in OF_RAY:
        for group in groups(content):
            assert chosen.items() <= group["template"]["metadata"]["labels"].items()


def test_the_jobs_workers_fit_its_nodes():
    (job,) = [content for _, content in OF_RAY if content["kind"] == "RayJob"]
    words = job["spec"]["entrypoint"].split()
    workers, cpus = (int(words[words.index(x) + 1]) for x in ("--workers", "--cpus-per-worker"))
    nodes = cluster(job)["workerGroupSpecs"][0]
    limits = nodes["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert workers == nodes["replicas"] * int(limits["nvidia.com/gpu"])
    assert workers * cpus <= nodes["replicas"] * int(limits["cpu"])


# --- Slurm --------------------------------------------------------------------------------------


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A folder with stand-ins for Slurm's commands, which write what they are told to `calls`."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    program(
        binaries / "scontrol",
        f'echo "scontrol $*" >>{tmp_path}/calls\n'
        'if [ "$1" = show ]; then seq --format node%g "$NODES"; fi',
    )
    program(
        binaries / "srun",
        f'echo "srun $*" >>{tmp_path}/calls\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"',
    )
    return tmp_path


def environment(node: Path, nodes: int, job: int) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{node}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "node[1-]",
        "NODES": str(nodes),  # for the stand-in of scontrol
        "SLURM_CPUS_PER_TASK": "2",
        "HEAD_ADDRESS": "127.0.0.1",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",  # nothing is left to save
        "RAY_memory_monitor_refresh_ms": "0",  # it would end the job for others' use of the memory
    }


def until(condition: Callable[[], object], process: subprocess.Popen, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the script has ended; what it printed is in `log`"
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def test_the_script_is_bash_and_asks_slurm_for_a_signal_and_its_requeueing():
    subprocess.run(["bash", "-n", SLURM], check=True)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SLURM.read_text(), flags=re.M))
    assert options["signal"].startswith("B:TERM@")
    assert int(options["signal"].split("@")[1]) >= 120
    assert "requeue" in options
    assert options["open-mode"] == "append"
    assert options["ntasks-per-node"] == "1"
    assert os.access(SLURM, os.X_OK)


@pytest.fixture
def pretended(node: Path) -> Path:
    """`ray` and `python` pretended, too: a job whose log goes on until the job is stopped, or
    until there is a file `end` with its exit status."""
    binaries = node / ".venv/bin"
    binaries.mkdir(parents=True)
    program(binaries / "ray", f'echo "ray $*" >>{node}/calls\nexec sleep 600')
    program(
        binaries / "python",
        f'echo "python $*" >>{node}/calls\n'
        'case "$1 $2 $3" in\n'
        '  "-c "*) echo secret;;\n'
        '  "-m jobs submit") echo "submitted r50-0 to http://there";;\n'
        f'  "-m jobs stop") echo 2 >{node}/end;;\n'
        f'  "-m jobs logs") until [ -s {node}/end ]; do sleep 0.05; done; exit $(<{node}/end);;\n'
        "esac",
    )
    return node


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """`start(node, nodes, …)`: the script, which with all it started is ended after the test. As a
    job that is queued again it has the same id each time."""
    started: list[subprocess.Popen] = []
    job = secrets.randbelow(10**7)

    def run(node: Path, nodes: int, *arguments: str) -> subprocess.Popen:
        given = arguments or ("deformable_detr_r50", "--output", "/shared/runs/r50")
        script = subprocess.Popen(
            ["bash", SLURM, *given], cwd=node, env=environment(node, nodes, job),
            stdout=(node / "log").open("a"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        started.append(script)
        return script

    yield run
    for script in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGTERM)
        script.wait(300)


def command_lines() -> list[list[str]]:
    """Of all processes."""
    return [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]


def calls(node: Path, *beginning: str) -> list[str]:
    file = node / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line for line in lines if line.startswith(" ".join(beginning))]


@pytest.mark.parametrize("status", [0, 2])
def test_a_training_that_ends_ends_the_script(pretended, status, start):
    script = start(pretended, 2)
    until(lambda: len(calls(pretended, "ray")) == 2, script, 120)
    (pretended / "end").write_text(str(status))
    assert script.wait(120) == status, (pretended / "log").read_text()
    assert not calls(pretended, "scontrol requeue")
    others, head = sorted(calls(pretended, "srun"), key=lambda line: "--head" in line)
    assert "--nodelist=node1 ray start --head --block" in head
    assert "--dashboard-host 127.0.0.1" in head
    assert "--exclude=node1 ray start --block" in others
    assert "--nodes=1 " in others
    port = re.search(r"--port (\d+)", head)
    assert port
    assert f"--address 127.0.0.1:{port[1]}" in others
    (submitted,) = calls(pretended, "python -m jobs submit")
    assert "deformable_detr_r50 --output /shared/runs/r50 --address http://127.0.0.1:" in submitted
    assert submitted.endswith("--no-wait")


def test_a_head_that_does_not_start_is_told(pretended, start):
    program(pretended / ".venv/bin/ray", "echo no room >&2; exit 3")
    program(pretended / ".venv/bin/python", 'if [ "$1" = -c ]; then echo secret; else exit 2; fi')
    assert start(pretended, 2).wait(120) == 1
    said = (pretended / "log").read_text()
    assert "no room" in said
    assert "error: Ray's head has ended" in said


def test_a_job_of_one_node_starts_no_others(pretended, start):
    script = start(pretended, 1)
    until(lambda: calls(pretended, "python -m jobs logs"), script, 120)
    (pretended / "end").write_text("0")
    assert script.wait(120) == 0
    assert len(calls(pretended, "srun")) == 1


def test_slurms_signal_has_the_training_save_and_queues_the_job_again(pretended, start):
    script = start(pretended, 2)
    until(lambda: calls(pretended, "python -m jobs logs"), script, 120)
    script.send_signal(signal.SIGTERM)
    assert script.wait(120) == 0, (pretended / "log").read_text()
    (stopped,) = calls(pretended, "python -m jobs stop")
    assert "--job r50-0 --address http://127.0.0.1:" in stopped
    assert len(calls(pretended, "scontrol requeue")) == 1
    assert calls(pretended)[-1].startswith("scontrol requeue")


@pytest.mark.chaos
@pytest.mark.timeout(2400)
def test_a_job_is_signalled_queued_again_and_finishes(node, drawn, start):
    """With Ray and a training, on this machine in place of the first node."""
    for package in ("cuda_ops", "jobs", "model", "pipeline", ".build"):
        (node / package).symlink_to(ROOT / package)
    options = (
        "demo", "--output", str(node / "runs/r"), "--data.train", str(drawn.shards / "train"),
        "--data.val", str(drawn.shards / "val"), "--schedule.epochs", "16", "--engine.device",
        "cpu", "--engine.loader-workers", "0", "--no-register",
    )  # fmt: skip
    evaluations = node / "runs/r/evaluations"
    script = start(node, 1, *options)
    until(lambda: evaluations.is_dir() and any(evaluations.iterdir()), script, 900)
    script.send_signal(signal.SIGTERM)
    assert script.wait(600) == 0, (node / "log").read_text()
    assert calls(node, "scontrol requeue")
    steps = [int(x.name.split("-")[1]) for x in (node / "runs/r/checkpoints").glob("step-*")]
    assert 0 < max(steps) < 40
    number = calls(node, "scontrol requeue")[0].split()[-1]
    deadline = time.monotonic() + 300  # as Slurm, which ends what is left before it starts again
    while any(f"/tmp/ray-{number}" in " ".join(command) for command in command_lines()):
        assert time.monotonic() < deadline
        time.sleep(1)
    script = start(node, 1, *options)
    assert script.wait(900) == 0, (node / "log").read_text()
    assert (node / "runs/r/checkpoints/step-00000040").is_dir()
    begun = [x["step"] for x in read_lines(node / "runs/r/metrics.jsonl") if "step" in x]
    assert begun == sorted(begun)  # none again: it went on where it had saved


def ask(url: str, content: dict[str, str] | None = None) -> dict[str, Any]:
    """The answer of Ray's Jobs API."""
    request = urllib.request.Request(
        url,
        None if content is None else json.dumps(content).encode(),
        {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def status(address: str, job: str) -> str:
    return ask(f"{address}/api/jobs/{job}")["status"]


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_the_entrypoint_of_the_ray_job_trains_from_inside_its_cluster(drawn, tmp_path):
    """As KubeRay submits it, on a local Ray, with another recipe, data and folders."""
    (job,) = [content for _, content in OF_RAY if content["kind"] == "RayJob"]
    words = job["spec"]["entrypoint"].split()
    at = words.index("--init.backbone")
    del words[at : at + 2]
    small = ("--schedule.epochs", "1", "--engine.device", "cpu", "--no-register")
    with local_cluster() as (address, _):
        here = {
            "/opt/deformable-detr": str(ROOT), "deformable_detr_r50": "demo", "4": "2", "8": "1",
            "http://127.0.0.1:8265": address, "/shared/runs/r50": str(tmp_path / "runs/r50"),
            "/shared/shards/train": str(drawn.shards / "train"),
            "/shared/shards/val": str(drawn.shards / "val"),
        }  # fmt: skip
        entrypoint = " ".join([*(here.get(word, word) for word in words), *small])
        # As the operator in HTTPMode. Not by Ray's client, which keeps the token that its process
        # used first.
        job = ask(f"{address}/api/jobs/", {"entrypoint": entrypoint})["submission_id"]
        while status(address, job) in ("PENDING", "RUNNING"):
            time.sleep(1)
        assert status(address, job) == "SUCCEEDED", ask(f"{address}/api/jobs/{job}/logs")["logs"]
    assert (tmp_path / "runs/r50/best.json").is_file()
