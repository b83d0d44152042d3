"""Shards as training reads them, class columns, decoding and batching."""

import errno
import gc
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import storage
from pipeline.data.augment import Example, Geometry
from pipeline.data.batch import MEAN, STD, collate, decode
from pipeline.data.labels import build_labels
from pipeline.data.loader import (
    evaluation_batches,
    micro_batch_size,
    micro_batches,
    steps_per_epoch,
    training_steps,
)
from pipeline.data.order import Stream
from pipeline.data.shards import Sample, ShardSet
from pipeline.errors import UserError
from pipeline.machine_errors import in_a_line
from tests.pipeline.test_resumed_batches import config_for

ROOT = Path(__file__).resolve().parents[2]


def test_a_manifest_is_read_after_the_storage_was_away(drawn, monkeypatch):
    """Else the job of a node that starts in that moment would end as by its user's mistake."""
    slept, whole = [], Path.read_bytes

    def seldom(path):
        if len(slept) < 2:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return whole(path)

    monkeypatch.setattr(storage.time, "sleep", slept.append)
    monkeypatch.setattr(Path, "read_bytes", seldom)
    assert len(ShardSet(drawn.shards / "val")) > 0
    assert slept == [*storage.PAUSES[:2]]


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_give_back_every_record_and_every_byte(drawn, split):
    shards = ShardSet(drawn.shards / split)
    truth = drawn.annotations(split)
    by_image = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    samples = [shards.read(i) for i in range(len(shards))]
    key = lambda record: record["id"]  # noqa: E731
    assert sorted((s.image for s in samples), key=key) == sorted(truth["images"], key=key)
    for i, sample in enumerate(samples):
        assert sample.image["id"] == shards.image_id[i]
        assert [sample.image["width"], sample.image["height"]] == shards.size[i].tolist()
        expected = by_image[sample.image["id"]]
        assert sorted(sample.annotations, key=key) == sorted(expected, key=key)
        assert sample.image_bytes == (drawn.coco / split / sample.image["file_name"]).read_bytes()
    assert shards.categories == truth["categories"]


def test_a_folder_that_is_no_shard_folder_is_refused(drawn, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        ShardSet(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        ShardSet(tmp_path)
    (tmp_path / "manifest.json").write_text('{"version": 1}')
    with pytest.raises(UserError, match="not a shard manifest"):
        ShardSet(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "coco-webdataset", "version": 99}')
    with pytest.raises(UserError, match="99"):
        ShardSet(tmp_path)


def test_a_missing_or_shortened_shard_is_found_at_once(drawn, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(drawn.shards / "train", copy)
    name = ShardSet(copy).shard_names[1]
    with (copy / name).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match=f"{name}.*1000 bytes"):
        ShardSet(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match="no such file"):
        ShardSet(copy)


def test_a_shard_that_is_not_its_manifests_is_named(drawn, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(drawn.shards / "train", copy)
    path = copy / ShardSet(copy).shard_names[1]
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(UserError, match=f"{path.name}: no sample at byte 0.*copy it again"):
        ShardSet(copy).read(16)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_found_by_a_worker_is_one_line(drawn, tmp_path, workers):
    copy = tmp_path / "copy"
    shutil.copytree(drawn.shards / "train", copy)
    shards = ShardSet(copy)
    with (copy / shards.shard_names[1]).open("r+b") as file:
        file.seek(int(shards.offset[20]) + 512 + 100)
        file.write(bytes(300))
    labels = build_labels(shards.categories, "contiguous")
    config = config_for(loader_workers=workers)
    with pytest.raises(UserError) as caught:
        list(training_steps(shards, labels, config, range(5), 0, 1, False))
    assert str(caught.value).startswith(f"image {shards.image_id[20]} (")
    assert "cannot be decoded" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_is_one_line(drawn, tmp_path, workers):
    copy = tmp_path / "copy"
    shutil.copytree(drawn.shards / "train", copy)
    shards = ShardSet(copy)
    for name in shards.shard_names:
        (copy / name).unlink()
    labels = build_labels(shards.categories, "contiguous")
    config = config_for(loader_workers=workers)
    with pytest.raises(OSError, match="No such file") as caught:
        list(training_steps(shards, labels, config, range(5), 0, 1, False))
    assert in_a_line(caught.value).startswith(f"{copy}/shard-")
    assert "\n" not in str(caught.value)


def test_a_failing_read_names_the_shard(drawn, monkeypatch):
    shards = ShardSet(drawn.shards / "train")
    stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    monkeypatch.setattr(os, "pread", Mock(side_effect=stale))
    with pytest.raises(OSError, match=rf"Stale file handle: '{shards.folder}/shard-000000.tar'"):
        shards.read(0)


def test_workers_end_with_the_loader_where_one_fails(drawn, monkeypatch):
    """Else the process would wait for them when it ends."""
    shards = ShardSet(drawn.shards / "train")
    monkeypatch.setattr("pipeline.data.loader.collate", Mock(side_effect=ZeroDivisionError("ours")))
    labels = build_labels(shards.categories, "contiguous")
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError, match="ours"):
            list(evaluation_batches(shards, labels, config_for(loader_workers=2), 0, 1, 2, False))
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


HOLDS_A_LOADER = """
import sys
from pipeline.data.labels import build_labels
from pipeline.data.loader import evaluation_batches
from pipeline.data.shards import ShardSet
from tests.pipeline.test_resumed_batches import config_for

shards = ShardSet(sys.argv[1])
labels = build_labels(shards.categories, "contiguous")
batches = evaluation_batches(shards, labels, config_for(loader_workers=2), 0, 1, 2, False)
print(len(next(batches).image_ids), flush=True)
if sys.argv[2] == "fails":
    raise ZeroDivisionError("ours")
"""


@pytest.mark.parametrize(("end", "status", "said"), [("ends", 0, ""), ("fails", 1, "ours")])
def test_a_process_ends_that_holds_an_unfinished_loader(drawn, end, status, said):
    command = [sys.executable, "-c", HOLDS_A_LOADER, drawn.shards / "train", end]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (status, "2\n")
    assert ended.stderr.strip().endswith(said)
    assert "killed" not in ended.stderr


def test_a_picture_of_another_size_than_the_manifests_is_named():
    geometry = Geometry((10, 30), size=(10, 30))
    with pytest.raises(UserError, match=r"3 \(a\.jpg\): got 20x10 pixels, expected 30x10"):
        decode(sample(), {}, geometry)


CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}]


