"""`python -m jobs train`: from pictures and labels to a report; mistakes are one line."""

import ast
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from jobs import own_data
from jobs.__main__ import COMMANDS
from jobs.own_data import is_finished, is_given, recipe_of
from jobs.own_data_report import Prepared, advice_of, again, found, next_commands
from jobs.own_data_start import PUBLISHED, beginning, starts_from
from model.detr import build_model
from pipeline.checkpoint_store import Progress, write
from pipeline.cli import _options_of, main
from pipeline.config import RunConfig
from pipeline.data.images import decode_image
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.evaluate import NAMES as SUMMARY
from pipeline.fine_tuning import fine_tuning
from pipeline.recipes import recipe

ROOT = Path(__file__).resolve().parents[2]

NAMES = {1: (7, "coin"), 2: (3, "tile"), 4: (100, "flag"), 7: (55, "spark")}


@pytest.fixture(scope="module")
def own(drawn, tmp_path_factory):
    """Forty pictures with ids and names of their own, in no order."""
    folder = tmp_path_factory.mktemp("own")
    content = drawn.annotations("train")
    content["categories"] = [{"id": i, "name": n} for i, n in NAMES.values()]
    for a in content["annotations"]:
        a["category_id"] = NAMES[a["category_id"]][0]
    (folder / "labels.json").write_text(json.dumps(content))
    return SimpleNamespace(
        images=drawn.coco / "train", labels=folder / "labels.json", content=content, drawn=drawn
    )


@pytest.fixture(scope="module")
def prepared(own, tmp_path_factory):
    """An output folder after --prepare-only, for tests that need one."""
    output = tmp_path_factory.mktemp("prepared") / "output"
    assert train(own, output, "--prepare-only") == 0
    return output


def train(own, output, *options, labels=None):
    given = ["--images", own.images, "--annotations", labels or own.labels, "--output", output]
    given += ["--recipe", "demo", *options]
    return main("python -m jobs", "", COMMANDS, ["train", *map(str, given)])


@pytest.fixture
def trained(monkeypatch):
    """In place of a job on Ray: what a training leaves in its folder. A list of the jobs."""
    jobs = []

    def launch(spec, address, wait):
        jobs.append(spec)
        config, folder = spec.run_config(), Path(spec.folder)
        classes = ShardSet(config.data.train).categories
        config = replace(config, model=replace(config.model, num_classes=len(classes)))
        (folder / "checkpoints" / "step-00000004").mkdir(parents=True)
        identity = {"config": json.loads(config.to_json()), "config_digest": config.digest(),
                    "train_digest": "", "val_digest": ""}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(identity))
        best = {"epoch": 2, "checkpoint": "step-00000004", "summary": dict.fromkeys(SUMMARY, 0.25),
                "per_class": {"coin": 0.5, "tile": 0.125}}  # fmt: skip
        (folder / "best.json").write_text(json.dumps(best))
        lines = [
            {"kind": "event", "step": 2, "event": "message", "text": "label check: seen: x; do y"},
            {"kind": "evaluation", "step": 4, "epoch": 2.0, "AP": 0.25},
            {"kind": "event", "step": 4, "event": "finished"},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))

    monkeypatch.setattr(own_data, "launch", launch)
    return jobs


def checkpoint(folder):
    """One of ours, of three classes: others than the data have."""
    config = recipe("demo")
    config = replace(config, model=replace(config.model, num_classes=3))
    labels = {"category_of": [1, 2, 3], "names": ["cat", "dog", "bird"]}
    weights = build_model(config.model).state_dict()
    content = {"model": weights, "config": config.to_json(), "labels": labels}
    return write(folder / "weights", Progress(), content, {})


@pytest.mark.parametrize(
    ("content", "recipe", "words"),
    [
        (b"no weights", "demo", "cannot be read"),
        (b'{"images": []}', "demo", "cannot be read"),
        (b"", "detr_r50_demo", "another architecture"),
    ],
)
def test_weights_that_do_not_fit_are_one_line_before_anything_is_made(
    own, tmp_path, capsys, content, recipe, words
):
    weights = checkpoint(tmp_path)
    if content:
        weights = tmp_path / "given.pth"
        weights.write_bytes(content)
    assert train(own, tmp_path / "output", "--weights", weights, "--recipe", recipe) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words in said
    assert "--weights" in said
    assert "init.weights" not in said
    assert not (tmp_path / "output").exists()


