"""`export`: transformers loads a checkpoint's folder, image processor and all, and finds the same
objects in an image."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from model.detr import build_model
from model.postprocess import postprocess
from pipeline.__main__ import COMMANDS
from pipeline.cli import main
from pipeline.config import RunConfig
from pipeline.data.augment import Example, resize_for_evaluation
from pipeline.data.batch import collate
from pipeline.data.labels import Labels
from pipeline.recipes import recipe

LABELS = Labels((-1, 1, 2, -1), ("", "cat", "dog", ""))


def small(name: str, **augment: object) -> RunConfig:
    config = recipe(name)
    return replace(
        config,
        model=replace(
            config.model, num_classes=4, num_queries=20, hidden_dim=64, num_heads=4,
            encoder_layers=1, decoder_layers=2, feedforward_dim=64,
        ),
        augment=replace(config.augment, **augment),
    )  # fmt: skip


def checkpoint(config: RunConfig, path: Path) -> torch.nn.Module:
    """Writes model.pt of random weights with which different boxes get different scores."""
    torch.manual_seed(1)
    model = build_model(config.model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone."):
                scale = 0.3 if name.endswith("bias") else 1.5 * parameter.shape[-1] ** -0.5
                parameter.normal_(0, scale if parameter.dim() < 4 else 0.02)
    content = {"model": model.state_dict(), "config": config.to_json(), "labels": asdict(LABELS)}
    torch.save({**content, "progress": {}}, path)
    return model


def export(*arguments: object) -> int:
    return main("python -m pipeline", "", COMMANDS, ["export", *map(str, arguments)])


@pytest.mark.parametrize("name", ["deformable_detr_r50_two_stage", "detr_r50"])
def test_the_same_detections_from_the_same_picture(name, tmp_path, capsys):
    # Where the longer side is at its limit, transformers' rounding can give a pixel more.
    config = small(name, val_short_side=128, max_side=333)
    ours = checkpoint(config, tmp_path / "model.pt")
    assert (
        export(tmp_path / "model.pt", "--format", "transformers", "--output", tmp_path / "out") == 0
    )
    assert str(tmp_path / "out") in capsys.readouterr().out

    generator = torch.Generator().manual_seed(2)
    coarse = torch.randint(0, 256, (1, 3, 9, 7), generator=generator, dtype=torch.uint8)
    pixels = torch.nn.functional.interpolate(coarse, size=(90, 70))[0]  # [3, 90, 70]
    example = Example(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    resized = resize_for_evaluation(example, config.augment)
    batch = collate([resized], [{"id": 1, "height": 90, "width": 70}])
    with torch.no_grad():
        outputs = ours(batch.normalized_images(), batch.padding_mask)
    expected = postprocess(outputs, batch.sizes)[0]

    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    theirs = AutoModelForObjectDetection.from_pretrained(tmp_path / "out").eval()
    inputs = processor(Image.fromarray(pixels.permute(1, 2, 0).numpy()), return_tensors="pt")
    assert inputs["pixel_values"].shape == batch.images.shape
    with torch.no_grad():
        found = processor.post_process_object_detection(
            theirs(**inputs), threshold=0.0, target_sizes=[(90, 70)]
        )[0]
    assert theirs.config.id2label == {0: "LABEL_0", 1: "cat", 2: "dog", 3: "LABEL_3"}
    order = found["scores"].argsort(descending=True)[: len(expected["scores"])]
    torch.testing.assert_close(found["scores"][order], expected["scores"], atol=2e-3, rtol=0)
    best = expected["scores"].argmax()
    torch.testing.assert_close(found["boxes"][order[0]], expected["boxes"][best], atol=0.2, rtol=0)
    assert found["labels"][order[0]] == expected["labels"][best]


def test_images_that_are_not_resized_stay_so(tmp_path):
    config = small("deformable_detr_r50_single_scale", val_short_side=0)
    checkpoint(config, tmp_path / "model.pt")
    assert (
        export(tmp_path / "model.pt", "--format", "transformers", "--output", tmp_path / "out") == 0
    )
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(Image.new("RGB", (61, 47), (124, 116, 104)), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 47, 61)
    assert inputs["pixel_values"].abs().max() < 0.02  # ImageNet's mean colour
