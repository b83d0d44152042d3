"""A finished run in MLflow: figures, artifacts, the registered model, and what that predicts."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from jobs import pictures
from jobs.driver import about
from jobs.forwarder import About, Forwarder
from jobs.registry import best_version, move_alias
from jobs.spec import JobSpec
from jobs.summary import summary
from jobs.tracking import default_tracking_uri
from model.postprocess import postprocess
from pipeline.config import RunConfig
from pipeline.data.augment import resize_for_evaluation
from pipeline.data.batch import collate, decode
from pipeline.dataset import open_dataset, open_shards
from pipeline.predict import Detector
from pipeline.tracking import read_lines

ROOT = Path(__file__).resolve().parents[2]
NAME = "tests model"
# A process without the run, which gives what the registered model predicts for its arguments.
LOAD = """
import sys
import mlflow
uri, model, *files = sys.argv[1:]
mlflow.set_tracking_uri(uri)
print(mlflow.pyfunc.load_model(model).predict(files).to_json(orient="records"), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def trained(reference):
    """A run of two epochs in full precision."""
    return reference(1, 2, "--engine.precision", "fp32").folder


@pytest.fixture
def run(trained, empty_store, tmp_path):
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs")
    return Path(shutil.copytree(trained, tmp_path / "runs" / "one"))


def config_of(run: Path) -> RunConfig:
    return RunConfig.from_json(json.dumps(json.loads((run / "config.json").read_text())["config"]))


def deliver(run: Path, name: str = NAME) -> Forwarder:
    about = About("tests", {}, {"recipe": "demo"}, model_name=name)
    sender = Forwarder(run, default_tracking_uri(run), about)
    assert sender.finish("FINISHED"), sender.why
    return sender


def client_of(run: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri=default_tracking_uri(run))


def versions(run: Path, name: str = NAME) -> dict[str, dict[str, str]]:
    found = client_of(run).search_model_versions(f"name = '{name}'")
    return {str(v.version): v.tags for v in found}


def best(run: Path, name: str = NAME) -> str:
    return str(client_of(run).get_model_version_by_alias(name, "best").version)


def expected(run: Path, file: Path) -> pd.DataFrame:
    """What the detector finds in one validation image, alone in its batch, cut to the image."""
    detector = Detector.load(run, "cpu")
    shards = open_shards(config_of(run).data.val, config_of(run).data)
    samples = map(shards.read, range(len(shards)))
    sample = next(one for one in samples if one.image["file_name"] == file.name)
    example = resize_for_evaluation(decode(sample, detector.labels.column_of()),
                                    detector.config.augment)  # fmt: skip
    batch = collate([example], [sample.image])
    with torch.no_grad():
        outputs = detector.model(batch.normalized_images(), batch.padding_mask)
    result = postprocess(outputs, batch.sizes)[0]
    height, width = batch.sizes[0].tolist()
    limits = torch.tensor([width, height, width, height])
    x0, y0, x1, y1 = result["boxes"].clamp(min=0).minimum(limits).unbind(1)
    names = [detector.labels.names[column] for column in result["labels"].tolist()]
    columns = {"label": names, "score": result["scores"], "x": x0, "y": y0, "w": x1 - x0,
               "h": y1 - y0}  # fmt: skip
    return pd.DataFrame({name: list(map(plain, column)) for name, column in columns.items()})


def plain(value):
    return value if isinstance(value, str) else float(value)


def assert_predicted(got: pd.DataFrame, run: Path, files: list[Path]) -> None:
    """Detections of these validation images. Of nearly equal scores the order may
    differ, and so may what is the last of those kept."""
    assert list(got.columns) == ["image", "label", "score", "x", "y", "w", "h"]
    assert sorted(set(got["image"])) == list(range(len(files)))
    for index, file in enumerate(files):
        mine, reference = got[got["image"] == index], expected(run, file)
        assert len(mine) == len(reference)
        assert (mine["score"].diff().dropna() <= 0).all()
        values = ["score", "x", "y", "w", "h"]
        for _, row in mine.head(20).iterrows():
            same = reference[reference["label"] == row["label"]][values].to_numpy()
            distance = np.abs(same - row[values].to_numpy(dtype=float)).max(axis=1)
            assert distance.min() < 1e-3


def test_mlflow_is_told_the_identity_that_the_run_folder_has(trained, drawn):
    written = json.loads((trained / "config.json").read_text())
    config = config_of(trained)
    # As it is submitted: the data say how many classes there are.
    config = replace(config, model=replace(config.model, num_classes=91))
    spec = JobSpec(
        config.to_json(), str(trained), code=f"{'a' * 40}-dirty", code_digest="b", grid="/grids/x"
    )
    said = about(spec, config, open_dataset(config))
    for key in ("config_digest", "train_digest", "val_digest"):
        assert said.tags[key] == written[key]
    assert said.tags["mlflow.source.git.commit"] == "a" * 40
    assert said.params["model.num_classes"] == written["config"]["model"]["num_classes"]
    sources = [(one.context, one.images) for one in said.sources]
    assert sources == [("train", 40), ("validation", 12)]
    annotations = len(drawn.annotations("val")["annotations"])
    assert said.sources[1].annotations == annotations
    assert (said.model_name, said.grid) == ("demo", "/grids/x")
    unknown = about(replace(spec, code="unknown", register=False), config, open_dataset(config))
    assert "mlflow.source.git.commit" not in unknown.tags
    assert unknown.model_name == ""


def test_a_run_registers_its_best_checkpoint_once(run, drawn):
    first, second = deliver(run), deliver(run)
    assert first.state["run_id"] == second.state["run_id"]
    (tags,) = versions(run).values()
    written = json.loads((run / "best.json").read_text())
    assert float(tags["val/AP"]) == written["summary"]["AP"]
    assert tags["val_digest"] == json.loads((run / "config.json").read_text())["val_digest"]
    assert tags["run_id"] == first.state["run_id"]
    assert int(tags["step"]) == int(written["checkpoint"].removeprefix("step-"))
    assert best(run) == "1"
    assert f"registered       {NAME}, version 1" in summary(run, default_tracking_uri(run))

    # In a process that never sees the run, from files.
    uri, files = default_tracking_uri(run), sorted((drawn.coco / "val").glob("*"))[:3]
    hidden = run.with_name("hidden")
    run.rename(hidden)
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, uri, f"models:/{NAME}@best", *map(str, files)],
        cwd=hidden.parent, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr
    printed = loaded.stderr[loaded.stderr.rindex("[{") :]
    assert_predicted(pd.DataFrame(json.loads(printed)), hidden, files)


