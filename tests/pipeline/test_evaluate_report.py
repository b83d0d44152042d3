"""The folder that `evaluate` writes: its counts by hand, its files, and who may overwrite them."""

import contextlib
import csv
import io
import json
import resource
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model.detr import build_model
from pipeline.__main__ import COMMANDS
from pipeline.checkpoint_store import Progress, write
from pipeline.cli import main
from pipeline.confusion import Confusion, confusion, draw_confusion
from pipeline.data.labels import build_labels
from pipeline.error_pictures import COLOURS, draw_errors, errors_of, worst
from pipeline.evaluate import NAMES
from pipeline.image_boxes import ImageBoxes
from pipeline.recipes import recipe
from tests.pipeline.training_runs import ENVIRONMENT, ROOT

A, B, FAR = [0, 0, 40, 40], [50, 0, 40, 40], [10, 60, 30, 30]


def image(objects, detections, crowds=(), image_id=1):
    """objects, crowds: (category, box); detections: (category, box, score), best first."""

    def boxes(records):
        return np.asarray([r[1] for r in records], dtype=np.float64).reshape(-1, 4)

    def classes(records):
        return np.asarray([r[0] for r in records], dtype=np.int64)

    return ImageBoxes(
        image_id, boxes(detections), np.asarray([d[2] for d in detections], dtype=np.float64),
        classes(detections), boxes(objects), classes(objects), boxes(crowds), classes(crowds),
    )  # fmt: skip


def evaluate(*options):
    return main("python -m pipeline", "", COMMANDS, ["evaluate", *map(str, options)])


def test_confusion_by_hand():
    images = [
        image([(3, A), (5, B)], [(3, A, 0.9), (3, B, 0.8), (5, FAR, 0.7)]),
        image([(5, A)], [(3, A, 0.9), (5, [0, 0, 40, 30], 0.8)]),  # its own class comes first
        image([(5, A)], []),
        image([], [(3, A, 0.9), (5, A, 0.8)], crowds=[(3, A)]),  # a crowd excuses its class alone
    ]
    of = confusion(images, (3, 5, 9), ("a", "b", "none"))
    assert of.counts.tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 1],
        [0, 0, 0, 0],
        [1, 2, 0, 0],
    ]
    assert of.precision() == pytest.approx([1 / 3, 1 / 3, np.nan], nan_ok=True)
    assert of.recall() == pytest.approx([1, 1 / 3, np.nan], nan_ok=True)


def test_of_many_classes_the_most_confused_are_drawn():
    counts = np.diag(np.full(61, 9))
    counts[7, 50] = counts[50, 52] = 4
    figure = draw_confusion(Confusion(counts, tuple(f"class {k}" for k in range(60))))
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(shown) == 31
    assert {"class 7", "class 50", "class 52"} <= set(shown)
    assert "30 most confused of 60" in figure.axes[0].get_title()


def test_the_worst_images_come_first_and_those_without_errors_not():
    images = [
        image([(3, A)], [(3, A, 0.9)]),
        image([(3, A)], [(3, A, 0.9), (3, FAR, 0.8)]),
        image([(3, A), (5, B)], [(5, FAR, 0.9)]),
    ]
    assert errors_of(images[2]) == {
        "classification": 0, "localisation": 0, "both": 0, "duplicate": 0, "background": 1,
        "missed": 2,
    }  # fmt: skip
    assert worst(images, 5) == [2, 1]
    assert worst(images, 1) == [2]


def test_errors_are_drawn_where_they_are():
    """Of a picture of 100 x 100 as 640 x 640 each half, below a band of 22."""
    drawn = draw_errors(
        Image.new("RGB", (100, 100), "white"),
        image([(3, A), (5, B)], [(3, A, 0.9), (3, FAR, 0.8)]),
        {3: "a", 5: "b"},
    )
    pixels = np.asarray(drawn)

    def colour_at(half, x, y):
        found = pixels[round(22 + 6.4 * y), round(646 * half + 6.4 * x)]
        return "#" + "".join(f"{v:02x}" for v in found)

    assert drawn.size == (1286, 662)
    assert colour_at(0, 0, 20) == COLOURS["right"]
    assert colour_at(0, 50, 20) == COLOURS["missed"]
    assert colour_at(1, 0, 20) == COLOURS["right"]
    assert colour_at(1, 10, 75) == COLOURS["background"]
    assert colour_at(1, 50, 20) == "#ffffff"


@pytest.fixture(scope="module")
def run(drawn, tmp_path_factory):
    """A run folder: a checkpoint with random weights as the average, others as the plain ones."""
    folder = tmp_path_factory.mktemp("run")
    labels = build_labels(drawn.annotations("val")["categories"], "contiguous")
    config = recipe("demo")
    config = replace(config, model=replace(config.model, num_classes=labels.num_classes))
    torch.manual_seed(0)
    average, plain = (build_model(config.model).state_dict() for _ in range(2))
    content = {
        "config": config.to_json(),
        "labels": {"category_of": labels.category_of, "names": labels.names},
    }
    write(folder, Progress(step=1), {"model": average, **content}, {"weights": plain})
    torch.save({"model": plain, **content}, folder / "plain.pt")
    return folder


