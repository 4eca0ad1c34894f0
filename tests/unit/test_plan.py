"""The plan's figures: SDXL's published sizes without its weights, and what a real run on the mini family needs."""

import json
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from packshot.base.cost import planned_gpu
from packshot.base.load import load_parts
from packshot.config.compose import compose
from packshot.config.gpus import GPUS, find_gpu
from packshot.config.schema import MixedPrecision
from packshot.engine.memory import enable_checkpointing
from packshot.engine.sharding import Sharding
from packshot.errors import ConfigError
from packshot.methods import METHODS
from packshot.train.decide import DECODING_SECONDS, decide, first_change
from packshot.train.encode import encode_batch
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

    plain = planned("train.gradient_checkpointing=false", "train.mixed_precision=no")
    thrifty = planned("train.gradient_checkpointing=true", "train.mixed_precision=bf16")
    assert thrifty.activations_gib < plain.activations_gib / 8
    assert thrifty.frozen_weights_gib == pytest.approx(plain.frozen_weights_gib / 2)
    assert thrifty.tflop_per_step > 1.2 * plain.tflop_per_step  # the forward pass is done twice
    assert planned("optim=adam8bit").optimizer_gib < plain.optimizer_gib / 3


def real(config):
    """(method, one step) of a config on the CPU, under autocast if it asks for bf16; gradients are dropped."""
    lower = config.train.mixed_precision is MixedPrecision.bf16
    parts = load_parts(config.model)
    method = METHODS[type(config.method)](parts, config.method).train()
    if config.train.gradient_checkpointing:
        enable_checkpointing(method)
    batch = {
        "prompt_embeds": torch.randn(2, 77, parts.unet.config.cross_attention_dim),
        "pooled_prompt_embeds": torch.randn(2, parts.text_encoder_2.config.projection_dim),
        "time_ids": torch.full((2, 6), 128.0),
        "control_0": torch.rand(2, 3, 128, 128),
        "reference": torch.randn(2, parts.image_encoder.config.projection_dim),
    }
    ids = [torch.zeros(2, 77, dtype=torch.long)] * 2
    noisy = torch.randn(2, 4, 16, 16)
    for parameter in method.parameters():
        if lower and not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step():
        embeds = {}
        if method.trains_text:
            embeds = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), method.encode_prompt(ids), strict=True))
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            loss = method.predict(noisy, torch.tensor([1, 2]), batch | embeds).float().square().mean()
        loss.backward()

    return method, step


def allocated(step):
    """Bytes that are alive at the peak of a step, by what the allocator says."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def test_the_vae_is_counted_where_it_stays(parts):
    """In fp32, whatever the precision."""

    def vae(*keys):
        return make_plan(compose("train_lora", ["train.mixed_precision=bf16", *keys]), samples=10).vae_gib

    assert vae() == pytest.approx(sum(p.numel() for p in parts.vae.parameters()) * 4 / GIB)
    assert vae("train.validation_steps=0") == 0
    assert vae("train.validation_steps=0", "data.cache=false") == vae()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    "script",
    [["train_lora"], ["train_lora", "method.text_encoder=true"], ["train_controlnet"], ["train_ip_adapter"]],
    ids=lambda script: script[-1],
)
def test_the_plan_of_the_mini_family_is_what_a_real_step_does(script, checkpointing):
    config = compose(script[0], ["train.batch_size=2", f"train.gradient_checkpointing={checkpointing}", *script[1:]])
    planned = make_plan(config, samples=100)
    method, step = real(config)
    assert planned.trained_parameters == sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert planned.frozen_parameters == sum(p.numel() for p in method.parameters() if not p.requires_grad)
    with FlopCounterMode(display=False) as counter:
        step()
    assert planned.tflop_per_step == pytest.approx(counter.get_total_flops() / 1e12, rel=0.1)  # CPU kernels fuse some
    # nothing but the graph's tensors without checkpointing; with it, workspaces show beside the little that is left
    assert planned.activations_gib == pytest.approx(allocated(step) / GIB, rel=0.15 if checkpointing else 0.01)


@pytest.mark.parametrize("script", ["train_lora", "train_controlnet", "train_ip_adapter"])
def test_bf16_is_planned_within_5_percent_of_a_real_step(script):
    """Copies of trained weights and casts of inputs count; a CPU's autocast leaves norms in the precision they get."""
    config = compose(script, ["train.batch_size=2", "train.mixed_precision=bf16"])
    planned = make_plan(config, samples=100)
    _, step = real(config)
    step()  # autocast and kernels set themselves up
    # without its own bfloat16 instructions a CPU keeps some inputs in float32 beside the casts
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert planned.activations_gib == pytest.approx(allocated(step) / GIB, rel=0.05 if native else 0.1)


