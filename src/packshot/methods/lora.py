"""LoRA on the UNet, through peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from packshot.config.schema import LoraKind, LoraMethod
from packshot.core.errors import ConfigError
from packshot.diffusion.keyed import SampleKey
from packshot.methods.base import trainable_fp32, unet_conditioning
from packshot.models.load import Parts


class Lora(nn.Module):
    """Low-rank updates of the linear layers whose names match ``target_modules`` (Hu et al. 2021, arXiv 2106.09685)."""

    needs_pixels = False

    def __init__(self, parts: Parts, config: LoraMethod) -> None:
        super().__init__()
        self.config, self._parts = config, parts
        self.unet = parts.unet
        adapter = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=config.target_modules,
            use_dora=config.kind is LoraKind.dora,
            use_rslora=config.kind is LoraKind.rslora,
        )
        try:
            self.unet.add_adapter(adapter)
        except ValueError as error:
            raise ConfigError(
                f"method.target_modules={config.target_modules!r} matches no layer of the UNet.",
                "It is a regular expression over full module names.",
            ) from error
        trainable_fp32(self.unet)

    def encode(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        """Nothing: a LoRA sees no more than the picture and its prompt."""
        return {}

    def cache_key(self) -> str:
        """Nothing to distinguish."""
        return ""

    def condition(self, sample: Any, encoded: dict[str, Tensor], key: SampleKey) -> dict[str, Tensor]:
        """Nothing besides the prompt."""
        return {}

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The adapted UNet's output."""
        return self.unet(noisy_BCHW, timesteps_B, **unet_conditioning(batch)).sample

    def pipeline(self) -> DiffusionPipeline:
        """Text to image with the LoRA active."""
        return StableDiffusionXLPipeline(**self._parts.pipeline_components())

    def pipeline_inputs(self, sample: Any, encoded: dict[str, Tensor]) -> dict[str, Any]:
        """Nothing besides the prompt."""
        return {}

    def export(self, folder: Path) -> None:
        """``pytorch_lora_weights.safetensors``, read by ``pipe.load_lora_weights(folder)``."""
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
        StableDiffusionXLPipeline.save_lora_weights(
            folder, unet_lora_layers=layers, unet_lora_adapter_metadata=self.unet.peft_config["default"].to_dict()
        )

    def export_kohya(self, folder: Path) -> None:
        """``kohya_lora.safetensors``: the same weights under the names of sd-scripts and ComfyUI."""
        state = get_peft_model_state_dict(self.unet)
        named = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in state.items()})
        alpha = self.config.alpha
        tensors = {}
        for key, value in named.items():
            tensors[key] = value.new_tensor(alpha) if key.endswith(".alpha") else value.contiguous()
        save_file(tensors, folder / "kohya_lora.safetensors", metadata={"ss_network_dim": str(self.config.rank)})