def test_columns_by_order_of_id():
    labels = build_labels(CATEGORIES, "contiguous")
    assert (labels.category_of, labels.names) == ((2, 7), ("cat", "dog"))
    assert labels.column_of() == {2: 0, 7: 1}


def test_columns_by_order_of_id_after_the_background():
    background = build_labels(CATEGORIES, "contiguous_from_1")
    assert (background.category_of, background.names) == ((-1, 2, 7), ("", "cat", "dog"))
    assert background.column_of() == {2: 1, 7: 2}


def test_columns_by_category_id():
    labels = build_labels(CATEGORIES, "category_id")
    assert labels.category_of == (-1, -1, 2, -1, -1, -1, -1, 7)
    assert labels.column_of() == {2: 2, 7: 7}
    coco = [{"id": i, "name": str(i)} for i in [*range(1, 12), 90]]
    assert build_labels(coco, "category_id").num_classes == 91


def test_absurd_categories_are_refused():
    with pytest.raises(UserError, match="no categories"):
        build_labels([], "contiguous")
    with pytest.raises(UserError, match="contiguous"):
        build_labels([{"id": 10**6, "name": "x"}], "category_id")


def sample(mode: str = "RGB", annotations: list | None = None, kind: str = "JPEG") -> Sample:
    buffer = io.BytesIO()
    Image.new(mode, (20, 10), "red" if mode in ("RGB", "CMYK") else 128).save(buffer, kind)
    image = {"id": 3, "file_name": "a.jpg", "width": 20, "height": 10}
    return Sample(buffer.getvalue(), image, annotations or [])


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG")]
)
def test_images_of_any_mode_become_three_channels(mode, kind):
    image = decode(sample(mode, kind=kind), {}).image
    assert image.shape == (3, 10, 20)
    assert image.dtype == torch.uint8


def box(x, y, w, h, category=1, **more):
    return {"bbox": [x, y, w, h], "category_id": category, "iscrowd": 0, **more}


def test_what_is_no_object_is_left_out_and_boxes_are_cut_to_the_image():
    annotations = [
        box(1, 2, 3, 4),
        box(0, 0, 5, 5, iscrowd=1),
        box(4, 4, 0, 3),
        box(18, 8, 10, 10, category=2),
        box(30, 30, 5, 5),
        box(float("nan"), 0, 5, 5),
        box(5, 5, -3, 2),
        box(0, 0, 9, 9, category=99),
        {"category_id": 1},
        {"category_id": 1, "bbox": [1, 2, 3]},
        {"category_id": 1, "bbox": None},
    ]
    example = decode(sample(annotations=annotations), {1: 0, 2: 1})
    assert example.boxes.tolist() == [[1, 2, 4, 6], [18, 8, 20, 10]]
    assert example.labels.tolist() == [0, 1]


def test_an_unreadable_image_is_named():
    whole = sample()
    broken = Sample(whole.image_bytes[:200], whole.image, [])
    with pytest.raises(UserError, match=r"3 \(a\.jpg\).*decoded"):
        decode(broken, {})


