"""What a replica does to images, and with a model that fails, without a cluster."""

import asyncio
import io
import logging
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jobs.serve_deployment import FAILURES, DetectorReplica, Settings, as_json, check_image
from pipeline.data.labels import Labels
from pipeline.predict import Detections, Detector
from tests.pipeline.made_up_detector import save_checkpoint


def encoded(kind: str, size=(40, 30), mode="RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def claims(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that says it is of this size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = (
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, data)
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_of_the_network_are_taken(kind):
    check_image(encoded(kind), 1, 0)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not an image"),
        (b"hello", "not an image: expected JPEG, PNG, WebP, GIF, BMP or TIFF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # would run gs
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (encoded("PPM"), "not an image"),  # of a format that a disk may have
        (encoded("PNG", (2001, 1000)), "got 2001 x 1000 pixels, expected at most 2 million"),
        (claims(10_000, 8_000), "got 10000 x 8000 pixels, expected at most 2 million"),
        (claims(60_000, 40_000), "too many pixels, expected at most 2 million"),
        (encoded("PNG")[:20], "damaged"),
    ],
)
def test_others_are_refused_by_their_header(data, said):
    with pytest.raises(ValueError, match=r"\w") as caught:
        check_image(data, 2, 0)
    assert said in str(caught.value)


def test_a_longest_side_holds_for_models_that_do_not_resize():
    check_image(encoded("PNG", (1333, 2)), 50, 1333)
    with pytest.raises(ValueError, match="got 1334 x 2 pixels, expected sides of at most 1333"):
        check_image(encoded("PNG", (1334, 2)), 50, 1333)


FOUND = Detections(
    ("a", "b", "a"), (3, 7, 3), np.array([0.9, 0.5, 0.1]),
    np.array([[0, 0, 4, 4], [1, 2, 3, 4], [0.125, 0, 9, 8]]), 9, 8,
)  # fmt: skip


def test_answers_have_the_best_that_score_enough():
    answer = as_json(FOUND, 0.5, 100)
    assert [one["score"] for one in answer["detections"]] == [0.9, 0.5]
    assert answer["detections"][1] == {
        "label": "b", "category_id": 7, "score": 0.5, "box": [1, 2, 3, 4],
    }  # fmt: skip
    assert (answer["width"], answer["height"]) == (9, 8)
    assert len(as_json(FOUND, 0, 1)["detections"]) == 1


def image(height: int, width: int, bad: bool = False) -> SimpleNamespace:
    """What a replica looks at of a prepared image."""
    pixels = np.zeros((3, height, width), dtype=np.uint8)
    return SimpleNamespace(example=SimpleNamespace(image=pixels), bad=bad)


class Watched:
    """A detector that keeps the sizes of its batches, and fails for some images."""

    def __init__(self):
        self.batches = []

    def detect(self, images):
        self.batches.append([one.example.image.shape[1:] for one in images])
        if any(one.bad for one in images):
            raise RuntimeError("CUDA out of memory")
        return images


@pytest.fixture
def replica():
    one = DetectorReplica.__new__(DetectorReplica)  # without a checkpoint
    one.detector, one.failures = Watched(), 0
    return one


def test_images_of_one_size_are_looked_at_together_and_no_others(replica):
    images = [image(4, 6), image(6, 4), image(4, 6), image(2, 2), image(6, 4), image(4, 6)]
    found = replica._look(images)
    assert [one for one, _ in found] == images  # each its own
    assert [count for _, count in found] == [3, 2, 0, 1, 0, 0]
    assert replica.detector.batches == [[(4, 6)] * 3, [(6, 4)] * 2, [(2, 2)]]


def test_only_the_image_at_fault_fails(replica, caplog):
    images = [image(4, 6), image(4, 6, bad=True), image(4, 6)]
    with caplog.at_level(logging.ERROR, "ray.serve"):
        good, bad, other = (one for one, _ in replica._look(images))
    assert (good, other) == (images[0], images[2])
    assert isinstance(bad, RuntimeError)
    replica.check_health()


def test_an_answer_tells_of_damage_that_can_be_read_past(replica, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "model.pt", Labels((1, 2), ("cat", "dog")))
    replica.settings = Settings(str(tmp_path / "model.pt"), "cpu", "fp32", 1, 0.0, 50, 0)
    replica.detector = Detector.load(replica.settings.checkpoint, "cpu", "fp32")
    replica.decoders = ThreadPoolExecutor(1)

    async def alone(image):  # batches are Ray Serve's
        return replica._look([image])[0]

    monkeypatch.setattr(DetectorReplica, "_together", staticmethod(alone))
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    whole = file.getvalue()
    third = len(whole) // 3
    damaged = whole[:third] + bytes(third) + whole[2 * third :]

    async def both():
        return [await replica(data, 0.0, 5) for data in (whole, damaged)]

    good, bad = asyncio.run(both())
    assert "damage" not in good
    assert bad["damage"].startswith("Corrupt JPEG data: ")
    assert len(good["detections"]) == len(bad["detections"]) == 5


def test_a_model_that_fails_again_and_again_is_replaced(replica):
    good, bad = [image(2, 2)], [image(2, 2, bad=True)]
    for _ in range(FAILURES - 1):
        replica._look(bad)
    replica.check_health()
    replica._look(good)  # and one that recovers is kept
    for _ in range(FAILURES):
        replica.check_health()
        replica._look(bad)
    with pytest.raises(RuntimeError, match="failed 3 times in a row"):
        replica.check_health()