def test_what_the_model_takes(run, drawn, monkeypatch):
    deliver(run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", default_tracking_uri(run))
    mlflow.set_tracking_uri(default_tracking_uri(run))
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@best")
    outputs = [one.name for one in model.metadata.signature.outputs]
    assert outputs == ["image", "label", "score", "x", "y", "w", "h"]
    files = sorted((drawn.coco / "val").glob("*"))[:2]
    encoded = [path.read_bytes() for path in files]
    pixels = [np.array(Image.open(path).convert("RGB")) for path in files]
    from_files = model.predict([str(path) for path in files])
    assert_predicted(from_files, run, files)
    for same in (encoded, pd.DataFrame({"image": encoded}), [files[0], encoded[1]]):
        pd.testing.assert_frame_equal(model.predict(same), from_files)
    assert_predicted(model.predict(pixels), run, files)
    one = model.predict(str(files[0]))
    assert len(one) == (from_files["image"] == 0).sum()
    nothing = model.predict([])
    assert (len(nothing), list(nothing.columns)) == (0, list(from_files.columns))
    for wrong, said in (
        ([encoded[0], b"no image"], "image 1: "),
        ([pixels[0].astype(np.float32)], "image 0: got an array of float32"),
        ([pixels[0][:, :, :2]], "expected uint8"),
        ([3], "image 0: got int, expected a path"),
    ):
        with pytest.raises(ValueError, match=said):
            model.predict(wrong)
    # What is loaded is code of ours and a checkpoint, read without executing any.
    place = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}@best"))
    kinds = {path.suffix for path in place.rglob("*") if path.is_file()}
    assert kinds <= {"", ".py", ".pt", ".txt", ".yaml"}
    requirements = (place / "requirements.txt").read_text()
    torch_release = torch.__version__.partition("+")[0]
    assert f"torch=={torch_release}\n" in requirements


