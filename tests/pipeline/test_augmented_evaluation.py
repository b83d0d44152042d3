"""Test-time augmentation: exact geometry, fusion by hand, and evaluation without ground truth."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.detr import build_model
from pipeline.__main__ import COMMANDS
from pipeline.augmented_evaluation import at_size, detect_augmented, fuse, mirror, mirror_back
from pipeline.cli import main
from pipeline.data.augment import Example
from pipeline.data.batch import collate
from pipeline.data.labels import build_labels
from pipeline.data.shards import ShardSet
from pipeline.evaluate import detect, predict
from pipeline.recipes import recipe

CPU = torch.device("cpu")


class Brightness(nn.Module):
    """A detector known in advance: the box around the bright pixels of each image."""

    def forward(self, images, padding_mask):
        boxes = []
        for image, padding in zip(images, padding_mask, strict=True):
            height, width = int((~padding[:, 0]).sum()), int((~padding[0]).sum())
            rows, columns = torch.nonzero((image[0] > 1) & ~padding, as_tuple=True)
            y0, y1 = int(rows.min()) / height, (int(rows.max()) + 1) / height
            x0, x1 = int(columns.min()) / width, (int(columns.max()) + 1) / width
            boxes.append([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
        logits = torch.zeros(len(boxes), 1, 1, dtype=torch.float64)
        return {
            "pred_logits": logits,
            "pred_boxes": torch.tensor(boxes, dtype=torch.float64)[:, None],
        }


def two_images():
    """Of 20 x 32 and 30 x 24 pixels, with a bright box in each."""
    examples, boxes = [], [(3, 2, 9, 11), (10, 5, 24, 6)]
    for (height, width), (x0, y0, x1, y1) in zip([(20, 32), (30, 24)], boxes, strict=True):
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        image[:, y0:y1, x0:x1] = 255
        examples.append(Example(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)))
    records = [{"id": 7, "height": 20, "width": 32}, {"id": 8, "height": 30, "width": 24}]
    return collate(examples, records), boxes


def test_boxes_found_in_a_flipped_image_map_back_to_those_of_the_image():
    batch, truth = two_images()
    plain = predict(Brightness(), batch, None)
    mirrored = predict(Brightness(), mirror(batch), None)
    for (found, flipped), expected, width in zip(
        zip(plain, mirrored, strict=True), truth, (32, 24), strict=True
    ):
        expected = torch.tensor([expected], dtype=torch.float64)
        torch.testing.assert_close(found["boxes"], expected, rtol=0, atol=1e-12)
        assert not torch.equal(flipped["boxes"], found["boxes"])
        back = mirror_back(flipped, width)
        torch.testing.assert_close(back["boxes"], expected, rtol=0, atol=1e-12)
        assert torch.equal(back["scores"], found["scores"])


def test_mirroring_twice_is_nothing_and_keeps_padding_at_the_right():
    batch, _ = two_images()
    batch.images[0, :, :20, :32] = torch.randint(0, 255, (3, 20, 32), dtype=torch.uint8)
    before = batch.images.clone()
    once = mirror(batch)
    assert torch.equal(batch.images, before)
    assert torch.equal(mirror(once).images, before)
    assert torch.equal(once.images[0, :, :20], before[0, :, :20].flip(-1))
    assert (once.images[1, :, :, 24:] == 0).all()


@pytest.fixture(scope="module")
def val(drawn):
    return ShardSet(drawn.shards / "val")


def test_one_plain_view_is_the_plain_evaluation(val):
    torch.manual_seed(0)
    config = recipe("demo")
    labels = build_labels(val.categories, "contiguous")
    config = replace(config, model=replace(config.model, num_classes=labels.num_classes))
    model = build_model(config.model).train()
    given_ = (model, val, labels, config, CPU)
    plain = detect(*given_)
    assert detect_augmented(*given_, flip=False) == plain
    assert model.training
    several = detect_augmented(*given_, sides=(96, 128))
    assert {d["image_id"] for d in several} == set(val.image_id.tolist())
    assert max(np.bincount([d["image_id"] for d in several])) <= 100
    assert several != plain


def view(*detections):
    """Detections as (score, label, box)."""
    scores, labels, boxes = zip(*detections, strict=True)
    return {
        "scores": torch.tensor(scores, dtype=torch.float64),
        "labels": torch.tensor(labels),
        "boxes": torch.tensor(boxes, dtype=torch.float64),
    }


def test_fusion_by_hand():
    box, near, far = [0.0, 0, 10, 10], [0.0, 0, 10, 8], [50.0, 50, 60, 60]
    first = view((0.6, 1, box), (0.5, 1, near), (0.2, 2, box))
    second = view((0.3, 1, near), (0.4, 1, far))
    found = fuse([first, second])
    # The second view's 0.3 joins the best; the first view's own 0.5 is a duplicate of it.
    assert found["labels"].tolist() == [1, 1, 2]
    torch.testing.assert_close(found["scores"], torch.tensor([0.45, 0.2, 0.1], dtype=torch.float64))
    joined = [0, 0, 10, (0.6 * 10 + 0.3 * 8) / 0.9]
    expected = torch.tensor([joined, far, box], dtype=torch.float64)
    torch.testing.assert_close(found["boxes"], expected)


def test_fusion_of_nothing_and_of_zero_scores():
    empty = {k: v[:0] for k, v in view((0.5, 0, [0.0, 0, 1, 1])).items()}
    assert len(fuse([empty, empty])["scores"]) == 0
    zero = view((0.0, 3, [1.0, 2, 3, 4]))
    found = fuse([zero, empty])
    assert found["boxes"].tolist() == [[1.0, 2, 3, 4]]
    assert found["labels"].tolist() == [3]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 4), st.integers(1, 12))
def test_fusion_of_equal_views_is_one_of_them_and_their_order_does_not_matter(seed, views, count):
    """Boxes in a row, too little overlapping for one object."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.arange(count, dtype=torch.float64)[:, None] * torch.tensor([8.0, 0.0])
    size = torch.rand(count, 2, generator=random, dtype=torch.float64) + 19
    scores = torch.rand(count, generator=random, dtype=torch.float64).sort(descending=True).values
    labels = torch.randint(0, 2, (count,), generator=random)
    one = {"scores": scores, "labels": labels, "boxes": torch.cat((corner, corner + size), 1)}
    same = fuse([one] * views)
    for name in one:
        torch.testing.assert_close(same[name], one[name], rtol=1e-12, atol=1e-12)

    moved = {**one, "boxes": one["boxes"] + 0.5, "scores": scores * 0.9}
    forth, back = fuse([one, moved]), fuse([moved, one])
    for name in one:
        torch.testing.assert_close(forth[name], back[name], rtol=1e-12, atol=1e-12)


