"""The detector's three lines: whatever an image comes as, what the model finds in it, in pixels of
the image as it is seen."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.postprocess import postprocess
from pipeline.data.augment import resized_hw
from pipeline.data.batch import MEAN, STD
from pipeline.data.labels import Labels
from pipeline.errors import UserError
from pipeline.predict import Detector
from pipeline.predict_images import prepare
from tests.pipeline.made_up_detector import save_checkpoint

LABELS = Labels((-1, 5, 9, 2), ("", "cat", "dog", "Straße"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    save_checkpoint(path, LABELS)
    return path


@pytest.fixture(scope="module")
def detector(checkpoint) -> Detector:
    return Detector.load(str(checkpoint), device="cpu")


def photograph(seed: int, height: int = 90, width: int = 120) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def assert_same(got, expected) -> None:
    assert got.labels == expected.labels
    assert got.category_ids == expected.category_ids
    np.testing.assert_array_equal(got.scores, expected.scores)
    np.testing.assert_array_equal(got.boxes, expected.boxes)
    assert (got.width, got.height) == (expected.width, expected.height)


def assert_close(got, expected) -> None:
    """Of the best alone: nearly equal scores may come in another order."""
    assert got.labels[:10] == expected.labels[:10]
    np.testing.assert_allclose(got.scores[:10], expected.scores[:10], atol=1e-5)
    np.testing.assert_allclose(got.boxes[:10], expected.boxes[:10], atol=1e-2)
    assert (got.width, got.height) == (expected.width, expected.height)


def test_it_finds_what_the_model_does(detector, tmp_path):
    """The model run by hand on pixels resized by Pillow, whose rounding is another."""
    Image.fromarray(photograph(1)).save(tmp_path / "a.png")
    (found,) = detector.predict([tmp_path / "a.png"])
    augment = detector.config.augment
    height, width = resized_hw(90, 120, augment.val_short_side, augment.max_side)
    small = Image.fromarray(photograph(1)).resize((width, height), Image.Resampling.BILINEAR)
    pixels = (np.asarray(small) / 255.0 - MEAN) / STD
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        outputs = detector.model(image, torch.zeros(1, height, width, dtype=torch.bool))
    result = postprocess(outputs, torch.tensor([[90, 120]]))[0]
    kept = result["labels"] > 0  # column 0 has no category
    assert 0 < kept.sum() < 100
    assert len(found) == kept.sum()
    assert (np.diff(found.scores) <= 0).all()
    boxes = result["boxes"][kept].clamp(min=0).minimum(torch.tensor([120, 90, 120, 90]))
    best = [
        np.abs(boxes[result["labels"][kept] == LABELS.names.index(label)].numpy() - box)
        .max(axis=1).min()
        for label, box in zip(found.labels, found.boxes, strict=True)
    ]  # fmt: skip
    assert max(best[:20]) < 1
    np.testing.assert_allclose(found.scores[:20], result["scores"][kept][:20], atol=0.02)
    assert found.scores.dtype == found.boxes.dtype == np.float64
    assert (found.width, found.height) == (120, 90)
    columns = {"cat": 5, "dog": 9, "Straße": 2}
    assert [columns[name] for name in found.labels] == list(found.category_ids)


def test_boxes_lie_within_the_image(detector):
    for found in detector.predict([photograph(1), photograph(2, 40, 300)]):
        (x0, y0, x1, y1), limits = found.boxes.T, (found.width, found.height)
        assert ((x0 >= 0) & (y0 >= 0) & (x1 <= limits[0]) & (y1 <= limits[1])).all()
        assert ((x0 <= x1) & (y0 <= y1)).all()
        assert (x1 == limits[0]).any() or (x0 == 0).any()  # some were cut


def test_an_image_comes_as_anything(detector, tmp_path):
    pixels = photograph(4)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(pixels))
    given = [
        str(path), path, path.read_bytes(), bytearray(path.read_bytes()), Image.open(path), pixels,
        np.asfortranarray(pixels), pixels[::-1][::-1],
    ]  # fmt: skip
    first, *others = detector.predict(given, batch_size=1)
    assert len(first) > 20
    for other in others:
        assert_same(other, first)


def test_grey_is_the_same_in_one_channel_and_in_three(detector):
    grey = photograph(5)[..., 0].copy()
    three = grey[..., None].repeat(3, axis=2)
    wide = grey.astype(np.uint16) * 257
    one, *others = detector.predict(
        [three, grey, Image.fromarray(grey), Image.fromarray(wide), encoded(wide, "TIFF")],
        batch_size=1,
    )
    for other in others:
        assert_same(other, one)


STORED = {  # how a picture lies in a file, that is shown upright
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
    5: lambda a: a.swapaxes(0, 1), 6: np.rot90, 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}  # fmt: skip


def test_the_same_picture_in_eight_orientations_has_the_same_boxes(detector):
    pixels = photograph(6)
    files = []
    for orientation, turn in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = np.ascontiguousarray(turn(pixels))
        files.append(encoded(stored, exif=exif))
    first, *others = detector.predict(files, batch_size=1)
    assert (first.width, first.height) == (120, 90)
    assert len(first) > 20
    for other in others:
        assert_same(other, first)
    opened = [Image.open(io.BytesIO(file)) for file in files]
    for other in detector.predict(opened, batch_size=1):
        assert_same(other, first)
    turned = next(detector.predict([np.ascontiguousarray(STORED[6](pixels))]))
    assert (turned.width, turned.height) == (90, 120)  # an array says nothing of how it is shown


def test_images_are_taken_as_they_are_needed(detector):
    taken = []

    def images():
        for seed in range(7):
            taken.append(seed)
            yield photograph(seed)

    found = detector.predict(images(), batch_size=3)
    assert not taken
    first = next(found)
    assert taken == [0, 1, 2]
    everything = [first, *found]
    assert taken == list(range(7))
    for seed, objects in enumerate(everything):
        assert_close(objects, next(detector.predict([photograph(seed)])))


def test_threshold_and_most(detector):
    (whole,) = detector.predict([photograph(1)])
    few = next(detector.predict([photograph(1)], most=10))
    assert 0 < len(few) <= 10
    np.testing.assert_array_equal(few.scores, whole.scores[: len(few)])
    middle = float(whole.scores[len(whole) // 2])
    above = next(detector.predict([photograph(1)], threshold=middle))
    np.testing.assert_array_equal(above.scores, whole.scores[whole.scores >= middle])
    assert above.labels == whole.labels[: len(above)]
    (none,) = detector.predict([photograph(1)], threshold=1.0)
    assert (len(none), none.boxes.shape, none.labels) == (0, (0, 4), ())
    assert list(detector.predict([])) == []


def test_from_many_threads_at_once(detector):
    images = [encoded(photograph(seed, 60 + 7 * seed, 100)) for seed in range(12)]
    expected = list(detector.predict(images, batch_size=1))
    with ThreadPoolExecutor(4) as pool:
        got = pool.map(lambda image: detector.detect([detector.prepare(image)])[0], images)
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other)


def test_a_large_jpeg_is_resized_to_what_evaluation_takes(detector):
    data = encoded(photograph(7, 900, 1200), "JPEG", quality=92)
    prepared = prepare(data, detector.config.augment)
    whole = prepare(np.asarray(Image.open(io.BytesIO(data))), detector.config.augment)
    assert (prepared.width, prepared.height) == (whole.width, whole.height) == (1200, 900)
    assert prepared.example.image.shape == whole.example.image.shape
    difference = prepared.example.image.float() - whole.example.image.float()
    assert difference.abs().mean() < 2


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (b"", "image 1: got a file that is empty"),
        (b"no image at all", "image 1: got a file that starts with b'no image at"),
        (encoded(photograph(1), "JPEG")[:1500], "image 1: "),
        (3, "image 1: got int, expected a path"),
        (np.zeros((4, 4, 3), np.float32), r"image 1: got an array of float32 \[4, 4, 3\]"),
        (np.zeros((4, 4, 4), np.uint8), "expected uint8"),
        (np.zeros((0, 4, 3), np.uint8), "expected uint8"),
    ],
)
def test_what_is_no_image_is_named(detector, image, said):
    found = detector.predict([photograph(1), image], batch_size=1)
    assert len(next(found)) > 0
    with pytest.raises(ValueError, match=said):
        next(found)


@pytest.mark.parametrize("one", ["a.jpg", b"GIF89a", np.zeros((4, 4, 3), np.uint8), photograph(1)])
def test_one_image_alone_is_not_taken_for_several(detector, one):
    with pytest.raises(ValueError, match="put it in a list"):
        next(detector.predict(one))


def test_a_file_is_named(detector, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"image 0 .*a\.jpg"):
        next(detector.predict([tmp_path / "a.jpg"]))
    with pytest.raises(FileNotFoundError):
        next(detector.predict(["none.jpg"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_labels_of_another_number_than_the_models_are_refused(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["labels"] = {"category_of": [5, 9], "names": ["cat", "dog"]}
    torch.save(content, tmp_path / "model.pt")
    said = r"labels of 2 classes and model.num_classes 4, expected the same"
    with pytest.raises(UserError, match=said) as told:
        Detector.load(tmp_path / "model.pt")
    assert "\n" not in str(told.value)


def test_a_gpu_that_is_not_there_names_the_commands_option(checkpoint, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"^--device: got cuda, .* use --device cpu"):
        Detector.load(checkpoint, device="cuda")


def test_precision(tmp_path):
    save_checkpoint(tmp_path / "model.pt", LABELS, precision="fp16")
    assert Detector.load(tmp_path / "model.pt").config.engine.precision == "fp32"
    full = Detector.load(tmp_path / "model.pt", precision="fp32")
    half = Detector.load(tmp_path / "model.pt", precision="bf16")
    a, b = (next(one.predict([photograph(1)])) for one in (full, half))
    assert not np.array_equal(a.scores[:20], b.scores[:20])
    np.testing.assert_allclose(a.scores[:20], b.scores[:20], atol=0.1)
    for options, said in (
        ({"precision": "fp16"}, "needs a GPU"),
        ({"precision": "half"}, "'half', expected fp32, bf16 or fp16"),
        ({"device": "gpu"}, "'gpu', expected auto, cpu or cuda"),
        ({"device": "cuda"}, "no usable CUDA device"),
    ):
        with pytest.raises(UserError, match=said):
            Detector.load(tmp_path / "model.pt", **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_as_on_a_cpu(checkpoint, detector):
    other = Detector.load(checkpoint, device="cuda")
    images = [photograph(seed) for seed in range(5)]
    for one, two in zip(detector.predict(images), other.predict(images), strict=True):
        np.testing.assert_allclose(one.scores[:10], two.scores[:10], atol=1e-3)
        np.testing.assert_allclose(one.boxes[:5], two.boxes[:5], atol=0.5)