def test_the_alias_is_on_the_best_of_the_same_validation_set(run, monkeypatch):
    client = client_of(run)
    client.create_registered_model(NAME)

    def add(ap, digest):
        tags = {"val/AP": repr(ap), "val_digest": digest, "run_id": "r", "model_sha256": repr(ap)}
        made = client.create_model_version(NAME, f"{run}/model", tags=tags)
        move_alias(client, NAME, digest)
        return str(made.version)

    one = add(0.4, "val")
    assert best(run) == one
    two = add(0.5, "val")
    assert best(run) == two
    add(0.3, "val")
    add(0.5, "val")
    assert best(run) == two  # of equals the earliest
    other = add(0.1, "another")  # a name goes on with another set
    assert best(run) == other
    assert best_version(client, NAME, "val") == two

    # Another run registers a better one just before the alias is set.
    late = []
    put = client.set_registered_model_alias

    def slow(name, alias, version):
        if not late:
            late.append(True)
            late.append(add(0.9, "val"))
        put(name, alias, version)

    monkeypatch.setattr(client, "set_registered_model_alias", slow)
    add(0.6, "val")
    assert best(run) == late[1]


def test_another_best_checkpoint_is_another_version(run):
    deliver(run)
    found = json.loads((run / "best.json").read_text())
    other = next(p for p in (run / "checkpoints").iterdir() if p.name != found["checkpoint"])
    found["checkpoint"] = other.name
    found["summary"]["AP"] += 0.1
    (run / "best.json").write_text(json.dumps(found))
    deliver(run)
    assert len(versions(run)) == 2
    assert best(run) == "2"
    paths = {a.path for a in client_of(run).list_artifacts(json.loads(
        (run / "mlflow.json").read_text())["run_id"], "model")}  # fmt: skip
    assert len(paths) == 2  # the first version is still there


def test_figures_and_other_artifacts(run, monkeypatch):
    config = config_of(run)
    pictures.draw(run, config)
    figures = {path.name for path in (run / "figures").iterdir()}
    assert {"precision_recall.png", "precision_recall.csv", "class_ap.csv"} <= figures
    inside = {name.rpartition("_")[0] for name in figures if name.startswith(("pixel", "sampling"))}
    said = [x["text"] for x in read_lines(run / "metrics.jsonl") if x.get("event") == "message"]
    # Two epochs teach little: there are figures, or a line that says why not.
    assert inside == {"pixel_gradients", "sampling_points"} or any("looks at" in x for x in said)
    drawn_at = (run / "figures" / "class_ap.csv").stat().st_mtime_ns
    pictures.draw(run, config)
    assert (run / "figures" / "class_ap.csv").stat().st_mtime_ns == drawn_at  # not anew

    monkeypatch.setattr("jobs.artifacts.LARGE", 1000)
    sender = deliver(run, name="")
    client, run_id = client_of(run), sender.state["run_id"]
    assert not client.search_registered_models()  # without a name nothing is
    top = {a.path for a in client.list_artifacts(run_id)}
    assert {"config.json", "best.json", "metrics.jsonl", "predictions.png", "figures"} <= top
    assert {Path(a.path).name for a in client.list_artifacts(run_id, "figures")} == figures
    packed = client.download_artifacts(run_id, "evaluations/best-detections.json.gz")
    with gzip.open(packed) as file:
        assert file.read() == (run / "evaluations" / "best-detections.json").read_bytes()


def test_what_cannot_be_drawn_is_a_line_and_no_failure(run, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    (run / "evaluations" / "best-detections.json").unlink()
    monkeypatch.setattr("pipeline.look_inside.look_inside", fail)
    pictures.draw(run, config_of(run))
    said = [x["text"] for x in read_lines(run / "metrics.jsonl") if x.get("event") == "message"]
    assert any("precision and recall: FileNotFoundError" in x for x in said)
    assert "no figure of what the model looks at: RuntimeError: out of memory" in said
    assert [path.name for path in (run / "figures").iterdir()] == ["checkpoint.txt"]


def test_drawing_that_ends_its_process_is_not_tried_again(run, monkeypatch):
    def die(*_):
        raise SystemExit

    monkeypatch.setattr("pipeline.curves.curves", die)
    with pytest.raises(SystemExit):
        pictures.draw(run, config_of(run))
    pictures.draw(run, config_of(run))
    assert not (run / "figures").exists()
    said = [x["text"] for x in read_lines(run / "metrics.jsonl") if x.get("event") == "message"]
    assert any("was ended meanwhile" in x for x in said)
