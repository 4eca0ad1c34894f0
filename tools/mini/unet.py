"""Stage ``unet``: SDXL's UNet on 16 x 16 latents, conditioned exactly as StableDiffusionXLPipeline conditions it."""

# diffusers annotates block tuples as one-element tuples and module attributes as optional.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportIndexIssue=false

from __future__ import annotations

import json
import random
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from packshot.imaging.pixels import to_bytes
from packshot.pipeline.shards import split
from packshot.scene import Scene
from tools.mini.budgeted_training import DEVICE, Loss, Plan, Progress, fast_precision, run_stretch
from tools.mini.clip import slot_accuracy, token_ids
from tools.mini.data import SIZE, Render, Renders, images_of, mirrored, prompt, scenes_of
from tools.mini.folder import Family, fingerprint
from tools.mini.vae import encode, encoder_fingerprint

LOADERS = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "image_encoder": CLIPVisionModelWithProjection,
    "tokenizer": CLIPTokenizer,
    "tokenizer_2": CLIPTokenizer,
    "feature_extractor": CLIPImageProcessorPil,
}
SIDE = SIZE // 8
BATCH = 32
WORDINGS = 3  # prompts for one view of a scene: 27 kB each once encoded
DROP_TEXT = 0.1
# Share of batches cut to each latent shape: the pipeline is also asked for portrait and landscape.
SHAPES = (((SIDE, SIDE), 0.84), ((SIDE, 12), 0.08), ((12, SIDE), 0.08))
SNR_GAMMA = 5.0
# A small latent betrays its mean colour even at the noisiest step, and the model would read the colour from there
# instead of from the text; SDXL's own training adds the same kind of noise, at 0.05.
NOISE_OFFSET = 0.1
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TIME_EMBEDDING = 32


def sdxl_scheduler() -> EulerDiscreteScheduler:
    """The scheduler with the settings of the SDXL base checkpoint."""
    return EulerDiscreteScheduler(
        **BETAS, prediction_type="epsilon", steps_offset=1, timestep_spacing="leading", interpolation_type="linear"
    )


def build_unet(latent_channels: int, text_width: int, pooled_width: int) -> UNet2DConditionModel:
    """The untrained UNet in SDXL's arrangement: no attention at the finest level, most at the coarsest."""
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        transformer_layers_per_block=[1, 1, 2],
        attention_head_dim=[2, 4, 4],  # the number of heads: diffusers reads it so, as in SDXL's own config
        cross_attention_dim=text_width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_EMBEDDING,
        projection_class_embeddings_input_dim=pooled_width + 6 * TIME_EMBEDDING,
        norm_num_groups=16,
    )
    torch.nn.init.zeros_(unet.conv_out.weight)  # Dhariwal and Nichol 2021: start from the prediction "no noise"
    torch.nn.init.zeros_(unet.conv_out.bias)
    return unet


def load_parts(folder: Path) -> dict:
    """All parts but the UNet, in fp32 and eval mode."""
    parts = {name: loader.from_pretrained(folder / name) for name, loader in LOADERS.items()}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.float().eval().requires_grad_(False)
    return parts


