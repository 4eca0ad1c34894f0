"""The product held while the scene is denoised: what the network sees of it, in training and while sampling."""

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image, ImageDraw

from packshot.base.adapter_metadata import (
    AdapterMetadata,
    common_metadata,
    objective_metadata,
    read_metadata,
    write_metadata,
)
from packshot.base.load import load_parts
from packshot.config.compose import compose
from packshot.config.schema import (
    AdaptersConfig,
    ControlNetMethod,
    GenerateSettings,
    LoraMethod,
    ModelConfig,
)
from packshot.diffusion.hold_product import INPUT_SCALES, first_latents, hold_product
from packshot.engine.keyed_random import SampleKey
from packshot.errors import ConfigError, PackshotError
from packshot.generate import Packshot
from packshot.generate.adapters import check_adapters
from packshot.generate.canvas import make_working, place, plan_frame
from packshot.generate.denoise import denoise, encode
from packshot.generate.load import load_models
from packshot.generate.product import prepare
from packshot.imaging.matte import held_cells
from packshot.methods import METHODS
from packshot.train.encode import Encoder
from packshot.train.examples import framed, widened
from packshot.train.run import build_task

SCHEDULERS = (
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    LCMScheduler,
)
SETTINGS = GenerateSettings(num_inference_steps=3, guidance_scale=1.0)


