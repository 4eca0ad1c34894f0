"""Denoising as a Task: from encoded samples to batches, from batches to losses, and pictures along the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from packshot.base.inpainting import ProductConv
from packshot.base.load import Parts, trained_scheduler
from packshot.config.schema import PredictionType, ProductConditioning, TrainScript, Unconditional, check_objective
from packshot.diffusion import hold_product, schedule
from packshot.engine.keyed_random import SampleKey
from packshot.engine.packed import Tensors
from packshot.engine.task import Task, Validated
from packshot.errors import PackshotError
from packshot.lists import column, map_values
from packshot.methods.base import Method
from packshot.train.examples import Example, Examples
from packshot.train.validation import Validator


def drawn_prompt(sample: Example, key: SampleKey) -> Tensors:
    """The prompt of one access: of several captions each is as likely."""
    prompts = sample.get("prompts", ())
    if len(prompts) < 2:
        return sample["prompt"]
    return prompts[int(key.uniform("caption") * len(prompts))]


def drawn_side(sample: Example, key: SampleKey) -> Example:
    """The sample of one access; where it may be flipped, its mirror image at half of the accesses."""
    mirror = sample.get("mirror")
    return mirror[0] if mirror is not None and key.uniform("flip") < 0.5 else sample


class DiffusionTask(Task):
    """Loss of a Method (see ``methods.base``) on encoded samples (see ``train.examples``); the loop's Task."""

    def __init__(self, method: Method, parts: Parts, config: TrainScript, validation: Examples) -> None:
        super().__init__()
        self.method = method
        self.alphas_cumprod_T: Tensor
        self.config = config
        self._latent_scale = parts.latent_scale()
        self.validator = Validator(validation, config)
        objective = config.objective
        scheduler = parts.scheduler.config
        self.prediction_type: str = scheduler.prediction_type
        if objective.prediction_type is not PredictionType.base:
            self.prediction_type = objective.prediction_type.name
        rescaled = objective.zero_terminal_snr or bool(scheduler.get("rescale_betas_zero_snr"))
        effective = replace(objective, zero_terminal_snr=rescaled)
        check_objective(effective, self.prediction_type, scheduler.num_train_timesteps)
        alphas_cumprod = schedule.alphas_cumprod(scheduler)
        if rescaled:
            alphas_cumprod = schedule.rescale_zero_terminal_snr(alphas_cumprod)
        # validation pictures are sampled the way the network is trained
        parts.scheduler = trained_scheduler(parts.scheduler, self.prediction_type, objective.zero_terminal_snr)
        self.register_buffer("alphas_cumprod_T", alphas_cumprod, persistent=False)

    # ---- one access to one sample ----

    def _prompt(self, sample: Example, key: SampleKey) -> Tensors:
        """The prompt of one access; ``prompt_kept`` is 0 where it is dropped to zeros, for prompts encoded later.

        A sample without a caption is trained as one whose prompt is dropped.
        """
        objective = self.config.objective
        if not sample.get("bare") and key.uniform("caption_dropout") >= objective.caption_dropout:
            return {**drawn_prompt(sample, key), "prompt_kept": torch.ones(())}
        if objective.unconditional is not Unconditional.zeros:
            return {**sample["empty"], "prompt_kept": torch.ones(())}
        # sequence and pooled embedding are dropped together, as at inference
        zeros = map_values(torch.zeros_like, sample["prompt"])
        return {**zeros, "prompt_kept": torch.zeros(())}

    def encode_prompt(self, batch: Tensors) -> Tensors:
        """Embeddings by the text encoders as they are now, zero where the prompt was dropped."""
        prompt_embeds, pooled = self.method.encode_prompt([batch["input_ids"], batch["input_ids_2"]])
        kept_B = batch["prompt_kept"]
        return {
            "prompt_embeds": prompt_embeds * kept_B[:, None, None],
            "pooled_prompt_embeds": pooled * kept_B[:, None],
        }

    def _drawn(self, sample: Example, key: SampleKey) -> Tensors:
        """Every random draw of one access, and the other things that a step reads."""
        objective = self.config.objective
        sample = drawn_side(sample, key)
        shape = sample["mean"].shape
        latents = sample["mean"] + sample["std"] * torch.randn(shape, generator=key.generator("posterior"))
        noise = torch.randn(shape, generator=key.generator("noise"))
        noise = schedule.offset_noise(noise, key.generator("noise_offset"), objective.noise_offset)
        perturbation = key.generator("input_perturbation")
        drawn = {
            "latents": self._latent_scale.to_unet(latents),
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
            **self._weights(sample),
            **self._prompt(sample, key),
            **self.method.condition(sample["seen"], sample["encoded"], key),
        }
        if "product" in sample:
            drawn["product"] = sample["product"]
        return drawn

    def _weights(self, sample: Example) -> Tensors:
        """``weight``: the loss weight of each cell, 0 in letterbox bars, which are not part of the scene.

        If the product is shown clean, also ``held``: 1 in the product's cells, whose weight is 0 too.
        """
        objective = self.config.objective
        alpha_1HW = sample["alpha"]
        conditioning = objective.product_conditioning
        if conditioning is not ProductConditioning.noised and not alpha_1HW.any():
            raise PackshotError(
                f"sample {sample['id']} has no product: objective.product_conditioning={conditioning} needs masks.",
                "Use a product dataset (build_data.py dataset=product), or set objective.product_conditioning=noised.",
            )
        weight_1HW = sample["inside"] * schedule.boundary_weight(
            alpha_1HW,
            objective.product_weight,
            objective.background_weight,
            objective.boundary_weight,
            objective.boundary_width,
        )
        if conditioning is not ProductConditioning.clean:
            return {"weight": weight_1HW}
        return {"weight": weight_1HW * (1 - sample["held"]), "held": sample["held"]}

    def collate(self, samples: Sequence[Example], keys: Sequence[SampleKey]) -> Tensors:
        """Latents (scaled), noise, timesteps, embeddings, time_ids and the method's condition, all with B first."""
        drawn = list(map(self._drawn, samples, keys))
        return {name: torch.stack(column(drawn, name)) for name in drawn[0]}

    # ---- loss ----

    def forward(self, batch: Tensors) -> Tensor:
        """Weighted squared error per sample, shape (B,); noising, target and loss in fp32."""
        timesteps = batch["timesteps"]
        schedule_T = self.alphas_cumprod_T
        if self.method.trains_text:
            batch = batch | self.encode_prompt(batch)
        noisy = schedule.add_noise(batch["latents"], batch["seen_noise"], timesteps, schedule_T)
        if "held" in batch:
            noisy = hold_product.show_clean(noisy, batch["latents"], batch["held"])
        self.show_product(batch.get("product"))
        prediction = self.method.predict(noisy, timesteps, batch)
        target = schedule.TARGETS[self.prediction_type](batch["latents"], batch["noise"], timesteps, schedule_T)
        loss = schedule.masked_mse(prediction, target, batch["weight"])
        objective = self.config.objective
        weight = schedule.LOSS_WEIGHTS[objective.loss_weighting.name]
        return loss * weight(timesteps, schedule_T, objective.min_snr_gamma, self.prediction_type)

    def show_product(self, product_B5HW: Tensor | None) -> None:
        """Hand the UNet its further input channels, if it reads the product (``base.inpainting``)."""
        if product_B5HW is not None:
            conv_in = self.method.unet.conv_in
            assert isinstance(conv_in, ProductConv)
            conv_in.show(product_B5HW)

    # ---- validation ----

    def validate(self, folder: Path, accelerator: Accelerator) -> Validated:
        """Loss and pictures of held-out samples; see ``train.validation``."""
        return self.validator(self, folder, accelerator)
