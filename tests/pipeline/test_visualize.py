"""What `visualize` shows is what the model does: sampling points and weights those of the operator,
gradients those of finite differences; and its pictures show it where it is."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import nn

from cuda_ops.ops import multi_scale_deformable_attention
from model.attention import DeformableAttention
from model.boxes import inverse_sigmoid
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
from pipeline.sampling_points import deformable_attention_of, sampling_recorded

DEFORMABLE = {
    "multi-scale": ("deformable_detr_r50_demo", {}),
    "one point": ("deformable_detr_r50_demo", {"num_points": 1}),
    "levels apart": ("deformable_detr_r50_demo", {"level_exchange": False}),
    "single scale": ("deformable_detr_r50_single_scale_demo", {}),
    "dilated": ("deformable_detr_r50_single_scale_dc5_demo", {}),
    "refinement": ("deformable_detr_r50_refine_demo", {}),
    "two-stage": ("deformable_detr_r50_two_stage_demo", {}),
    "DINO": ("dino_r50_4scale_demo", {}),
    "DAB": ("dab_deformable_detr_r50_demo", {}),
    "DN-DAB": ("dn_dab_deformable_detr_r50_demo", {}),
    "SAM": ("sam_detr_r50_multiscale_demo", {}),
}
BY_BOXES = ("refinement", "two-stage", "DINO", "DAB", "DN-DAB")
"""Those whose decoder attends to points around the boxes that the layer before hands on."""


def config_of(name: str, **changes: object) -> ModelConfig:
    return replace(recipe(name).model, decoder_layers=2, num_queries=8, **changes)


def scrambled(config: ModelConfig, seed: int = 0) -> nn.Module:
    """A model in which offsets, weights, boxes and classes depend on the image."""
    torch.manual_seed(seed)
    model = build_model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = ("encoder.", "decoder.", "heads.", "queries.")
            if name.startswith(parts) and "norm" not in name:
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

    deformable = model.config.architecture != "sam_multiscale_detr"  # its decoder
    model.encoder[-1].attention.register_forward_hook(note("encoder"))
    if deformable:
        model.decoder[-1].cross_attention.register_forward_hook(note("decoder"))
    with torch.no_grad(), sampling_recorded(model) as (encoder, decoder):
        model(*padded_pair())
    assert len(decoder) == int(deformable)
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
    calls = len(encoder), len(decoder)
    with torch.no_grad():
        model(*padded_pair())
    assert (len(encoder), len(decoder)) == calls  # no hook is left


@pytest.mark.parametrize(("name", "changes"), DEFORMABLE.values(), ids=DEFORMABLE)
def test_a_token_samples_by_its_offsets_in_cells_of_the_image(name, changes):
    """Worked out from the module's offsets for one token of the finest level, in fractions of each
    image, whatever its padding."""
    model = scrambled(config_of(name, **changes))
    calls = inputs_of(model.encoder[-1].attention)
    with torch.no_grad(), sampling_recorded(model) as (encoder, _):
        model(*padded_pair())
    attention, sampling = model.encoder[-1].attention, encoder[0]
    row, column = 1, 1
    token = row * sampling.shapes[0][1] + column
    offsets = attention.sampling_offsets(calls[0][0][:, token])
    for image, (height, width) in enumerate(((64, 96), (96, 48))):
        # Of a padded level an image has all cells that its pixels touch: (across, down).
        cells = [
            (math.ceil(columns * width / 96), math.ceil(rows * height / 96))
            for rows, columns in sampling.shapes
        ]
        across, down = cells[0]
        centre = ((column + 0.5) / across, (row + 0.5) / down)
        assert sampling.reference_points()[image, token].tolist() == pytest.approx(centre)
        found = sampling.points()[image, token].flatten(0, -2).tolist()
        for point, (head, level, k) in zip(found, order_of(attention), strict=True):
            x, y = offset_of(offsets[image], attention, head, level, k)
            across, down = cells[level]
            by_hand = (centre[0] + x / across, centre[1] + y / down)
            assert point == pytest.approx(by_hand, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("case", BY_BOXES)
def test_a_query_samples_by_its_offsets_in_halves_of_its_box(case):
    """Worked out from the module's offsets and the box that the layer before left, in fractions of
    each image, whatever its padding."""
    name, changes = DEFORMABLE[case]
    model = scrambled(config_of(name, **changes))
    if case == "DINO":
        nn.init.constant_(model.heads.norm.weight, 0.5)
    attention = model.decoder[-1].cross_attention
    calls, states = inputs_of(attention), []
    model.decoder[0].register_forward_hook(lambda _, inputs, state: states.append(state))
    with torch.no_grad(), sampling_recorded(model) as (_, decoder):
        outputs = model(*padded_pair())
    boxes = outputs["aux_outputs"][-1]["pred_boxes"]
    if case == "DINO":  # which predicts boxes from normed states, and hands on those of others
        anchors = inverse_sigmoid(outputs["enc_outputs"]["pred_boxes"], 1e-3)
        handed_on = (anchors + model.heads.boxes(states[0])).sigmoid()
        assert (handed_on - boxes).abs().max() > 0.01
        boxes = handed_on
    torch.testing.assert_close(decoder[0].reference_points(), boxes[..., :2])
    for image, query in ((0, 3), (1, 6)):
        cx, cy, width, height = boxes[image, query].tolist()
        offsets = attention.sampling_offsets(calls[0][0][image, query])
        found = decoder[0].points()[image, query].flatten(0, -2).tolist()
        for point, (head, level, k) in zip(found, order_of(attention), strict=True):
            x, y = offset_of(offsets, attention, head, level, k)
            by_hand = (
                cx + x / attention.num_points * width / 2,
                cy + y / attention.num_points * height / 2,
            )
            assert point == pytest.approx(by_hand, rel=1e-4, abs=1e-5)


def inputs_of(module: nn.Module) -> list[tuple]:
    """The arguments of calls to come."""
    calls: list[tuple] = []
    module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    return calls


def order_of(attention: DeformableAttention) -> list[tuple[int, int, int]]:
    """(head, level, point) of the points of a figure."""
    sizes = (attention.num_heads, attention.num_levels, attention.num_points)
    return list(np.ndindex(sizes))


def offset_of(
    offsets: torch.Tensor, attention: DeformableAttention, head: int, level: int, k: int
) -> list[float]:
    """(x, y) among the flat offsets of a query."""
    at = ((head * attention.num_levels + level) * attention.num_points + k) * 2
    return offsets[at : at + 2].tolist()


@pytest.mark.parametrize(
    "name",
    [
        "detr_r50_demo",
        "conditional_detr_r50_demo",
        "smca_detr_r50_demo",
        "dab_detr_r50_demo",
        "sam_detr_r50_demo",
        "anchor_detr_r50_demo",
    ],
)
def test_dense_attention_samples_no_points(name):
    model = build_model(config_of(name)).eval()
    assert deformable_attention_of(model) == (None, None)
    with torch.no_grad(), sampling_recorded(model) as (encoder, decoder):
        model(*padded_pair())
    assert (encoder, decoder) == ([], [])


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
        ("dino_r50_4scale_demo", {}),
        ("dab_deformable_detr_r50_demo", {}),
        ("anchor_detr_r50_demo", {}),
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


def test_a_figure_of_an_encoder_alone_has_the_box():
    image = np.full((80, 40, 3), 128, np.uint8)
    token = Points(np.array([0.5, 0.5]), np.array([[0.25, 0.75]]), np.array([1.0]))
    found = Detected(0, 0, 0.5, (0.1, 0.2, 0.5, 0.9))
    figure = draw_sampling_points(image, [found], ["cat"], [token], [])
    encoder, _ = figure.axes
    assert encoder.get_ylabel() == "(a) encoder"
    assert [text.get_text() for text in encoder.texts] == ["cat 0.50"]
    assert (colour_at(figure, encoder, 0.5, 0.5) == (57, 255, 20)).all()
    red, green, blue = colour_at(figure, encoder, 0.25, 0.75)
    assert red > 100 > max(green, blue)


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


@pytest.mark.parametrize("name", ["predictions.png", "pixel_gradients_900001.png"])
def test_a_picture_that_does_not_fit_on_the_disk_is_named(shards, tmp_path, capsys, name):
    save_checkpoint("demo", shards, tmp_path / "model.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to("/dev/full")
    given = ("--data", shards.folder, "--output", tmp_path / "out", "--image-ids", 900001)
    assert visualize(tmp_path / "model.pt", *given, "--threshold", 0, "--device", "cpu") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'out' / name}: No space left on device; ")


def test_detr_has_gradients_but_no_sampling_points(shards, tmp_path):
    said, saved = looked_inside("detr_r50_demo", shards, tmp_path)
    assert saved == ["pixel", "predictions.png"]
    assert said[0].startswith("no sampling points (Figure 6) of the encoder and the decoder: detr ")


def test_figure_6_of_multi_scale_sam_detr_is_of_its_encoder(shards, tmp_path):
    said, saved = looked_inside("sam_detr_r50_multiscale_demo", shards, tmp_path)
    assert saved == ["pixel", "sampling", "predictions.png"]
    assert said[0].startswith("no sampling points (Figure 6) of the decoder: sam_multiscale_detr ")


def test_dino_has_both_figures(shards, tmp_path):
    said, saved = looked_inside("dino_r50_4scale_demo", shards, tmp_path)
    assert saved == ["pixel", "sampling", "predictions.png"]
    assert all(line.startswith("saved ") for line in said)


def looked_inside(name: str, shards: ShardSet, folder) -> tuple[list[str], list[str]]:
    """What is told about the first image, and the kinds of files that are saved."""
    save_checkpoint(name, shards, folder / "model.pt")
    said: list[str] = []
    detector = Detector.load(folder / "model.pt", "cpu")
    saved = look_inside(detector, shards, [0], folder / "out", 1, 0.0, said.append)
    return said, [path.name.split("_")[0] for path in saved]


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
        ("faster_rcnn_r50_fpn_demo", [], ["faster_rcnn", "expected a detector by queries"]),
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
