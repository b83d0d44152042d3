"""The graph that is exported: standard operators, sizes, padding, and the check of a file."""

from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pipeline import export_check
from pipeline.errors import UserError
from pipeline.export_check import check
from pipeline.export_graph import PixelsToDetections, exported, smallest_side, standard_operators
from pipeline.predict import Detector
from tests.pipeline.export_cases import (
    LABELS,
    assert_same,
    expected,
    lively,
    padded,
    pictures,
    tiny,
)

VARIANTS = [
    ("deformable_detr_r50_two_stage_demo", {}),
    ("deformable_detr_r50_refine_demo", {"neck": "fpn", "level_exchange": False}),
    ("deformable_detr_r50_demo", {"backbone": "tiny_dcn", "neck": "bifpn", "num_levels": 5}),
    ("deformable_detr_r50_single_scale_dc5_demo", {}),
    ("detr_r50_demo", {}),
    ("detr_r50_dc5_plus_demo", {}),
    ("conditional_detr_r50_demo", {}),
    ("smca_detr_r50_demo", {}),
    ("anchor_detr_r50_demo", {}),
    ("dab_detr_r50_demo", {}),
    ("dab_deformable_detr_r50_demo", {}),
    ("dino_r50_4scale_demo", {}),
    ("sam_detr_r50_demo", {}),
    ("sam_detr_r50_multiscale_smca_demo", {}),
    ("deformable_detr_r50_12ep_demo", {}),
]


def detector(config) -> Detector:
    return Detector(lively(config), LABELS, config, torch.device("cpu"))


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_standard_operators_detect_the_same(name, changes):
    config = tiny(name, **changes)
    model = lively(config)
    graph = PixelsToDetections(model).eval()
    images = pictures((128, 100), (77, 160))
    with torch.no_grad(), standard_operators():
        found = graph(*padded(images, colour=200))  # padding's colour does not count
    assert_same(found, expected(model, images), atol=1e-5)

    with torch.no_grad(), standard_operators():
        operators = {str(node.target) for node in make_fx(graph)(*padded(images)).graph.nodes}
    assert any(name.startswith("aten.") for name in operators)
    ours = {name for name in operators if "cuda_ops" in name or "torchvision" in name}
    assert ours <= ({"torchvision.roi_align.default"} if "sam_" in name else set())


def test_a_check_passes_what_is_equal_and_nothing_else():
    config = tiny("deformable_detr_r50_two_stage_demo")
    ours = detector(config)
    graph = PixelsToDetections(ours.model).eval()

    def run(images, sizes):
        with torch.no_grad():
            return graph(images, sizes)

    def other_boxes(images, sizes):
        scores, labels, boxes = run(images, sizes)
        boxes[-1, 7, 2] += 3e-4
        return scores, labels, boxes

    def other_label(images, sizes):
        scores, labels, boxes = run(images, sizes)
        labels[0, 3] = (labels[0, 3] + 1) % 4
        return scores, labels, boxes

    def no_number(images, sizes):
        scores, labels, boxes = run(images, sizes)
        boxes[0, 0, 0] = torch.nan
        return scores, labels, boxes

    def another_image(images, sizes):
        return run(images.flip(-1), sizes)

    def fewer(images, sizes):
        return tuple(x[:, :-1] for x in run(images, sizes))

    def sizes_ignored(images, sizes):
        return run(images, torch.tensor(images.shape[2:]).expand(len(images), 2))

    said: list[str] = []
    found = check(ours, run, said.append)
    assert len(found) == len(said) == 3
    assert {difference.shape[0] for difference in found} == {1, 2, 3}
    assert all(max(difference.scores, difference.boxes) < 1e-5 for difference in found)
    for wrong in (other_boxes, other_label, no_number, another_image, fewer, sizes_ignored):
        with pytest.raises(UserError, match="exported file"):
            check(ours, wrong, said.append)


def test_what_cannot_be_a_graph_is_refused():
    config = tiny("faster_rcnn_r50_fpn_demo")
    with pytest.raises(UserError, match="faster_rcnn"):
        exported(detector(config))


def test_the_smallest_side_gives_every_query_a_token():
    for name, changes in VARIANTS:
        model = tiny(name, **changes).model
        side = smallest_side(model)
        finest = 8 if model.num_levels > 1 else 16 if model.dilation else 32
        assert side > finest
        if model.two_stage:
            assert (-(-side // finest)) ** 2 >= model.num_queries
    full = replace(tiny("deformable_detr_r50_two_stage_demo").model, num_queries=300)
    assert smallest_side(full) == 144


@pytest.mark.chaos  # half a minute each
@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_every_variant_in_a_file_of_its_own(name, changes, tmp_path):
    from pipeline.export_onnx import onnx_runner, write_onnx
    from pipeline.export_torch import archive_runner, write_archive

    ours = detector(tiny(name, **changes))
    for write, runner, file in (
        (write_onnx, onnx_runner, "detector.onnx"),
        (write_archive, archive_runner, "detector.pt2"),
    ):
        write(ours, tmp_path / file)
        for difference in check(ours, runner(tmp_path / file), print):
            assert max(difference.scores, difference.boxes) <= export_check.TOLERANCE
