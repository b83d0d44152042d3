import pytest

from pipeline.config import RunConfig
from pipeline.fine_tuning import as_option, fine_tuning, value_of
from pipeline.recipes import RECIPES, recipe


@pytest.mark.parametrize(
    ("images", "batch", "lr", "epochs", "drop", "warm_up", "decay"),
    [
        # batch 8 of the recipe's 32: a quarter of 2e-4; 100 epochs of 160 images are 2000 steps
        (160, 8, 5e-5, 100, 80, 200, 0.99),
        # 4000 steps of 8 are 40 epochs of 800 images
        (800, 8, 5e-5, 40, 32, 400, 0.995),
        # 16 images from 1000 on: 4000 steps are 12.8 epochs of 5000
        (5000, 16, 1e-4, 13, 10, 406, 0.9951),
        (118_000, 16, 1e-4, 12, 10, 500, 0.9997),
    ],
)
def test_defaults_by_the_number_of_images(images, batch, lr, epochs, drop, warm_up, decay):
    config, _ = fine_tuning(recipe("deformable_detr_r50_two_stage"), images)
    assert config.optimizer.batch_size == batch
    assert config.optimizer.lr == pytest.approx(lr)
    assert config.optimizer.backbone_lr == pytest.approx(lr / 10)
    assert config.optimizer.ema_decay == pytest.approx(decay, abs=2e-4)
    assert config.schedule.epochs == epochs
    assert config.schedule.drop_epochs == (drop,)
    assert config.schedule.evaluate_every == max(1, epochs // 25)
    steps = epochs * images / batch
    assert config.schedule.warmup_fraction * steps == pytest.approx(warm_up, rel=0.02)
    assert config.data.labels == "contiguous"


def test_what_is_chosen_decides_the_rest():
    config, _ = fine_tuning(recipe("deformable_detr_r50"), 160, batch_size=4, epochs=20)
    assert config.optimizer.batch_size == 4
    assert config.optimizer.lr == pytest.approx(2.5e-5)
    assert config.schedule.epochs == 20
    assert config.schedule.drop_epochs == (16,)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("images", [1, 2, 7, 300, 10**6])
def test_every_recipe_has_valid_defaults_each_with_its_reason(name, images):
    before = recipe(name)
    config, defaults = fine_tuning(before, images)
    assert RunConfig.from_json(config.to_json()) == config
    assert config.optimizer.batch_size <= images
    assert config.model == before.model
    assert config.augment == before.augment
    for default in defaults:
        assert value_of(config, default.field) == default.value
        assert str(default).startswith(f"--{default.field.replace('_', '-')} ")
        assert len(default.reason) > 10
        assert "\n" not in str(default)
    changed = {d.field for d in defaults}
    for section in ("optimizer", "schedule", "engine", "data", "init"):
        for field in vars(getattr(config, section)):
            name = f"{section}.{field}"
            assert name in changed or value_of(config, name) == value_of(before, name)


def test_defaults_are_printed_as_a_shell_takes_them():
    _, defaults = fine_tuning(recipe("deformable_detr_r50"), 160)
    options = {str(d).split(": ")[0] for d in defaults}
    assert {"--schedule.drop-epochs 80", "--optimizer.lr 5e-05"} <= options
    assert as_option("schedule.drop_epochs", (101, 106)) == "--schedule.drop-epochs 101 106"


def test_a_background_column_stays_free():
    config, _ = fine_tuning(recipe("faster_rcnn_r50_fpn"), 200)
    assert config.data.labels == "contiguous_from_1"


def test_a_cosine_has_no_drops():
    config, defaults = fine_tuning(recipe("demo"), 200)
    assert config.schedule.kind == "cosine"
    assert "schedule.drop_epochs" not in {d.field for d in defaults}
