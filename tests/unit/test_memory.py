"""Switches that trade memory against time: they change no weights, and are refused where they cannot work."""

import json
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from test_loop import ROWS, Regression, Samples
from torch import nn

from packshot.base.load import load_parts
from packshot.config.compose import compose
from packshot.config.schema import (
    AttentionKernel,
    CaptionVLM,
    ControlNetMethod,
    DataConfig,
    LoraMethod,
    LRSchedule,
    MixedPrecision,
    ModelConfig,
    OptimConfig,
    OptimizerKind,
    TrainConfig,
)
from packshot.engine.checkpoints import trainable
from packshot.engine.loop import fit
from packshot.engine.memory import KERNELS, compile_networks, enable_checkpointing, refuse_unavailable
from packshot.engine.processes import Session, make_accelerator
from packshot.engine.task import Validated
from packshot.errors import ConfigError, PackshotError
from packshot.methods import METHODS
from packshot.runs.folder import Run
from packshot.runs.tracking import NullTracker
from packshot.train.encode import Encoder
from packshot.train.run import build_task

STEPWISE = [OptimizerKind.adamw, OptimizerKind.adam8bit, OptimizerKind.adafactor, OptimizerKind.lion]


def run_fit(path, task, kind=OptimizerKind.adamw, rows=ROWS, **settings):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    path.mkdir(exist_ok=True)
    defaults = {"max_steps": 8, "batch_size": 3, "checkpointing_steps": 3, "validation_steps": 0, "learning_rate": 1e-2}
    config = CaptionVLM(optim=OptimConfig(kind=kind), train=TrainConfig(**{**defaults, "max_grad_norm": 0, **settings}))
    fit(task, Samples(rows), config, Session(make_accelerator(config.train), path, Run(path, False), NullTracker()))
    return task


def figures(path, name):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