@pytest.fixture(scope="module")
def written(drawn, run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "evaluation"
    options = ("--output", folder, "--threshold", 0, "--images", 3)
    assert evaluate(run, "--data", drawn.shards / "val", *options) == 0
    return folder


def test_numbers_are_pycocotools_of_the_result_file(drawn, written):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(drawn.coco / "annotations" / "instances_val.json"))
        by_hand = COCOeval(truth, truth.loadRes(str(written / "results.json")), "bbox")
        by_hand.evaluate()
        by_hand.accumulate()
        by_hand.summarize()
    numbers = json.loads((written / "numbers.json").read_text())
    mine = [numbers["top_100"][name] for name in NAMES]
    np.testing.assert_allclose(mine, by_hand.stats, rtol=0, atol=1e-12)
    objects = [a for a in truth.anns.values() if not a["iscrowd"]]
    rows = list(csv.DictReader((written / "classes.csv").open()))
    assert sum(int(row["objects"]) for row in rows) == len(objects)
    confused = list(csv.reader((written / "confusion.csv").open()))
    assert [row[0] for row in confused[1:]] == [*(row["class"] for row in rows), "(background)"]
    for row, counts in zip(rows, confused[1:], strict=False):
        assert sum(map(int, counts[1:])) == int(row["objects"])
    assert numbers["errors"]["dAP"].keys() >= {"missed", "false_positives"}


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.pictures, self.open = [], []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_shows_what_is_there(written):
    page = Page()
    page.feed((written / "evaluation.html").read_text())
    assert page.open == []
    drawn = sorted(f"images/{path.name}" for path in (written / "images").iterdir())
    assert len(drawn) == 3
    assert page.pictures == ["errors.png", "precision_recall.png", "confusion.png", *drawn]
    for name in page.pictures:
        with Image.open(written / name) as picture:
            picture.verify()


def test_what_is_there_is_not_overwritten(drawn, run, written, tmp_path, capsys):
    data = ("--data", drawn.shards / "val")
    (tmp_path / "results.json").write_text("[]")
    before = (written / "evaluation.html").read_bytes()
    for options, words in (
        (("--output", written), "there already"),
        (("--results", tmp_path / "results.json"), "there already"),
        (("--output", tmp_path / "new.json"), "--results FILE"),
        (("--threshold", 2), "0 to 1"),
    ):
        assert evaluate(run, *data, *options) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert words in said
    assert (written / "evaluation.html").read_bytes() == before
    assert (tmp_path / "results.json").read_text() == "[]"


def test_a_result_file_that_does_not_fit_on_the_disk_is_named(drawn, run, tmp_path, capsys):
    """The limit on the size of files stands for the end of the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        file = tmp_path / "found.json"
        assert evaluate(run, "--data", drawn.shards / "val", "--results", file) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"error: {file}: File too large; " in capsys.readouterr().err


def test_plain_weights(drawn, run, written, tmp_path, capsys):
    data = ("--data", drawn.shards / "val")
    of_run, by_hand = tmp_path / "of run.json", tmp_path / "by hand.json"
    assert evaluate(run, *data, "--weights", "plain", "--results", of_run) == 0
    assert evaluate(run / "plain.pt", *data, "--results", by_hand) == 0
    assert json.loads(of_run.read_text()) == json.loads(by_hand.read_text())
    assert json.loads(of_run.read_text()) != json.loads((written / "results.json").read_text())
    capsys.readouterr()
    assert evaluate(run / "plain.pt", *data, "--weights", "plain") == 2
    assert "no training.pt" in capsys.readouterr().err


A_BEST_IN_BETWEEN = """
import os, sys
from pipeline.__main__ import COMMANDS
from pipeline.cli import main
from pipeline.predict import Detector

load = Detector.load
if os.environ["RANK"] == "1":
    Detector.load = staticmethod(lambda run, *given: load(run / "plain.pt", *given))
sys.exit(main("evaluates", "", COMMANDS, sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_evaluate_one_checkpoint_whatever_training_does(
    drawn, run, written, tmp_path
):
    script, results = tmp_path / "script.py", tmp_path / "results.json"
    script.write_text(A_BEST_IN_BETWEEN)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(script), "evaluate", str(run), "--data", str(drawn.shards / "val")),
        *("--results", str(results)),
    ]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(results.read_text()) == json.loads((written / "results.json").read_text())


@pytest.mark.chaos
def test_two_processes_write_the_same_folder(drawn, run, tmp_path):
    """Byte for byte, pictures too; long for what the processes load."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    arguments = [
        "-m",
        "pipeline",
        "evaluate",
        run,
        "--data",
        drawn.shards / "val",
        "--threshold",
        0,
    ]
    folders = [tmp_path / "one", tmp_path / "two"]
    assert evaluate(*arguments[3:], "--output", folders[0]) == 0
    together = [*command, *arguments, "--output", folders[1]]
    done = subprocess.run([*map(str, together)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("AP by class") == 1
    files = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in folders]
    assert files[0] == files[1]
    for name in files[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
