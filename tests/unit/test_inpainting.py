"""The product in input channels of its own: taken apart, trained, exported, drawn with."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLInpaintPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from packshot.base.adapter_metadata import objective_metadata
from packshot.base.inpainting import CONV_FILE, ProductConv, prepare_unet, product_channels, split_conv_in
from packshot.base.load import load_parts
from packshot.config.compose import compose
from packshot.config.schema import AdaptersConfig, GenerateSettings, LoraMethod, ModelConfig, ProductConditioning
from packshot.engine.keyed_random import SampleKey
from packshot.errors import ConfigError, PackshotError
from packshot.generate import Packshot
from packshot.methods import METHODS
from packshot.runs.files import resolve
from packshot.train.plan import make_plan
from packshot.train.run import build_task

BASE = resolve("data/models/sdxl")
QUICK = GenerateSettings(num_inference_steps=2, guidance_scale=2.0)
CHANNELS = ["objective.product_conditioning=channels", "method.rank=4", "data.cache=false", "train.validation_steps=0"]


def inputs(unet, batch=1):
    g = torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return {
        "sample": torch.randn(batch, 4, 16, 16, generator=g),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 77, width, generator=g),
        "added_cond_kwargs": {"text_embeds": torch.randn(batch, pooled, generator=g), "time_ids": torch.ones(batch, 6)},
    }


@torch.no_grad()
def predict(unet, given):
    return unet(**given).sample


def nine_channels(seed=3):
    """The mini UNet as an inpainting model: a first convolution of nine channels."""
    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet")
    conv = nn.Conv2d(9, unet.conv_in.out_channels, 3, padding=1)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        conv.weight.copy_(0.1 * torch.randn(conv.weight.shape, generator=g))
        conv.weight[:, :4] = unet.conv_in.weight
        conv.bias.copy_(unet.conv_in.bias)
    unet.conv_in = conv
    unet.register_to_config(in_channels=9)
    return unet.eval().requires_grad_(False)


def shown(batch=1, seed=5):
    return torch.randn(batch, 5, 16, 16, generator=torch.Generator().manual_seed(seed))


# ---- the layer ----


def test_taken_apart_an_inpainting_unet_computes_the_same():
    whole, parted = nine_channels(), nine_channels()
    conv = split_conv_in(parted)
    assert not any(p.requires_grad for p in conv.parameters())
    assert parted.config.in_channels == 4
    given = inputs(whole, 2)
    conv.show(shown(2))
    theirs = predict(whole, {**given, "sample": torch.cat([given["sample"], shown(2)], dim=1)})
    torch.testing.assert_close(predict(parted, given), theirs, rtol=1e-4, atol=1e-5)


def test_one_shown_product_serves_both_halves_of_guidance():
    unet = nine_channels()
    conv = split_conv_in(unet)
    noisy = inputs(unet, 4)["sample"]
    conv.show(shown(2))
    both = conv(noisy)
    conv.show(torch.cat([shown(2), shown(2)]))
    torch.testing.assert_close(both, conv(noisy))


def test_added_channels_start_without_effect_and_are_trained():
    unet = load_parts(ModelConfig()).unet
    given = inputs(unet)
    before = predict(unet, given)
    conv = split_conv_in(unet)
    conv.show(shown())
    assert torch.equal(predict(unet, given), before)
    assert [name for name, p in unet.named_parameters() if p.requires_grad] == ["conv_in.product.weight"]


def test_a_cell_with_any_of_the_product_counts_as_product():
    keep = torch.zeros(1, 1, 32, 32)
    keep[0, 0, 9, 17] = 1  # one pixel, in the cell (1, 2)
    channels = product_channels(keep, torch.zeros(1, 4, 4, 4))
    assert channels.shape == (1, 5, 4, 4)
    assert (channels[0, 0] == 0).nonzero().tolist() == [[1, 2]]
    assert channels[0, 0].sum() == 15


# ---- training ----


def task_of(rows, *overrides):
    config = compose("train_lora", [*CHANNELS, *overrides])
    return build_task(config, load_parts(config.model), rows, rows, Accelerator(cpu=True))


def test_lora_and_new_channels_train_and_see_the_product(rows):
    task, examples = task_of(rows)
    sample = examples[0]
    assert sample["product"].shape == (5, 16, 16)
    mask = np.asarray(examples.seen(0)["mask"]) >= 128
    assert sample["product"][0].sum() == 256 - mask.reshape(16, 8, 16, 8).any((1, 3)).sum()
    batch = task.collate([sample, examples[1]], [SampleKey(0, 0, examples.ids[i]) for i in (0, 1)])
    names = [name for name, p in task.named_parameters() if p.requires_grad]
    assert all("lora" in name or name == "method.unet.conv_in.product.weight" for name in names)
    assert sum("lora" in name for name in names) == len(names) - 1
    plain = task(batch).detach()
    with torch.no_grad():
        task.method.unet.conv_in.product.weight.add_(0.05)
    assert not torch.equal(task(batch).detach(), plain)
    task(batch).sum().backward()
    assert task.method.unet.conv_in.product.weight.grad.abs().sum() > 0


def test_cached_product_channels_equal_those_on_the_fly(rows, tmp_path):
    cached = [f"data.cache_dir={tmp_path}", "data.cache=true"]
    _, examples = task_of(rows, *cached)
    examples.ids = examples.ids[:3]
    examples.groups = examples.groups[:3]
    examples.fill(Accelerator(cpu=True))
    for index in range(3):
        torch.testing.assert_close(examples[index]["product"], examples.fresh(index)["product"])


def test_a_plan_counts_the_new_channels():
    plain = make_plan(compose("train_lora", []), samples=10)
    more = make_plan(compose("train_lora", ["objective.product_conditioning=channels"]), samples=10)
    assert more.trained_parameters - plain.trained_parameters == 5 * 9 * 64


def test_samples_without_a_product_are_refused(rows):
    task, examples = task_of(rows)
    sample = {**examples[0], "alpha": torch.zeros(1, 16, 16)}
    with pytest.raises(PackshotError, match="product_conditioning=channels needs masks"):
        task.collate([sample], [SampleKey(0, 0, "x")])


def test_unsuited_methods_for_product_channels_are_refused():
    for script in ("train_controlnet", "train_ip_adapter"):
        with pytest.raises(ConfigError, match=r"product_conditioning=channels changes the UNet's first layer"):
            compose(script, ["objective.product_conditioning=channels"])
    with pytest.raises(ConfigError, match=r"inpainting model: its UNet has 9 input channels"):
        prepare_unet(nine_channels(), ProductConditioning.noised)
    parts = load_parts(ModelConfig())
    METHODS[LoraMethod](parts, LoraMethod(rank=2, target_modules="conv_in"))
    with pytest.raises(ConfigError, match="adapts conv_in"):
        prepare_unet(parts.unet, ProductConditioning.channels)


# ---- export and inference ----


@pytest.fixture(scope="module")
def export(rows, tmp_path_factory):
    """An export whose adapters do something, and the task it is of."""
    task, _ = task_of(rows)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=g))
    folder = tmp_path_factory.mktemp("export")
    task.method.export(folder, objective_metadata(task.config.objective))
    return folder, task


def test_stock_diffusers_loads_lora_and_channels_alike(export):
    folder, task = export
    unet = nine_channels()
    unet.load_state_dict(load_file(folder / CONV_FILE), strict=False)
    pipeline = StableDiffusionXLInpaintPipeline.from_pretrained(BASE, unet=unet)
    pipeline.load_lora_weights(folder)
    given = inputs(unet)
    task.method.unet.conv_in.show(shown())
    ours = predict(task.method.unet, given)
    theirs = predict(pipeline.unet, {**given, "sample": torch.cat([given["sample"], shown()], dim=1)})
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    pipeline.set_progress_bar_config(disable=True)
    picture, mask = Image.new("RGB", (128, 128), "gray"), Image.new("L", (128, 128), 255)
    drawn = pipeline(
        "a table", image=picture, mask_image=mask, strength=1.0, num_inference_steps=2, height=128, width=128
    ).images[0]
    assert drawn.size == (128, 128)


def held(tool):
    mask = Image.new("L", (128, 128))
    mask.paste(255, (40, 40, 88, 88))
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    return tool.set_product(Image.fromarray(noise), mask)


def draw(adapters):
    return held(Packshot.load(adapters=adapters)).generate("a table", 1, settings=QUICK)[0]


def test_a_picture_is_drawn_with_the_product_in_its_channels(export, monkeypatch):
    folder, _ = export
    seen = []
    monkeypatch.setattr(
        ProductConv, "show", lambda self, product: (seen.append(product), setattr(self, "_shown", product))
    )
    result = draw(AdaptersConfig(lora=str(folder)))
    [product] = seen
    assert product.shape == (1, 5, 16, 16)
    assert (product[0, 0] == 0).nonzero().tolist() == [[y, x] for y in range(5, 11) for x in range(5, 11)]
    assert result.certificate["model"]["product_shown"] == "channels"
    assert CONV_FILE in result.certificate["model"]["adapters"][0]["files"]
    assert np.asarray(result.layers["raw"]).std() > 0


def test_scale_zero_switches_lora_and_channels_off(export):
    folder, _ = export
    silent, bare = draw(AdaptersConfig(lora=str(folder), lora_scale=0)), draw(AdaptersConfig())
    full = draw(AdaptersConfig(lora=str(folder)))
    assert np.abs(np.asarray(silent.image).astype(int) - np.asarray(bare.image)).max() <= 1
    assert np.abs(np.asarray(full.image).astype(int) - np.asarray(bare.image)).max() > 1


def test_an_inpainting_base_needs_no_conv_file(export, tmp_path):
    folder, _ = export
    base = tmp_path / "base"
    base.mkdir()
    for part in BASE.iterdir():
        if part.name != "unet":
            (base / part.name).symlink_to(part.absolute())
    nine_channels().save_pretrained(base / "unet")
    tool = Packshot.load(model=ModelConfig(base=str(base)))
    assert tool.models.product_conditioning == "channels"
    held(tool).generate("a table", 1, settings=QUICK)
    lora = tmp_path / "lora"
    lora.mkdir()
    for file in ("pytorch_lora_weights.safetensors", "packshot.json"):
        (lora / file).write_bytes((folder / file).read_bytes())
    assert json.loads((lora / "packshot.json").read_text())["product_conditioning"] == "channels"
    Packshot.load(model=ModelConfig(base=str(base)), lora=str(lora))
    with pytest.raises(ConfigError, match=rf"has no {CONV_FILE}, and the base is not an inpainting model"):
        Packshot.load(lora=str(lora))
