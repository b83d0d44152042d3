"""`python -m pipeline predict`: files in, and out come a COCO data set, a table and pictures; what
cannot be read is told, and nothing is mixed up."""

import csv
import json
import os
import resource
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from pipeline.__main__ import COMMANDS
from pipeline.cli import main
from pipeline.data.labels import Labels
from pipeline.drawing import Label, colour_of, draw_labels, with_boxes
from pipeline.errors import UserError
from pipeline.image_files import ImageFiles, find_images
from pipeline.predict import Detector
from pipeline.predict_files import in_background
from pipeline.prediction_files import picture_names, writing
from tests.pipeline.made_up_detector import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    save_checkpoint(path, Labels((3, 8), ("cat", "Hündchen")))
    return path


def image(seed: int, height: int = 60, width: int = 80) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two films of equal names, and a folder of odd images."""
    folder = tmp_path_factory.mktemp("photos")
    for film in ("film1", "film2"):
        (folder / film).mkdir()
        for number in (1, 2, 10):
            image(number + 100 * (film == "film2")).save(folder / film / f"frame{number}.jpg")
    odd = folder / "odd"
    odd.mkdir()
    image(50).convert("CMYK").save(odd / "ink.tif")
    image(51).convert("L").save(odd / "grey.PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    image(52).save(odd / "turned, é.jpg", exif=exif)
    (odd / "._turned.jpg").write_bytes(b"of macOS")
    (odd / "notes.txt").write_text("no image")
    return folder


def predict(*arguments: object) -> int:
    given = ["predict", *map(str, arguments), "--device", "cpu"]
    return main("python -m pipeline", "", COMMANDS, given)


@pytest.mark.parametrize(("most", "named"), [(100, ""), (2000, "/pictures/large.jpg")])
def test_what_does_not_fit_on_the_disk_is_named(checkpoint, tmp_path, capsys, most, named):
    """The limit on the size of files stands for the end of the disk."""
    image(1, 600, 800).save(tmp_path / "large.jpg")
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        drawn = "--pictures" if named else "--no-pictures"
        given = (tmp_path / "large.jpg", "--output", out, "--threshold", 1, drawn)
        status = predict(checkpoint, *given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {out}{named}: File too large; ")


def test_an_interrupted_prediction_ends_and_leaves_nothing_that_looks_whole(
    checkpoint, photos, tmp_path, capsys, monkeypatch
):
    """By Ctrl-C in the second batch, while others are read and drawn."""
    detect, batches = Detector.detect, []

    def interrupted(self, *arguments):
        batches.append(1)
        if len(batches) == 2:
            signal.raise_signal(signal.SIGINT)
        return detect(self, *arguments)

    monkeypatch.setattr(Detector, "detect", interrupted)
    given = (checkpoint, photos, "--recursive", "--output", tmp_path / "out", "--batch-size", 2)
    assert predict(*given) == 130
    assert capsys.readouterr().err == "interrupted; what it was writing is not complete\n"
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written <= {"detections.json.partial", "detections.csv.partial", "pictures"}


def test_what_is_written_is_what_is_found(checkpoint, photos, tmp_path, capsys):
    status = predict(checkpoint, photos, "--recursive", "--output", tmp_path / "out",
                     "--threshold", 0.1, "--most", 20, "--batch-size", 2)  # fmt: skip
    said = capsys.readouterr()
    assert status == 0, said.err
    assert said.err == ""
    names = [
        "film1/frame1.jpg", "film1/frame2.jpg", "film1/frame10.jpg", "film2/frame1.jpg",
        "film2/frame2.jpg", "film2/frame10.jpg", "odd/grey.PNG", "odd/ink.tif",
        "odd/turned, é.jpg",
    ]  # fmt: skip
    coco = COCO(str(tmp_path / "out/detections.json"))
    capsys.readouterr()
    assert [one["file_name"] for one in coco.dataset["images"]] == names
    assert coco.dataset["info"]["images"] == str(photos)
    assert [c["id"] for c in coco.dataset["categories"]] == [3, 8]
    with (tmp_path / "out/detections.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    detector = Detector.load(checkpoint, "cpu")
    found = list(detector.predict([photos / name for name in names], 0.1, 20, batch_size=2))
    assert sum(map(len, found)) == len(coco.dataset["annotations"]) == len(rows) > 50
    assert f"{len(rows)} objects in 9 images" in said.out
    at = iter(rows)
    for record, objects in zip(coco.dataset["images"], found, strict=True):
        annotations = coco.imgToAnns[record["id"]]
        assert (record["width"], record["height"]) == (objects.width, objects.height)
        assert [one["category_id"] for one in annotations] == list(objects.category_ids)
        for k, one in enumerate(annotations):
            x, y, width, height = one["bbox"]
            box = [x, y, x + width, y + height]
            np.testing.assert_allclose(box, objects.boxes[k], atol=2e-3)
            assert one["area"] == pytest.approx(width * height, abs=1e-3)
            assert one["score"] == pytest.approx(objects.scores[k], abs=1e-6)
            row = next(at)
            assert row["file_name"] == record["file_name"]
            assert (row["label"], int(row["category_id"])) == (
                objects.labels[k],
                one["category_id"],
            )
            assert [float(row[c]) for c in ("x0", "y0", "x1", "y1")] == pytest.approx(box, abs=2e-3)
    assert coco.dataset["images"][-1]["width"] == 60  # as it is shown
    results = coco.loadRes(coco.dataset["annotations"])
    capsys.readouterr()
    assert len(results.anns) == len(rows)
    pictures = tmp_path / "out/pictures"
    drawn = sorted(str(p.relative_to(pictures)) for p in pictures.rglob("*") if p.is_file())
    assert drawn == sorted(n.replace(".tif", ".tif.png") for n in names)
    with Image.open(pictures / "odd/turned, é.jpg") as turned:
        assert (turned.width / 60, turned.height / 80) == (6, 6)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "detections.csv", "detections.json", "pictures",
    }  # fmt: skip


def test_the_batch_size_changes_nothing_for_images_of_one_size(checkpoint, photos, tmp_path):
    for size in (1, 4):
        options = ("--batch-size", size, "--no-pictures", "--output", tmp_path / str(size))
        assert predict(checkpoint, photos / "film*" / "*.jpg", *options) == 0
    one, four = (json.loads((tmp_path / s / "detections.json").read_text()) for s in ("1", "4"))
    assert one["images"] == four["images"]
    assert len(one["images"]) == 6
    best = [{a["image_id"]: a for a in reversed(x["annotations"])} for x in (one, four)]
    assert len(best[0]) == 6
    for image_id, annotation in best[0].items():
        assert annotation["bbox"] == pytest.approx(best[1][image_id]["bbox"], abs=0.01)
    assert not (tmp_path / "1/pictures").exists()


def test_broken_images_are_left_out_and_told(checkpoint, photos, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    whole = (photos / "film1/frame1.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(whole)
    (folder / "empty.png").write_bytes(b"")
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "page.jpg").write_text("<html>not found</html>")
    (folder / "z.jpg").write_bytes(whole)
    assert predict(checkpoint, folder, "--output", tmp_path / "out", "--batch-size", 2) == 2
    said = capsys.readouterr()
    *told, last = said.err.splitlines()
    assert last == (
        f"error: 3 of 5 images cannot be read and are left out; {tmp_path}/out/left_out.csv says "
        f"why of each"
    )
    assert [line.split(": ")[0] for line in told] == [
        f"left out {folder}/{name}" for name in ("empty.png", "half.jpg", "page.jpg")
    ]
    assert "is empty" in told[0]
    assert "starts with b'<html>" in told[2]
    with (tmp_path / "out/left_out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file_name"] for row in rows] == ["empty.png", "half.jpg", "page.jpg"]
    written = json.loads((tmp_path / "out/detections.json").read_text())
    assert [one["file_name"] for one in written["images"]] == ["a.jpg", "z.jpg"]
    boxes = [[a["bbox"] for a in written["annotations"] if a["image_id"] == i] for i in (1, 2)]
    assert boxes[0]
    assert np.allclose(boxes[0][:5], boxes[1][:5], atol=0.01)


def test_an_image_that_is_damaged_in_its_middle_is_looked_at_and_told(
    checkpoint, photos, tmp_path, capsys
):
    whole = (photos / "film1/frame1.jpg").read_bytes()
    path = tmp_path / "a.jpg"
    path.write_bytes(whole[:-400] + bytes(200) + whole[-200:])
    assert predict(checkpoint, path, "--output", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert said.startswith(
        f"{path} is damaged, and what is found in it may be wrong: Corrupt JPEG data: "
    )
    assert said.count("\n") == 1
    written = json.loads((tmp_path / "out/detections.json").read_text())
    assert [one["file_name"] for one in written["images"]] == ["a.jpg"]


def test_without_detections_the_files_are_whole(checkpoint, photos, tmp_path):
    given = ("--threshold", 1, "--output", tmp_path / "out")
    assert predict(checkpoint, photos / "film1/frame1.jpg", *given) == 0
    written = json.loads((tmp_path / "out/detections.json").read_text())
    assert written["annotations"] == []
    assert (tmp_path / "out/detections.csv").read_text().count("\n") == 1
    assert (tmp_path / "out/pictures/frame1.jpg").is_file()


def test_an_interrupted_command_leaves_no_file_that_looks_whole(
    checkpoint, photos, tmp_path, monkeypatch, capsys
):
    detect, calls = Detector.detect, []

    def once(self, *given):
        calls.append(given)
        if len(calls) > 1:
            raise OSError("No space left on device")
        return detect(self, *given)

    monkeypatch.setattr(Detector, "detect", once)
    output = ("--output", tmp_path / "out", "--batch-size", 2)
    assert predict(checkpoint, photos / "film1", *output) == 2
    assert "No space left" in capsys.readouterr().err
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"detections.csv.partial", "detections.json.partial", "pictures"}
    assert predict(checkpoint, photos / "film1", *output) == 2
    assert "which has files, expected a new folder or an empty one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.jpg"], ["image 'none.jpg' does not exist"]),
        (["tests"], ["folder 'tests': got no image", "ending in .jpg"]),
        (["none/*.jpg"], ["nothing matches 'none/*.jpg'"]),
        (["tests/*.py"], ["none of its", "is an image"]),
        (["Makefile", "--threshold", "30"], ["--threshold: got 30", "0 to 1"]),
        (["Makefile", "--most", "0"], ["--most: got 0"]),
        (["Makefile", "--batch-size", "-1"], ["--batch-size: got -1"]),
        (["Makefile", "--precision", "half"], ["half", "bf16"]),
        (["Makefile", "--precision", "fp16"], ["fp16", "needs a GPU"]),
        (["Makefile", "--output", "README.md"], ["--output", "README.md, expected a folder"]),
        (["Makefile", "--output", "docs"], ["--output", "docs, which has files"]),
        (["Makefile", "--output", "none/out"], ["--output", "'none' does not exist"]),
        ([], ["IMAGES: got none"]),
    ],
)
def test_one_clear_line(checkpoint, tmp_path, capsys, arguments, words):
    given = arguments if "--output" in arguments else [*arguments, "--output", tmp_path / "out"]
    assert predict(checkpoint, *given) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "out").exists()


# Which files are meant


def found(*arguments: object, recursive: bool = False) -> list[str]:
    return list(find_images([str(one) for one in arguments], recursive).names)


def test_folders_patterns_and_files(photos, monkeypatch):
    frames = ["frame1.jpg", "frame2.jpg", "frame10.jpg"]
    films = [f"{film}/{name}" for film in ("film1", "film2") for name in frames]
    assert found(photos / "film1") == frames
    assert found(photos / "film1", photos / "film2") == films
    assert found(photos / "film2/*", photos / "film1/*") == films
    assert found(photos / "film[12]") == films
    assert found(photos / "**/*.jpg") == [*films, "odd/turned, é.jpg"]
    assert found(photos / "**") == found(photos, recursive=True)
    assert found(photos / "odd") == ["grey.PNG", "ink.tif", "turned, é.jpg"]
    # The same file by three ways, and one whose name is no image's: it was asked for.
    monkeypatch.chdir(photos / "film1")
    assert found("frame1.jpg", "../film1/frame1.jpg", photos / "film1/frame*1.jpg") == [
        "frame1.jpg"
    ]
    assert found("../odd/notes.txt") == ["notes.txt"]
    files = find_images(["frame2.jpg", "../odd/ink.tif"])
    assert [files.path(name).is_file() for name in files.names] == [True, True]


def test_a_name_that_looks_like_a_pattern_is_a_file(tmp_path):
    (tmp_path / "a[1].jpg").touch()
    (tmp_path / "a1.jpg").touch()
    assert found(tmp_path / "a[1].jpg") == ["a[1].jpg"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("film.mp4", "is a video.*ffmpeg -i"),
        ("shards/manifest.json", "is a shard folder.*evaluate"),
        ("deep/below/a.jpg", "got no image.*--recursive takes the 1 of its subfolders"),
    ],
)
def test_what_else_is_meant_is_guessed(tmp_path, name, said):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=said):
        found(tmp_path / name.split("/")[0])


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        found(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="got no image"):
        found(tmp_path)


def test_every_image_has_a_picture_of_its_own():
    files = ImageFiles(Path(), ("a.JPG", "a.tif", "a.tif.png", "b.gif", "c/a.tif"))
    names = picture_names(files)
    assert names["a.JPG"] == "a.JPG"
    assert names["a.tif"] == "a.tif.png.png"
    assert names["c/a.tif"] == "c/a.tif.png"
    assert len(set(names.values())) == 5


def test_few_images_are_in_memory_at_a_time():
    """Of a stream without an end no more are begun than are asked for and `ahead`."""
    begun, lock = [], threading.Lock()

    def work(number: int) -> int:
        with lock:
            begun.append(number)
        return number * number

    with ThreadPoolExecutor(3) as pool:
        results = in_background(pool, work, iter(int, 1), 5)
        for taken in range(1, 40):
            assert next(results) == 0
            assert len(begun) <= taken + 5
        assert list(in_background(pool, work, range(30), 4)) == [n * n for n in range(30)]


# Pictures


def test_a_class_has_one_colour_and_others_have_others():
    colours = [colour_of(column) for column in range(91)]
    assert len(set(colours)) == 91
    near = [np.abs(np.subtract(a, b)).max() for a, b in pairwise(colours)]
    assert min(near) > 40


def test_boxes_are_drawn_where_they_are():
    plain = Image.new("RGB", (1000, 800), (128, 128, 128))
    picture = with_boxes(plain, [Label((300, 200, 700, 600), 1, "dog 0.90")])
    assert picture.size == plain.size
    pixels, colour = np.asarray(picture), np.array(colour_of(1))
    for x, y in ((301, 400), (699, 400), (500, 201), (500, 599)):
        assert (pixels[y, x] == colour).all()
    for x, y in ((290, 400), (500, 400), (710, 400), (500, 610)):
        assert (pixels[y, x] == 128).all()
    assert (pixels[190, 301] == colour).all()  # the name, above
    assert (np.asarray(plain) == 128).all()


def test_a_small_image_is_enlarged_and_its_boxes_with_it():
    picture = with_boxes(Image.new("RGB", (100, 50)), [Label((10, 20, 90, 40), 0, "cat 1.00")])
    assert picture.size == (500, 250)
    pixels = np.asarray(picture)
    assert (pixels[150, 51] == colour_of(0)).all()
    assert (pixels[199, 250] == colour_of(0)).all()
    assert (pixels[150, 250] == 0).all()
    assert with_boxes(Image.new("RGB", (1, 1)), []).size == (480, 480)


def test_names_that_are_near_each_other_are_all_to_be_read():
    """A name of one colour each: as much of it is seen as if it were alone."""
    boxes = [(50, 100, 300, 300), (52, 102, 250, 280), (54, 104, 320, 310)]
    labels = [Label(box, column, "tramway 0.50") for column, box in enumerate(boxes)]

    def seen(drawn: list[Label], column: int) -> int:
        picture = Image.new("RGB", (480, 480), (1, 2, 3))
        draw_labels(picture, drawn, 16)
        return int((np.asarray(picture) == colour_of(column)).all(axis=-1).sum())

    for label in labels:
        assert seen(labels, label.column) > 0.8 * seen([label], label.column)


@pytest.mark.parametrize("box", [(-5, -5, 700, 700), (639, 479, 640, 480), (5, 9, 5, 9)])
def test_boxes_at_the_edge_are_drawn(box):
    picture = Image.new("RGB", (640, 480))
    draw_labels(picture, [Label(box, 4, "x" * 200)])
    assert np.asarray(picture).any()


def test_a_folder_that_another_command_has_begun_to_write_is_left_to_it(tmp_path):
    """Both have found it new, and loaded their models since."""
    labels = Labels((3,), ("cat",))
    with (
        writing(tmp_path, labels, {"mine": 1}),
        pytest.raises(UserError, match="to which another command has begun to write"),
        writing(tmp_path, labels, {}),
    ):
        pytest.fail("written to by both")
    assert json.loads((tmp_path / "detections.json").read_text())["info"] == {"mine": 1}
