"""The label check inside a training: it says what it found, and changes nothing else."""

import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from model.detr import build_model
from pipeline.checkpoint_store import Progress, checkpoint_steps, load_model, write
from pipeline.config import InitConfig, RunConfig
from pipeline.data.labels import Labels
from pipeline.recipes import recipe
from pipeline.sanity_check import same_classes
from pipeline.tracking import read_lines
from tests.pipeline.training_runs import metrics, require_same, run

LABELS = Labels((1, 2, 4, 7), ("circle", "square", "triangle", "star"))


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    """A checkpoint whose scores are all near 0."""
    torch.manual_seed(0)
    config = recipe("demo")
    model = build_model(config.model)
    for name, value in model.state_dict().items():
        if name.startswith("heads.classes") and name.endswith("bias"):
            value.fill_(-12.0)
    content = {"model": model.state_dict(), "config": config.to_json(), "labels": asdict(LABELS)}
    return write(tmp_path_factory.mktemp("blind"), Progress(), content, {})


TWO_TRAININGS = """
import sys
from dataclasses import replace
from pathlib import Path
from pipeline.config import RunConfig
from pipeline.engine import stop_process_group
from pipeline.train import train
folder = Path(sys.argv[1])
config = RunConfig.from_json((folder / "config.json").read_text())
for name, after in (("with", 2), ("without", 0)):
    train(replace(config, engine=replace(config.engine, check_after=after)), folder / name)
stop_process_group()
"""


@pytest.mark.slow
def test_it_says_what_it_found_and_changes_nothing(drawn, blind, tmp_path):
    config = recipe("demo")
    config = replace(
        config,
        data=replace(config.data, train=f"{drawn.shards}/train", val=f"{drawn.shards}/val"),
        optimizer=replace(config.optimizer, batch_size=10, ema_decay=0.9),
        schedule=replace(config.schedule, epochs=1),
        engine=replace(config.engine, precision="fp32", device="cpu"),
        init=InitConfig(weights=str(blind)),
    )
    (tmp_path / "config.json").write_text(config.to_json())
    run([sys.executable, "-c", TWO_TRAININGS, str(tmp_path)])
    said = {
        name: [
            (line["step"], line["text"])
            for line in read_lines(tmp_path / name / "metrics.jsonl")
            if line.get("event") == "message" and line["text"].startswith("label check")
        ]
        for name in ("with", "without")
    }
    ((step, text),) = said["with"]
    assert step == 2
    assert "nothing is detected: after 2 steps no score of 40 training images is above" in text
    assert said["without"] == []
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    assert checkpoint_steps(tmp_path / "with") == checkpoint_steps(tmp_path / "without")
    one, other = (load_model(tmp_path / name) for name in ("with", "without"))
    require_same(one["model"], other["model"], "model.pt")


def test_a_run_of_before_the_check_is_the_same_run():
    """A config.json of then has no check_after."""
    config = recipe("demo")
    older = config.to_json().replace('    "check_after": 300,\n', "")
    assert older != config.to_json()
    assert RunConfig.from_json(older).digest() == config.digest()


def test_weights_of_other_names_have_other_classes(blind, tmp_path):
    torch.save({"model": {}}, tmp_path / "published.pth")
    other = Labels(LABELS.category_of, tuple(reversed(LABELS.names)))

    def of(labels, weights):
        config = SimpleNamespace(init=InitConfig(weights=str(weights)))
        return same_classes(SimpleNamespace(config=config, dataset=SimpleNamespace(labels=labels)))

    assert of(LABELS, blind)
    assert not of(other, blind)
    assert not of(LABELS, tmp_path / "published.pth")
