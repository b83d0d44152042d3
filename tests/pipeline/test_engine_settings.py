"""The schedule, the optimizer's groups and DeepSpeed's dictionary."""

import math
import os
import sys
from dataclasses import replace

import pytest
import torch

from model.detr import build_model
from pipeline.config import EngineConfig, ScheduleConfig
from pipeline.engine import (
    build_optimizer,
    choose_device,
    deepspeed_config,
    hidden,
    learning_rate_factor,
    set_determinism,
)
from pipeline.errors import UserError
from pipeline.recipes import recipe


def test_the_papers_schedule_drops_once_by_ten():
    factor = learning_rate_factor(ScheduleConfig(), steps_per_epoch=10)
    values = [factor(step) for step in range(500)]
    assert values[:400] == [1.0] * 400
    assert values[400:] == pytest.approx([0.1] * 100)


def test_warm_up_rises_in_a_line_and_the_cosine_ends_at_its_factor():
    schedule = ScheduleConfig(epochs=10, kind="cosine", warmup_fraction=0.1, final_factor=0.01)
    factor = learning_rate_factor(schedule, steps_per_epoch=100)
    warm = [factor(step) for step in range(100)]
    assert warm == pytest.approx([(step + 1) / 101 for step in range(100)])
    assert factor(100) == 1.0
    middle = 0.01 + 0.99 * (1 + math.cos(math.pi / 2)) / 2
    assert factor(550) == pytest.approx(middle)
    assert factor(1000) == pytest.approx(0.01)


def test_the_rates_of_the_paper_reach_the_right_parameters():
    """Section 5: 2e-4, a tenth for the backbone, a tenth for reference points and offsets."""
    config = recipe("deformable_detr_r50")
    model = build_model(replace(config.model, encoder_layers=1, decoder_layers=1))
    optimizer = build_optimizer(model, config)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(trainable)
    for name, parameter in trainable.items():
        slow = (
            name.startswith("backbone") or "sampling_offsets" in name or "reference_points" in name
        )
        assert rates[id(parameter)] == pytest.approx(2e-5 if slow else 2e-4), name
    assert all(g["weight_decay"] == 1e-4 for g in optimizer.param_groups)


@pytest.mark.parametrize(
    ("world", "micro", "passes", "images"),
    [(1, 0, 1, 16), (2, 4, 2, 4), (4, 1, 4, 1), (3, 0, 1, 6), (3, 2, 3, 2)],
)
def test_deepspeed_is_told_of_one_global_batch(world, micro, passes, images):
    config = recipe("demo")
    config = replace(config, engine=replace(config.engine, micro_batch=micro))
    settings = deepspeed_config(config, world)
    assert settings["gradient_accumulation_steps"] == passes
    assert settings["train_micro_batch_size_per_gpu"] == images
    assert settings["zero_optimization"]["stage"] == (1 if world > 1 else 0)
    assert settings["torch_autocast"]["dtype"] == "bfloat16"


def test_stage_3_is_for_more_than_one_process():
    config = recipe("demo")
    config = replace(config, engine=replace(config.engine, zero_stage=3))
    assert deepspeed_config(config, 1)["zero_optimization"] == {"stage": 0}
    settings = deepspeed_config(config, 2)["zero_optimization"]
    assert (settings["stage"], settings["stage3_param_persistence_threshold"]) == (3, 2**14)


def test_precision_fp32_has_no_autocast():
    config = recipe("demo")
    config = replace(config, engine=replace(config.engine, precision="fp32"))
    assert "torch_autocast" not in deepspeed_config(config, 1)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"got cuda.*no usable CUDA device"):
        choose_device(EngineConfig(device="cuda"))
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_device(EngineConfig(precision="fp16"))
    assert choose_device(EngineConfig()).type == "cpu"


def test_a_hidden_module_is_not_imported_meanwhile_alone(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with hidden("this"), pytest.raises(ImportError):
        import this  # noqa: F401
    assert "this" not in sys.modules
    with hidden("math"):  # imported already: whoever has it keeps it
        assert sys.modules["math"] is math
    assert sys.modules["math"] is math


def test_deterministic_mode_gives_cublas_the_workspace_that_torch_asks_for(monkeypatch):
    """Without it torch refuses every product of matrices on a GPU. The user's own stays."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    try:
        for before, after in ((":16:8", ":16:8"), (None, ":4096:8")):
            if before is None:
                monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
                set_determinism(False)
                assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
                assert not torch.are_deterministic_algorithms_enabled()
            set_determinism(True)
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == after
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