def test_norms_in_fp32_cost_memory_on_a_gpu():
    """On CUDA autocast runs norms in fp32, so a plan for a GPU is higher than one for a CPU."""
    bf16 = "train.mixed_precision=bf16"
    cpu = make_plan(compose("train_lora", [bf16]), samples=10)
    gpu = make_plan(compose("train_lora", [bf16, "mode=plan", "plan.gpu=h100"]), samples=10)
    assert 1.2 < gpu.activations_gib / cpu.activations_gib < 2


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_is_planned_at_its_size(quantization):
    config = compose("train_lora", [f"model.quantization={quantization}"])
    planned = make_plan(config, samples=10)
    method, _ = real(config)
    size = 0
    for parameter in method.parameters():
        if not parameter.requires_grad:
            size += parameter.numel() * parameter.element_size()
            state = getattr(parameter, "quant_state", None)
            size += sum(t.numel() * t.element_size() for t in (state.absmax, state.state2.absmax)) if state else 0
            size += 4 * len(parameter.SCB) if hasattr(parameter, "SCB") else 0
    assert planned.frozen_weights_gib == pytest.approx(size / GIB, rel=0.002)
    whole = make_plan(compose("train_lora", []), samples=10)
    assert planned.frozen_weights_gib < 0.7 * whole.frozen_weights_gib
    assert planned.frozen_parameters == whole.frozen_parameters


def test_a_fused_backward_needs_memory_for_one_gradient_alone():
    plain, fused = (
        make_plan(compose("train_controlnet", ["train.max_grad_norm=0", f"train.fused_backward={fused}"]), samples=10)
        for fused in ("false", "true")
    )
    assert plain.gradients_gib == plain.trained_weights_gib
    assert 0 < fused.gradients_gib < plain.gradients_gib / 5
    assert fused.total_gib == pytest.approx(plain.total_gib - plain.gradients_gib + fused.gradients_gib)


def test_the_plain_attention_kernel_keeps_every_score():
    plain, math = (
        make_plan(compose("train_lora", ["model.resolution=512", f"train.attention={kernel}"]), samples=10)
        for kernel in ("auto", "math")
    )
    assert math.activations_gib > 1.5 * plain.activations_gib


def test_the_plan_is_written_and_says_what_it_counts(tmp_path, capsys):
    config = compose("train_lora", ["mode=plan", f"run.dir={tmp_path / 'run'}", "tracking=none"])
    plan(config, "train_lora")
    written = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert written["total_gib"] == pytest.approx(sum(v for k, v in written.items() if k in (
        "frozen_weights_gib", "trained_weights_gib", "gradients_gib", "optimizer_gib", "ema_gib", "gathered_gib",
        "vae_gib",        "activations_gib",
    )))  # fmt: skip
    assert "tflop_per_step" in capsys.readouterr().out


def test_several_processes_make_one_plan_for_all_of_them(tmp_path, monkeypatch):
    """As ``accelerate launch`` starts them, one after the other."""
    folder = tmp_path / "run"
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in (0, 1, 2, 3):
        monkeypatch.setenv("RANK", str(rank))
        plan(compose("train_lora", ["tracking=none", f"run.dir={folder}"]), "train_lora")
    planned = json.loads((folder / "plan.json").read_text())
    assert planned["samples_per_step"] == 4 * compose("train_lora", []).train.batch_size