def test_the_longest_side_grows_with_the_shorter():
    config = at_size(recipe("deformable_detr_r50"), 1200)
    assert (config.augment.val_short_side, config.augment.max_side) == (1200, 2000)
    assert at_size(recipe("deformable_detr_r50"), 800) == recipe("deformable_detr_r50")
    assert at_size(recipe("demo"), 400).augment.val_short_side == 400


@pytest.fixture(scope="module")
def detector(drawn, tmp_path_factory):
    """A model.pt with random weights."""
    file = tmp_path_factory.mktemp("detector") / "model.pt"
    labels = build_labels(drawn.annotations("val")["categories"], "contiguous")
    config = recipe("demo")
    config = replace(config, model=replace(config.model, num_classes=labels.num_classes))
    content = {
        "model": build_model(config.model).state_dict(),
        "config": config.to_json(),
        "labels": {"category_of": labels.category_of, "names": labels.names},
    }
    torch.save(content, file)
    return file


def test_data_without_annotations_gives_a_result_file(
    drawn, detector, tmp_path, run_command, capsys
):
    content = drawn.annotations("val")
    content["annotations"] = []
    (tmp_path / "test-dev.json").write_text(json.dumps(content))
    done = run_command("data_prep", "convert", "--images", drawn.coco / "val", "--annotations",
                       tmp_path / "test-dev.json", "--output", tmp_path / "shards")  # fmt: skip
    assert done.returncode == 0, done.stderr
    command = ("pipeline", "evaluate", detector, "--data", tmp_path / "shards")
    done = run_command(*command, "--results", tmp_path / "results.json", "--tta")
    assert done.returncode == 0, done.stderr
    assert "no annotations: 12 images" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert {d["image_id"] for d in results} == {i["id"] for i in content["images"]}
    assert all(set(d) == {"image_id", "category_id", "bbox", "score"} for d in results)
    assert all(np.isfinite([*d["bbox"], d["score"]]).all() for d in results)
    assert main("python -m pipeline", "", COMMANDS, [str(x) for x in command[1:]]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "--results FILE" in said


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--tta-sides", "600"], "without --tta"),
        (["--tta", "--tta-sides", "0"], "1 or more"),
        (["--batch-size", "-1"], "--batch-size"),
        (["--results", "none/results.json"], "'none' does not exist"),
    ],
)
def test_mistakes_are_one_line(drawn, detector, capsys, options, word):
    arguments = [str(detector), "--data", str(drawn.shards / "val"), *options]
    assert main("python -m pipeline", "", COMMANDS, ["evaluate", *arguments]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert word in said
