"""What generation costs: SDXL's published sizes without its weights, and FLOPs as PyTorch counts them on mini."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from packshot.base.load import load_parts
from packshot.config.compose import compose
from packshot.config.gpus import GPUS
from packshot.generate.plan import GIB, decide, make_plan
from packshot.generate.run import generate

UNET, TEXT, TEXT_2, VAE, VISION = 2_567_463_684, 123_060_480, 694_659_840, 83_653_863, 632_076_800


def planned(*keys, gpu="h100", pictures=100):
    config = compose("generate", list(keys))
    result = make_plan(config, on_cuda=True)
    return result, decide(config, result, GPUS[gpu], 1, pictures)


def test_sdxl_is_planned_at_its_published_size():
    result, decision = planned("model=sdxl", "num_inference_steps=30")
    assert result.weights_gib == pytest.approx((2 * (UNET + TEXT + TEXT_2) + 4 * VAE) / GIB, rel=1e-3)
    # 3 TMAC in the layers of the UNet at 1024 px, .75 TFLOP in the products of its attentions; twice for guidance
    assert result.tflop_per_picture / 30 == pytest.approx(2 * (2 * 2.99 + 0.75), rel=0.02)
    assert decision.verdict == "fits"
    assert 0.5 < decision.seconds_per_picture[0] < decision.seconds_per_picture[1] < 5
    assert decision.hours[0] == pytest.approx(100 * decision.seconds_per_picture[0] / 3600)


def test_each_adapter_adds_its_weights(tmp_path):
    result, _ = planned("model=sdxl")
    controlled, _ = planned("model=sdxl", "adapters.controlnets=[a,b]")
    assert (controlled.weights_gib - result.weights_gib) * GIB == pytest.approx(2 * 2 * 1_251_014_160, rel=1e-3)
    assert controlled.tflop_per_picture > 1.4 * result.tflop_per_picture
    referenced, _ = planned("model=sdxl", "adapters.ip_adapter=x")
    assert (referenced.weights_gib - result.weights_gib) * GIB == pytest.approx(2 * VISION, rel=1e-2)


def test_without_guidance_half_is_left():
    whole, _ = planned("model=sdxl")
    half, _ = planned("model=sdxl", "guidance_scale=1")
    assert half.tflop_per_picture == pytest.approx(whole.tflop_per_picture / 2)
    assert half.denoising_gib < whole.denoising_gib


def test_what_does_not_fit_says_what_to_change():
    result, decision = planned("model=sdxl", "inference.dtype=float32", gpu="a10")
    assert decision.verdict == "fits"
    small = compose("generate", ["mode=plan", "model=sdxl", "inference.dtype=float32", "plan.gpu_hour_price=2"])
    tight = decide(small, result, GPUS["a10"].__class__("small", "a small one", 12.0, 100.0, ""), 2, 7200)
    assert tight.verdict == "does not fit"
    assert tight.change == "inference.dtype=bfloat16"
    assert tight.price == pytest.approx(tuple(4 * hours for hours in tight.hours))
    assert tight.hours[0] == pytest.approx(tight.seconds_per_picture[0])
    assert any("does not fit on a small one" in sentence for sentence in tight.sentences())


def test_offload_leaves_what_works_together():
    """One after the other: the UNet with its ControlNets is the largest; text encoders and VAE wait elsewhere."""
    whole, _ = planned("model=sdxl", "adapters.controlnets=[a]")
    alone, _ = planned("model=sdxl", "adapters.controlnets=[a]", "inference.offload=model")
    others = (2 * (TEXT + TEXT_2) + 4 * VAE) / GIB
    assert alone.weights_gib == whole.weights_gib
    assert alone.total_gib == pytest.approx(whole.weights_gib - others + alone.denoising_gib, rel=1e-3)
    assert alone.total_gib < whole.total_gib
    config = compose("generate", ["model=sdxl"])
    small = decide(config, planned("model=sdxl")[0], GPUS["a10"].__class__("x", "x", 8.0, 1.0, ""), 1, 1)
    assert small.change == "inference.offload=model"


def test_flops_are_those_of_the_network_itself():
    config = compose("generate", ["num_inference_steps=7"])
    parts = load_parts(config.model)
    side = config.model.resolution // 2 ** (len(parts.vae_config("block_out_channels")) - 1)
    noisy = torch.zeros(2, 4, side, side)
    added = {"text_embeds": torch.zeros(2, parts.text_encoder_2.config.projection_dim), "time_ids": torch.zeros(2, 6)}
    prompt = torch.zeros(2, 77, parts.unet.config.cross_attention_dim)
    # in single products: the counter does not know the CPU's fused attention
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        parts.unet(noisy, torch.zeros(2), encoder_hidden_states=prompt, added_cond_kwargs=added)
    assert make_plan(config, on_cuda=False).tflop_per_picture == pytest.approx(7 * counter.get_total_flops() / 1e12)


def test_a_plan_is_written_and_nothing_is_drawn(tmp_path):
    keys = ["mode=plan", "model=sdxl", "plan.gpu=l4", "plan.images=20000", "plan.gpus=4", "product=missing.png"]
    generate(compose("generate", [*keys, f"run.dir={tmp_path / 'run'}", "tracking=none"]))
    written = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (written["pictures"], written["gpus"], written["gpu"]) == (20000, 4, "L4")
    assert written["verdict"] in ("fits", "tight", "does not fit")
    assert not list((tmp_path / "run").glob("*.png"))