def test_encoding_is_planned_for_a_whole_vae_batch(parts):
    """Against the tensors that a real pass makes; at SDXL's size one picture goes at a time."""
    config = compose("train_lora", [])
    planned = make_plan(config, samples=10)
    pixels = torch.rand(encode_batch((128, 128)), 3, 128, 128)

    def encode():
        with torch.no_grad():
            parts.vae.encode(pixels)

    vae = sum(p.numel() for p in parts.vae.parameters()) * 4 / GIB
    peak = planned.encoding_gib - planned.frozen_weights_gib - planned.trained_weights_gib - vae
    assert peak == pytest.approx(allocated(encode) / GIB, rel=0.05)
    large = make_plan(compose("train_lora", ["model=sdxl", "train.mixed_precision=bf16"]), samples=10)
    assert 5 < large.encoding_gib < 10


# ---- a decision ----


def decided(*overrides, processes=1, script="train_lora"):
    config = compose(script, ["mode=plan", "plan.gpu=rtx4090", "plan.images=100", *overrides])
    result = make_plan(config, config.plan.images, processes)
    return result, decide(config, result, planned_gpu(config.plan), processes)


def test_the_largest_batch_is_the_last_that_fits():
    """Planned again at that batch it fits, and at the next one it does not."""
    _, decision = decided("model.resolution=512")
    limit = 0.95 * GPUS["rtx4090"].memory_gib
    batch = decision.largest_batch
    assert batch > 4
    at, beyond = (decided("model.resolution=512", f"train.batch_size={size}")[0] for size in (batch, batch + 1))
    assert at.total_gib <= limit * 1.001
    assert beyond.total_gib > limit * 0.999


def test_hours_and_price_follow_from_the_stated_utilisation():
    keys = ("train.max_steps=3600", "plan.gpu_hour_price=2", "plan.utilisation_low=0.1", "plan.utilisation_high=0.5")
    result, decision = decided(*keys, processes=4)
    fast = result.tflop_per_step / GPUS["rtx4090"].tflops / 0.5
    assert decision.seconds_per_step == (pytest.approx(fast), pytest.approx(5 * fast))
    assert decision.hours == (pytest.approx(fast), pytest.approx(5 * fast))
    whole = decision.hours[0] + decision.encoding_hours[0]
    assert decision.price is not None
    assert decision.price[0] == pytest.approx(2 * 4 * whole)
    assert decided()[1].price is None


def test_what_does_not_fit_names_the_first_change():
    keys = ("model.resolution=1024", "train.batch_size=64")
    _, decision = decided(*keys, "train.mixed_precision=no")
    assert (decision.verdict, decision.change) == ("does not fit", "train.mixed_precision=bf16")
    _, decision = decided("model.resolution=1024", "train.batch_size=160")
    assert decision.change == "train.gradient_checkpointing=true"
    assert decided()[1].change == ""


def test_a_plan_for_a_gpu_needs_no_dataset(tmp_path, capsys):
    keys = [
        "mode=plan",
        "plan.gpu=h100",
        "plan.gpus=8",
        "plan.images=20000",
        "data.train=gone",
        "plan.gpu_hour_price=3",
    ]
    plan(compose("train_lora", [*keys, "tracking=none", f"run.dir={tmp_path / 'run'}"]), "train_lora")
    written = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (written["samples"], written["processes"], written["verdict"]) == (20000, 8, "fits")
    assert written["samples_per_step"] == 8 * 4
    said = capsys.readouterr().out
    assert "It fits on H100 SXM" in said
    assert "It costs" in said


def test_gpus_are_found_by_the_name_that_cuda_reports():
    reported = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-40GB": "a100_40",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA L40S": "l40s",
        "NVIDIA L4": "l4",
        "NVIDIA GeForce RTX 4090": "rtx4090",
    }
    for name, row in reported.items():
        found = find_gpu(name)
        assert found is not None
        assert found.name == row
    assert find_gpu("GeForce GT 710") is None


