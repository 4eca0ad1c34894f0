"""Denoising as a Task: from samples to batches, from batches to losses, and pictures along the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor, nn

from packshot.config.schema import TrainScript, Unconditional
from packshot.core.run import log
from packshot.data import geometry
from packshot.data.dataset import Rows
from packshot.diffusion import schedule
from packshot.diffusion.keyed import SampleKey
from packshot.models.load import Parts, weights_hash
from packshot.train.cache import TensorCache, content_key

VALIDATION_LOSS_SAMPLES = 32
VALIDATION_STEPS = 20
VALIDATION_GUIDANCE = 5.0


def framed(sample: dict[str, Any], resolution: int) -> dict[str, Any]:
    """The sample as the model sees it: image and mask through one geometry, which is added as ``geometry``."""
    image, mask = sample["image"], sample["mask"]
    size = (image.height, image.width)
    frame = geometry.plan(size, (resolution, resolution), geometry.product_box(mask))
    pixels = geometry.apply(frame, np.asarray(image))
    seen = {**sample, "image": Image.fromarray(pixels), "geometry": frame}
    if mask is not None:
        seen["mask"] = Image.fromarray(geometry.apply(frame, np.asarray(mask), pad="constant"))
    return seen


@dataclass(frozen=True)
class Keys:
    """Identity of the encoders inside cache keys."""

    vae: str
    text: str
    method: str


class DiffusionTask(nn.Module):
    """Loss of a Method (see ``methods.base``) on a dataset; the loop's Task."""

    def __init__(
        self, method: nn.Module, parts: Parts, config: TrainScript, cache: TensorCache, validation: Rows
    ) -> None:
        super().__init__()
        self.method: Any = method
        self.alphas_cumprod_T: Tensor
        self._parts, self.config, self._cache, self._validation = parts, config, cache, validation
        self._text = StableDiffusionXLPipeline(**parts.pipeline_components())
        self._keys = Keys(
            vae=weights_hash(parts.vae),
            text=weights_hash(parts.text_encoder, parts.text_encoder_2),
            method=self.method.cache_key(),
        )
        scheduler_config: Any = parts.scheduler.config
        self.prediction_type: str = scheduler_config.prediction_type
        self.register_buffer("alphas_cumprod_T", schedule.alphas_cumprod(scheduler_config), persistent=False)

    # ---- encoding, once per sample ----

    def _latent_key(self, sample: dict[str, Any]) -> str:
        frame = geometry.plan(
            (sample["image"].height, sample["image"].width),
            (self.config.model.resolution, self.config.model.resolution),
            geometry.product_box(sample["mask"]),
        )
        return content_key("latent", sample["id"], frame, self._keys.vae)

    def _method_key(self, sample: dict[str, Any]) -> str:
        return content_key("method", sample["id"], self.config.model.resolution, self._keys.method)

    def _text_key(self, text: str) -> str:
        return content_key("text", text, self._keys.text)

    @torch.no_grad()
    def _encode_latents(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        pixels = np.asarray(framed(sample, self.config.model.resolution)["image"], dtype=np.float32) / 127.5 - 1
        pixels_1CHW = torch.from_numpy(pixels.transpose(2, 0, 1))[None].to(self._parts.vae.device)
        posterior = self._parts.vae.encode(pixels_1CHW).latent_dist
        return {"mean": posterior.mean[0].cpu(), "std": posterior.std[0].cpu()}

    @torch.no_grad()
    def _encode_text(self, text: str) -> dict[str, Tensor]:
        self._warn_if_truncated(text)
        prompt_embeds, _, pooled, _ = self._text.encode_prompt(text, do_classifier_free_guidance=False)
        return {"prompt_embeds": prompt_embeds[0].float().cpu(), "pooled_prompt_embeds": pooled[0].float().cpu()}

    def _warn_if_truncated(self, text: str) -> None:
        for tokenizer in (self._parts.tokenizer,):
            ids = tokenizer(text).input_ids
            if len(ids) > tokenizer.model_max_length:
                lost = tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1])
                log.warning("a caption has %d tokens, the model reads %d; lost: %r", len(ids), 77, lost)

    def fill_cache(self, rows: Rows, accelerator: Accelerator) -> None:
        """Encode pictures, captions and references that no earlier run has encoded."""
        # jobs hold an index, not a sample: a large set must not be decoded into memory
        indices = range(len(rows))
        self._cache.fill(
            "encoding pictures",
            (
                (self._latent_key(rows[i]), f"sample {rows.ids[i]}", lambda i=i: self._encode_latents(rows[i]))
                for i in indices
            ),
            accelerator,
        )
        texts = sorted({*rows.texts, ""})
        self._cache.fill(
            "encoding captions",
            ((self._text_key(text), f"caption {text!r}", lambda text=text: self._encode_text(text)) for text in texts),
            accelerator,
        )
        if self._keys.method:
            resolution = self.config.model.resolution
            jobs = (
                (
                    self._method_key(rows[i]),
                    f"sample {rows.ids[i]}",
                    lambda i=i: self.method.encode(framed(rows[i], resolution)),
                )
                for i in indices
            )
            self._cache.fill("encoding references", jobs, accelerator)

    # ---- one access to one sample ----

    def _text_embeds(self, text: str, key: SampleKey) -> dict[str, Tensor]:
        objective = self.config.objective
        dropped = key.uniform("caption_dropout") < objective.caption_dropout
        if dropped and objective.unconditional is Unconditional.empty:
            return self._cache.get(self._text_key(""))
        encoded = self._cache.get(self._text_key(text))
        # sequence and pooled embedding are dropped together, as at inference
        return {name: torch.zeros_like(tensor) for name, tensor in encoded.items()} if dropped else encoded

    def _example(self, sample: dict[str, Any], key: SampleKey) -> dict[str, Tensor]:
        objective = self.config.objective
        seen = framed(sample, self.config.model.resolution)
        posterior = self._cache.get(self._latent_key(sample))
        shape = posterior["mean"].shape
        latents = posterior["mean"] + posterior["std"] * torch.randn(shape, generator=key.generator("posterior"))
        noise = torch.randn(shape, generator=key.generator("noise"))
        if objective.noise_offset:
            shift = torch.randn((shape[0], 1, 1), generator=key.generator("noise_offset"))
            noise = noise + objective.noise_offset * shift
        steps = self.alphas_cumprod_T.numel()
        encoded = self._cache.get(self._method_key(sample)) if self._keys.method else {}
        return {
            "latents": latents * self._parts.vae.config.scaling_factor,
            "noise": noise,
            "timesteps": torch.randint(0, steps, (), generator=key.generator("timestep")),
            "time_ids": torch.tensor(seen["geometry"].time_ids()),
            "weight": self._weight(seen, (shape[1], shape[2])),
            **self._text_embeds(sample["text"], key),
            **self.method.condition(seen, encoded, key),
        }

    def _weight(self, seen: dict[str, Any], latent_size: tuple[int, int]) -> Tensor:
        """Loss weight per latent pixel, (1, h, w): background and product weighted by their share of the cell."""
        objective = self.config.objective
        if seen["mask"] is None:
            return torch.ones(1, *latent_size)
        mask = torch.from_numpy(np.asarray(seen["mask"], dtype=np.float32) / 255)[None]
        product = torch.nn.functional.adaptive_avg_pool2d(mask, latent_size)
        return objective.product_weight * product + objective.background_weight * (1 - product)

    def collate(self, samples: list[dict[str, Any]], keys: list[SampleKey]) -> dict[str, Any]:
        """Latents (scaled), noise, timesteps, embeddings, time_ids and the method's condition, all with B first."""
        examples = [self._example(sample, key) for sample, key in zip(samples, keys, strict=True)]
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    # ---- loss ----

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Weighted squared error per sample, shape (B,); noising, target and loss in fp32."""
        timesteps, schedule_T = batch["timesteps"], self.alphas_cumprod_T
        noisy = schedule.add_noise(batch["latents"], batch["noise"], timesteps, schedule_T)
        prediction = self.method.predict(noisy, timesteps, batch)
        target = schedule.TARGETS[self.prediction_type](batch["latents"], batch["noise"], timesteps, schedule_T)
        loss = schedule.masked_mse(prediction, target, batch["weight"])
        gamma = self.config.objective.snr_gamma
        if gamma is not None:
            loss = loss * schedule.min_snr_weight(timesteps, schedule_T, gamma, self.prediction_type)
        return loss

    # ---- validation ----

    def validate(self, folder: Path, accelerator: Accelerator) -> tuple[dict[str, float], list[Path], list[str]]:
        """Loss on held-out samples with fixed noise, and pictures of fixed prompts with fixed seeds (truth | ours)."""
        losses = self._validation_loss(accelerator)
        count = min(self.config.train.validation_samples, len(self._validation))
        mine = range(accelerator.process_index, count, accelerator.num_processes)
        folder.mkdir(parents=True, exist_ok=True)
        pipeline = self.method.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        for index in mine:
            self._picture(pipeline, index, accelerator).save(folder / f"{index:03d}.png")
        accelerator.wait_for_everyone()
        files = [folder / f"{index:03d}.png" for index in range(count)]
        return {"validation_loss": losses}, files, self._validation.texts[:count]

    def _validation_loss(self, accelerator: Accelerator) -> float:
        count = min(VALIDATION_LOSS_SAMPLES, len(self._validation))
        total = torch.zeros((), device=accelerator.device)
        for index in range(accelerator.process_index, count, accelerator.num_processes):
            sample = self._validation[index]
            # the epoch "validation" never occurs in training: these draws stay the same from step to step
            batch = self.collate([sample], [SampleKey(self.config.run.seed, -1, sample["id"])])
            with accelerator.autocast():
                total += self(batch_to(batch, accelerator.device)).sum()
        summed: Any = accelerator.reduce(total, "sum")
        return summed.item() / count

    def _picture(self, pipeline: Any, index: int, accelerator: Accelerator) -> Image.Image:
        resolution = self.config.model.resolution
        seen = framed(self._validation[index], resolution)
        with accelerator.autocast():
            latents = pipeline(
                prompt=seen["text"],
                height=resolution,
                width=resolution,
                num_inference_steps=VALIDATION_STEPS,
                guidance_scale=VALIDATION_GUIDANCE,
                generator=torch.Generator().manual_seed(self.config.run.seed + index),
                output_type="latent",
                **self.method.pipeline_inputs(seen),
            ).images
        vae = self._parts.vae
        pixels = vae.decode(latents.float() / vae.config.scaling_factor).sample[0].clamp(-1, 1)
        generated = ((pixels.permute(1, 2, 0).cpu().numpy() + 1) * 127.5).round().astype(np.uint8)
        return Image.fromarray(np.concatenate([np.asarray(seen["image"]), generated], axis=1))


def batch_to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch of tensors on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
