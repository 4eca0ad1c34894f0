"""What a training method is: the contract between LoRA, IP-Adapter and ControlNet and the rest of the project."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from packshot.base.adapter_metadata import NO_METADATA
from packshot.base.load import Parts
from packshot.config.schema import TrainScript
from packshot.engine.keyed_random import SampleKey
from packshot.imaging.framing import Geometry

if TYPE_CHECKING:  # pipelines cost a second of imports, and a run may never draw
    from diffusers import DiffusionPipeline

Tensors = dict[str, Tensor]
Row = Mapping[str, Any]  # a dataset's row without its pictures: ``id``, ``text``, ``scene`` and further columns
PeerKey = Callable[[Row], Hashable | None]


class FramedSample(TypedDict):
    """A sample as the network sees it: all its pictures went through one ``geometry``. mask: white = product.

    Further picture columns, such as depth and shadow, are there if the method reads them. What is made ahead of the
    encoder: pixels_HW3, which the VAE reads; planes, which follow from the mask alone; kept, the pictures' cache entry.
    """

    id: str
    text: str
    geometry: Geometry
    image: Image.Image
    mask: Image.Image | None
    depth: NotRequired[Image.Image | None]
    shadow: NotRequired[Image.Image | None]
    pixels_HW3: NotRequired[np.ndarray]
    planes: NotRequired[dict[str, Tensor]]
    kept: NotRequired[dict[str, Tensor]]


@dataclass(frozen=True)
class Exported:
    """What an export is made from: the script's config, what the network predicts, the number of samples, the step."""

    config: TrainScript
    prediction_type: str
    samples: int
    step: int


class Method(nn.Module):
    """A trainable extension of a frozen SDXL; parameters with ``requires_grad`` are trained, in fp32.

    A method is one subclass of this class and one config dataclass, and it is built as ``Class(parts, config)``.
    Nothing outside this package asks which method it is: training, caching, ``mode=plan``, ``mode=check``, validation,
    export and model card go by what is declared here. The defaults are those of a method that reads only
    picture and prompt.

    unet: the base's UNet, as a submodule.
    used_as: how generate.py and serve.py are given the export; FOLDER stands for its folder.
    pictures: picture columns of the dataset that ``condition`` reads, see ``pictures_of``. Where there are none, no
        picture is decoded during training.
    reach: how far from the product's outline ``condition`` reads the picture, in px; None: everywhere. What is farther
        away is not kept in the cache.
    encoders: parts of the base that only ``encode`` reads; they are freed once everything is encoded. A submodule of
        the method with the same name is freed too.
    copies_base: whether trained weights start as copies of the base's, which is then loaded in fp32.
    trains_text: whether the text encoders are trained; then ``encode_prompt`` encodes the prompts at each step.
    peer_key: samples with the same key, which is read from their rows without pictures, are peers: each may be
        conditioned on the encodings of another. A sample with the key None has no peers. Without a function, no sample
        has any.
    layouts: further file layouts that are exported on request, by their key below ``export``; they take the folder and
        what is exported.
    export_dtype: of the exported weights.
    """

    used_as: str
    encoders: tuple[str, ...] = ()
    copies_base: bool = False

    def __init__(self, parts: Parts, config: Any) -> None:
        super().__init__()
        self.parts = parts
        self.config = config
        self.unet = parts.unet
        self.pictures = self.pictures_of(config)
        self.reach: int | None = None
        self.trains_text = False
        self.peer_key: PeerKey | None = None
        self.layouts: dict[str, Callable[[Path, Exported], None]] = {}
        self.export_dtype = torch.float32

    @classmethod
    def pictures_of(cls, config: Any) -> tuple[str, ...]:
        """The ``pictures`` of a method with this config: a dataset is checked for them before anything is loaded."""
        return ()

    # ---- once per sample ----

    def encode(self, samples: Sequence[FramedSample]) -> list[Tensors]:
        """What frozen encoders make of framed samples, without batch dimension; it is cached. Empty: nothing."""
        return [{} for _ in samples]

    def cache_key(self) -> str:
        """Everything that ``encode`` depends on, apart from the sample (encoder weights, variant)."""
        return ""

    # ---- at each access and step ----

    def condition(self, sample: FramedSample | None, encoded: Sequence[Tensors], key: SampleKey) -> Tensors:
        """What the network reads at one access in addition to the prompt, without batch dimension.

        sample: the framed sample if the method has ``pictures``, else None.
        encoded: results of ``encode``, first that of the sample itself, then those of its peers; each is read or made
            when it is indexed.
        key: every random draw is keyed by it.
        """
        return {}

    def condition_shapes(self, resolution: int) -> dict[str, tuple[int, ...]]:
        """The shapes of what ``condition`` returns for a square of this side (px): ``mode=plan`` has no samples."""
        return {}

    def encode_prompt(self, input_ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``prompt_embeds`` (B, 77, D) and ``pooled_prompt_embeds`` (B, P), fp32 and with gradients.

        input_ids: one (B, 77) tensor for each tokenizer. It is called only where ``trains_text``.
        """
        raise NotImplementedError

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, batch: Tensors) -> Tensor:
        """The network's output for a batch: shape (B, C, H, W)."""
        raise NotImplementedError

    # ---- validation and export ----

    def pipeline(self) -> DiffusionPipeline:
        """A stock pipeline with the adapter in its present state, for validation pictures."""
        raise NotImplementedError

    def pipeline_inputs(self, sample: FramedSample, encoded: Sequence[Tensors]) -> dict[str, Any]:
        """Further call arguments of that pipeline for one validation sample; ``encoded`` as in ``condition``."""
        return {}

    def export(self, folder: Path, metadata: Mapping[str, object] = NO_METADATA) -> None:
        """Write the adapter in the format stock tools load, with ``metadata`` in its ``packshot.json``."""
        raise NotImplementedError


def unet_conditioning(batch: Tensors) -> dict[str, Any]:
    """The UNet's text and size conditioning, from a batch."""
    return {
        "encoder_hidden_states": batch["prompt_embeds"],
        "added_cond_kwargs": {"text_embeds": batch["pooled_prompt_embeds"], "time_ids": batch["time_ids"]},
    }


def trainable_fp32(module: nn.Module) -> nn.Module:
    """Master weights in fp32: bf16 parameters at usual learning rates mostly round back to where they were."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return module