class Deep(Regression):
    """Weights of several shapes, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(4, 96), nn.Tanh(), shared := nn.Linear(96, 96), nn.Tanh(), shared)
        self.out = nn.Linear(96, 4, bias=False)

    def forward(self, batch):
        return (self.out(self.linear(self.frozen(batch["x"] + batch["noise"]))) - batch["x"]).square().mean(dim=1)


class Killed(Exception):
    pass


class Dying(Deep):
    def __init__(self):
        super().__init__()
        self.calls = count(1)

    def forward(self, batch):
        if next(self.calls) == 5:  # after the checkpoint at 3
            raise Killed
        return super().forward(batch)


def assert_same_weights(a, b):
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(one, other)


# ---- gradient checkpointing ----


def prediction_and_texts(parts, method):
    """One loss through every network of a method."""
    g = torch.Generator().manual_seed(0)
    pooled, width = parts.text_encoder_2.config.projection_dim, parts.unet.config.cross_attention_dim
    embeds = {"prompt_embeds": (2, 77, width), "pooled_prompt_embeds": (2, pooled)}
    batch = {name: torch.randn(*shape, generator=g) for name, shape in embeds.items()}
    batch |= {"time_ids": torch.full((2, 6), 128.0), "control_0": torch.rand(2, 3, 128, 128, generator=g)}
    if method.trains_text:
        ids = [torch.randint(0, 49000, (2, 77), generator=g) for _ in range(2)]
        batch |= dict(zip(embeds, method.encode_prompt(ids), strict=True))
    noisy = torch.randn(2, parts.unet.config.in_channels, 16, 16, generator=g)
    return method.predict(noisy, torch.tensor([500, 20]), batch).square().mean()


@pytest.mark.parametrize(
    ("config", "networks"),
    [
        (LoraMethod(rank=2), ["unet"]),
        (LoraMethod(rank=2, text_encoder=True), ["unet", "text_encoder", "text_encoder_2"]),
        (ControlNetMethod(), ["unet", "controlnet"]),
    ],
    ids=["lora", "lora_and_text", "controlnet"],
)
def test_checkpointing_covers_networks_and_keeps_gradients(config, networks, parts):
    method = METHODS[type(config)](parts, config).train()
    with torch.no_grad():
        for parameter in trainable(method).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    calls = dict.fromkeys(networks, 0)

    def counted(name):
        def count_call(*_):
            calls[name] += 1

        return count_call

    for name in networks:
        # one that gradients pass: not the first half of a frozen UNet, not the end of the first text encoder
        kind = "CLIPMLP" if name.startswith("text") else "BasicTransformerBlock"
        half = getattr(getattr(method, name), "up_blocks", getattr(method, name))
        next(m for m in half.modules() if type(m).__name__ == kind).register_forward_pre_hook(counted(name))

    def gradients():
        method.zero_grad()
        prediction_and_texts(parts, method).backward()
        return {name: p.grad.clone() for name, p in trainable(method).items() if p.grad is not None}

    plain = gradients()
    assert set(calls.values()) == {1}
    enable_checkpointing(method)
    checkpointed = gradients()
    assert calls == dict.fromkeys(networks, 3)  # once more in the backward pass
    assert set(plain) == set(checkpointed)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-4, atol=1e-7)


# ---- gradients applied during the backward pass ----


@pytest.mark.parametrize("kind", STEPWISE, ids=str)
def test_a_fused_backward_gives_the_same_bits(tmp_path, kind):
    """Weights, losses and optimizer state of ordinary steps."""
    plain = run_fit(tmp_path / "a", Deep(), kind)
    fused = run_fit(tmp_path / "b", Deep(), kind, fused_backward=True)
    assert_same_weights(plain, fused)
    assert figures(tmp_path / "b", "loss") == figures(tmp_path / "a", "loss")
    assert figures(tmp_path / "b", "grad_norm") == pytest.approx(figures(tmp_path / "a", "grad_norm"), rel=1e-5)
    a, b = (torch.load(tmp_path / x / "checkpoints" / "8" / "optimizer.pt") for x in "ab")
    assert a["param_groups"] == b["param_groups"]
    assert {k: set(v) for k, v in a["state"].items()} == {k: set(v) for k, v in b["state"].items()}


def test_no_two_gradients_exist_at_the_same_time(tmp_path):
    alive = []

    class Watched(Deep):
        def __init__(self):
            super().__init__()
            for parameter in trainable(self).values():  # before the loop's own hooks
                parameter.register_post_accumulate_grad_hook(self.look)

        def look(self, _):
            alive.append(sum(p.grad is not None for p in self.parameters()))

    task = run_fit(tmp_path / "a", Watched(), fused_backward=True)
    assert len(alive) == 8 * 5
    assert set(alive) == {1}
    before = [p.detach().clone() for p in task.parameters()]
    task({"x": torch.ones(3, 4), "noise": torch.zeros(3, 4)}).sum().backward()  # the run is over: nothing is applied
    assert all(torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))
    alive.clear()
    run_fit(tmp_path / "b", Watched())
    assert max(alive) == 5


@pytest.mark.parametrize("resumed_fused", [True, False])
@pytest.mark.parametrize("kind", STEPWISE, ids=str)
def test_a_killed_fused_run_resumes_to_the_bit_fused_or_not(tmp_path, kind, resumed_fused):
    unbroken = run_fit(tmp_path / "a", Deep(), kind, fused_backward=True)
    with pytest.raises(Killed):
        run_fit(tmp_path / "b", Dying(), kind, fused_backward=True)
    assert_same_weights(unbroken, run_fit(tmp_path / "b", Deep(), kind, fused_backward=resumed_fused))


def test_a_gradient_that_is_not_finite_stops_a_fused_run_too(tmp_path):
    rows = [*ROWS[:4], {"x": torch.full((4,), float("nan"))}, *ROWS[5:]]
    with pytest.raises(PackshotError, match=r"not finite; samples .*s4"):
        run_fit(tmp_path, Deep(), rows=rows, fused_backward=True)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["train.gradient_accumulation_steps=2", "train.max_grad_norm=0"], "train.gradient_accumulation_steps=2"),
        ([], "train.max_grad_norm=1.0"),
        (["train.max_grad_norm=0", "train.mixed_precision=fp16"], "train.mixed_precision=fp16"),
        (["train.max_grad_norm=0", "optim=prodigy", "train.learning_rate=1"], "optim=prodigy"),
    ],
    ids=["accumulation", "clipping", "fp16", "prodigy"],
)
def test_conflicts_of_a_fused_backward_are_refused(overrides, key):
    """The message names the key, and the hint how to change it."""
    with pytest.raises(ConfigError, match=rf"fused_backward=true with {key}") as caught:
        compose("train_controlnet", ["train.fused_backward=true", *overrides])
    assert key.split("=")[0] in caught.value.hint
    compose("train_controlnet", ["train.fused_backward=true", "train.max_grad_norm=0"])


class Others:
    """An accelerator of two processes."""

    num_processes, device = 2, torch.device("cpu")


def test_a_fused_backward_is_refused_on_two_processes():
    with pytest.raises(ConfigError, match="on 2 processes"):
        refuse_unavailable(TrainConfig(fused_backward=True), Others())


# ---- attention ----


@pytest.mark.parametrize("kernel", [AttentionKernel.flash, AttentionKernel.math], ids=str)
def test_both_passes_use_the_chosen_attention_kernel(tmp_path, kernel):
    seen = []

    class Watched(Regression):
        def forward(self, batch):
            loss = super().forward(batch)
            self.look()
            loss.register_hook(self.look)
            return loss

        def look(self, *_):
            backends = torch.backends.cuda
            seen.append(
                (backends.flash_sdp_enabled(), backends.math_sdp_enabled(), backends.mem_efficient_sdp_enabled())
            )

    run_fit(tmp_path, Watched(), max_steps=2, attention=kernel)
    assert seen == [(kernel is AttentionKernel.flash, kernel is AttentionKernel.math, False)] * 4
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.parametrize("kernel", [AttentionKernel.efficient, AttentionKernel.cudnn], ids=str)
def test_a_kernel_the_device_lacks_is_refused(tmp_path, kernel):
    with pytest.raises(
        ConfigError, match=rf"train.attention={kernel} has no kernel for torch.float32 on cpu"
    ) as caught:
        run_fit(tmp_path, Regression(), attention=kernel)
    assert "train.attention=auto" in caught.value.hint
    assert not (tmp_path / "metrics.jsonl").exists()


def test_fp16_is_refused_without_a_gpu():
    config = TrainConfig(mixed_precision=MixedPrecision.fp16)
    with pytest.raises(ConfigError, match=r"mixed_precision=fp16 needs a GPU"):
        refuse_unavailable(config, SimpleNamespace(num_processes=1, device=torch.device("cpu"), autocast=nullcontext))


def test_every_kernel_but_auto_is_known():
    assert set(KERNELS) == set(AttentionKernel) - {AttentionKernel.auto}


# ---- torch.compile ----


class Network(nn.Module):
    """Compiled in seconds; recognised by what it could do, as the UNet is."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(torch.nn.functional.silu(self.first(x)))

    def enable_gradient_checkpointing(self):
        raise NotImplementedError


