"""torch.compile of the whole forward: one graph without breaks for images of any size."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from model.config import ModelConfig
from model.detr import build_model


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "changes",
    [
        {"two_stage": True},
        pytest.param({"neck": "bifpn"}, marks=pytest.mark.chaos),
        {"architecture": "detr", "classification": "softmax", "num_levels": 1},
        {"architecture": "conditional_detr", "num_levels": 1},
        {"architecture": "smca_detr", "classification": "focal_no_object", "num_levels": 1},
        pytest.param(
            {
                "architecture": "sam_multiscale_detr",
                "num_levels": 3,
                "box_refine": True,
                "salient_gaussians": True,
            },
            marks=pytest.mark.chaos,
        ),
        pytest.param({"architecture": "dino", "two_stage": True}, marks=pytest.mark.chaos),
        {"architecture": "anchor_detr", "num_levels": 1, "num_patterns": 2},
        {"architecture": "dab_detr", "num_levels": 1, "num_patterns": 2},
        pytest.param(
            {"architecture": "dab_deformable_detr", "box_refine": True}, marks=pytest.mark.chaos
        ),
    ],
    ids=[
        "two_stage",
        "bifpn",
        "detr",
        "conditional",
        "smca",
        "sam_multiscale",
        "dino",
        "anchor",
        "dab",
        "dab_deformable",
    ],
)
def test_one_graph_for_images_of_any_size(
    changes: dict[str, Any], small_config: Callable[..., ModelConfig]
) -> None:
    torch.manual_seed(0)
    model = build_model(small_config(**changes)).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for height, width in ((96, 128), (160, 96), (128, 224)):
        images = torch.randn(2, 3, height, width)
        padding = torch.zeros(2, height, width, dtype=torch.bool)
        padding[1, height // 2 :] = True
        with torch.no_grad():
            found, expected = compiled(images, padding), model(images, padding)
        for name in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
