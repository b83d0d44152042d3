"""DINO against a plain second writing of it: from a published state dict's names to its boxes."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from model.config import ModelConfig
from model.criterion import build_criterion
from model.detr import build_model
from model.family import contrastive_denoising
from model.family.contrastive_denoising import draw_noise
from model.family.look_forward_twice import LookForwardTwice
from model.family.mixed_selection import MixedQueries
from model.heads import Heads
from model.parts import References
from model.proposals import ProposalQueries
from model.weights import load_official
from pipeline.checkpoint_store import Progress, write
from pipeline.config import InitConfig
from pipeline.initialise import initial_model
from pipeline.recipes import recipe

Config = Callable[..., ModelConfig]
Batch = tuple[Tensor, Tensor, list[dict[str, Tensor]]]
State = dict[str, Tensor]

WIDTH, HEADS, CLASSES, QUERIES, POINTS, LEVELS = 32, 2, 5, 9, 4, 4
SMALL: dict[str, Any] = {
    "architecture": "dino",
    "two_stage": True,
    "num_classes": CLASSES,
    "num_queries": QUERIES,
    "hidden_dim": WIDTH,
    "num_heads": HEADS,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward_dim": 48,
    "dropout": 0.0,
    "class_weight": 1.0,
    "denoising_pairs": 4,
    "denoising_label_noise": 0.25,
    "denoising_box_noise": 1.0,
}


def published() -> State:
    """A checkpoint with random numbers in the published names and shapes for `SMALL`, float64."""
    state: State = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs) / math.sqrt(inputs)
        state[f"{name}.bias"] = 0.3 * torch.randn(outputs)

    def norm(name: str) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(WIDTH)
        state[f"{name}.bias"] = 0.2 * torch.randn(WIDTH)

    def mlp(name: str, *widths: int) -> None:
        for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            linear(f"{name}.layers.{index}", outputs, inputs)

    def deformable(name: str) -> None:
        samples = HEADS * LEVELS * POINTS
        for part, outputs in (("sampling_offsets", 2 * samples), ("attention_weights", samples)):
            linear(f"{name}.{part}", outputs, WIDTH)
        for part in ("value_proj", "output_proj"):
            linear(f"{name}.{part}", WIDTH, WIDTH)

    for layer, attention in (("encoder.layers.0", "self_attn"), ("decoder.layers.0", "cross_attn"),
                             ("decoder.layers.1", "cross_attn")):  # fmt: skip
        name = f"transformer.{layer}"
        deformable(f"{name}.{attention}")
        linear(f"{name}.linear1", 48, WIDTH)
        linear(f"{name}.linear2", WIDTH, 48)
        norm(f"{name}.norm1")
        norm(f"{name}.norm2")
        if attention == "cross_attn":
            norm(f"{name}.norm3")
            linear(f"{name}.self_attn.out_proj", WIDTH, WIDTH)
            state[f"{name}.self_attn.in_proj_weight"] = torch.randn(3 * WIDTH, WIDTH) / 6
            state[f"{name}.self_attn.in_proj_bias"] = 0.3 * torch.randn(3 * WIDTH)
    linear("transformer.enc_output", WIDTH, WIDTH)
    norm("transformer.enc_output_norm")
    norm("transformer.decoder.norm")
    mlp("transformer.decoder.ref_point_head", 2 * WIDTH, WIDTH, WIDTH)
    mlp("transformer.enc_out_bbox_embed", WIDTH, WIDTH, WIDTH, 4)
    linear("transformer.enc_out_class_embed", CLASSES, WIDTH)
    state["transformer.tgt_embed.weight"] = torch.randn(QUERIES, WIDTH)
    state["transformer.level_embed"] = torch.randn(LEVELS, WIDTH)
    state["label_enc.weight"] = torch.randn(CLASSES + 1, WIDTH)
    for level, (inputs, side) in enumerate(((512, 1), (1024, 1), (2048, 1), (2048, 3))):
        weight = torch.randn(WIDTH, inputs, side, side) / math.sqrt(inputs * side**2)
        state[f"input_proj.{level}.0.weight"] = weight
        state[f"input_proj.{level}.0.bias"] = torch.randn(WIDTH)
        norm(f"input_proj.{level}.1")
    mlp("bbox_embed.0", WIDTH, WIDTH, WIDTH, 4)
    linear("class_embed.0", CLASSES, WIDTH)
    for name, value in torchvision.models.resnet50(weights=None).state_dict().items():
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            positive = torch.rand_like(value) + 0.5 if name.endswith("running_var") else value
            state[f"backbone.0.body.{name}"] = positive
    state = {name: value.double() for name, value in state.items()}
    for name in [n for n in state if n.startswith(("bbox_embed.", "class_embed."))]:
        for layer in range(2):
            alias = name.replace(".0.", f".{layer}.", 1)
            state[alias] = state[f"transformer.decoder.{alias}"] = state[name]
    return state


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, State]:
    torch.manual_seed(0)
    state = published()
    model = build_model(ModelConfig(**SMALL)).double()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    load_official(model, state)
    return model, state


@pytest.fixture(scope="module")
def pictures() -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Two images padded to 64 x 96, and the (height, width) that is valid of each."""
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)).double()
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, 40:], padding[1, :, 72:] = True, True
    return images.masked_fill(padding[:, None], 0.0), padding, [(64, 96), (40, 72)]