def test_a_batch_is_padded_normalised_and_in_relative_boxes():
    small = Example(
        torch.full((3, 4, 6), 100, dtype=torch.uint8),
        torch.tensor([[0.0, 1, 3, 3]]),
        torch.tensor([5]),
    )
    large = Example(
        torch.full((3, 8, 5), 50, dtype=torch.uint8),
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
    )
    records = [{"id": 1, "height": 40, "width": 60}, {"id": 2, "height": 8, "width": 5}]
    batch = collate([small, large], records)
    assert batch.images.shape == (2, 3, 8, 6)
    assert batch.padding_mask[0].sum() == 4 * 6  # rows 4..7 are padding
    assert batch.padding_mask[1].sum() == 8
    # (x0 + x1) / 2 / 6, (y0 + y1) / 2 / 4, w / 6, h / 4, of the image's own size
    torch.testing.assert_close(
        batch.targets[0]["boxes"], torch.tensor([[1.5 / 6, 2 / 4, 3 / 6, 2 / 4]])
    )
    assert batch.targets[1]["boxes"].shape == (0, 4)
    assert batch.sizes.tolist() == [[40, 60], [8, 5]]
    images = batch.normalized_images()
    assert images.is_contiguous(memory_format=torch.channels_last)
    for c in range(3):
        expected = (100 / 255 - MEAN[c]) / STD[c]
        np.testing.assert_allclose(images[0, c, :4, :6], expected, rtol=1e-5)
    assert (images[0, :, 4:] == 0).all()
    assert (images[1, :, :, 5:] == 0).all()


def test_micro_batches_stay_within_the_bound_on_every_rank_at_once(drawn):
    shards = ShardSet(drawn.shards / "train")
    labels = build_labels(shards.categories, "contiguous")
    config = config_for(40, group_by_shape=True, max_padded_pixels=3 * 56 * 80)
    ranks = [
        list(training_steps(shards, labels, config, range(3), rank, 2, False)) for rank in (0, 1)
    ]
    for of_ranks in zip(*ranks, strict=True):
        assert len(of_ranks[0]) == len(of_ranks[1]) > 1
        for batch in (batch for step in of_ranks for batch in step):
            n, _, height, width = batch.images.shape
            assert n * height * width <= 3 * 56 * 80
    small = replace(config, engine=replace(config.engine, max_padded_pixels=100))
    with pytest.raises(UserError, match=r"engine\.max_padded_pixels: got 100, expected"):
        next(training_steps(shards, labels, small, range(3), 0, 1, False))


@pytest.mark.parametrize("world", [1, 2, 5, 13])
def test_evaluation_sees_every_image_once(drawn, world):
    shards = ShardSet(drawn.shards / "val")
    labels = build_labels(shards.categories, "contiguous")
    seen = []
    for rank in range(world):
        for batch in evaluation_batches(shards, labels, config_for(), rank, world, 4, False):
            seen += batch.image_ids
    assert sorted(seen) == sorted(shards.image_id.tolist())


def test_impossible_batches_are_refused(drawn):
    shards = ShardSet(drawn.shards / "val")
    with pytest.raises(UserError, match="12 images, fewer than one global batch of 16"):
        steps_per_epoch(shards, 16)
    config = config_for()
    with pytest.raises(UserError, match=r"got 8 images for 9 processes, expected 9 or more"):
        micro_batch_size(config, 9)
    for stage in (2, 3):
        engine = replace(config.engine, zero_stage=stage, micro_batch=2)
        with pytest.raises(UserError, match=rf"8 images over 3 processes .* ZeRO stage {stage}"):
            micro_batch_size(replace(config, engine=engine), 3)


@pytest.mark.parametrize(("world", "micro", "expected"), [(3, 0, 3), (3, 2, 2), (2, 9, 4)])
def test_shares_may_be_uneven(drawn, world, micro, expected):
    config = config_for()
    config = replace(config, engine=replace(config.engine, micro_batch=micro))
    assert micro_batch_size(config, world) == expected
    shards = ShardSet(drawn.shards / "train")
    stream = Stream(shards.shard_sizes, config.seed, config.data.shuffle_window)
    ranks = [micro_batches(shards, config, stream, 2, rank, world) for rank in range(world)]
    assert all(1 <= len(part) <= expected for parts in ranks for part in parts)
    joined = np.concatenate([part for parts in ranks for part in parts])
    np.testing.assert_array_equal(joined, stream.batch(2, 8))


def test_a_manifest_is_plain_json(drawn):
    manifest = json.loads((drawn.shards / "val" / "manifest.json").read_text())
    assert manifest["num_images"] == 12