def test_it_begins_with_what_is_trained_and_where(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    demo, large = recipe("demo"), recipe(own_data.RECIPE)
    parameters = sum(p.numel() for p in build_model(demo.model).parameters())
    millions = f"{parameters / 1e6:.1f} million parameters"
    assert beginning(demo, False, 4, "") == f"recipe demo, {millions}, on 2 GPUs"
    assert beginning(large, True, 1, "").startswith(
        "recipe deformable_detr_r50_two_stage (the default), "
    )
    assert "days" not in beginning(large, True, 1, "")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert beginning(demo, False, 1, "") == f"recipe demo, {millions}, on cpu"
    assert "\nthere is no GPU here: such a training takes days" in beginning(large, True, 1, "")
    assert beginning(large, False, 1, "http://a:1").endswith("parameters, on http://a:1")


def test_weights_are_pointed_to_where_there_are_some():
    assert "github.com/fundamentalvision" in starts_from(recipe("deformable_detr_r50_refine"))
    assert "github" not in starts_from(recipe("demo"))
    assert {name: recipe(name).recipe for name in PUBLISHED} == {name: name for name in PUBLISHED}


def test_shards_of_both_parts_hold_all_pictures_once(own, prepared):
    train_set, val_set = (ShardSet(prepared / "shards" / part) for part in ("train", "val"))
    assert not set(train_set.image_id) & set(val_set.image_id)
    ids = sorted([*train_set.image_id.tolist(), *val_set.image_id.tolist()])
    assert ids == [image["id"] for image in own.content["images"]]
    assert 6 <= len(val_set) <= 11
    assert train_set.categories == val_set.categories == own.content["categories"]


def test_the_job_has_the_defaults_and_what_was_given(own, prepared, trained, tmp_path, capsys):
    output = tmp_path / "output"
    shutil.copytree(prepared, output)
    weights = checkpoint(tmp_path)
    options = ("--weights", weights, "--schedule.epochs", 7, "--optimizer.weight_decay", 0.5)
    assert train(own, output, *options, "--workers", 2) == 0
    (spec,) = trained
    config = RunConfig.from_json(spec.config)
    assert (spec.workers, spec.folder) == (2, str(output / "run"))
    assert config.optimizer.batch_size == 8
    assert config.optimizer.lr == pytest.approx(1e-3)  # the demo's 2e-3 for 16
    assert config.schedule.epochs == 7
    assert config.optimizer.weight_decay == 0.5
    assert config.init.weights == str(weights)
    assert config.data.train == str(output / "shards" / "train")
    said = capsys.readouterr().out
    assert "--optimizer.lr 0.001: the recipe's 0.002 for 16 images, in proportion" in said
    assert "--schedule.epochs 7: given" in said
    assert "label check: seen: x; do y" in said
    assert "AP was best at the end (epoch 2 of 2)" in said
    report = (output / "report.md").read_text()
    for text in ("coin  0.500", "run/predictions.png", "label check: seen", "7", str(weights)):
        assert text in report
    # The same command finds the run finished, and shows the report again.
    assert train(own, output, *options, "--workers", 2) == 0
    assert len(trained) == 1
    assert "report" in capsys.readouterr().out


def test_once_more_it_says_what_is_there_and_what_to_expect(own, prepared, capfd):
    assert train(own, prepared, "--prepare-only", "--optimizer.lr", 0.5) == 0
    said = capfd.readouterr().out
    assert said.count("there already, nothing to do") == 2
    assert "--optimizer.lr 0.5: given" in said
    assert "label check: nothing looks wrong" in said
    assert "no --weights: training starts from random weights." in said
    assert "AP stays near 0" in said


def test_changed_labels_are_refused_once_something_is_trained(own, prepared, tmp_path, capsys):
    output, changed = tmp_path / "output", tmp_path / "changed.json"
    shutil.copytree(prepared, output)
    changed.write_text(json.dumps(dict(own.content, info={"changed": True})))
    (output / "run").mkdir()
    assert train(own, output, "--prepare-only", labels=changed) == 2
    said = capsys.readouterr().err
    assert "training on other data (differs in: annotations); choose another --output" in said
    (output / "run").rmdir()
    assert train(own, output, "--prepare-only", "--val-share", 0.5, labels=changed) == 0
    assert "made anew for other annotations, share" in capsys.readouterr().out
    assert len(ShardSet(output / "shards" / "val")) >= 18
    assert ShardSet(output / "shards" / "train").header["info"] == {"changed": True}


def test_another_training_in_the_folder_is_refused_before_ray(
    own, prepared, trained, tmp_path, capsys
):
    output = tmp_path / "output"
    shutil.copytree(prepared, output)
    assert train(own, output, "--schedule.epochs", 7) == 0
    assert len(trained) == 1
    capsys.readouterr()
    assert train(own, output, "--schedule.epochs", 9) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "schedule.epochs: got 9, expected 7" in said.err
    assert "choose another --output" in said.err
    assert "label check" not in said.out
    assert train(own, output, "--schedule.epochs", 7, "--recipe", "detr_r50_demo") == 2
    assert "recipe: got detr_r50_demo, expected demo" in capsys.readouterr().err
    assert len(trained) == 1
    shutil.rmtree(output / "run")
    assert train(own, output, "--schedule.epochs", 9) == 0
    assert len(trained) == 2


def test_wrong_labels_are_named_before_training(own, trained, tmp_path, capsys):
    content = json.loads(own.labels.read_text())
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        a["bbox"] = [x, y, x + w, y + h]
    labels = tmp_path / "corners.json"
    content["images"].append(dict(content["images"][0], id=10**6, file_name="none.jpg"))
    labels.write_text(json.dumps(content))
    for option in ((), ("--prepare-only",)):
        assert train(own, tmp_path / "output", *option, labels=labels) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1
        assert said.err.startswith("error: label check: boxes are corners: ")
        assert "--train-anyway" in said.err
        first = next(line for line in said.out.splitlines() if line.startswith("label check"))
        assert first.startswith("label check: boxes are corners")
    assert trained == []
    assert train(own, tmp_path / "output", "--train-anyway", labels=labels) == 0
    assert "label check: boxes are corners" in capsys.readouterr().out
    report = (tmp_path / "output" / "report.md").read_text()
    assert "label check: boxes are corners" in report
    assert "label check: images are left out: 1 of " in report
    assert "no file 'none.jpg'" in report
    assert report.count("(1 more images are left out)") == 1
    assert "IMAGES --output predictions" in report
    parts = [int(n) for n in re.findall(r"^(?:train|val): (\d+) images", report, re.M)]
    assert sum(parts) == 40


def test_photos_that_exif_turns_reach_the_remedy(tmp_path, capsys):
    """The labels are of the pictures as a viewer shows them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "pictures").mkdir()
    images, annotations = [], []
    for i in range(6):
        name = f"{i}.jpg"
        Image.new("RGB", (80, 60), (i * 40, 9, 9)).save(tmp_path / "pictures" / name, exif=exif)
        images.append({"id": i, "file_name": name, "width": 60, "height": 80})
        box = {"id": i, "image_id": i, "category_id": 1, "bbox": [5, 30, 40, 40], "area": 1600}
        annotations.append(box | {"iscrowd": 0})
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "coin"}]
    (tmp_path / "labels.json").write_text(json.dumps(content))
    data = SimpleNamespace(images=tmp_path / "pictures", labels=tmp_path / "labels.json")
    assert train(data, tmp_path / "output", "--prepare-only") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "turn the files (exiftran -ai, or jpegtran)" in said
    assert "the labels can stay as they are" in said


def test_a_picture_that_is_damaged_in_its_middle_is_left_out_and_named(own, tmp_path, capsys):
    """Its size and its ends are right, and a decoder goes on behind the damage."""
    pictures = shutil.copytree(own.images, tmp_path / "pictures")
    name = own.content["images"][0]["file_name"]
    whole = (pictures / name).read_bytes()
    quarter = len(whole) // 4
    damaged = whole[: 2 * quarter] + bytes(quarter) + whole[3 * quarter :]
    (pictures / name).write_bytes(damaged)
    decode_image(damaged)
    data = SimpleNamespace(images=pictures, labels=own.labels)
    assert train(data, tmp_path / "output", "--prepare-only") == 0
    told = capsys.readouterr().out
    assert "(1 corrupt image): " in told
    assert "Corrupt JPEG data" in told
    parts = [ShardSet(tmp_path / "output" / "shards" / part) for part in ("train", "val")]
    assert sum(map(len, parts)) == len(own.content["images"]) - 1


def test_a_validation_set_of_its_own(own, tmp_path, capsys):
    content = own.drawn.annotations("val")
    content["categories"] = own.content["categories"]
    for a in content["annotations"]:
        a["category_id"] = NAMES[a["category_id"]][0]
    labels = tmp_path / "val.json"
    labels.write_text(json.dumps(content))
    given = ("--val-images", own.drawn.coco / "val", "--val-annotations", labels)
    assert train(own, tmp_path / "output", *given, "--prepare-only") == 0
    assert len(ShardSet(tmp_path / "output" / "shards" / "train")) == 40
    assert len(ShardSet(tmp_path / "output" / "shards" / "val")) == 12
    assert not (tmp_path / "output" / "split").exists()
    assert "images are in train and val" not in capsys.readouterr().out
    # The training images again as validation: the same bytes.
    given = ("--val-annotations", own.labels)
    assert train(own, tmp_path / "other", *given, "--prepare-only") == 0
    assert "40 of 40 val images are in train, too" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--images", "/none"], "--images /none: no such folder"),
        (["--annotations", "/none"], "--annotations /none: no such file"),
        (["--weights", "/none"], "--weights /none: no such file"),
        (["--val-images", "tests"], "--val-images needs --val-annotations"),
        (["--val-share", "1.5"], "--val-share: got 1.5"),
        (["--workers", "0"], "workers 0"),
        (["--recipe", "dmo"], "unknown recipe 'dmo'"),
        (["--optimizer.lrr", "1"], "--optimizer.lr"),
        (["--split-by", "video"], "no field 'video'"),
        (["--images", "tests"], "is --images the right folder?"),
    ],
)
def test_a_mistake_is_one_line(own, tmp_path, capsys, options, words):
    assert train(own, tmp_path / "output", "--prepare-only", *options) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("error: ")
    assert words in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "not in COCO format"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no images"),
    ],
)
def test_a_file_that_is_none_is_one_line(own, tmp_path, capsys, text, words):
    labels = tmp_path / "labels.json"
    labels.write_text(text)
    assert train(own, tmp_path / "output", "--prepare-only", labels=labels) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words in said


def test_another_folder_is_left_alone(own, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("of years")
    assert train(own, tmp_path) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_images_without_objects_and_classes_are_counted(own):
    lines = found(own.content, dict(own.content, images=own.content["images"][:1], annotations=[]))
    objects = len(own.content["annotations"])
    assert lines[0].startswith("train: 40 images, ")
    assert lines[0].endswith(f"; {objects} objects")
    assert lines[1] == "val: 1 images, 1 of them without objects; 0 objects"
    table = {line.split()[0]: [int(n) for n in line.split()[1:]] for line in lines[3:]}
    assert table.keys() == {name for _, name in NAMES.values()}
    assert sum(n for n, _ in table.values()) == objects


def test_the_recipe_may_stand_anywhere():
    assert recipe_of(["--a", "1", "--recipe", "demo", "--b"]) == ("demo", ["--a", "1", "--b"])
    assert recipe_of(["--recipe=detr_r50"]) == ("detr_r50", [])
    assert recipe_of(["--x"]) == ("", ["--x"])
    for nameless in (["--recipe"], ["--recipe="], ["--recipe", "--output", "a"]):
        with pytest.raises(UserError, match="pipeline recipes"):
            recipe_of(nameless)


def test_options_are_known_in_every_spelling():
    assert is_given(["--optimizer.batch_size=4"], "optimizer.batch_size")
    assert is_given(["--optimizer.batch-size", "4"], "optimizer.batch_size")
    assert not is_given(["--optimizer.batch-size", "4"], "schedule.epochs")


@pytest.mark.parametrize("subfolders", [True, False])
def test_what_is_next_can_be_pasted(tmp_path, subfolders):
    output, command = tmp_path / "my own", shlex.split("python -m jobs train --output=a")
    prepared = Prepared([], [], [], "", epochs=4, subfolders=subfolders)
    command += ["--schedule.epochs", "4"]
    predict, evaluate, resume, _, more = next_commands(output, command, prepared)
    run = str(output / "run")
    words = ["IMAGES", *(["--recursive"] if subfolders else []), "--output", "predictions"]
    assert shlex.split(predict)[3:] == ["predict", run, *words]
    assert shlex.split(evaluate)[4:] == [run, "--data", str(output / "shards" / "val")]
    assert shlex.split(resume, comments=True)[3:] == ["resume", run]
    assert shlex.split(more)[4:] == [
        "--weights", run, "--output", f"{output}-more", "--schedule.epochs", "8",
    ]  # fmt: skip


def test_the_next_command_has_the_new_weights_alone():
    command = shlex.split("python -m jobs train --weights old --output=a --images 'my dir'")
    changed = again(command, {"--weights": "run", "--output": "b"})
    assert shlex.join(changed) == (
        "python -m jobs train --images 'my dir' --weights run --output b"
    )


@pytest.mark.parametrize(("best", "words"), [(10, "more epochs"), (3, "fewer epochs"), (7, None)])
def test_advice_is_of_the_curve(best, words):
    lines = [{"kind": "evaluation", "epoch": float(e), "AP": 0.1} for e in range(1, 11)]
    said = list(advice_of(lines, best))
    assert said == [] if words is None else words in said[0]


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_from_pictures_to_a_report_on_ray(own, tmp_path, run_command):
    given = [
        *("jobs", "train", "--images", own.images, "--annotations", own.labels),
        *("--recipe", "demo", "--output", tmp_path / "output", "--schedule.epochs", 1),
    ]
    done = run_command(*given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "AP by class" in done.stdout
    assert (tmp_path / "output" / "run" / "predictions.png").is_file()
    report = (tmp_path / "output" / "report.md").read_text()
    assert "AP of the best epoch (1) on val" in report
    assert "==> training" not in run_command(*given).stdout


def test_the_guide_names_every_finding_and_default():
    guide = (ROOT / "docs" / "own_data.md").read_text()
    kinds = set()
    for file in (ROOT / "pipeline").glob("sanity_*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Finding":
                kind = call.args[0]
                if isinstance(kind, ast.Constant):
                    kinds.add(kind.value)
                else:  # of one of the two parts
                    kinds |= {"classes missing in train", "classes missing in val"}
    assert len(kinds) > 20
    assert {kind for kind in kinds if kind not in guide} == set()
    _, defaults = fine_tuning(recipe("deformable_detr_r50"), 200)
    assert {d.field for d in defaults if f"`{d.field}`" not in guide} == set()


def test_commands_of_the_guide_have_options_that_there_are():
    guide = (ROOT / "docs" / "own_data.md").read_text()
    given = set(re.findall(r"(?<=[\s`(])--[a-z][a-z.-]+", guide))
    assert len(given) > 10
    known = {"--init.weights", *_options_of(own_data.OwnDataOptions)}
    known.add("--data")  # of evaluate
    assert given - known == set()


def test_a_training_whose_config_is_damaged_is_told(drawn, tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"rec')
    train, val = (str(drawn.shards / split) for split in ("train", "val"))
    config = replace(recipe("demo"), data=replace(recipe("demo").data, train=train, val=val))
    with pytest.raises(UserError, match=r"config\.json is damaged: it is not JSON"):
        is_finished(tmp_path, config)
