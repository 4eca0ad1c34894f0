"""Denoising as a Task: from encoded samples to batches, from batches to losses, and pictures along the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from packshot.config.schema import PredictionType, TrainScript, Unconditional
from packshot.config.validate import check_objective
from packshot.diffusion import schedule
from packshot.diffusion.keyed import SampleKey
from packshot.models.load import Parts
from packshot.train.encode import Examples

VALIDATION_LOSS_SAMPLES = 32
VALIDATION_STEPS = 20
VALIDATION_GUIDANCE = 5.0


class DiffusionTask(nn.Module):
    """Loss of a Method (see ``methods.base``) on encoded samples (see ``train.encode``); the loop's Task."""

    def __init__(self, method: nn.Module, parts: Parts, config: TrainScript, validation: Examples) -> None:
        super().__init__()
        self.method: Any = method
        self.alphas_cumprod_T: Tensor
        self._parts, self.config, self.validation = parts, config, validation
        objective, scheduler = config.objective, parts.scheduler.config
        own = objective.prediction_type is PredictionType.base
        self.prediction_type: str = scheduler.prediction_type if own else objective.prediction_type.name
        check_objective(objective, self.prediction_type, scheduler.num_train_timesteps)
        alphas_cumprod = schedule.alphas_cumprod(scheduler)
        if objective.zero_terminal_snr or scheduler.get("rescale_betas_zero_snr"):
            alphas_cumprod = schedule.rescale_zero_terminal_snr(alphas_cumprod)
        # validation pictures are sampled the way the network is trained
        zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if objective.zero_terminal_snr else {}
        parts.scheduler = type(parts.scheduler).from_config(scheduler, prediction_type=self.prediction_type, **zero)
        self.register_buffer("alphas_cumprod_T", alphas_cumprod, persistent=False)

    # ---- one access to one sample ----

    def _prompt(self, sample: dict[str, Any], key: SampleKey) -> dict[str, Tensor]:
        """The prompt of one access; ``prompt_kept`` is 0 where it is dropped to zeros, for what is encoded later."""
        objective, empty = self.config.objective, sample["empty"]
        kept = {name: sample[name] for name in empty}
        if key.uniform("caption_dropout") < objective.caption_dropout:
            if objective.unconditional is Unconditional.zeros:
                # sequence and pooled embedding are dropped together, as at inference
                return {
                    **{name: torch.zeros_like(tensor) for name, tensor in kept.items()},
                    "prompt_kept": torch.zeros(()),
                }
            kept = empty
        return {**kept, "prompt_kept": torch.ones(())}

    def _encode_prompt(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings by the text encoders as they are now, zero where the prompt was dropped."""
        prompt_embeds, pooled = self.method.encode_prompt([batch["input_ids"], batch["input_ids_2"]])
        kept_B = batch["prompt_kept"]
        return {
            "prompt_embeds": prompt_embeds * kept_B[:, None, None],
            "pooled_prompt_embeds": pooled * kept_B[:, None],
        }

    def _drawn(self, sample: dict[str, Any], key: SampleKey) -> dict[str, Tensor]:
        objective, shape = self.config.objective, sample["mean"].shape
        latents = sample["mean"] + sample["std"] * torch.randn(shape, generator=key.generator("posterior"))
        noise = torch.randn(shape, generator=key.generator("noise"))
        noise = schedule.offset_noise(noise, key.generator("noise_offset"), objective.noise_offset)
        perturbation = key.generator("input_perturbation")
        return {
            "latents": latents * self._parts.vae.config.scaling_factor,
            "noise": noise,
            "seen_noise": schedule.perturb_noise(noise, perturbation, objective.input_perturbation),
            "timesteps": schedule.draw_timestep(
                key.generator("timestep"),
                objective.timestep_sampling.name,
                self.alphas_cumprod_T.numel(),
                objective.min_timestep,
                objective.max_timestep,
                objective.logit_normal_location,
                objective.logit_normal_scale,
            ),
            "time_ids": sample["time_ids"],
            "weight": schedule.boundary_weight(
                sample["alpha"],
                objective.product_weight,
                objective.background_weight,
                objective.boundary_weight,
                objective.boundary_width,
            ),
            **self._prompt(sample, key),
            **self.method.condition(sample["seen"], sample["encoded"], key),
        }

    def collate(self, samples: list[dict[str, Any]], keys: list[SampleKey]) -> dict[str, Any]:
        """Latents (scaled), noise, timesteps, embeddings, time_ids and the method's condition, all with B first."""
        drawn = [self._drawn(sample, key) for sample, key in zip(samples, keys, strict=True)]
        return {name: torch.stack([example[name] for example in drawn]) for name in drawn[0]}

    # ---- loss ----

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Weighted squared error per sample, shape (B,); noising, target and loss in fp32."""
        timesteps, schedule_T = batch["timesteps"], self.alphas_cumprod_T
        if self.method.trains_text:
            batch = batch | self._encode_prompt(batch)
        noisy = schedule.add_noise(batch["latents"], batch["seen_noise"], timesteps, schedule_T)
        prediction = self.method.predict(noisy, timesteps, batch)
        target = schedule.TARGETS[self.prediction_type](batch["latents"], batch["noise"], timesteps, schedule_T)
        loss = schedule.masked_mse(prediction, target, batch["weight"])
        objective = self.config.objective
        weight = schedule.LOSS_WEIGHTS[objective.loss_weighting.name]
        return loss * weight(timesteps, schedule_T, objective.snr_gamma, self.prediction_type)

    # ---- validation ----

    def validate(self, folder: Path, accelerator: Accelerator) -> tuple[dict[str, float], list[Path], list[str]]:
        """Loss on held-out samples with fixed noise, and pictures of fixed prompts with fixed seeds (truth | ours)."""
        losses = self._held_out_loss(accelerator)
        count = min(self.config.train.validation_samples, len(self.validation))
        mine = range(accelerator.process_index, count, accelerator.num_processes)
        folder.mkdir(parents=True, exist_ok=True)
        pipeline = self.method.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        for index in mine:
            self._picture(pipeline, index, accelerator).save(folder / f"{index:03d}.png")
        accelerator.wait_for_everyone()
        files = [folder / f"{index:03d}.png" for index in range(count)]
        return {"validation_loss": losses}, files, self.validation.rows.texts[:count]

    def _held_out_loss(self, accelerator: Accelerator) -> float:
        count = min(VALIDATION_LOSS_SAMPLES, len(self.validation))
        total = torch.zeros((), device=accelerator.device)
        for index in range(accelerator.process_index, count, accelerator.num_processes):
            sample = self.validation[index]
            # the epoch "validation" never occurs in training: these draws stay the same from step to step
            batch = self.collate([sample], [SampleKey(self.config.run.seed, -1, sample["id"])])
            with accelerator.autocast():
                total += self(batch_to(batch, accelerator.device)).sum()
        summed: Any = accelerator.reduce(total, "sum")
        return summed.item() / count

    def _prompts(self, sample: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
        """The pipeline's embeddings of a sample's prompt, and of what guidance subtracts: a prompt that was dropped."""
        given, empty = (
            {name: values[name][None].to(device) for name in sample["empty"]} for values in (sample, sample["empty"])
        )
        if self.method.trains_text:
            one = {"prompt_kept": torch.ones(1, device=device)}
            given, empty = self._encode_prompt(given | one), self._encode_prompt(empty | one)
        if self.config.objective.unconditional is Unconditional.zeros:
            empty = {name: torch.zeros_like(tensor) for name, tensor in empty.items()}
        return {**given, **{f"negative_{name}": tensor for name, tensor in empty.items()}}

    def _picture(self, pipeline: Any, index: int, accelerator: Accelerator) -> Image.Image:
        sample, seen = self.validation[index], self.validation.seen(index)
        with accelerator.autocast():
            latents = pipeline(
                **self._prompts(sample, accelerator.device),
                height=seen["image"].height,
                width=seen["image"].width,
                num_inference_steps=VALIDATION_STEPS,
                guidance_scale=VALIDATION_GUIDANCE,
                generator=torch.Generator().manual_seed(self.config.run.seed + index),
                output_type="latent",
                **self.method.pipeline_inputs(seen, sample["encoded"]),
            ).images
        vae = self._parts.vae
        pixels = vae.decode(latents.float() / vae.config.scaling_factor).sample[0].clamp(-1, 1)
        generated = ((pixels.permute(1, 2, 0).cpu().numpy() + 1) * 127.5).round().astype(np.uint8)
        return Image.fromarray(np.concatenate([np.asarray(seen["image"]), generated], axis=1))


def batch_to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch of tensors on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