def ellipse(side=128):
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).ellipse((side // 4, side // 5, 3 * side // 4, 4 * side // 5), fill=255)
    return mask


# ---- sampling, any network ----


class Stock:
    """What a stock pipeline does with latents and callback; the network answers with noise and notes what it saw."""

    def __init__(self, scheduler):
        self.scheduler, self.seen = scheduler, []

    def __call__(self, latents, callback, steps):
        self.scheduler.set_timesteps(steps)
        latents = latents * self.scheduler.init_noise_sigma
        generator = torch.Generator().manual_seed(7)
        for step, timestep in enumerate(self.scheduler.timesteps):
            self.seen.append(self.scheduler.scale_model_input(latents, timestep).clone())
            said = torch.randn(latents.shape, generator=generator)
            extra = {} if "generator" not in self.scheduler.step.__code__.co_varnames else {"generator": generator}
            latents = self.scheduler.step(said, timestep, latents, **extra).prev_sample
            latents = callback(self, step, timestep, {"latents": latents})["latents"]
        return latents


def sampler(kind, **changes):
    with open("data/models/sdxl/scheduler/scheduler_config.json") as file:
        return kind.from_config({**json.load(file), **changes})


def run(scheduler, shown, held, steps=6):
    generator = torch.Generator().manual_seed(0)
    known, noise = (torch.randn(1, 4, 6, 6, generator=generator) for _ in range(2))
    stock = Stock(scheduler)
    start = first_latents(known, noise, held, shown, scheduler, steps)
    return known, stock, stock(start, hold_product(known, noise, held, shown), steps)


@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_clean_cells_are_seen_without_noise_at_every_step(kind, spacing):
    """The other cells are left alone."""
    held = torch.zeros(1, 6, 6)
    held[:, 2:4, 1:5] = 1
    inside = held[0].bool()
    known, stock, result = run(sampler(kind, timestep_spacing=spacing), "clean", held)
    assert len(stock.seen) == 6
    for seen in stock.seen:
        torch.testing.assert_close(seen[..., inside], known[..., inside], rtol=1e-6, atol=1e-6)
    assert torch.equal(result[..., inside], known[..., inside])
    _, free, unheld = run(sampler(kind, timestep_spacing=spacing), "clean", torch.zeros_like(held))
    for seen, same in zip([*stock.seen, result], [*free.seen, unheld], strict=True):
        assert torch.equal(seen[..., ~inside], same[..., ~inside])


def test_clean_cells_are_noiseless_from_pure_noise_on():
    """Zero terminal SNR: the first sigma is 4096."""
    held = torch.ones(1, 6, 6)
    scheduler = sampler(EulerDiscreteScheduler, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    known, stock, _ = run(scheduler, "clean", held)
    for seen in stock.seen:
        torch.testing.assert_close(seen, known, rtol=1e-6, atol=1e-6)


def test_a_noised_product_has_the_noise_of_each_step():
    """It starts as noise, as the rest does."""
    held = torch.ones(1, 6, 6)
    scheduler = sampler(EulerDiscreteScheduler)
    generator = torch.Generator().manual_seed(0)
    known, noise = (torch.randn(1, 4, 6, 6, generator=generator) for _ in range(2))
    assert first_latents(known, noise, held, "noised", scheduler, 6) is noise
    _, stock, result = run(scheduler, "noised", held)
    for step, seen in enumerate(stock.seen[1:], 1):
        sigma = scheduler.sigmas[step]
        torch.testing.assert_close(seen, (known + sigma * noise) / (sigma**2 + 1) ** 0.5)
    assert torch.equal(result, known)


def test_an_unknown_scheduler_cannot_show_a_clean_product():
    """How it scales the input of the network is not known."""
    scheduler, held = sampler(LMSDiscreteScheduler), torch.ones(1, 6, 6)
    known, noise = torch.zeros(1, 4, 6, 6), torch.ones(1, 4, 6, 6)
    for attempt in (
        lambda: first_latents(known, noise, held, "clean", scheduler, 6),
        lambda: Stock(scheduler)(noise, hold_product(known, noise, held, "clean"), 6),
    ):
        with pytest.raises(ValueError, match="LMSDiscreteScheduler"):
            attempt()
    assert set(INPUT_SCALES) == {kind.__name__ for kind in SCHEDULERS}


# ---- which cells ----


def test_training_holds_the_cells_that_generation_holds(rows, parts):
    """There is one definition: at the photograph's own size both give the same cells."""
    task = METHODS[LoraMethod](parts, LoraMethod(rank=2))
    encoder = Encoder(parts, task, 128, compose("train_lora", []).data)
    for index in range(6):
        row = rows.read(index, ("image", "mask"))
        canvas = place(prepare(row["image"], row["mask"]), SETTINGS)
        working = make_working(canvas, plan_frame(128, 128, 128, 32), 8)
        held = widened(encoder.latents([framed(row, (128, 128))])[0])["held"]
        assert working.held_hw.any()
        assert np.array_equal(held[0].numpy() > 0, working.held_hw)


def test_the_frame_takes_nothing_from_a_product_that_fills_it():
    assert held_cells(np.ones((32, 32), np.float32), 8).all()
    assert not held_cells(np.full((32, 32), 0.99, np.float32), 8).any()


# ---- training ----


class Two:
    """The first samples of a dataset."""

    def __init__(self, rows):
        self._rows, self.ids, self.texts, self.sizes = rows, rows.ids[:2], rows.texts[:2], rows.sizes[:2]
        self.read, self.digest, self.path = rows.read, rows.digest, rows.path

    def __len__(self):
        return 2


def task_of(rows, parts, *keys, script="train_lora"):
    config = compose(script, ["tracking=none", "data.cache=false", "train.validation_samples=1", *keys])
    return build_task(config, parts, Two(rows), Two(rows), Accelerator(cpu=True))


def batch_of(task, examples):
    samples = [examples[index] for index in range(2)]
    return task.collate(samples, [SampleKey(0, 0, sample["id"]) for sample in samples])


class Told(torch.nn.Module):
    """A method whose network notes its input and says what it is told to."""

    trains_text = False

    def __init__(self, says):
        super().__init__()
        self.says, self.seen = says, None

    def predict(self, noisy, timesteps, batch):
        self.seen = noisy
        return self.says


@pytest.mark.parametrize("script", ["train_lora", "train_controlnet", "train_ip_adapter"])
def test_every_method_sees_the_product_clean(rows, script):
    """The loss does not depend on what is predicted there."""
    weights = ("objective.product_weight=5", "objective.boundary_weight=3")
    noised, others = task_of(rows, load_parts(ModelConfig()), *weights, script=script)
    clean, examples = task_of(
        rows, load_parts(ModelConfig()), *weights, "objective.product_conditioning=clean", script=script
    )
    plain, batch = batch_of(noised, others), batch_of(clean, examples)
    held = batch.pop("held")
    inside = (held > 0).expand_as(batch["latents"])
    assert 4 < held.sum() < held.numel() / 2
    assert set(plain) == set(batch)
    assert all(torch.equal(plain[name], batch[name]) for name in plain if name != "weight")
    assert (batch["weight"][held > 0] == 0).all()
    assert torch.equal(batch["weight"][held == 0], plain["weight"][held == 0])
    generator = torch.Generator().manual_seed(0)
    says = torch.randn(batch["latents"].shape, generator=generator)
    seen, losses = {}, {}
    for name, task, given, answer in (
        ("noised", noised, plain, says),
        ("clean", clean, {**batch, "held": held}, says),
        ("otherwise inside", clean, {**batch, "held": held}, torch.where(inside, says + 100, says)),
        ("otherwise outside", clean, {**batch, "held": held}, torch.where(inside, says, says + 1)),
    ):
        task.method = Told(answer)
        losses[name], seen[name] = task(given), task.method.seen
    assert torch.equal(seen["clean"][inside], batch["latents"][inside])
    assert torch.equal(seen["clean"][~inside], seen["noised"][~inside])
    assert (seen["noised"][inside] != batch["latents"][inside]).all()
    assert torch.equal(losses["clean"], losses["otherwise inside"])
    assert (losses["clean"] != losses["otherwise outside"]).all()


def test_gradients_reach_a_lora_that_sees_a_clean_product(rows, parts):
    task, examples = task_of(rows, parts, "objective.product_conditioning=clean")
    task(batch_of(task, examples)).mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in task.parameters())


def test_a_clean_product_needs_masks(rows, parts):
    task, examples = task_of(rows, parts, "objective.product_conditioning=clean")
    sample = examples[0]
    bare = {**sample, "alpha": torch.zeros_like(sample["alpha"])}
    with pytest.raises(PackshotError, match=f"sample {sample['id']} has no product"):
        task.collate([bare], [SampleKey(0, 0, sample["id"])])


# ---- exports, and inference with them ----


def said(folder, **content):
    folder.mkdir(exist_ok=True)
    (folder / "packshot.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """An export without a packshot.json, as those of other trainers are."""
    folder = tmp_path_factory.mktemp("lora")
    METHODS[LoraMethod](load_parts(ModelConfig()), LoraMethod(rank=2)).export(folder)
    return folder


def test_an_export_names_condition_and_product_conditioning(tmp_path):
    config = compose("train_controlnet", ["objective.product_conditioning=clean"])
    method = METHODS[ControlNetMethod](load_parts(ModelConfig()), config.method)
    method.export(tmp_path, objective_metadata(config.objective))
    written = json.loads((tmp_path / "packshot.json").read_text())
    assert written.items() >= {"condition": "inpaint", "product_conditioning": "clean"}.items()
    plain = compose("train_lora", []).objective
    assert objective_metadata(plain) == {"product_conditioning": "noised"}


def test_exports_of_earlier_versions_are_read_with_their_names(tmp_path):
    folder = said(tmp_path, product_shown="clean", prediction_type="v_prediction")
    assert read_metadata("adapters.lora", folder) == AdapterMetadata("clean", "v_prediction")


def working_copy(tool):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8))
    canvas = tool.set_product(photo, ellipse()).canvas(SETTINGS)
    return make_working(canvas, plan_frame(128, 128, tool.models.resolution, tool.models.unit), 8)


def latents_of(vae, image_HW3):
    """The product's latents, written out once more: pixels in [-1, 1], the posterior's mode, times the VAE's factor."""
    pixels = torch.from_numpy(image_HW3 / 127.5 - 1).float().permute(2, 0, 1)[None]
    return vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor


def network_inputs(monkeypatch, pipe):
    """What the UNet is given at each step."""
    seen, forward = [], pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda sample, *a, **k: seen.append(sample) or forward(sample, *a, **k))
    return seen


def test_clean_trained_adapters_are_shown_clean_products(lora, tmp_path, monkeypatch):
    """Generation follows what the export states."""
    export = said(tmp_path / "clean", product_conditioning="clean")
    (export / "pytorch_lora_weights.safetensors").write_bytes((lora / "pytorch_lora_weights.safetensors").read_bytes())
    tool = Packshot.load(lora=str(export))
    assert tool.models.product_conditioning == tool.models.manifest["product_shown"] == "clean"
    working = working_copy(tool)
    seen = network_inputs(monkeypatch, tool.models.pipe)
    denoise(tool.models, working, encode(tool.models, "an object on a table", SETTINGS), SETTINGS, seed=0)
    with torch.no_grad():
        known = latents_of(tool.models.pipe.vae, working.image_HW3)
    inside = torch.from_numpy(working.held_hw)
    assert len(seen) == 3
    assert inside.sum() > 10
    for sample in seen:
        torch.testing.assert_close(sample[..., inside], known[..., inside], rtol=1e-5, atol=1e-5)


def blended(pipe, known, noise, held):
    """Blended latent diffusion written out: what is done for a product that is noised as the rest."""

    def keep(pipe, step, timestep, tensors):
        later = pipe.scheduler.timesteps[step + 1 : step + 2]
        target = pipe.scheduler.add_noise(known, noise, later) if len(later) else known
        return {"latents": torch.lerp(tensors["latents"], target, held)}

    return keep


def test_other_adapters_draw_by_blended_latent_diffusion(lora):
    """Written out once more, from noise to picture."""
    tool = Packshot.load(lora=str(lora))
    pipe = tool.models.pipe
    assert tool.models.product_conditioning == "noised"
    working = working_copy(tool)
    conditioning = encode(tool.models, "an object on a table", SETTINGS)
    ours = denoise(tool.models, working, conditioning, SETTINGS, seed=3)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn((1, 4, 16, 16), generator=generator)
    with torch.no_grad():
        known = latents_of(pipe.vae, working.image_HW3)
        held = torch.from_numpy(working.held_hw.astype(np.float32))
        latents = pipe(
            **conditioning.arguments, height=128, width=128, num_inference_steps=3, guidance_scale=1.0, latents=noise,
            generator=generator, output_type="latent", callback_on_step_end=blended(pipe, known, noise, held),
        ).images  # fmt: skip
        theirs = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample[0].permute(1, 2, 0)
    np.testing.assert_allclose(ours, (theirs / 2 + 0.5).clamp(0, 1).numpy(), atol=1e-5)


def test_a_disagreement_of_adapters_is_logged(lora, tmp_path, monkeypatch, caplog):
    """One that was trained on clean products is enough."""
    export = said(tmp_path / "net", condition="inpaint", product_conditioning="clean")
    (export / "config.json").write_text("{}")
    adapters = AdaptersConfig(lora=str(lora), controlnets=[str(export)])
    monkeypatch.setattr("packshot.base.adapter_metadata.log.propagate", True)
    with caplog.at_level(logging.WARNING):
        check_adapters(adapters, {})
    assert "clean is used" in caplog.text
    assert f"{lora}: noised" in caplog.text
    assert f"{export}: clean" in caplog.text
    assert common_metadata({"lora": [lora], "controlnets": [export], "ip_adapter": []}).product_conditioning == "clean"
    assert common_metadata({"lora": [lora], "controlnets": [], "ip_adapter": []}) == AdapterMetadata()
    caplog.clear()
    check_adapters(replace(adapters, lora=None), {})
    assert not caplog.text


TERMINAL = ("objective.prediction_type=v_prediction", "objective.zero_terminal_snr=true")


def test_inference_samples_as_the_adapter_was_trained(lora, rows, tmp_path):
    export = shutil.copytree(lora, tmp_path / "export")
    config = compose("train_lora", [*TERMINAL, "objective.unconditional=empty"])
    write_metadata(export, objective_metadata(config.objective))
    parts = load_parts(config.model)
    base = dict(parts.scheduler.config)
    task_of(rows, parts, *TERMINAL)
    models = load_models(config.model, AdaptersConfig(lora=str(export)))
    assert dict(models.pipe.scheduler.config) == dict(parts.scheduler.config) != base
    sampler = models.pipe.scheduler
    assert (sampler.config.prediction_type, sampler.config.timestep_spacing) == ("v_prediction", "trailing")
    assert sampler.alphas_cumprod[-1] < 1e-6  # the last step is pure noise
    assert models.manifest["prediction_type"] == "v_prediction"
    settings = GenerateSettings(guidance_scale=2.0, num_inference_steps=1)
    assert encode(models, "", settings).arguments["prompt_embeds"].any()
    plain = load_models(config.model, AdaptersConfig(lora=str(lora)))
    assert dict(plain.pipe.scheduler.config) == base
    assert not encode(plain, "", settings).arguments["prompt_embeds"].any()


def test_adapters_of_different_predictions_do_not_mix(lora, tmp_path):
    """Epsilon and v cannot be added."""
    folders = []
    for name, keys in (("plain", ()), ("terminal", TERMINAL)):
        folders.append(shutil.copytree(lora, tmp_path / name))
        objective = compose("train_lora", list(keys)).objective
        write_metadata(folders[-1], objective_metadata(objective))
    with pytest.raises(ConfigError, match="prediction_type differed"):
        common_metadata({"lora": folders[:1], "controlnets": folders[1:]})
    assert common_metadata(
        {"lora": [lora], "controlnets": folders[1:]}
    ).zero_terminal_snr  # others' exports say nothing


@pytest.mark.parametrize("content", ["{", "[]", '{"product_conditioning": "blurred"}', '{"product_conditioning": 1}'])
def test_an_export_that_says_nonsense_is_refused(lora, tmp_path, content):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    (tmp_path / "packshot.json").write_text(content)
    with pytest.raises(ConfigError, match=r"adapters.lora: .*packshot.json does not name how the adapter was trained"):
        check_adapters(AdaptersConfig(lora=str(tmp_path)), {})
