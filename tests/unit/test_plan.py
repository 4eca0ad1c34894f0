"""The plan's figures: SDXL's published sizes without its weights, and what a real run on the mini family needs."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from packshot.config.compose import compose
from packshot.methods import METHODS
from packshot.models.load import load_parts
from packshot.train.memory import enable_checkpointing
from packshot.train.plan import GIB, make_plan, plan

SCRIPTS = {"train_lora": 23_224_320, "train_controlnet": 1_251_014_160}


@pytest.mark.parametrize("script", SCRIPTS)
def test_sdxl_is_planned_without_its_weights(script):
    """Parameter counts as published: UNet 2.57 B; LoRA of rank 16 on its attentions 23.2 M; ControlNet 1.25 B."""
    result = make_plan(compose(script, ["model=sdxl", "train.batch_size=1"]), samples=1000)
    assert result.trained_parameters == SCRIPTS[script]
    assert result.frozen_parameters == 2_567_463_684
    assert result.optimizer_gib == pytest.approx(8 * SCRIPTS[script] / GIB)
    # a forward pass of the UNet at 1024 px is about 6 TFLOP; backward through frozen weights is as much again
    assert 10 < result.tflop_per_step < 40


def test_checkpointing_and_precision_show_in_the_plan():
    def planned(*overrides):
        return make_plan(compose("train_lora", ["model=sdxl", "train.batch_size=1", *overrides]), samples=10)

    plain, thrifty = planned(), planned("train.gradient_checkpointing=true", "train.mixed_precision=bf16")
    assert thrifty.activations_gib < plain.activations_gib / 8
    assert thrifty.frozen_weights_gib == pytest.approx(plain.frozen_weights_gib / 2)
    assert thrifty.tflop_per_step > 1.2 * plain.tflop_per_step  # the forward pass is done twice
    assert planned("optim=adam8bit").optimizer_gib < plain.optimizer_gib / 3


@pytest.mark.parametrize("script", ["train_lora", "train_controlnet", "train_ip_adapter"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_of_the_mini_family_is_what_a_real_step_does(script, checkpointing):
    config = compose(script, ["train.batch_size=2", f"train.gradient_checkpointing={checkpointing}"])
    planned = make_plan(config, samples=100)
    parts = load_parts(config.model)
    method = METHODS[type(config.method)](parts, config.method)
    if checkpointing:
        enable_checkpointing(method)
    assert planned.trained_parameters == sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert planned.frozen_parameters == sum(p.numel() for p in method.parameters() if not p.requires_grad)
    batch = {
        "prompt_embeds": torch.randn(2, 77, parts.unet.config.cross_attention_dim),
        "pooled_prompt_embeds": torch.randn(2, parts.text_encoder_2.config.projection_dim),
        "time_ids": torch.full((2, 6), 128.0),
        "control": torch.rand(2, 3, 128, 128),
        "reference": torch.randn(2, parts.image_encoder.config.projection_dim),
    }
    with FlopCounterMode(display=False) as counter:
        method.predict(torch.randn(2, 4, 16, 16), torch.tensor([1, 2]), batch).square().mean().backward()
    assert planned.tflop_per_step == pytest.approx(counter.get_total_flops() / 1e12, rel=0.06)  # CPU kernels fuse some


def test_the_plan_is_written_and_says_what_it_counts(tmp_path, capsys):
    config = compose("train_lora", ["mode=plan", f"run.dir={tmp_path / 'run'}", "tracking=none"])
    plan(config, "train_lora")
    written = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert written["total_gib"] == pytest.approx(sum(v for k, v in written.items() if k in (
        "frozen_weights_gib", "trained_weights_gib", "gradients_gib", "optimizer_gib", "ema_gib", "activations_gib"
    )))  # fmt: skip
    assert "tflop_per_step" in capsys.readouterr().err
