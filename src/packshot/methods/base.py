"""The five things a method has to say."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from packshot.base.adapter_metadata import NO_METADATA
from packshot.engine.keyed_random import SampleKey

if TYPE_CHECKING:  # pipelines cost a second of imports, and a run may never draw
    from diffusers import DiffusionPipeline


class Method(Protocol):
    """A trainable extension of a frozen SDXL: an ``nn.Module`` whose parameters with ``requires_grad`` are trained.

    Built as ``Class(parts, method_config)``. Trainable parameters are fp32 from the start.

    pictures: the pictures of a sample that ``condition`` reads; if there are none, nothing is decoded during training.
    trains_text: whether the text encoders are trained; then embeddings come from ``encode_prompt`` at each step.
    kinship: what two samples have in common if one can be conditioned on the encodings of the other, read from a row
        without its pictures; None for a sample that stands alone. No function: every sample does.
    """

    pictures: tuple[str, ...]
    trains_text: bool
    kinship: Callable[[dict[str, Any]], Hashable | None] | None

    def encode(self, samples: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Frozen-encoder results of framed samples that are worth caching (may be empty), without batch dimension."""
        ...

    def cache_key(self) -> str:
        """Names whatever ``encode`` depends on besides the sample (encoder weights, variant)."""
        ...

    def condition(self, sample: Any, encoded: Sequence[dict[str, Tensor]], key: SampleKey) -> dict[str, Tensor]:
        """Extra conditioning of one access, no batch dimension; dropout is drawn from ``key``.

        sample: the framed sample if the method reads pictures, else None. encoded: the results of ``encode`` for the
            sample itself, and after it for its kin, each read or made when it is asked for.
        """
        ...

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The network's output for a batch: shape (B, C, H, W)."""
        ...

    def pipeline(self) -> DiffusionPipeline:
        """A stock pipeline with the adapter in its present state, for validation pictures."""
        ...

    def pipeline_inputs(self, sample: Any, encoded: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Extra call arguments of that pipeline for one validation sample; arguments as of ``condition``."""
        ...

    def export(self, folder: Path, metadata: Mapping[str, object] = NO_METADATA) -> None:
        """Write the adapter in the format stock tools load, with ``metadata`` in its ``packshot.json``."""
        ...


def unet_conditioning(batch: dict[str, Tensor]) -> dict[str, Any]:
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
