"""Run configurations: checks, JSON, identity, recipes and command-line overrides."""

import dataclasses
import json
from dataclasses import replace

import pytest

from model.config import ModelConfig
from pipeline.cli import REQUIRED, parse_run
from pipeline.commands.train import TrainOptions
from pipeline.config import (
    AugmentConfig,
    DataConfig,
    EngineConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
)
from pipeline.errors import UserError
from pipeline.recipes import RECIPES, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json_and_bears_its_name(name):
    config = recipe(name)
    assert config.recipe == name
    assert RunConfig.from_json(config.to_json()) == config


def test_the_baseline_is_the_papers():
    """Section 5 of the paper and, for what it leaves to DETR, DETR's section 4."""
    config = recipe("deformable_detr_r50")
    model, optimizer = config.model, config.optimizer
    assert (model.backbone, model.num_levels, model.hidden_dim) == ("resnet50", 4, 256)
    assert (model.encoder_layers, model.decoder_layers) == (6, 6)
    assert (model.num_heads, model.num_points, model.num_queries) == (8, 4, 300)
    assert (model.focal_alpha, model.class_weight) == (0.25, 2.0)
    assert (model.bbox_weight, model.giou_weight) == (5.0, 2.0)
    assert (optimizer.lr, optimizer.backbone_lr) == (2e-4, 2e-5)
    assert optimizer.offsets_lr_factor == 0.1
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.batch_size) == (1e-4, 0.1, 32)
    assert (config.schedule.epochs, config.schedule.drop_epochs) == (50, (40,))
    assert config.augment.short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert config.augment.max_side == 1333
    assert config.augment.crop_sides == (384, 600)


def test_variants_differ_from_the_baseline_where_they_say():
    base = dataclasses.asdict(recipe("deformable_detr_r50"))
    refine = dataclasses.asdict(recipe("deformable_detr_r50_refine"))
    changed = {k for k in base["model"] if base["model"][k] != refine["model"][k]}
    assert changed == {"box_refine"}
    assert {k for k in base if base[k] != refine[k]} == {"recipe", "model"}


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'deformable_detr_r50'"):
        recipe("deformable_detr_r5")


def test_the_digest_is_of_what_decides_the_result():
    config = recipe("demo")
    moved = replace(config, data=DataConfig(train="/a", val="/b"))
    spread = replace(config, engine=replace(config.engine, loader_workers=7, log_every=1))
    assert config.digest() == moved.digest() == spread.digest()
    others = [
        replace(config, seed=1),
        replace(config, optimizer=replace(config.optimizer, lr=1e-3)),
        replace(config, model=replace(config.model, num_queries=31)),
        replace(config, engine=replace(config.engine, precision="fp32")),
        replace(config, data=DataConfig(labels="category_id")),
    ]
    assert len({c.digest() for c in [config, *others]}) == 6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OptimizerConfig(lr=-1.0), ["optimizer.lr", "-1.0", "0 or more"]),
        (lambda: OptimizerConfig(batch_size=0), ["batch_size", "got 0", "1 or more"]),
        (lambda: ScheduleConfig(epochs=0), ["schedule.epochs", "got 0"]),
        (lambda: ScheduleConfig(warmup_fraction=1.0), ["warmup_fraction", "1.0"]),
        (lambda: AugmentConfig(flip_probability=1.5), ["flip_probability", "1.5"]),
        (lambda: AugmentConfig(crop_sides=(600, 384)), ["crop_sides", "(600, 384)"]),
        (lambda: AugmentConfig(crop_short_sides=()), ["crop_short_sides", "at least one"]),
        (lambda: AugmentConfig(short_sides=(0,)), ["sides", "1 or more"]),
        (lambda: DataConfig(shuffle_window=0), ["shuffle_window", "got 0"]),
        (lambda: EngineConfig(micro_batch=-2), ["micro_batch", "-2"]),
        (lambda: RunConfig("demo", seed=-1), ["seed", "-1"]),
    ],
)
def test_impossible_values_are_refused_with_got_and_expected(make, words):
    with pytest.raises(ValueError, match="expected") as error:
        make()
    for word in words:
        assert word in str(error.value)


def test_json_of_an_older_version_takes_defaults_and_of_a_newer_one_is_refused():
    content = json.loads(recipe("demo").to_json())
    del content["data"]["cache_gb"]
    assert RunConfig.from_json(json.dumps(content)) == recipe("demo")
    content["optimizer"]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"config\.optimizer: got momentum, expected"):
        RunConfig.from_json(json.dumps(content))


def options(*args: str) -> TrainOptions:
    return parse_run(TrainOptions, list(args), "prog", "", output=REQUIRED)


def test_any_field_can_be_overridden_with_its_type():
    config = options(
        "demo", "--output", "x", "--optimizer.lr", "1e-3", "--augment.short-sides", "64", "96",
        "--engine.deterministic", "--model.num-queries", "7",
    ).config  # fmt: skip
    assert config.optimizer.lr == 1e-3
    assert config.augment.short_sides == (64, 96)
    assert config.engine.deterministic
    assert config.model == replace(recipe("demo").model, num_queries=7)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["demo", "--output", "x", "--optimiser.lr", "1"], ["--optimizer.lr"]),
        (["demo", "--output", "x", "--modle.num-queries=3"], ["--model.num-queries"]),
        (["demo", "--output", "x", "--schedule.epochs", "ten"], ["--schedule.epochs", "ten"]),
        (["demo", "--output", "x", "--engine.precision", "fp8"], ["fp8", "bf16"]),
        (["demo", "--output", "x", "--optimizer.lr", "-1"], ["optimizer.lr", "-1.0"]),
        (["demo"], ["Missing", "--output"]),
        ([], ["expected a recipe", "demo"]),
        (["demos"], ["did you mean 'demo'"]),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(args, words):
    with pytest.raises(UserError) as error:
        options(*args)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_the_last_epoch_is_evaluated_in_any_case():
    schedule = ScheduleConfig(epochs=7, evaluate_every=3)
    assert [e for e in range(1, 8) if schedule.evaluates(e)] == [3, 6, 7]
    assert all(ScheduleConfig().evaluates(e) for e in range(1, 51))


def test_the_model_default_is_the_baseline():
    assert recipe("deformable_detr_r50").model == ModelConfig()
