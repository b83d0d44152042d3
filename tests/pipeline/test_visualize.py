"""What `visualize` shows is what the model does: sampling points and weights those of the operator,
gradients those of finite differences; and its pictures show it where it is."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import nn

from cuda_ops.ops import multi_scale_deformable_attention
from model.config import ModelConfig
from model.detr import build_model
from model.postprocess import class_scores, postprocess
from pipeline.__main__ import COMMANDS
from pipeline.cli import main
from pipeline.config import RunConfig
from pipeline.data.batch import STD
from pipeline.data.labels import build_labels
from pipeline.data.shards import ShardSet
from pipeline.detected import Detected, best_objects
from pipeline.figures import Points, draw_pixel_gradients, draw_sampling_points
from pipeline.look_inside import load_image, look_inside
from pipeline.pixel_gradients import differentiable_outputs, gradient_norms
from pipeline.predict import Detector
from pipeline.recipes import recipe
from pipeline.sampling_points import sampling_recorded

DEFORMABLE = {
    "multi-scale": ("deformable_detr_r50_demo", {}),
    "one point": ("deformable_detr_r50_demo", {"num_points": 1}),
    "levels apart": ("deformable_detr_r50_demo", {"level_exchange": False}),
    "single scale": ("deformable_detr_r50_single_scale_demo", {}),
    "dilated": ("deformable_detr_r50_single_scale_dc5_demo", {}),
    "refinement": ("deformable_detr_r50_refine_demo", {}),
    "two-stage": ("deformable_detr_r50_two_stage_demo", {}),
}


def config_of(name: str, **changes: object) -> ModelConfig:
    return replace(recipe(name).model, decoder_layers=2, num_queries=8, **changes)


def scrambled(config: ModelConfig, seed: int = 0) -> nn.Module:
    """A model in which offsets, weights, boxes and classes depend on the image."""
    torch.manual_seed(seed)
    model = build_model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("encoder.", "decoder.", "heads.")) and "norm" not in name:
                parameter.normal_(0, 0.3 if name.endswith("bias") else parameter.shape[-1] ** -0.5)
    return model


def padded_pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Images of 64x96 and of 96x48 pixels."""
    mask = torch.ones(2, 96, 96, dtype=torch.bool)
    mask[0, :64, :] = False
    mask[1, :, :48] = False
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    return images.masked_fill(mask[:, None], 0), mask


@pytest.mark.parametrize(("name", "changes"), DEFORMABLE.values(), ids=DEFORMABLE)
def test_the_sampling_points_are_those_of_the_operator(name, changes):
    """The unfused operator with them gives what the module gave with its fused one."""
    model = scrambled(config_of(name, **changes))
    seen: dict[str, list] = {"encoder": [], "decoder": []}

    def note(where):
        return lambda module, inputs, output: seen[where].append((module, inputs, output))

    model.encoder[-1].attention.register_forward_hook(note("encoder"))
    model.decoder[-1].cross_attention.register_forward_hook(note("decoder"))
    with torch.no_grad(), sampling_recorded(model) as (encoder, decoder):
        model(*padded_pair())
    assert len(decoder) == 1
    assert len(encoder) == (1 if model.config.level_exchange else model.config.num_levels)
    for sampling, (module, inputs, output) in zip(
        [*encoder, *decoder], [*seen["encoder"], *seen["decoder"]], strict=True
    ):
        _, _, tokens, shapes, padding = inputs
        value = module.value_proj(tokens).masked_fill(padding[..., None], 0)
        value = value.unflatten(-1, (module.num_heads, -1))
        expected = module.output_proj(
            multi_scale_deformable_attention(value, shapes, sampling.locations, sampling.weights)
        )
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        assert output.std() > 0.05
        assert sampling.weights.std() > 0.01
        torch.testing.assert_close(
            sampling.weights.sum((-1, -2)), torch.ones(sampling.weights.shape[:3])
        )
    assert decoder[0].references.shape[-1] == (4 if model.config.refines else 2)
    with torch.no_grad():
        model(*padded_pair())
    assert len(decoder) == 1  # no hook is left


