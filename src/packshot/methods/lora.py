"""Low-rank adapters of the UNet, and of the text encoders if asked for, through peft."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from packshot.base.adapter_metadata import NO_METADATA, write_metadata
from packshot.base.inpainting import export_conv
from packshot.base.load import Parts
from packshot.config.schema import LoraKind, LoraMethod
from packshot.engine.keyed_random import SampleKey
from packshot.methods.base import trainable_fp32, unet_conditioning
from packshot.methods.lora_targets import Targets, text_targets, unet_targets
from packshot.runs.folder import log

if TYPE_CHECKING:  # imported where one is built
    from diffusers import DiffusionPipeline

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
# Of these two pairs only the names of the original code are read everywhere.
KOHYA_MODULES = {
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
KOHYA_FACTORS = {"lora_A": "lora_down", "lora_B": "lora_up"}


def _low_rank(config: LoraMethod, targets: Targets, **options: Any) -> PeftConfig:
    return LoraConfig(
        r=targets.rank,
        lora_alpha=targets.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=targets.pattern,
        rank_pattern=targets.rank_pattern,
        alpha_pattern=targets.alpha_pattern,
        **options,
    )


def _lycoris(cls: Any, config: LoraMethod, targets: Targets) -> PeftConfig:
    return cls(
        r=targets.rank,
        alpha=targets.alpha,
        rank_dropout=config.dropout,
        target_modules=targets.pattern,
        rank_pattern=targets.rank_pattern,
        alpha_pattern=targets.alpha_pattern,
    )


# LoRA: Hu et al. 2021, arXiv 2106.09685. DoRA: Liu et al. 2024, arXiv 2402.09353. rsLoRA: Kalajdzievski 2023, arXiv
# 2312.03732. LoHa: Hyeon-Woo et al. 2021 (FedPara), arXiv 2108.06098. LoKr: Yeh et al. 2023 (LyCORIS), arXiv
# 2309.14859.
ADAPTERS: dict[LoraKind, Callable[[LoraMethod, Targets], PeftConfig]] = {
    LoraKind.lora: _low_rank,
    LoraKind.dora: partial(_low_rank, use_dora=True),
    LoraKind.rslora: partial(_low_rank, use_rslora=True),
    LoraKind.loha: partial(_lycoris, LoHaConfig),
    LoraKind.lokr: partial(_lycoris, LoKrConfig),
}


class Lora(nn.Module):
    """Adapters of the layers that ``method.targets`` or ``method.target_modules`` name.

    All kinds start as the identity: one factor of each product is zero (for DoRA the magnitude is the norm of the
    weight as it is). With ``method.text_encoder`` the attention of both text encoders is adapted too; the last layer
    of the first one is left out, because SDXL reads only what goes into it.

    trains_text: whether embeddings change during training and have to come from :meth:`encode_prompt`.

    Raises:
        ConfigError: the targets match no layer, or one that cannot be adapted.
    """

    pictures = ()
    kinship = None

    def __init__(self, parts: Parts, config: LoraMethod) -> None:
        super().__init__()
        self.config, self._parts = config, parts
        self.trains_text: bool = config.text_encoder
        self.unet = parts.unet
        self._adapt("unet", unet_targets(self.unet, config))
        if self.trains_text:
            self.text_encoder, self.text_encoder_2 = parts.text_encoder, parts.text_encoder_2
            for name, unread in zip(TEXT_ENCODERS, (1, 0), strict=True):
                self._adapt(name, text_targets(getattr(self, name).config.num_hidden_layers - unread, config))
        trainable_fp32(self)

    def _adapt(self, name: str, targets: Targets) -> None:
        network: Any = getattr(self, name)
        network.add_adapter(ADAPTERS[self.config.kind](self.config, targets))
        modules = sum(isinstance(module, BaseTunerLayer) for module in network.modules())
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        log.info("%s adapts %d layers of %s: %s trained parameters", self.config.kind, modules, name, f"{trained:,}")

    def _adapted(self) -> dict[str, Any]:
        """The networks that carry adapters, by their names in a pipeline."""
        return {name: getattr(self, name) for name in ("unet", *TEXT_ENCODERS[: 2 * self.trains_text])}

    def encode(self, samples: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Nothing: a LoRA sees no more than the picture and its prompt."""
        return [{} for _ in samples]

    def cache_key(self) -> str:
        """Nothing to distinguish."""
        return ""

    def condition(self, sample: Any, encoded: Sequence[dict[str, Tensor]], key: SampleKey) -> dict[str, Tensor]:
        """Nothing besides the prompt."""
        return {}

    def encode_prompt(self, input_ids: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What the adapted text encoders make of prompts, with gradients, as the stock pipeline does it.

        input_ids: one (B, 77) tensor of token ids per tokenizer, padded to the maximum length. Only where
        ``trains_text``.

        Returns:
            ``prompt_embeds`` (B, 77, D): the last layer's inputs of both encoders side by side (Podell et al. 2023,
            arXiv 2307.01952, section 2.1); ``pooled_prompt_embeds`` (B, P): the second one's projection. Both fp32.
        """
        encoders = (self.text_encoder, self.text_encoder_2)
        outputs = [
            encoder(ids.to(encoder.device), output_hidden_states=True)
            for encoder, ids in zip(encoders, input_ids, strict=True)
        ]
        prompt_embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return prompt_embeds.float(), outputs[1].text_embeds.float()

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The adapted UNet's output."""
        return self.unet(noisy_BCHW, timesteps_B, **unet_conditioning(batch)).sample

    def pipeline(self) -> DiffusionPipeline:
        """Text to image with the LoRA active."""
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(**self._parts.pipeline_components(references=False) | self._adapted())

    def pipeline_inputs(self, sample: Any, encoded: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Nothing besides the prompt."""
        return {}

    def export(self, folder: Path, metadata: Mapping[str, object] = NO_METADATA) -> None:
        """What stock loaders read; beside it ``conv_in.safetensors`` where the UNet was given channels for the product.

        lora, dora, rslora: ``pytorch_lora_weights.safetensors`` with the layers of all networks, for
        ``pipe.load_lora_weights(folder)``; the scale is inside the weights, so readers that know no alpha read them
        alike. loha, lokr: ``adapter_model.safetensors`` and ``adapter_config.json``, for
        ``PeftModel.from_pretrained(pipe.unet, folder)``.
        """
        EXPORTS[self.config.kind](self._adapted(), folder)
        export_conv(self.unet, folder)
        write_metadata(folder, metadata)

    def export_kohya(self, folder: Path) -> None:
        """``kohya_lora.safetensors``: the same weights under the names of sd-scripts and ComfyUI (lora, rslora).

        Readers multiply by alpha/rank, layer by layer: each alpha is its layer's rank, the scale is in the weights.
        """
        tensors = {}
        for name, network in self._adapted().items():
            for key, value in _layers(name, network).items():
                module, _, factor = key.removesuffix(".weight").rpartition(".")
                stem = f"{KOHYA_PREFIXES[name]}_{KOHYA_MODULES.get(module, module.replace('.', '_'))}"
                tensors[f"{stem}.{KOHYA_FACTORS[factor]}.weight"] = value.contiguous()
                if factor == "lora_A":
                    tensors[f"{stem}.alpha"] = value.new_tensor(float(len(value)))
        metadata = {"ss_network_dim": str(self.config.rank), "ss_network_alpha": str(self.config.rank)}
        save_file(tensors, folder / "kohya_lora.safetensors", metadata=metadata)


def _layers(name: str, network: Any) -> dict[str, Tensor]:
    """A low-rank adapter's tensors in peft's naming, with the scale of each layer multiplied into its lora_B.

    A DoRA's magnitudes stay: they divide by the norm of weight + scale·lora_B·lora_A, which stays the same.
    """
    scales = {path: m.scaling["default"] for path, m in network.named_modules() if isinstance(m, BaseTunerLayer)}
    state = {
        key: value * scales[key.partition(".lora_B.")[0]] if ".lora_B." in key else value
        for key, value in get_peft_model_state_dict(network).items()
    }
    if name == "text_encoder":  # transformers 5 dropped a prefix that files and their readers have
        state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}
    return state


def _export_diffusers(networks: dict[str, Any], folder: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    # In peft's names: diffusers' older ones exist for attention alone, and of a mixed file its loader drops those.
    layers: dict[str, Any] = {f"{name}_lora_layers": _layers(name, network) for name, network in networks.items()}
    metadata: dict[str, Any] = {
        f"{name}_lora_adapter_metadata": _unscaled(network.peft_config["default"]) for name, network in networks.items()
    }
    StableDiffusionXLPipeline.save_lora_weights(folder, **layers, **metadata)


def _unscaled(config: Any) -> dict[str, Any]:
    """An adapter's metadata with every alpha the rank, for weights that hold their scale."""
    same = {"lora_alpha": config.r, "alpha_pattern": config.rank_pattern, "use_rslora": False}
    return config.to_dict() | same


def _export_peft(networks: dict[str, Any], folder: Path) -> None:
    unet = networks["unet"]
    state = get_peft_model_state_dict(unet)
    tensors = {f"base_model.model.{key}": value.contiguous() for key, value in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    unet.peft_config["default"].save_pretrained(str(folder))


EXPORTS: dict[LoraKind, Callable[[dict[str, Any], Path], None]] = {
    LoraKind.lora: _export_diffusers,
    LoraKind.dora: _export_diffusers,
    LoraKind.rslora: _export_diffusers,
    LoraKind.loha: _export_peft,
    LoraKind.lokr: _export_peft,
}
