"""ControlNet: a trainable copy of the UNet's encoder that reads a control map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from packshot.base.adapter_metadata import NO_METADATA, write_metadata
from packshot.base.controlnets import find_controlnet, load_controlnet, read_control
from packshot.base.load import Parts
from packshot.config.conditions import INPUTS, split_condition
from packshot.config.schema import ControlNetMethod
from packshot.engine.checkpoints import on_cpu
from packshot.engine.keyed_random import SampleKey
from packshot.errors import PackshotError
from packshot.imaging.control_maps import Control, View, inputs_of
from packshot.imaging.pixels import to_unit
from packshot.lists import select
from packshot.methods.base import FramedSample, Method, Tensors, trainable_fp32, unet_conditioning

if TYPE_CHECKING:  # imported where one is built
    from diffusers import ControlNetModel, DiffusionPipeline


class ControlNet(Method):
    """Zero-initialised residuals from a control map (Zhang et al. 2023, arXiv 2302.05543); the UNet stays frozen.

    ``method.extra_controlnets`` names further ControlNets, each with its own map; all residuals are added up, as at
    inference. The further ones are frozen, or trained too with ``method.train_extras``.

    Raises:
        ConfigError: ``method.init`` or one of ``method.extra_controlnets`` cannot be loaded or does not fit the base.
    """

    config: ControlNetMethod
    used_as = "'adapters.controlnets=[FOLDER]'"
    copies_base = True

    def __init__(self, parts: Parts, config: ControlNetMethod) -> None:
        from diffusers import ControlNetModel

        super().__init__(parts, config)
        if config.init:
            self.controlnet = load_controlnet("method.init", config.init, self.unet)
        else:
            self.controlnet = ControlNetModel.from_unet(self.unet)
        self.beside = nn.ModuleList()  # the extra ones; checkpoints have them under this name
        for place in config.extra_controlnets:
            self.beside.append(load_controlnet("method.extra_controlnets", place, self.unet))
        self.controls = controls_of(config)
        outermost = max(control.mask_grow + control.mask_feather / 2 for control in self.controls)
        self.reach = math.ceil(max(0.0, outermost + config.mask_jitter)) + 1
        self.controlnet.requires_grad_(True).train()
        self.beside.requires_grad_(config.train_extras).train(config.train_extras)
        for net in self.nets():
            trainable_fp32(net)

    @classmethod
    def pictures_of(cls, config: ControlNetMethod) -> tuple[str, ...]:
        """Image and mask, and what further inputs of the control maps are read from."""
        read = select(INPUTS, inputs_of(controls_of(config)))
        return ("image", "mask", *map(attrgetter("column"), read.values()))

    def nets(self) -> list[ControlNetModel]:
        """All ControlNets, in the order of ``controls``."""
        return [self.controlnet, *self.beside]  # type: ignore[list-item]

    def names(self) -> list[str]:
        """The names of their maps in a batch."""
        return list(map("control_{}".format, range(len(self.controls))))

    def control_maps(self, sample: FramedSample, shift: float = 0.0) -> list[Tensor]:
        """One map (3, H, W) for each ControlNet. shift: px by which the product's outline is moved."""
        view = view_of(sample, inputs_of(self.controls))
        maps = []
        for control in self.controls:
            map_HWC = control.draw(view, shift)
            maps.append(torch.from_numpy(np.ascontiguousarray(map_HWC.transpose(2, 0, 1))))
        return maps

    def condition(self, sample: FramedSample | None, encoded: Sequence[Tensors], key: SampleKey) -> Tensors:
        """``control_0`` and so on, one for each ControlNet: (3, H, W) at image resolution; in [0, 1], and -1 for the
        unknown pixels of inpaint.

        The product's outline is moved by up to ``method.mask_jitter`` px, the same in all maps: masks of photographs
        are never exact, and a network that has only seen exact ones takes their errors for the product.
        """
        assert sample is not None  # it has pictures
        shift = (2 * key.uniform("mask_jitter") - 1) * self.config.mask_jitter
        return dict(zip(self.names(), self.control_maps(sample, shift), strict=True))

    def condition_shapes(self, resolution: int) -> dict[str, tuple[int, ...]]:
        """A picture for each ControlNet."""
        return dict.fromkeys(self.names(), (3, resolution, resolution))

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, batch: Tensors) -> Tensor:
        """The frozen UNet's output with the control residuals added."""
        conditioning = unet_conditioning(batch)
        outputs = []
        for net, control in zip(self.nets(), select(batch, self.names()).values(), strict=True):
            outputs.append(net(noisy_BCHW, timesteps_B, controlnet_cond=control, return_dict=False, **conditioning))
        downs, middle = outputs[0]
        for more_downs, more_middle in outputs[1:]:
            downs = list(map(torch.add, downs, more_downs))
            middle = middle + more_middle
        dtype = self.unet.dtype
        return self.unet(
            noisy_BCHW,
            timesteps_B,
            down_block_additional_residuals=[down.to(dtype) for down in downs],
            mid_block_additional_residual=middle.to(dtype),
            **conditioning,
        ).sample

    def pipeline(self) -> DiffusionPipeline:
        """Text and control maps to image."""
        from diffusers import MultiControlNetModel, StableDiffusionXLControlNetPipeline

        components = self.parts.pipeline_components(references=False)
        return StableDiffusionXLControlNetPipeline(**components, controlnet=MultiControlNetModel(self.nets()))

    def pipeline_inputs(self, sample: FramedSample, encoded: Sequence[Tensors]) -> dict[str, list[Tensor]]:
        """The control maps of the sample."""
        return {"image": [control[None] for control in self.control_maps(sample)]}

    def export(self, folder: Path, metadata: Mapping[str, object] = NO_METADATA) -> None:
        """A folder for ``ControlNetModel.from_pretrained``, and ``packshot.json`` that names its condition.

        With ``method.train_extras``, the other ControlNets lie in ``beside-1`` and so on.
        """
        trained = self.nets() if self.config.train_extras else [self.controlnet]
        for number, net in enumerate(trained):
            place = folder / f"beside-{number}" if number else folder
            export_network(net, place, self.export_dtype)
            write_metadata(place, {**asdict(self.controls[number]), **metadata})


