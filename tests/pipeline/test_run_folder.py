"""config.json: what a run is, written once, and damaged."""

import json
import re
from dataclasses import replace

import pytest
import torch

from pipeline.dataset import open_dataset
from pipeline.errors import UserError
from pipeline.recipes import recipe
from pipeline.replay import replay_step
from pipeline.run_folder import claim


@pytest.fixture
def config(drawn):
    config = recipe("demo")
    train, val = (str(drawn.shards / split) for split in ("train", "val"))
    return replace(config, data=replace(config.data, train=train, val=val))


def test_it_is_written_only_where_it_changes(tmp_path, config):
    """Each write is one that a power cut could fall into."""
    dataset, path = open_dataset(config), tmp_path / "config.json"
    claim(tmp_path, config, dataset)
    written = path.stat().st_ino
    claim(tmp_path, config, dataset)
    assert path.stat().st_ino == written
    more = replace(config, engine=replace(config.engine, log_every=7))  # the same run
    claim(tmp_path, more, dataset)
    assert json.loads(path.read_text())["config"]["engine"]["log_every"] == 7


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is not JSON"),
        (b'{"config"', "it is not JSON"),
        (b"\xff\xfe", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[]", "expected config_digest, train_digest, val_digest in it"),
        (b'{"config_digest": 1}', "expected config_digest, train_digest, val_digest in it"),
    ],
)
def test_a_damaged_one_is_told_and_left(tmp_path, config, content, why):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path} is damaged: {why}")) as told:
        claim(tmp_path, config, open_dataset(config))
    assert "put a copy of it back" in str(told.value)
    with pytest.raises(UserError, match=re.escape(f"{path} is damaged: {why}")):
        replay_step(tmp_path, 1, torch.device("cpu"))
    assert path.read_bytes() == content
