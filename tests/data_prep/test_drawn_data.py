import json
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import data_prep.synthesize
from data_prep.drawing import LEAST_VISIBLE, draw_picture
from data_prep.synthesize import run_lengths, synthesize


@pytest.fixture(scope="module")
def coco(drawn):
    return COCO(drawn / "annotations" / "instances_train.json")


def files(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_equal_seeds_give_equal_files_for_any_number_of_workers(tmp_path):
    for name, seed, workers in (("a", 5, 1), ("b", 5, 3), ("c", 6, 1)):
        assert synthesize(tmp_path / name, 120, 7, seed, workers)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert len(a) == 129
    assert a == b
    assert a.keys() == c.keys()
    assert all(a[path] != c[path] for path in a)


def test_more_pictures_keep_the_first_ones(tmp_path, drawn):
    synthesize(tmp_path / "fewer", 5, 2, 3, 1)
    for split, count in (("train", 5), ("val", 2)):
        own = sorted((tmp_path / "fewer" / split).iterdir())
        assert len(own) == count
        assert all(p.read_bytes() == (drawn / split / p.name).read_bytes() for p in own)


def test_files_are_what_the_records_say(drawn, coco):
    for split in ("train", "val"):
        content = json.loads((drawn / "annotations" / f"instances_{split}.json").read_text())
        assert set(content) == {"info", "licenses", "images", "annotations", "categories"}
        assert {i["file_name"] for i in content["images"]} == {
            path.name for path in (drawn / split).iterdir()
        }
        for image in content["images"]:
            with Image.open(drawn / split / image["file_name"]) as file:
                assert file.format == "JPEG"
                assert file.size == (image["width"], image["height"])
                assert max(file.size) == 128
    assert len({(i["width"], i["height"]) for i in coco.dataset["images"]}) >= 5
    # Ids with gaps, as COCO's: a label is not an id.
    assert [c["id"] for c in coco.dataset["categories"]] == [1, 2, 4, 7]


def test_box_area_and_segmentation_agree_in_pycocotools(coco):
    differences = []
    for annotation in coco.dataset["annotations"]:
        image = coco.imgs[annotation["image_id"]]
        x, y, width, height = annotation["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + width <= image["width"]
        assert y + height <= image["height"]
        rle = coco.annToRLE(annotation)
        mask_box = coco_mask.toBbox(rle)
        mask_area = float(coco_mask.area(rle))
        if annotation["iscrowd"]:
            assert annotation["area"] == mask_area
            assert list(mask_box) == annotation["bbox"]
        else:
            # A mask of whole pixels rounds each edge by half a pixel either way, and the tip of
            # a star can be thinner than a pixel; over all objects this must cancel.
            found = np.array([x, y, x + width, y + height])
            told = np.concatenate((mask_box[:2], mask_box[:2] + mask_box[2:]))
            assert np.abs(found - told).max() <= 2.0
            difference = (annotation["area"] - mask_area) / (width + height)
            assert abs(difference) <= 0.6
            differences.append(difference)
            polygon = np.array(annotation["segmentation"][0]).reshape(-1, 2)
            np.testing.assert_allclose(
                [*polygon.min(0), *np.ptp(polygon, axis=0)], annotation["bbox"], atol=0.006
            )
    assert abs(np.mean(differences)) < 0.02


def test_hard_cases_are_there(coco):
    rows = coco.dataset["annotations"]
    areas = np.array([a["area"] for a in rows if not a["iscrowd"]])
    assert (areas < 32**2).sum() > 100
    assert ((areas >= 32**2) & (areas < 96**2)).sum() > 50
    assert (areas >= 96**2).sum() >= 5
    crowds = [a for a in rows if a["iscrowd"]]
    assert len(crowds) >= 3
    assert all(isinstance(a["segmentation"]["counts"], list) for a in crowds)
    counts = [len(coco.getAnnIds(imgIds=[number])) for number in coco.imgs]
    assert counts.count(0) >= 2
    assert max(counts) >= 8
    assert {a["category_id"] for a in rows} == {1, 2, 4, 7}
    assert len({a["id"] for a in rows}) == len(rows)


def test_objects_stay_visible():
    """Repaint each picture's outlines in order: what is on top must leave 60% of what is below."""
    overlaps = 0
    for seed in range(40):
        picture = draw_picture(np.random.default_rng(seed))
        height, width = picture.pixels.shape[:2]
        top = np.zeros((height, width), int)
        areas = []
        for i, drawn in enumerate(picture.objects, start=1):
            flat = [float(v) for v in drawn.polygon.ravel()]
            mask = coco_mask.decode(coco_mask.frPyObjects([flat], height, width))[..., 0] > 0
            top[mask] = i
            areas.append(mask.sum())
        if picture.crowd is not None:
            top[picture.crowd.mask] = -1
        for i, area in enumerate(areas, start=1):
            left = (top == i).sum()
            overlaps += left < area
            # pycocotools and Pillow differ by up to a pixel along the outline.
            assert left >= LEAST_VISIBLE * area - 2 * np.sqrt(area) - 4
    assert overlaps > 20


def test_run_lengths_by_hand():
    mask = np.array([[0, 1], [1, 1], [0, 0]], bool)  # columns 010 110
    assert run_lengths(mask) == [1, 1, 1, 2, 1]
    assert run_lengths(np.ones((2, 2), bool)) == [0, 4]
    assert run_lengths(np.zeros((2, 2), bool)) == [4]


def test_again_is_a_no_op_and_other_contents_are_refused(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()  # empty is fine
    assert synthesize(folder, 3, 2, 0, 1)
    before = files(folder)
    assert not synthesize(folder, 3, 2, 0, 1)
    with pytest.raises(ValueError, match="something else"):
        synthesize(folder, 4, 2, 0, 1)
    assert files(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(ValueError, match="something else"):
        synthesize(tmp_path / "mine", 3, 2, 0, 1)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep"
    with pytest.raises(ValueError, match="train must be in"):
        synthesize(tmp_path / "none", 0, 2, 0, 1)


def test_of_two_at_once_the_second_waits_and_finds_it_drawn(tmp_path, monkeypatch):
    """As two grids at demo scale begin."""
    folder, alone, drawn = tmp_path / "set", tmp_path / "alone", []
    draw = data_prep.synthesize.ordered_map
    second = Thread(target=lambda: drawn.append(synthesize(folder, 60, 2, 0, 1)))

    def beside_another(*arguments):
        monkeypatch.undo()
        second.start()
        second.join(1.0)  # long enough to draw it all, in the same place
        return draw(*arguments)

    monkeypatch.setattr(data_prep.synthesize, "ordered_map", beside_another)
    assert synthesize(folder, 60, 2, 0, 1)
    second.join()
    assert drawn == [False]
    assert synthesize(alone, 60, 2, 0, 1)
    assert files(folder) == files(alone)
    assert sorted(tmp_path.iterdir()) == [alone, folder]
