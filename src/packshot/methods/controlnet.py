"""ControlNet: a trainable copy of the UNet's encoder that reads a control map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from packshot.config.schema import ControlNetMethod
from packshot.core.errors import PackshotError
from packshot.diffusion.conditions import CONDITIONS
from packshot.diffusion.keyed import SampleKey
from packshot.methods.base import trainable_fp32, unet_conditioning
from packshot.models.load import Parts

if TYPE_CHECKING:  # imported where one is built
    from diffusers import DiffusionPipeline


class ControlNet(nn.Module):
    """Zero-initialised residuals from a control map (Zhang et al. 2023, arXiv 2302.05543); the UNet stays frozen."""

    needs_pixels = True
    trains_text = False

    def __init__(self, parts: Parts, config: ControlNetMethod) -> None:
        from diffusers import ControlNetModel

        super().__init__()
        self.config, self._parts = config, parts
        self.unet = parts.unet
        self.controlnet = ControlNetModel.from_unet(parts.unet)
        self.controlnet.requires_grad_(True).train()
        trainable_fp32(self.controlnet)

    def encode(self, samples: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Nothing: control maps are cheap to draw at each access."""
        return [{} for _ in samples]

    def cache_key(self) -> str:
        """Nothing to distinguish."""
        return ""

    def _control_map(self, sample: dict[str, Any]) -> Tensor:
        if sample.get("mask") is None:
            raise PackshotError(
                f"sample {sample['id']} has no mask, a ControlNet cannot be trained on it.",
                "Use a product dataset (build_data.py dataset=product).",
            )
        image_HWC = np.asarray(sample["image"], dtype=np.float32) / 255
        mask_HW = np.asarray(sample["mask"], dtype=np.float32) / 255
        control_HWC = CONDITIONS[self.config.condition.name](image_HWC, mask_HW)
        return torch.from_numpy(np.ascontiguousarray(control_HWC.transpose(2, 0, 1)))

    def condition(self, sample: Any, encoded: dict[str, Tensor], key: SampleKey) -> dict[str, Tensor]:
        """``control``: (3, H, W) at image resolution; [0, 1], unknown pixels -1 for inpaint."""
        return {"control": self._control_map(sample)}

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The frozen UNet's output with the control residuals added."""
        conditioning = unet_conditioning(batch)
        down, middle = self.controlnet(
            noisy_BCHW,
            timesteps_B,
            controlnet_cond=batch["control"],
            conditioning_scale=self.config.conditioning_scale,
            return_dict=False,
            **conditioning,
        )
        dtype = self.unet.dtype
        return self.unet(
            noisy_BCHW,
            timesteps_B,
            down_block_additional_residuals=[residual.to(dtype) for residual in down],
            mid_block_additional_residual=middle.to(dtype),
            **conditioning,
        ).sample

    def pipeline(self) -> DiffusionPipeline:
        """Text and control map to image."""
        from diffusers import StableDiffusionXLControlNetPipeline

        return StableDiffusionXLControlNetPipeline(**self._parts.pipeline_components(), controlnet=self.controlnet)

    def pipeline_inputs(self, sample: Any, encoded: dict[str, Tensor]) -> dict[str, Any]:
        """The control map of the sample."""
        return {
            "image": self._control_map(sample)[None],
            "controlnet_conditioning_scale": self.config.conditioning_scale,
        }

    def export(self, folder: Path) -> None:
        """A folder for ``ControlNetModel.from_pretrained``, and ``packshot.json`` that names its condition."""
        self.controlnet.save_pretrained(folder)
        (folder / "packshot.json").write_text(json.dumps({"condition": self.config.condition.name}, indent=2) + "\n")