def test_points_are_fractions_of_the_image_not_of_the_padding():
    """At the start (A.4) head 0's k-th point lies k cells to the right of the token's centre."""
    model = build_model(config_of("deformable_detr_r50_demo")).eval()
    with torch.no_grad(), sampling_recorded(model) as (encoder, _):
        model(*padded_pair())
    sampling = encoder[0]
    assert list(sampling.shapes) == [(12, 12), (6, 6), (3, 3), (2, 2)]
    # Token (row 3, column 5) of the finest level, in the image of 64x96 and in that of 96x48.
    token = 3 * 12 + 5
    expected = torch.tensor([[5.5 / 12, 3.5 / 8], [5.5 / 6, 3.5 / 12]])
    torch.testing.assert_close(sampling.reference_points()[:, token], expected)
    cells = torch.tensor([[[12, 8], [6, 4], [3, 2], [2, 2]], [[6, 12], [3, 6], [2, 3], [1, 2]]])
    for image in range(2):
        for level in range(4):
            for k in range(4):
                at = sampling.points()[image, token, 0, level, k]
                moved = expected[image] + torch.tensor([k + 1, 0]) / cells[image, level]
                torch.testing.assert_close(at, moved)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deformable_detr_r50_demo", {}),
        ("deformable_detr_r50_two_stage_demo", {}),
        ("deformable_detr_r50_two_stage_demo", {"activation_checkpointing": True}),
        ("detr_r50_demo", {}),
        ("detr_r50_dc5_plus_demo", {}),
    ],
)
def test_gradients_are_those_of_finite_differences(name, changes):
    model = scrambled(config_of(name, **changes)).double()
    pixels = torch.randn(1, 3, 64, 80, generator=torch.Generator().manual_seed(1)).double()
    mask = torch.zeros(1, 64, 80, dtype=torch.bool)
    images = pixels.clone().requires_grad_()
    outputs = differentiable_outputs(model, images, mask)
    query, column = 3, int(class_scores(outputs)[0, 3].argmax())
    norms = gradient_norms(outputs, images, query, column)
    assert norms.shape == (5, 64, 80)

    @torch.no_grad()
    def items(changed: torch.Tensor) -> torch.Tensor:
        found = model(changed, mask)
        score = class_scores(found)[0, query, column]
        return torch.cat([found["pred_boxes"][0, query], score[None]])

    strongest = int((norms / norms.amax((1, 2), keepdim=True)).sum(0).argmax())
    for y, x in (divmod(strongest, 80), (31, 40), (60, 7)):
        step = 1e-6
        slopes = []
        for colour in range(3):
            change = torch.zeros_like(pixels)
            change[0, colour, y, x] = step / STD[colour]  # of a pixel's range of 0 to 1
            slopes.append((items(pixels + change) - items(pixels - change)) / (2 * step))
        expected = torch.stack(slopes).norm(dim=0)
        torch.testing.assert_close(norms[:, y, x], expected, rtol=1e-4, atol=1e-9)
    assert (norms.amax((1, 2)) > 1e-7).all()


def test_gradients_pass_through_the_boxes_that_layers_hand_on():
    model = scrambled(config_of("deformable_detr_r50_two_stage_demo"))
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    whole, cut = differentiable_outputs(model, images, mask), model(images, mask)
    assert torch.equal(whole["pred_boxes"], cut["pred_boxes"])
    ours, training = (gradient_norms(outputs, images, 0, 0) for outputs in (whole, cut))
    assert (ours[0] - training[0]).abs().max() > 0.1 * ours[0].max()