def test_a_range_of_utilisation_that_is_turned_round_is_refused():
    with pytest.raises(ConfigError, match=r"plan\.utilisation_low"):
        compose("train_lora", ["plan.utilisation_low=0.5"])


@pytest.mark.parametrize(("free", "warned"), [(80, False), (0.05, True)])
def test_a_training_that_may_not_fit_is_announced(free, warned, monkeypatch, caplog):
    """Before anything is loaded, on a machine with a GPU."""
    from packshot.train.run import warn_of_memory

    config = compose("train_lora", ["mode=plan", "plan.gpu=h100"])
    warn_of_memory(config, 10)
    assert not caplog.records or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 80 * GIB))
    with caplog.at_level("INFO"):
        warn_of_memory(config, 10)
    assert f"free: {free:.1f} GiB" in caplog.text
    assert ("may not fit; change first: train.gradient_checkpointing=true" in caplog.text) is warned


def test_sharding_divides_the_state_and_gathers_blocks():
    """A UNet of 2.57 B in bf16 as one block: its gathered weights are all of it; block by block they are a part."""
    keys = ["model=sdxl", "train.mixed_precision=bf16", "train.gradient_checkpointing=true", "train.ema_decay=0.99"]
    config = compose("train_controlnet", keys)
    whole = make_plan(config, samples=10, processes=8)
    parts = make_plan(config, samples=10, processes=8, sharding=Sharding())
    names = ("frozen_weights_gib", "trained_weights_gib", "gradients_gib", "optimizer_gib", "ema_gib")
    for name in names:
        assert getattr(parts, name) == pytest.approx(getattr(whole, name) / 8)
    weights = whole.frozen_weights_gib + whole.trained_weights_gib
    assert whole.gathered_gib == 0 < parts.gathered_gib < weights / 3
    assert make_plan(config, 10, 8, sharding=Sharding(whole=True)).gathered_gib == pytest.approx(weights)
    assert make_plan(config, 10, 8, sharding=Sharding(reshard=False)).gathered_gib == pytest.approx(weights)
    assert parts.total_gib < whole.total_gib
    assert parts.encoding_gib == whole.encoding_gib  # it is divided after the encoding


def test_a_plan_is_sharded_where_its_key_or_the_launcher_says_so(tmp_path):
    def written(name, key, sharding=None):
        keys = ["mode=plan", "plan.gpu=h100", "plan.gpus=8", "plan.images=10", "tracking=none", *key]
        plan(compose("train_lora", [*keys, f"run.dir={tmp_path / name}"]), "train_lora", sharding)
        return json.loads((tmp_path / name / "plan.json").read_text())["gathered_gib"] > 0

    assert not written("a", [])
    assert written("b", ["plan.sharded=true"])
    assert written("c", [], Sharding())
    assert not written("d", ["plan.sharded=false"], Sharding())


def test_more_gpus_that_do_not_divide_the_state_are_told_to():
    keys = [
        "model=sdxl",
        "mode=plan",
        "plan.gpu=rtx4090",
        "plan.images=10",
        "train.mixed_precision=bf16",
        "optim=adam8bit",
    ]
    config = compose("train_controlnet", [*keys, "train.batch_size=1", "train.gradient_checkpointing=true"])
    assert "fsdp.yaml" in first_change(config, can_shard=True)
    assert "fsdp.yaml" not in first_change(config)


def test_decoders_keep_up_with_the_encoder():
    result, decision = decided("model=sdxl", "train.batch_size=1", processes=4)
    for cores, hours in zip(decision.decoders, decision.encoding_hours[::-1], strict=True):
        busy = 25 * DECODING_SECONDS / 3600  # 100 pictures on four GPUs
        assert (cores - 1) * hours <= busy <= cores * hours
    assert result.encoded_pictures == 100
    assert decided("model=sdxl", "train.batch_size=1", "data.flip=true")[0].encoded_pictures == 200
