"""ControlNet: a trainable copy of the UNet's encoder that reads a control map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from packshot.base.adapter_metadata import NO_METADATA, write_metadata
from packshot.base.controlnets import load_controlnet, read_control
from packshot.base.load import Parts
from packshot.config.schema import ControlNetMethod
from packshot.engine.keyed_random import SampleKey
from packshot.errors import PackshotError
from packshot.imaging.control_maps import Control, View
from packshot.imaging.light_direction import light_direction
from packshot.methods.base import trainable_fp32, unet_conditioning
from packshot.runs.files import readable

if TYPE_CHECKING:  # imported where one is built
    from diffusers import DiffusionPipeline


class ControlNet(nn.Module):
    """Zero-initialised residuals from a control map (Zhang et al. 2023, arXiv 2302.05543); the UNet stays frozen.

    ``method.extra_controlnets`` names further ControlNets, each with its own map; all residuals are added up, as at
    inference. The further ones are frozen, or trained too with ``method.train_extras``.

    Raises:
        ConfigError: ``method.init`` or one of ``method.extra_controlnets`` cannot be loaded or does not fit the base.
    """

    trains_text = False
    kinship = None

    def __init__(self, parts: Parts, config: ControlNetMethod) -> None:
        from diffusers import ControlNetModel

        super().__init__()
        self.config, self._parts = config, parts
        self.unet = parts.unet
        init, folders = config.init, [readable("method.extra_controlnets", path) for path in config.extra_controlnets]
        fresh = ControlNetModel.from_unet
        self.controlnet: Any = load_controlnet("method.init", init, self.unet) if init else fresh(self.unet)
        self.beside = nn.ModuleList(
            load_controlnet("method.extra_controlnets", str(folder), self.unet) for folder in folders
        )
        self.controls = [
            Control(config.condition.name, config.mask_grow, config.mask_feather),
            *(read_control("method.extra_controlnets", folder) for folder in folders),
        ]
        self.controlnet.requires_grad_(True).train()
        self.beside.requires_grad_(config.train_extras).train(config.train_extras)
        for net in self._nets():
            trainable_fp32(net)
        self._needs = sorted({control.needs for control in self.controls if control.needs})
        self.pictures = ("image", "mask", *(SOURCES[name].column for name in self._needs))

    def _nets(self) -> list[Any]:
        """All ControlNets, in the order of ``controls``."""
        return [self.controlnet, *self.beside]

    def encode(self, samples: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Nothing: control maps are cheap to draw at each access."""
        return [{} for _ in samples]

    def cache_key(self) -> str:
        """Nothing to distinguish."""
        return ""

    def _control_maps(self, sample: dict[str, Any], shift: float = 0.0) -> list[Tensor]:
        view = _view(sample, self._needs)
        maps = [control.draw(view, shift) for control in self.controls]
        return [torch.from_numpy(np.ascontiguousarray(map_HWC.transpose(2, 0, 1))) for map_HWC in maps]

    def condition(self, sample: Any, encoded: Sequence[dict[str, Tensor]], key: SampleKey) -> dict[str, Tensor]:
        """``control_0`` and so on, one for each ControlNet: (3, H, W) at image resolution; [0, 1], and -1 for unknown
        pixels of inpaint. In all of them the product's outline is moved by up to ``method.mask_jitter`` px: masks of
        photographs are never exact, and a network that has only seen exact ones takes an error for the product."""
        shift = (2 * key.uniform("mask_jitter") - 1) * self.config.mask_jitter
        return {f"control_{k}": control for k, control in enumerate(self._control_maps(sample, shift))}

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The frozen UNet's output with the control residuals added."""
        conditioning = unet_conditioning(batch)
        residuals = [
            net(
                noisy_BCHW,
                timesteps_B,
                controlnet_cond=batch[f"control_{k}"],
                return_dict=False,
                **conditioning,
            )
            for k, net in enumerate(self._nets())
        ]
        downs, middles = zip(*residuals, strict=True)
        dtype = self.unet.dtype
        return self.unet(
            noisy_BCHW,
            timesteps_B,
            down_block_additional_residuals=[reduce(torch.add, layer).to(dtype) for layer in zip(*downs, strict=True)],
            mid_block_additional_residual=reduce(torch.add, middles).to(dtype),
            **conditioning,
        ).sample

    def pipeline(self) -> DiffusionPipeline:
        """Text and control maps to image."""
        from diffusers import MultiControlNetModel, StableDiffusionXLControlNetPipeline

        nets = MultiControlNetModel(self._nets())
        return StableDiffusionXLControlNetPipeline(**self._parts.pipeline_components(references=False), controlnet=nets)

    def pipeline_inputs(self, sample: Any, encoded: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """The control maps of the sample."""
        return {"image": [control[None] for control in self._control_maps(sample)]}

    def export(self, folder: Path, metadata: Mapping[str, object] = NO_METADATA) -> None:
        """A folder for ``ControlNetModel.from_pretrained``, and ``packshot.json`` that names its condition.

        With ``method.train_extras``, the other ControlNets lie in ``beside-1`` and so on.
        """
        trained = self._nets() if self.config.train_extras else [self.controlnet]
        for number, net in enumerate(trained):
            place = folder / f"beside-{number}" if number else folder
            net.save_pretrained(place)
            write_metadata(place, {**asdict(self.controls[number]), **metadata})


@dataclass(frozen=True)
class Source:
    """Where a field of a View comes from in training.

    column: the dataset's picture. read: that picture and the mask, (H, W) in [0, 1] each, to the field's value.
    where: which datasets have it.
    """

    column: str
    read: Callable[[np.ndarray, np.ndarray], Any]
    where: str


SOURCES = {
    "depth_HW": Source(
        "depth",
        lambda depth_HW, _: depth_HW,
        "Rendered sets have it; for photographs build_data.py dataset=product depth.onnx=<network> adds it.",
    ),
    "light": Source(
        "shadow",
        light_direction,
        "Rendered sets have it (build_data.py dataset=rendered); nothing tells it of a photograph.",
    ),
}


def _view(sample: dict[str, Any], needs: Sequence[str]) -> View:
    """A framed sample as control maps see it. needs: fields of a View besides image and mask.

    Raises:
        PackshotError: it has no mask, or nothing to read another field from.
    """
    if sample.get("mask") is None:
        raise PackshotError(
            f"sample {sample['id']} has no mask, a ControlNet cannot be trained on it.",
            "Use a product dataset (build_data.py dataset=product).",
        )
    for name in needs:
        if sample.get(SOURCES[name].column) is None:
            raise PackshotError(
                f"sample {sample['id']} has no {SOURCES[name].column}, which a control map is drawn from.",
                SOURCES[name].where,
            )

    def scaled(column: str) -> np.ndarray:
        return np.asarray(sample[column], dtype=np.float32) / 255

    mask_HW = scaled("mask")
    others = {name: SOURCES[name].read(scaled(SOURCES[name].column), mask_HW) for name in needs}
    return View(scaled("image"), mask_HW, **others)
