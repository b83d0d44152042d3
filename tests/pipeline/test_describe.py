"""`describe`: the official code's own counts, cases counted by hand, and the command."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cuda_ops.ops import (
    fused_deformable_attention,
    modulated_deform_conv2d,
    multi_scale_deformable_attention,
)
from model.config import ModelConfig
from model.detr import build_model
from pipeline import describe as module
from pipeline.__main__ import COMMANDS
from pipeline.cli import main
from pipeline.describe import PUBLISHED, activation_bytes, multiply_adds, table
from pipeline.recipes import RECIPES

describe = functools.cache(module.describe)


@pytest.fixture
def run(capsys):
    """`run("describe", …)` in this process: status, stdout and stderr."""

    def run(*arguments):
        status = main("python -m pipeline", "", COMMANDS, [str(x) for x in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("name", "parameters", "giga_multiply_adds"),
    [  # parameters and counts of fundamentalvision/Deformable-DETR, run under torch's counter
        ("deformable_detr_r50", 40_069_665, 163.960),
        ("deformable_detr_r50_refine", 40_849_660, 164.198),
        ("deformable_detr_r50_two_stage", 41_181_529, 168.213),
        ("deformable_detr_r50_single_scale", 34_066_593, 76.358),
        ("deformable_detr_r50_single_scale_dc5", 34_066_593, 124.896),
    ],
)
def test_counts_are_the_official_codes(name, parameters, giga_multiply_adds):
    cost = describe(name)
    assert cost.parameters == parameters
    assert cost.parameters - cost.trainable == 222_400  # stem and first stage
    assert cost.multiply_adds / 1e9 == pytest.approx(giga_multiply_adds, rel=0.002)
    assert cost.state > 4 * (cost.parameters + 3 * cost.trainable)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("deformable_detr_r101_two_stage", 60_121_433), ("detr_r50", 41_524_768)],
)
def test_parameters_of_the_other_published_models(name, parameters):
    assert describe(name).parameters == parameters


def test_published_figures_belong_to_recipes_and_are_near_ours():
    assert len(PUBLISHED) > 7
    for name in PUBLISHED.keys() & RECIPES.keys():
        parameters, giga = PUBLISHED[name]
        cost = describe(name)
        assert cost.published_parameters == parameters
        assert cost.parameters / 1e6 == pytest.approx(parameters, rel=0.04)
        assert cost.multiply_adds / 1e9 == pytest.approx(giga, rel=0.08)


def test_refinement_shares_the_bases_cost_but_for_heads_of_its_own():
    base, refine = describe("deformable_detr_r50"), describe("deformable_detr_r50_refine")
    head = 2 * (256 * 256 + 256) + 256 * 4 + 4 + 256 * 91 + 91
    assert refine.parameters - base.parameters == 5 * head
    assert refine.multiply_adds == base.multiply_adds
    assert refine.sampling == base.sampling


def test_sampling_of_the_base_model_by_hand():
    cells = [(100, 134), (50, 67), (25, 34), (13, 17)]
    tokens = sum(h * w for h, w in cells)
    samples = 6 * (tokens + 300) * 8 * 4 * 4  # layers, queries, heads, levels, points
    assert describe("deformable_detr_r50").sampling == samples * 32 * 5


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta", requires_grad=True)


def test_convolution_linear_and_attention_by_hand():
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Linear(7, 11))
    products, sampling = multiply_adds(lambda: net(meta(2, 3, 10, 14)))
    assert products == 2 * 8 * 5 * 7 * 27 + 2 * 8 * 5 * 7 * 11
    assert sampling == 0
    query, key = meta(2, 4, 5, 16), meta(2, 4, 9, 16)
    attention = multiply_adds(lambda: F.scaled_dot_product_attention(query, key, key))
    assert attention == (2 * (2 * 4 * 5 * 9 * 16), 0)


def test_deformable_operators_by_hand():
    shapes = [(4, 6), (2, 3)]
    value, offsets = meta(2, 30, 3, 8), meta(2, 7, 3, 2, 5, 2)
    expected = (0, 2 * 7 * 3 * 2 * 5 * 8 * 5)
    fused = multiply_adds(
        lambda: fused_deformable_attention(
            value, shapes, meta(2, 7, 2, 4), offsets, meta(2, 7, 3, 10)
        )
    )
    assert fused == expected
    plain = multiply_adds(
        lambda: multi_scale_deformable_attention(value, shapes, offsets, meta(2, 7, 3, 2, 5))
    )
    assert plain == expected


def test_deformable_convolution_counts_as_a_convolution_and_its_samples():
    found = multiply_adds(
        lambda: modulated_deform_conv2d(
            meta(2, 16, 6, 8), meta(2, 18, 6, 8), meta(2, 9, 6, 8), meta(10, 16, 3, 3), padding=1
        )
    )
    assert found == (2 * 6 * 8 * 9 * 16 * 10, 2 * 6 * 8 * 9 * 16 * 5)


def test_kept_activations_by_hand():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        x = torch.empty(5, 4)
    assert activation_bytes(net, lambda: net(x)) == 4 * (5 * 4 + 5 * 6)
    net[0].requires_grad_(False)  # the last layer's input is all that a gradient needs
    assert activation_bytes(net, lambda: net(x)) == 4 * 5 * 6
    with torch.device("meta"):
        dropout = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5))
    assert activation_bytes(dropout, lambda: dropout(x)) == 4 * 5 * 4 + 5 * 6
    assert activation_bytes(dropout, lambda: dropout.eval()(x)) == 4 * 5 * 4


@pytest.mark.parametrize("architecture", ["deformable_detr", "detr"])
def test_kept_activations_are_those_of_a_real_forward(architecture):
    dense = {"architecture": "detr", "num_levels": 1, "classification": "softmax"}
    config = ModelConfig(
        num_queries=50, hidden_dim=64, num_heads=4, feedforward_dim=128, dropout=0.0,
        **(dense if architecture == "detr" else {}),
    )  # fmt: skip
    model = build_model(config)
    images, padding = torch.rand(1, 3, 224, 256), torch.zeros(1, 224, 256, dtype=torch.bool)
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}  # holding the tensors keeps their addresses apart

    def note(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model(images, padding)
    measured = sum(x.untyped_storage().nbytes() for x in kept.values())
    with torch.device("meta"):
        shadow = build_model(config)
    counted = activation_bytes(shadow, lambda: shadow(images.to("meta"), padding.to("meta")))
    assert counted == pytest.approx(measured, rel=0.01)


def test_the_table_has_a_row_for_each_recipe_asked_for():
    lines = table([describe("detr_r50"), describe("demo")]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["detr_r50", "demo"]
    assert lines[2].split("|")[-2].strip() == "41 / 86"
    assert lines[3].split("|")[-2].strip() == ""


def test_the_command_prints_and_writes(run, tmp_path):
    file = tmp_path / "costs.json"
    status, printed, complaint = run("describe", "demo", "detr_r50", "--output", file)
    assert status == 0, complaint
    content = json.loads(file.read_text())
    assert content["size"] == [800, 1066]
    assert [row["recipe"] for row in content["recipes"]] == ["demo", "detr_r50"]
    assert content["recipes"][1]["parameters"] == 41_524_768
    assert "| detr_r50" in printed
    assert "41.52" in printed


def test_without_names_every_recipe_is_described(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "describe", describe)
    file = tmp_path / "costs.md"
    status, printed, _ = run("describe", "--output", file)
    assert status == 0
    assert file.read_text() == printed
    assert [line.split("|")[1].strip() for line in printed.splitlines()[2:]] == list(RECIPES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["detr_r5"], ["unknown recipe 'detr_r5'", "did you mean 'detr_r50'"]),
        (["demo", "--output", "costs.csv"], ["--output", ".json or .md"]),
        (["demo", "--size", "3"], ["unknown option --size"]),
    ],
)
def test_mistakes_are_one_line(run, arguments, words):
    status, printed, complaint = run("describe", *arguments)
    assert status == 2
    assert printed == ""
    assert len(complaint.strip().splitlines()) == 1
    for word in words:
        assert word in complaint
