"""The whole service, once: the command, Ray Serve, a model of random weights, and its end."""

import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from model.detr import build_model
from pipeline.predict import Detector
from pipeline.recipes import recipe
from tests.conftest import ROOT

PATIENCE = 540.0  # seconds for a local Ray and a replica to start on a busy machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def write_checkpoint(file: Path) -> Path:
    """A model of random weights, in which the queries of an image differ in score."""
    torch.manual_seed(0)
    config = recipe("demo")
    model = build_model(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class" in name and parameter.dim() > 1:
                parameter.normal_(std=0.5)
    names = ["circle", "square", "triangle", "star"]
    content = {
        "model": model.state_dict(),
        "config": config.to_json(),
        "labels": {"category_of": (1, 2, 4, 7), "names": tuple(names)},
        "progress": {"step": 3, "epoch": 1},
    }
    torch.save(content, file)
    return file


class Command:
    """The command under way; `said` grows by the lines that it prints."""

    def __init__(self, checkpoint: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs", "serve", str(checkpoint), "--port", "0",
             "--device", "cpu", "--precision", "fp32", "--max-batch", "4", "--max-wait-ms", "200"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.said: list[str] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.said.append(line)

    def port(self) -> int:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            for line in self.said:
                if line.startswith("ready: http://127.0.0.1:"):
                    return int(line.strip().rstrip("/").rsplit(":", 1)[1])
            time.sleep(0.1)
        raise AssertionError("".join(self.said))


class Client:
    def __init__(self, port: int, command: Command):
        self.port = port
        self.command = command

    def ask(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def detect(self, image, query=""):
        headers = {"Content-Type": "image/png"}
        status, body = self.ask("POST", f"/detect{query}", image, headers)
        return status, json.loads(body)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("served") / "model.pt")


@pytest.fixture(scope="module")
def client(checkpoint):
    command = Command(checkpoint)
    try:
        yield Client(command.port(), command)
    finally:
        command.process.terminate()
        try:
            command.process.wait(120)
        except subprocess.TimeoutExpired:
            command.process.kill()
        command.reader.join(60)


def png(seed: int, width=96, height=64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_answers_are_those_of_the_detector(client, checkpoint):
    detector = Detector.load(checkpoint, "cpu", "fp32")
    for seed, size in enumerate([(96, 64), (64, 96), (33, 120)]):
        image = png(seed, *size)
        [expected] = detector.predict([image], most=20)
        status, answer = client.detect(image, "?threshold=0&most=20")
        assert status == 200
        [found] = answer["images"]
        assert (found["width"], found["height"]) == size
        assert len(found["detections"]) == len(expected) > 5
        for i, one in enumerate(found["detections"]):
            assert one["label"] == expected.labels[i]
            assert one["category_id"] == expected.category_ids[i]
            assert one["score"] == pytest.approx(expected.scores[i], abs=2e-6)
            assert one["box"] == pytest.approx(expected.boxes[i].tolist(), abs=0.01)


def test_the_threshold_and_the_most_of_one_request_are_its_own(client):
    image = png(7)
    everything = client.detect(image, "?threshold=0")[1]["images"][0]["detections"]
    middle = everything[len(everything) // 2]["score"]
    some = client.detect(image, f"?threshold={middle}")[1]["images"][0]["detections"]
    assert 0 < len(some) < len(everything)
    assert all(one["score"] >= middle - 1e-6 for one in some)
    two = client.detect(image, "?threshold=0&most=2")[1]["images"][0]["detections"]
    assert len(two) == 2


def test_images_that_come_together_share_a_batch_and_bad_ones_harm_nobody(client):
    alone = [client.detect(png(seed), "?threshold=0&most=5")[1]["images"][0] for seed in range(6)]
    bad = [b"nonsense", png(1)[:200], b"GIF89a", png(2, 1400, 4)]
    answers = {}

    def send(name, image):
        answers[name] = client.detect(image, "?threshold=0&most=5")

    threads = [threading.Thread(target=send, args=(seed, png(seed))) for seed in range(6)]
    # Of another size: they change nothing for those above.
    threads += [threading.Thread(target=send, args=(f"tall{n}", png(n, 40, 130))) for n in range(3)]
    threads += [threading.Thread(target=send, args=(f"bad{i}", b)) for i, b in enumerate(bad)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    for seed in range(6):
        status, answer = answers[seed]
        assert status == 200
        for one, other in zip(
            answer["images"][0]["detections"], alone[seed]["detections"], strict=True
        ):
            assert one["score"] == pytest.approx(other["score"], abs=1e-4)
    assert [answers[f"tall{n}"][0] for n in range(3)] == [200] * 3
    for i, said in enumerate(["not an image", "", "not an image", "sides of at most 1333"]):
        status, answer = answers[f"bad{i}"]
        assert status == 400
        assert said in answer["error"]
        assert "\n" not in answer["error"]
        assert str(ROOT) not in answer["error"]
    _, metrics = client.ask("GET", "/metrics")
    batches = {
        line.split()[0]: float(line.split()[1])
        for line in metrics.decode().splitlines()
        if line.startswith("detector_batch_images_")
    }
    shared = batches["detector_batch_images_sum"] - batches["detector_batch_images_count"]
    assert shared > 0  # some batch was of more images than one


def test_model_tells_what_it_is(client, checkpoint):
    status, body = client.ask("GET", "/model")
    model = json.loads(body)
    assert status == 200
    assert [c["category_id"] for c in model["classes"]] == [1, 2, 4, 7]
    assert model["trained"] == {"steps": 3, "epochs": 1}
    assert len(model["weights_sha256"]) == 64
    assert str(checkpoint.parent) not in body.decode()


@pytest.mark.chaos
def test_a_replica_that_dies_is_replaced(client):
    replica = next(
        p for p in psutil.Process(client.command.process.pid).children(recursive=True)
        if "ServeReplica" in " ".join(p.cmdline())
    )  # fmt: skip
    replica.kill()
    deadline = time.monotonic() + PATIENCE
    statuses = set()
    while True:
        assert time.monotonic() < deadline, statuses
        status, _ = client.detect(png(0))
        statuses.add(status)
        if status == 200 and not replica.is_running():
            break
        time.sleep(0.2)
    assert statuses <= {200, 503, 504}
    while client.ask("GET", "/health")[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def in_hand(client) -> float:
    """Images that it has received and not answered."""
    lines = client.ask("GET", "/metrics")[1].decode().splitlines()
    return next(float(x.split()[1]) for x in lines if x.startswith("detector_queue_images "))


def test_sigterm_answers_what_is_in_hand_and_leaves_nothing(client):
    command = client.command
    family = psutil.Process(command.process.pid).children(recursive=True)
    assert len(family) > 4
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.detect(png(1))[0])) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    while len(answers) + in_hand(client) < 3:  # one may be answered before the last has come
        assert time.monotonic() < deadline
    command.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(300)
    assert answers == [200] * 3
    assert command.process.wait(300) == 0
    command.reader.join(60)
    assert command.said[-1] == "stopping\n"
    assert "Traceback" not in "".join(command.said)
    _, alive = psutil.wait_procs(family, timeout=240)
    assert not alive
