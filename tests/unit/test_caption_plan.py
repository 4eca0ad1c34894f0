"""What captioners cost: published sizes without their weights, and what real passes on mini need."""

import json

import pytest
import torch
from test_plan import allocated
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from packshot.base.cost import GIB
from packshot.caption.models.adapter import loss_per_sample
from packshot.caption.models.load import load_adapter
from packshot.caption.plan import WRITTEN, decide, make_plan, meta_captioner
from packshot.caption.run import run
from packshot.config.compose import compose
from packshot.config.gpus import GPUS
from packshot.engine.sharding import Sharding
from packshot.errors import ConfigError

KEYS = ("mode=plan", "tracking=none", "plan.images=20000")


def planned(*keys):
    config = compose("caption_vlm", [*KEYS, *keys])
    return config, make_plan(config, config.plan.images)


@pytest.mark.parametrize(
    ("keys", "parameters"),
    [
        (["captioner=florence2"], 231e6),  # published as .23 B
        (["captioner=florence2", "model.florence2=x/Florence-2-large"], 770e6),  # .77 B
        (["captioner=llama32_vision"], 10.65e9),  # 10.6 B
    ],
    ids=["base", "large", "llama"],
)
def test_captioners_are_planned_at_their_published_size(keys, parameters):
    _, result = planned("task=caption", "model=sdxl", "captioner.dtype=bfloat16", *keys)
    assert result.frozen_parameters == pytest.approx(parameters, rel=5e-3)
    assert result.frozen_weights_gib == pytest.approx(2 * result.frozen_parameters / GIB)
    assert result.optimizer_gib == result.gradients_gib == 0
    _, quantized = planned("task=caption", "model=sdxl", "captioner.quantization=nf4", *keys)
    assert quantized.frozen_weights_gib < result.frozen_weights_gib * 1.3


def inputs(meta, size, written):
    """Real inputs of the shapes that a plan is made from; the picture's tokens where the model looks for them."""
    filled = {}
    for name, tensor in meta.batch(size, written).items():
        ones = torch.ones(tensor.shape, dtype=tensor.dtype)
        filled[name] = torch.randn(tensor.shape) if tensor.is_floating_point() else ones
    return filled


@pytest.mark.parametrize("kind", ["florence2", "llama32_vision"])
@pytest.mark.parametrize("task", ["train", "caption"])
def test_memory_and_products_are_those_of_a_real_pass(kind, task):
    """Within 5 and 2 % of the allocator and of PyTorch's counter, on the shipped mini captioners."""
    keys = ("train.batch_size=4", "captioner.batch_size=4", f"captioner.max_new_tokens={WRITTEN}")
    config, result = planned(f"task={task}", f"captioner={kind}", "captioner.tuning=full", *keys)
    trained = task == "train"
    network = load_adapter(config.model, config.captioner, trainable=trained).model
    batch = inputs(meta_captioner(config), 4, WRITTEN)
    if kind == "florence2":
        pictures = 65
        batch["input_ids"][:, :pictures] = network.config.image_token_id
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step():
        with torch.set_grad_enabled(trained):
            logits = network(**batch, use_cache=not trained).logits
            if trained:
                loss_per_sample(logits, torch.zeros(logits.shape[:2], dtype=torch.long)).mean().backward()

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    assert result.tflop == pytest.approx(counter.get_total_flops() / 1e12, rel=0.02)
    assert result.activations_gib == pytest.approx(allocated(step) / GIB, rel=0.05)


def test_a_captioning_plan_needs_neither_weights_nor_data(tmp_path):
    keys = [
        "task=caption",
        "model=sdxl",
        "plan.gpu=l4",
        "plan.gpus=4",
        "plan.gpu_hour_price=2",
        f"run.dir={tmp_path / 'run'}",
    ]
    run(compose("caption_vlm", [*KEYS, *keys]))
    written = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (written["pictures"], written["processes"], written["gpu"], written["verdict"]) == (20000, 4, "L4", "fits")
    assert written["steps"] == 20000 / (4 * compose("caption_vlm", []).captioner.batch_size)
    assert 0 < written["hours"][0] < written["hours"][1]
    assert written["price"] == pytest.approx([8 * hours for hours in written["hours"]])


def test_a_written_token_waits_for_the_weights():
    """A large captioner in half the bytes writes faster, by what its memory reads; more layers take longer."""
    plans = {}
    for dtype in ("float32", "bfloat16"):
        config, result = planned("task=caption", "model=sdxl", "captioner=llama32_vision", f"captioner.dtype={dtype}")
        plans[dtype] = decide(config, result, GPUS["h200"], 1).seconds_per_step
    reader = 9.25e9 * 2 / 1e12 / GPUS["h200"].bandwidth
    saved = plans["float32"][0] - plans["bfloat16"][0]
    assert saved == pytest.approx(WRITTEN * reader / 0.4, rel=0.01)


def test_what_does_not_fit_says_what_to_change_for_captioners():
    keys = ("task=train", "model=sdxl", "captioner=llama32_vision", "captioner.tuning=language_lora")
    config, result = planned(*keys)
    decision = decide(config, result, GPUS["a10"], 1)
    assert (decision.verdict, decision.change) == ("does not fit", "train.gradient_checkpointing=true")
    sharded = make_plan(config, 10, 8, Sharding())
    assert sharded.frozen_weights_gib == pytest.approx(result.frozen_weights_gib / 8)
    assert 0 < sharded.gathered_gib < result.frozen_weights_gib / 3


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (["task=review", "data.input=x"], "no network runs"),
        (["task=caption"], "plan.images"),
        (["captioner=endpoint", "captioner.endpoint=http://x/v1", "captioner.endpoint_model=y"], "does not run here"),
    ],
    ids=["review", "images", "endpoint"],
)
def test_what_cannot_be_planned_is_refused(keys, match):
    with pytest.raises(ConfigError, match=match):
        compose("caption_vlm", ["mode=plan", *keys])