def export_network(net: ControlNetModel, folder: Path, dtype: torch.dtype) -> None:
    """A folder for ``from_pretrained`` with the weights in ``dtype``; the network stays as it is."""
    net.save_config(folder)
    save_file(
        on_cpu(net.state_dict(), dtype), folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"}
    )


def controls_of(config: ControlNetMethod) -> list[Control]:
    """The map of every ControlNet, the trained one first."""
    own = Control(config.condition.name, config.mask_grow, config.mask_feather)
    controls = [own]
    for value in config.extra_controlnets:
        key = "method.extra_controlnets"
        condition, _ = split_condition(value)
        controls.append(read_control(key, find_controlnet(key, value, whole=False), condition))
    return controls


def view_of(sample: FramedSample, inputs: Sequence[str]) -> View:
    """A framed sample as control maps see it. inputs: names of ``config.conditions.INPUTS``.

    Raises:
        PackshotError: it has no mask, or no picture that an input is read from.
    """
    if sample["mask"] is None:
        raise PackshotError(
            f"sample {sample['id']} has no mask, a ControlNet cannot be trained on it.",
            "Use a product dataset (build_data.py dataset=product).",
        )
    mask_HW = to_unit(np.asarray(sample["mask"]))
    values = {}
    for name in inputs:
        row = INPUTS[name]
        picture = sample.get(row.column)
        if picture is None:
            raise PackshotError(
                f"sample {sample['id']} has no {row.column}, which a control map is drawn from.", row.where
            )
        values[name] = resolve_name(row.read)(to_unit(np.asarray(picture)), mask_HW)
    return View(to_unit(np.asarray(sample["image"])), mask_HW, values)