class Plain:
    """The decoder's side of DINO for one image, in the published names."""

    def __init__(self, state: State, tokens: Tensor, valid: tuple[int, int]) -> None:
        self.state, self.tokens = state, tokens
        self.shapes = [(math.ceil(64 / s), math.ceil(96 / s)) for s in (8, 16, 32, 64)]
        # Nearest sampling of the padding mask: cell i of n is padded if pixel i * size / n is.
        self.valid = [
            (sum(y * 64 // h < valid[0] for y in range(h)),
             sum(x * 96 // w < valid[1] for x in range(w)))
            for h, w in self.shapes
        ]  # fmt: skip
        cells = zip(self.shapes, self.valid, strict=True)
        self.inside = torch.tensor(
            [y < v and x < u for (h, w), (v, u) in cells for y in range(h) for x in range(w)]
        )

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def mlp(self, name: str, x: Tensor, layers: int) -> Tensor:
        for index in range(layers):
            x = self.linear(f"{name}.layers.{index}", x)
            x = x if index == layers - 1 else x.clamp(min=0)
        return x

    def norm(self, name: str, x: Tensor) -> Tensor:
        deviation = x - x.mean(-1, keepdim=True)
        normed = deviation / (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return normed * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def first_stage(self) -> tuple[Tensor, Tensor]:
        """Class logits and boxes of the selected tokens, best first."""
        boxes = []
        for level, ((height, width), (tall, wide)) in enumerate(
            zip(self.shapes, self.valid, strict=True)
        ):
            side = 0.05 * 2**level
            for y in range(height):
                boxes += [[(x + 0.5) / wide, (y + 0.5) / tall, side, side] for x in range(width)]
        proposals = torch.tensor(boxes, dtype=torch.float32)
        usable = self.inside & ((proposals > 0.01) & (proposals < 0.99)).all(1)
        base = (proposals / (1 - proposals)).log()
        base[~usable] = math.inf
        tokens = self.linear("transformer.enc_output", self.tokens * usable[:, None])
        tokens = self.norm("transformer.enc_output_norm", tokens)
        logits = self.linear("transformer.enc_out_class_embed", tokens)
        scores = logits.max(1).values.tolist()
        best = sorted(range(len(scores)), key=lambda token: -scores[token])[:QUERIES]
        change = self.mlp("transformer.enc_out_bbox_embed", tokens[best], 3)
        return logits[best], (change + base[best]).sigmoid()

    def decode(self, content: Tensor, anchors: Tensor, sees: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Logits and boxes of each layer, of contents [Q, C] and anchors [Q, 4]; sees [Q, Q]:
        which query (row) attends to which."""
        found, before = [], anchors
        for index in range(2):
            name = f"transformer.decoder.layers.{index}"
            (tall, wide), (height, width) = self.valid[0], self.shapes[0]
            covered = torch.tensor([wide / width, tall / height]).repeat(2)
            there = anchors * covered
            sines = [self.sine(there[:, i]) for i in (1, 0, 2, 3)]
            position = self.mlp("transformer.decoder.ref_point_head", torch.cat(sines, 1), 2)
            content = self.attend_each_other(name, content, position, sees)
            content = self.sample(name, content, position, anchors)
            hidden = self.linear(f"{name}.linear1", content).clamp(min=0)
            content = self.norm(f"{name}.norm3", content + self.linear(f"{name}.linear2", hidden))
            normed = self.norm("transformer.decoder.norm", content)
            boxes = (self.mlp("bbox_embed.0", normed, 3) + logit(before)).sigmoid()
            found.append((self.linear("class_embed.0", normed), boxes))
            before = (self.mlp("bbox_embed.0", content, 3) + logit(anchors)).sigmoid()
            anchors = before.detach()
        return found

    def sine(self, x: Tensor) -> Tensor:
        """[Q] to [Q, C / 2] at temperature 10000."""
        columns = []
        for pair in range(WIDTH // 4):
            exponent = torch.tensor(4 * pair / WIDTH, dtype=torch.float32)
            angle = x * (2 * math.pi) / 10000**exponent
            columns += [angle.sin(), angle.cos()]
        return torch.stack(columns, dim=1)

    def attend_each_other(self, name: str, x: Tensor, position: Tensor, sees: Tensor) -> Tensor:
        weight = self.state[f"{name}.self_attn.in_proj_weight"].split(WIDTH)
        bias = self.state[f"{name}.self_attn.in_proj_bias"].split(WIDTH)
        inputs = (x + position, x + position, x)
        query, key, value = (
            (x @ w.T + b).chunk(HEADS, 1) for x, w, b in zip(inputs, weight, bias, strict=True)
        )
        attended = []
        for q, k, v in zip(query, key, value, strict=True):
            weights = (q @ k.T / math.sqrt(WIDTH / HEADS)).exp() * sees
            attended.append(weights / weights.sum(1, keepdim=True) @ v)
        attended = self.linear(f"{name}.self_attn.out_proj", torch.cat(attended, 1))
        return self.norm(f"{name}.norm2", x + attended)

    def sample(self, name: str, x: Tensor, position: Tensor, anchors: Tensor) -> Tensor:
        """Deformable attention: head by head and level by level."""
        attention = f"{name}.cross_attn"
        value = self.linear(f"{attention}.value_proj", self.tokens) * self.inside[:, None]
        maps = value.split([h * w for h, w in self.shapes])
        offsets = self.linear(f"{attention}.sampling_offsets", x + position)
        offsets = offsets.view(-1, HEADS, LEVELS, POINTS, 2)
        weights = self.linear(f"{attention}.attention_weights", x + position)
        weights = weights.view(-1, HEADS, LEVELS * POINTS).softmax(-1)
        weights = weights.view(-1, HEADS, LEVELS, POINTS)
        per_head = []
        for head in range(HEADS):
            total: Any = 0
            for level, (height, width) in enumerate(self.shapes):
                tall, wide = self.valid[level]
                covered = torch.tensor([wide / width, tall / height])
                centre, size = anchors[:, None, :2] * covered, anchors[:, None, 2:] * covered
                points = centre + offsets[:, head, level] / POINTS * size * 0.5
                part = maps[level].chunk(HEADS, 1)[head].T.reshape(1, -1, height, width)
                grid = (2 * points - 1)[None]
                sampled = F.grid_sample(part, grid, align_corners=False)[0]  # [D, Q, K]
                total = total + (sampled * weights[:, head, level]).sum(-1).T
            per_head.append(total)
        attended = self.linear(f"{attention}.output_proj", torch.cat(per_head, 1))
        return self.norm(f"{name}.norm1", x + attended)


def logit(x: Tensor) -> Tensor:
    return (x.clamp(1e-3, 1) / (1 - x).clamp(1e-3, 1)).log()


def near(found: Tensor, expected: Tensor) -> None:
    """Equal but for what adds up in another order."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_predictions_from_published_weights(loaded: Any, pictures: Any) -> None:
    """Of the queries that detect, of the first stage and of the denoising queries."""
    model, state = loaded
    images, padding, valid = pictures
    targets = [
        {"labels": torch.tensor([1, 4]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3],
                                                                [0.9, 0.5, 0.3, 0.9]]).double()},
        {"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.6, 0.7, 0.2]]).double()},
    ]  # fmt: skip
    torch.manual_seed(3)
    outputs = model.train()(images, padding, targets)
    torch.manual_seed(3)
    noise = draw_noise(2, torch.cat([t["boxes"] for t in targets]), CLASSES)
    moved = contrastive_denoising.noised_boxes(
        torch.cat([t["boxes"] for t in targets]), noise, scale=1.0
    )
    detecting = [*outputs["aux_outputs"], outputs]
    (group,) = outputs["groups"]
    denoised = [*group["aux_outputs"], group]

    # Two groups of two positive and two negative places, behind those that detect.
    owner = torch.tensor([-1] * QUERIES + [0] * 4 + [1] * 4)
    sees = (owner == -1) | (owner[:, None] == owner)
    memory = model.encode(images, padding)
    first = 0
    for image, target in enumerate(targets):
        plain = Plain(state, memory.tokens[image], valid[image])
        assert torch.equal(plain.inside, ~memory.padding[image])
        logits, boxes = plain.first_stage()
        near(outputs["enc_outputs"]["pred_logits"][image], logits)
        near(outputs["enc_outputs"]["pred_boxes"][image], boxes)
        content, anchors = torch.zeros(8, WIDTH).double(), torch.full((8, 4), 0.5).double()
        for part in range(4):
            for box, label in enumerate(target["labels"].tolist()):
                at = (part // 2, part % 2, first + box)
                told = noise.label[at] if noise.flip[at] < 0.25 else label
                content[part * 2 + box] = state["label_enc.weight"][told]
                anchors[part * 2 + box] = logit(moved[at]).sigmoid()
        first += len(target["labels"])
        predicted = plain.decode(
            torch.cat((state["transformer.tgt_embed.weight"], content)),
            torch.cat((boxes.detach(), anchors)),
            sees,
        )
        for (logits, boxes), of_ours, of_group in zip(predicted, detecting, denoised, strict=True):
            near(of_ours["pred_logits"][image], logits[:QUERIES])
            near(of_ours["pred_boxes"][image], boxes[:QUERIES])
            near(of_group["pred_logits"][image], logits[QUERIES:])
            near(of_group["pred_boxes"][image], boxes[QUERIES:])


def test_cells_are_encoded_at_temperature_20(loaded: Any) -> None:
    """And at their far corners, not their centres."""
    model, _ = loaded
    position = model.encode_position([torch.zeros(1, 3, 4, dtype=torch.bool)])
    assert position.shape == (1, 12, WIDTH)
    for y in range(3):
        for x in range(4):
            for axis, place in ((0, (y + 1) / 3), (1, (x + 1) / 4)):
                for pair in range(WIDTH // 4):
                    angle = place * 2 * math.pi / 20 ** (4 * pair / WIDTH)
                    found = position[0, y * 4 + x, axis * WIDTH // 2 + 2 * pair :][:2].tolist()
                    assert found == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-5)


def test_every_published_tensor_is_taken_once(loaded: Any) -> None:
    model, state = loaded
    ours = model.state_dict()
    by_storage = {value.data_ptr(): value for value in state.values()}
    assert sum(x.numel() for x in ours.values()) == sum(x.numel() for x in by_storage.values())
    total = sum(float(x.sum()) for x in by_storage.values())
    assert sum(float(x.sum()) for x in ours.values()) == pytest.approx(total)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("label_enc.weight"), "missing keys: label_enc.weight"),
        (lambda state: state.update(x=torch.zeros(1)), "unexpected keys: x"),
        (
            lambda state: state.update({"class_embed.1.bias": state["class_embed.1.bias"] + 1}),
            "different values in class_embed.1.bias and class_embed.0.bias",
        ),
    ],
)
def test_other_tensors_are_refused(
    loaded: Any, change: Callable[[State], Any], message: str
) -> None:
    model, state = loaded
    state = dict(state)
    change(state)
    with pytest.raises(ValueError, match=message):
        load_official(model, state)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("classes", [CLASSES, 3])
def test_weights_for_other_classes(loaded: Any, tmp_path: Path, ours: bool, classes: int) -> None:
    """Of a published file and of one of ours: both class heads are fresh then, and so is what
    denoising queries are told; all else comes from the file."""
    model, state = loaded
    small = ModelConfig(**SMALL)
    if ours:
        config = replace(recipe("demo"), model=small).to_json()
        labels = {"category_of": tuple(range(CLASSES)), "names": tuple("abcde")}
        content = {"config": config, "labels": labels, "progress": {}}
        content["model"] = {n: x.float() for n, x in model.state_dict().items()}
        write(tmp_path / "run", Progress(5, 1), content, {})
        weights = tmp_path / "run" / "checkpoints" / "step-00000005"
    else:
        torch.save({"model": state}, weights := tmp_path / "published.pth")
    wanted = replace(small, num_classes=classes)
    config = replace(recipe("demo"), model=wanted, init=InitConfig(weights=str(weights)))
    found, said = initial_model(config)
    per_class = ("heads.classes.", "queries.classes.", "training_queries.0.labels.")
    for name, value in found.state_dict().items():
        if classes == CLASSES or not name.startswith(per_class):
            assert torch.equal(value, model.state_dict()[name].float()), name
        else:
            assert len(value) == classes + int("labels" in name)
            assert name in said
    assert ("5 rows and this run's 3" in said) == (classes == 3)


def test_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = build_model(recipe("dino_r50_4scale").model)
    assert sum(p.numel() for p in model.parameters()) == 46_893_182
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 46_670_782


def test_the_first_stage_is_told_the_classes(small_config: Config, batch: Batch) -> None:
    """Its losses are those of its predictions as any other layer's."""
    images, padding, targets = batch
    torch.manual_seed(0)
    config = small_config(architecture="dino", two_stage=True)
    outputs = build_model(config).double().train()(images, padding)
    criterion = build_criterion(config)
    losses = criterion(outputs, targets)
    alone = criterion(outputs["enc_outputs"], targets)
    agnostic = [target | {"labels": target["labels"] * 0} for target in targets]
    others = criterion(outputs["enc_outputs"], agnostic)
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        torch.testing.assert_close(losses[f"{name}_enc"], alone[name], rtol=1e-12, atol=0)
    assert losses["loss_ce_enc"] != others["loss_ce"]
    assert outputs["enc_outputs"]["pred_logits"].shape == (2, 9, 5)


def gradient_of_second_boxes(heads: Heads) -> float:
    """How much the second layer's boxes depend on the first layer's head."""
    torch.manual_seed(0)
    start = torch.rand(1, 3, 4, dtype=torch.float64)
    first, other = torch.randn(2, 1, 3, 64, dtype=torch.float64)
    _, references = heads(0, first, References(start, start))
    assert not references.attend.requires_grad
    (_, boxes), _ = heads(1, other, references)
    boxes.sum().backward()
    return sum(float(p.grad.abs().sum()) for p in heads.boxes[0].parameters() if p.grad is not None)


def test_looking_forward_twice(small_config: Config) -> None:
    config = small_config(box_refine=True, look_forward_twice=True)
    model = build_model(config)
    assert isinstance(model.heads, LookForwardTwice)
    twice = copy.deepcopy(model.heads).double()
    for parameter in twice.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    once = Heads(config).double()
    once.load_state_dict(twice.state_dict())
    assert gradient_of_second_boxes(once) == 0
    assert gradient_of_second_boxes(twice) > 0.01


def test_looking_forward_twice_changes_the_gradient_alone(
    small_config: Config, batch: Batch
) -> None:
    images, padding, targets = batch
    outputs, losses = [], []
    for twice in (False, True):
        torch.manual_seed(0)
        model = build_model(small_config(two_stage=True, look_forward_twice=twice)).double()
        for parameter in model.heads.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        outputs.append(model(images, padding))
        losses.append(build_criterion(model.config)(outputs[-1], targets)["loss"])
    assert torch.equal(*(x["pred_boxes"] for x in outputs))
    assert torch.equal(*losses)


def test_mixed_selection_learns_the_content_alone(small_config: Config, batch: Batch) -> None:
    images, padding, _ = batch
    torch.manual_seed(0)
    model = build_model(small_config(two_stage=True, mixed_query_selection=True)).double()
    assert isinstance(model.queries, MixedQueries)
    memory = model.encode(images, padding)
    mixed = model.queries(memory, model.heads)
    pure = ProposalQueries.forward(model.queries, memory, model.heads)
    assert torch.equal(mixed.position, pure.position)
    assert torch.equal(mixed.references.attend, pure.references.attend)
    for image in range(2):
        assert torch.equal(mixed.content[image], model.queries.embed)


def test_fewer_tokens_than_queries_give_a_query_each(small_config: Config) -> None:
    for changes in (
        {"architecture": "dino", "two_stage": True},
        {"two_stage": True, "mixed_query_selection": True, "one_to_many_queries": 4},
    ):
        model = build_model(small_config(**changes)).eval()
        outputs = model(torch.randn(1, 3, 9, 9), torch.zeros(1, 9, 9, dtype=torch.bool))
        assert outputs["pred_boxes"].shape == (1, 4 + 3, 4)
        assert outputs["pred_boxes"].isfinite().all()