def test_the_best_objects_are_among_the_detections():
    outputs = {
        "pred_logits": torch.tensor([[[-3.0, 2.0], [1.0, -1.0], [1.5, 0.0], [-4.0, -4.0]]]),
        "pred_boxes": torch.tensor(
            [[[0.5, 0.5, 0.2, 0.4], [0.2, 0.2, 0.2, 0.2], [0.5, 0.52, 0.2, 0.4], [0.8] * 4]]
        ),
    }
    best, second = best_objects(outputs, 0.1, most=5)  # query 2 is the best once more
    assert (best.query, best.column, second.query, second.column) == (0, 1, 1, 0)
    assert best.box == pytest.approx((0.4, 0.3, 0.6, 0.7))
    found = postprocess(outputs, torch.tensor([[1, 1]]))[0]
    assert best.score == pytest.approx(float(found["scores"][0]))
    assert best.box == pytest.approx(found["boxes"][0].tolist())
    assert best_objects(outputs, 0.8, most=5) == [best]
    assert best_objects(outputs, 0.1, most=1) == [best]
    assert best_objects(outputs, 0.95, most=5) == []
    # With softmax the last column is no object's.
    outputs["classification"] = "softmax"
    assert [(one.query, one.column) for one in best_objects(outputs, 0.6, 5)] == [(1, 0), (2, 0)]


# Pictures


