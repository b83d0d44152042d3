"""A short, seeded part of `make fuzz`, and what it found once."""

import json
import os
from pathlib import Path

import pytest

from model.config import ModelConfig
from pipeline.config import RunConfig
from pipeline.data.objects import objects
from pipeline.data.shards import ShardSet
from pipeline.recipes import recipe
from tests.fuzz.readers import Reader, readers
from tests.fuzz.run import fuzz, outcome

NAMES = [
    "annotations", "convert", "manifest", "shard", "sample of a shard", "record of a sample",
    "checkpoint", "files beside a checkpoint", "published weights", "config", "grid",
    "image, judged by data_prep", "image, decoded for training",
]  # fmt: skip
INPUTS = 1500


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[dict[str, Reader], Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    marker = folder / "executed"
    return {reader.name: reader for reader in readers(folder, marker)}, marker


def test_every_reader_is_here_and_the_shares_make_one(made):
    assert list(made[0]) == NAMES
    assert sum(reader.share for reader in made[0].values()) >= 1


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_read_or_refused_in_one_line(made, name):
    reader = made[0][name]
    tally = fuzz(reader, max(10, round(INPUTS * reader.share)), 1, made[1])
    assert not tally.findings
    assert tally.refused.total() > 0


@pytest.mark.parametrize("harm", ["exception", "lines", "death", "code"])
def test_a_reader_that_fails_is_found(made, harm):
    """The fuzzer itself: what must be a finding is one."""
    marker = made[1]

    def read(data: bytes) -> None:
        if harm == "exception":
            raise KeyError("x")
        if harm == "lines":
            raise ValueError("one\ntwo")
        if harm == "code":
            marker.touch()
        else:
            os._exit(7)

    tally = fuzz(Reader("bad", 1.0, lambda random: b"x", read), 3, 0, marker)
    assert len(tally.findings) == 3
    assert not marker.exists()


def test_an_accepted_file_is_counted_as_one():
    assert outcome(Reader("good", 1.0, lambda random: b"", lambda data: None), b"") == (
        "accepted",
        "",
    )


def test_annotations_that_no_one_can_hash_or_hold_are_no_objects():
    good = {"category_id": 1, "bbox": [0, 0, 5, 5]}
    odd = [
        {**good, "category_id": [1]},
        {**good, "category_id": {}},
        {**good, "bbox": [10**400] * 4},
    ]
    odd += [{**good, "bbox": [float("nan")] * 4}, {**good, "bbox": [float("inf"), 0, 1, 1]}]
    assert objects([*odd, good], [1]) == [good]


def test_an_image_record_without_its_size_takes_that_of_the_manifest(drawn):
    """Trained on as any other: batches need the size."""
    shards = ShardSet(drawn.shards / "val")
    sample = shards.read(0)
    assert (sample.image["width"], sample.image["height"]) == tuple(shards.size[0].tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {"lr": "fast"}}, r"config\.optimizer\.lr: got 'fast', expected a number"),
        ({"seed": True}, r"config\.seed: got True, expected a whole number"),
        ({"augment": {"crop_sides": [1]}}, r"crop_sides: got \[1\], expected a list of 2"),
        ({"engine": {"device": "tpu"}}, r"device: got 'tpu', expected one of auto, cpu, cuda"),
        ({"model": []}, r"config\.model: got \[\], expected an object"),
        ({"model": {"num_levels": 2**70}}, r"num_levels: got .*, expected a whole number"),
    ],
)
def test_a_config_of_other_types_is_refused(change, message):
    content = json.loads(recipe("demo").to_json())
    for name, value in change.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        RunConfig.from_json(json.dumps(content))


def test_a_config_without_what_it_needs_is_refused():
    with pytest.raises(ValueError, match="got no recipe"):
        RunConfig.from_json("{}")
    with pytest.raises(ValueError, match="not JSON"):
        RunConfig.from_json("[" * 100_000)
    assert RunConfig.from_json('{"recipe": "x"}').model == ModelConfig()