@torch.no_grad()
def encode_prompts(parts: dict, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Penultimate states of both encoders side by side, states_B77D, and the second's pooled embeds_BE."""
    device = parts["text_encoder"].device
    ids = token_ids(parts["tokenizer"], texts).to(device)
    ids_2 = token_ids(parts["tokenizer_2"], texts).to(device)
    first = parts["text_encoder"](ids, output_hidden_states=True).hidden_states[-2]
    second = parts["text_encoder_2"](ids_2, output_hidden_states=True)
    return torch.cat([first, second.hidden_states[-2]], dim=-1), second.text_embeds


class PromptCache:
    """What the frozen text encoders make of every prompt. Encodes a prompt when it is first asked for."""

    def __init__(self, parts: dict) -> None:
        self._parts = parts
        self._encoded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """states_B77D and pooled_BE as :func:`encode_prompts` has them, rounded to half precision."""
        missing = sorted(set(texts) - self._encoded.keys())
        if missing:
            states, pooled = encode_prompts(self._parts, missing)
            for text, state, vector in zip(missing, states.half().cpu(), pooled.half().cpu(), strict=True):
                self._encoded[text] = state, vector
        states, pooled = map(torch.stack, zip(*map(self._encoded.__getitem__, texts), strict=True))
        return states.to(DEVICE).float(), pooled.to(DEVICE).float()


class LatentCache:
    """Scaled latents of every render: image and plate, as they are and mirrored. Encodes what is new when asked."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self._vae = vae
        self._latents: dict[str, torch.Tensor] = {}

    def of(self, render: Render) -> torch.Tensor:
        """latents_4CHW: image, plate, mirrored image, mirrored plate."""
        if render.id not in self._latents:
            pair = [render.image, render.plate]
            views = pair + [np.ascontiguousarray(view[:, ::-1]) for view in pair]
            self._latents[render.id] = encode(self._vae, views) * self._vae.config.scaling_factor
        return self._latents[render.id].clone()


def _cut(latent_CHW: torch.Tensor, shape: tuple[int, int], rng: random.Random) -> tuple[torch.Tensor, list[int]]:
    """A random window and its time_ids: original size, crop corner, target size, in pixels, height first."""
    height, width = shape
    top = rng.randint(0, SIDE - height)
    left = rng.randint(0, SIDE - width)
    window = latent_CHW[:, top : top + height, left : left + width]
    return window, [SIZE, SIZE, 8 * top, 8 * left, 8 * height, 8 * width]


def draw_batch(
    renders: list[Render], cache: LatentCache, rng: random.Random, wordings: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """latents_BCHW in one shape, time_ids_B6 and texts, an image or a plate of each render.

    wordings: how many prompts there are for one view of a render, so that each is encoded once; None for no limit.
    """
    shapes, shares = zip(*SHAPES, strict=True)
    shape = rng.choices(shapes, shares)[0]
    latents, times, texts = [], [], []
    for render in renders:
        empty = rng.random() < 0.4
        flip = rng.random() < 0.5
        window, time = _cut(cache.of(render)[2 * flip + empty], shape, rng)
        latents.append(window)
        times.append(time)
        words = rng
        if wordings is not None:
            words = random.Random(f"{render.id} {flip} {empty} {rng.randrange(wordings)}")
        texts.append(prompt(mirrored(render.scene) if flip else render.scene, words, empty))
    return torch.stack(latents), torch.tensor(times, dtype=torch.float32), texts


def assemble(parts: dict, unet: UNet2DConditionModel) -> StableDiffusionXLPipeline:
    """The stock pipeline around the given parts."""
    pipeline = StableDiffusionXLPipeline(**parts, unet=unet, scheduler=sdxl_scheduler(), add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


Prompts = tuple[torch.Tensor, torch.Tensor]  # states_B77D and pooled_BE


def _loss(
    unet: UNet2DConditionModel, noiser: DDPMScheduler, latents_BCHW: torch.Tensor, times_B6: torch.Tensor,
    prompts: Prompts, timesteps_B: torch.Tensor, noise_BCHW: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Squared error of the predicted noise per sample, losses_B."""
    states, pooled = prompts
    noisy = noiser.add_noise(latents_BCHW, noise_BCHW, timesteps_B).to(DEVICE, memory_format=torch.channels_last)
    extra = {"text_embeds": pooled, "time_ids": times_B6.to(DEVICE)}
    predicted = unet(noisy, timesteps_B.to(DEVICE), states, added_cond_kwargs=extra).sample
    return (predicted.float() - noise_BCHW.to(DEVICE)).pow(2).mean(dim=(1, 2, 3))


@torch.inference_mode()
def held_out_loss(
    unet: UNet2DConditionModel, parts: dict, noiser: DDPMScheduler, renders: list[Render], cache: LatentCache
) -> float:
    """Mean squared noise error on the same held-out images, noise and evenly spread timesteps every time."""
    rng = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for batch in split(renders, 16):
        latents, times, texts = draw_batch(list(batch), cache, rng)
        prompts = encode_prompts(parts, texts)
        for timestep in range(50, 1000, 100):
            timesteps = torch.full((len(texts),), timestep)
            noise = torch.randn(latents.shape, generator=generator)
            losses.append(_loss(unet, noiser, latents, times, prompts, timesteps, noise).mean())
    return torch.stack(losses).mean().item()


def sample(
    parts: dict, unet: UNet2DConditionModel, texts: list[str], guidance: float = 4.0, seed: int = 0
) -> list[np.ndarray]:
    """uint8 images, 25 Euler steps, the k-th from seed ``seed + k``."""
    images = []
    for start in range(0, len(texts), 16):
        chunk = texts[start : start + 16]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        output = assemble(parts, unet)(
            chunk, num_inference_steps=25, guidance_scale=guidance, generator=generators, output_type="np"
        )
        images += list(to_bytes(output.images))
    return images


def _save_samples(parts: dict, unet: UNet2DConditionModel, renders: Renders, path: Path) -> None:
    """Rows: held-out renders, what the model draws for their captions, and for the same places left empty."""
    chosen = renders.held_out[:8]
    texts = list(map(Scene.render, scenes_of(chosen)))
    drawn = sample(parts, unet, texts + [text.replace("an object", "an empty place") for text in texts])
    rows = np.vstack(list(map(np.hstack, (images_of(chosen), drawn[: len(texts)], drawn[len(texts) :]))))
    cv2.imwrite(str(path), cv2.cvtColor(rows, cv2.COLOR_RGB2BGR))


def measure_unet(
    unet: UNet2DConditionModel, parts: dict, noiser: DDPMScheduler, renders: list[Render], cache: LatentCache
) -> dict[str, float]:
    """Held-out loss, and per slot how often the image encoder sees in a sample what its prompt asked for."""
    scenes = scenes_of(renders[:32])
    drawn = sample(parts, unet, list(map(Scene.render, scenes)))
    seen = slot_accuracy(parts, drawn, scenes)
    loss = held_out_loss(unet, parts, noiser, renders, cache)
    return {"loss": loss, **{f"sample_{slot}": value for slot, value in seen.items()}}


def _training_loss(unet: UNet2DConditionModel, parts: dict, renders: Renders, cache: LatentCache) -> Loss:
    """The weighted loss on a batch. Latents and prompts are encoded once, so that a step is little but the UNet's."""
    noiser = DDPMScheduler(**BETAS)
    prompts = PromptCache(parts)

    def loss_of(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        latents, times, texts = draw_batch(renders.draw(generator, BATCH), cache, rng, WORDINGS)
        states, pooled = prompts.of(texts)
        timesteps = torch.randint(noiser.config.num_train_timesteps, (BATCH,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        noise += NOISE_OFFSET * torch.randn((*noise.shape[:2], 1, 1), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < DROP_TEXT
        states[dropped] = 0.0  # what force_zeros_for_empty_prompt gives guidance
        pooled[dropped] = 0.0
        with fast_precision():
            losses = _loss(unet, noiser, latents, times, (states, pooled), timesteps, noise)
        ratio = compute_snr(noiser, timesteps)
        weights = (ratio.clamp(max=SNR_GAMMA) / ratio).to(DEVICE)  # Hang et al. 2023, for noise prediction
        return (weights * losses).mean(), {"unweighted": losses.mean().item()}

    return loss_of


def train_unet(renders: Renders, family: Family, folder: Path, minutes: float, seed: int) -> None:
    """Train the UNet on the staged autoencoder and text encoders, and stage it with its scheduler and model index."""
    torch.manual_seed(seed)
    parts = load_parts(family.staging)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.to(DEVICE)
    pooled = parts["text_encoder_2"].config.projection_dim
    width = parts["text_encoder"].config.hidden_size + parts["text_encoder_2"].config.hidden_size
    unet = build_unet(parts["vae"].config.latent_channels, width, pooled).to(DEVICE, memory_format=torch.channels_last)
    family.begin(unet, "unet")
    noiser = DDPMScheduler(**BETAS)
    cache = LatentCache(parts["vae"])
    inputs = _inputs(family)
    plan = Plan("unet", folder, minutes, family.rate(6e-4), BATCH, seed=seed, inputs=inputs, ema_decay=0.998)
    loss_of = _training_loss(unet, parts, renders, cache)

    def preview(at: Progress) -> None:
        _save_samples(parts, unet, renders, folder / f"samples-{at.step:06d}.png")
        loss = held_out_loss(unet, parts, noiser, renders.held_out[:32], cache)
        print(f"unet  step {at.step}  loss on 32 held-out scenes {loss:.5f}", flush=True)

    progress = run_stretch(plan, unet, loss_of, preview)
    measures = measure_unet(unet, parts, noiser, renders.held_out, cache)
    score = -measures["loss"]
    record = family.record("unet", progress, renders, score, measures, unet.num_parameters(), inputs)

    def write(staging: Path) -> None:
        pipeline = assemble(parts, unet)
        pipeline.save_config(staging)
        pipeline.scheduler.save_pretrained(staging / "scheduler")
        unet.half().save_pretrained(staging / "unet")

    family.keep_if_better("unet", record, write)


def _inputs(family: Family) -> str:
    """What a UNet is trained on: the staged text encoders, and what makes latents. The VAE's decoder has no part."""
    vae = family.staging / "vae"
    config = json.loads((vae / "config.json").read_text(encoding="utf-8"))
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    texts = fingerprint(family.staging / "text_encoder", family.staging / "text_encoder_2")
    return f"{encoder_fingerprint(weights)} x {config['scaling_factor']}, {texts}"


def fits(family: Family) -> bool:
    """Whether the staged UNet was trained on the staged autoencoder and text encoders."""
    record = family.records.get("unet")
    return record is not None and record.inputs == _inputs(family)