class Compiled(Regression):
    """Validates with another batch size than it is trained with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = Network()

    def validate(self, folder, accelerator):
        with torch.no_grad():
            samples = {"x": torch.ones(5, 4), "noise": torch.zeros(5, 4)}
            return Validated({"validation_loss": float(self(samples).mean())})


@pytest.fixture
def compiler():
    """PyTorch's compiler without what other tests compiled; counts what is."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    yield counters
    torch._dynamo.reset()


def test_a_compiled_run_equals_an_eager_one(tmp_path, compiler):
    settings = {"lr_schedule": LRSchedule.constant, "checkpointing_steps": 1, "validation_steps": 1}
    eager = run_fit(tmp_path / "a", Compiled(), max_steps=4, **settings)
    task = Compiled()
    compile_networks(task, torch.device("cpu"))
    compiler.clear()
    run_fit(tmp_path / "b", task, max_steps=2, **settings)
    assert compiler["unique_graphs"] == 1  # the training batch; validation's other shape ran as it was written
    assert set(task.state_dict()) == set(eager.state_dict())
    resumed = run_fit(tmp_path / "b", Compiled(), max_steps=4, **settings)
    for name in ("loss", "validation_loss"):
        assert figures(tmp_path / "b", name) == pytest.approx(figures(tmp_path / "a", name), abs=1e-4)
    for a, b in zip(eager.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_missing_compiler_is_reported(compiler, monkeypatch):
    from torch._inductor import config, cpp_builder

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(ConfigError, match=r"train.compile=true does not work on this machine for cpu") as caught:
        compile_networks(Compiled(), torch.device("cpu"))
    assert "train.compile=false" in caught.value.hint


def test_compiling_for_captions_of_every_length_is_refused():
    with pytest.raises(ConfigError, match=r"train.compile=true: captions differ in length"):
        compose("caption_vlm", ["train.compile=true"])


def test_encoders_load_when_needed_and_are_released():
    """Encoding prompts loads no image encoder; release() frees the text encoders."""
    parts = load_parts(ModelConfig())
    encoder = Encoder(parts, METHODS[LoraMethod](parts, LoraMethod()), 128, DataConfig())
    encoder.text(["a stone counter"])
    assert {"text_encoder", "text_encoder_2"} <= parts.loaded()
    assert "image_encoder" not in parts.loaded()
    held = [weakref.ref(part) for part in (parts.text_encoder, parts.text_encoder_2)]
    encoder.release()
    assert [reference() for reference in held] == [None, None]
    assert parts.loaded().isdisjoint({"text_encoder", "text_encoder_2"})


FREEING = """
import torch
from pathlib import Path
from packshot.engine.memory import return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024

torch.ones(7 * 2**20).add_(1)  # 28 MiB, freed at once: from now on glibc keeps blocks up to this size
weights = [torch.ones(2 * 2**20) for _ in range(60)]
last = torch.ones(2 * 2**20)
del weights
kept = resident()
return_freed_memory()
print(kept - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's habit")
def test_freed_memory_returns_to_the_system():
    found = subprocess.run([sys.executable, "-c", FREEING], capture_output=True, text=True, check=True)
    assert int(found.stdout) > 300  # MiB of 480


def test_loader_processes_cannot_encode_on_a_gpu():
    config = compose("train_lora", ["data.cache=false", "data.num_workers=2"])
    absent: Any = None
    gpu = cast(Any, SimpleNamespace(device=torch.device("cuda")))
    with pytest.raises(ConfigError, match=r"data\.num_workers=2 with data\.cache=false.*cannot encode on cuda"):
        build_task(config, absent, absent, absent, gpu)
    config = compose("train_lora", ["data.cache=false", "train.attention=flash"])
    with pytest.raises(ConfigError, match=r"train\.attention=flash with data\.cache=false"):
        build_task(config, absent, absent, absent, gpu)


def test_deterministic_kernels_are_set_before_the_first_runs(monkeypatch):
    """cuBLAS reads its setting only once."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        make_accelerator(TrainConfig())
        assert not torch.are_deterministic_algorithms_enabled()
        make_accelerator(TrainConfig(deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