def colour_at(figure, axis, x: float, y: float) -> np.ndarray:
    """The rendered colour [3] at fractions (x, y) of the picture that `axis` holds."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    rendered = np.asarray(canvas.buffer_rgba())
    column, row = axis.transData.transform((x, y))
    return rendered[rendered.shape[0] - 1 - int(row), int(column), :3].astype(int)


def test_a_gradient_is_drawn_where_it_is():
    image = np.zeros((60, 120, 3), np.uint8)
    norms = np.zeros((1, 5, 60, 120), np.float32)
    norms[0, 1, 40:50, 90:110] = 7
    found = Detected(0, 0, 0.5, (0.1, 0.1, 0.3, 0.4))
    figure = draw_pixel_gradients(image, [found], ["cat"], norms)
    of_y = figure.axes[2]
    assert "partial y" in of_y.get_title()
    assert colour_at(figure, of_y, 100 / 120, 45 / 60).sum() > 600
    for x, y in ((100 / 120, 15 / 60), (20 / 120, 45 / 60), (80 / 120, 45 / 60)):
        assert colour_at(figure, of_y, x, y).sum() < 30
    assert colour_at(figure, figure.axes[3], 100 / 120, 45 / 60).sum() < 30
    red, green, blue = colour_at(figure, figure.axes[0], 0.3, 0.25)
    assert green > 200  # the box
    assert max(red, blue) < 100


def test_sampling_points_are_drawn_where_they_are():
    image = np.full((80, 40, 3), 128, np.uint8)
    points = np.array([[0.25, 0.75], [0.75, 0.1], [1.4, 0.5]], np.float32)
    token = Points(np.array([0.5, 0.5]), points, np.array([0.6, 0.1, 0.3], np.float32))
    query = Points(np.array([0.2, 0.3]), points, np.array([0.01, 0.98, 0.01], np.float32))
    assert token.outside() == pytest.approx(0.3)
    found = Detected(0, 0, 0.5, (0.1, 0.2, 0.5, 0.9))
    figure = draw_sampling_points(image, [found], ["cat"], [token], [query])
    encoder, decoder = figure.axes[:2]
    # Turbo: the heaviest of all is dark red, light ones dark blue; both have one scale.
    red, green, blue = colour_at(figure, decoder, 0.75, 0.1)
    assert red > 100 > max(green, blue)
    red, green, blue = colour_at(figure, encoder, 0.75, 0.1)
    assert blue > red
    assert (colour_at(figure, encoder, 0.5, 0.5) == (57, 255, 20)).all()  # the reference
    assert (colour_at(figure, decoder, 0.2, 0.3) == (57, 255, 20)).all()
    assert [text.get_text() for text in decoder.texts] == ["cat 0.50", "1% outside"]
    assert [text.get_text() for text in encoder.texts] == ["30% outside"]


# The command


def save_checkpoint(name: str, shards: ShardSet, path) -> RunConfig:
    config = recipe(name)
    config = replace(config, model=config_of(name))
    labels = build_labels(shards.categories, config.data.labels)
    config = replace(config, model=replace(config.model, num_classes=labels.num_classes))
    content = {"model": scrambled(config.model).state_dict(), "config": config.to_json()}
    torch.save({**content, "labels": asdict(labels), "progress": {}}, path)
    return config


@pytest.fixture(scope="module")
def shards(drawn) -> ShardSet:
    return ShardSet(drawn.shards / "val")


def visualize(*arguments: object) -> int:
    return main("python -m pipeline", "", COMMANDS, ["visualize", *map(str, arguments)])


def test_pictures_of_the_images_asked_for(shards, tmp_path, capsys):
    save_checkpoint("demo", shards, tmp_path / "model.pt")
    ids = [int(shards.image_id[7]), int(shards.image_id[2])]
    status = visualize(
        tmp_path / "model.pt", "--data", shards.folder, "--output", tmp_path / "out",
        "--image-ids", *ids, "--threshold", 0, "--objects", 2, "--device", "cpu",
    )  # fmt: skip
    said = capsys.readouterr()
    assert status == 0, said.err
    names = {f"{kind}_{i}.png" for kind in ("pixel_gradients", "sampling_points") for i in ids}
    saved = set((tmp_path / "out").iterdir())
    assert {path.name for path in saved} == {*names, "predictions.png"}
    for path in saved:
        assert f"saved {path}\n" in said.out
        picture = Image.open(path)
        assert min(picture.size) > 300
        assert len(set(picture.convert("RGB").resize((64, 64)).getdata())) > 100


def test_detr_has_gradients_but_no_sampling_points(shards, tmp_path):
    save_checkpoint("detr_r50_demo", shards, tmp_path / "model.pt")
    said: list[str] = []
    detector = Detector.load(tmp_path / "model.pt", "cpu")
    saved = look_inside(detector, shards, [0], tmp_path / "out", 1, 0.0, said.append)
    assert [path.name.split("_")[0] for path in saved] == ["pixel", "predictions.png"]
    assert said[0].endswith("are drawn of deformable_detr alone, none of detr")


def test_an_image_without_objects_is_left_out_and_told(shards, tmp_path):
    save_checkpoint("demo", shards, tmp_path / "model.pt")
    detector = Detector.load(tmp_path / "model.pt", "cpu")
    best = [float(class_scores(outputs).max()) for outputs in outputs_of(detector, shards, [0, 1])]
    assert best[0] != best[1]
    weaker, stronger = int(np.argmin(best)), int(np.argmax(best))
    said: list[str] = []
    saved = look_inside(detector, shards, [0, 1], tmp_path / "out", 1, sum(best) / 2, said.append)
    ids = shards.image_id.tolist()
    assert saved[0].name == f"pixel_gradients_{ids[stronger]}.png"
    assert len(saved) == 3
    assert [line for line in said if f"image {ids[weaker]}: no object scores" in line]


@torch.no_grad()
def outputs_of(detector: Detector, shards: ShardSet, indices: list[int]) -> list[dict]:
    batches = [load_image(detector, shards, index)[1] for index in indices]
    return [detector.model(batch.normalized_images(), batch.padding_mask) for batch in batches]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("demo", ["--image-ids", "5"], ["--image-ids: got 5", "12 images", "nearest is 900001"]),
        ("demo", ["--threshold", "1"], ["--threshold: got 1", "the best score"]),
        ("demo", ["--threshold", "30"], ["--threshold: got 30", "0 to 1"]),
        ("demo", ["--count", "0"], ["--count: got 0"]),
        ("demo", ["--objects", "0"], ["--objects: got 0"]),
        ("demo", ["--output", "Makefile"], ["--output", "Makefile", "expected a folder"]),
        ("demo", ["--output", "none/out"], ["--output", "'none' does not exist"]),
        ("faster_rcnn_r50_fpn_demo", [], ["faster_rcnn", "expected deformable_detr or detr"]),
    ],
)
def test_one_clear_line(name, options, words, shards, tmp_path, capsys):
    save_checkpoint(name, shards, tmp_path / "model.pt")
    output = [] if "--output" in options else ["--output", tmp_path / "out"]
    given = ("--data", shards.folder, "--device", "cpu", *output, *options)
    assert visualize(tmp_path / "model.pt", *given) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "out").exists()
