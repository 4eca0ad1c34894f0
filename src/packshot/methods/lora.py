"""Low-rank adapters of the UNet, and of the text encoders if asked for, through peft."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save, save_file
from torch import Tensor, nn

from packshot.base.adapter_metadata import NO_METADATA, write_metadata
from packshot.base.inpainting import export_conv
from packshot.base.load import Parts
from packshot.base.lora_files import Update, find_lora, read_lora, scale_of
from packshot.base.original_names import block_names, original_name
from packshot.config.schema import LoraKind, LoraMethod
from packshot.engine.checkpoints import count_trainable, on_cpu
from packshot.errors import ConfigError
from packshot.lists import attributes
from packshot.methods.base import Exported, Method, Tensors, trainable_fp32, unet_conditioning
from packshot.methods.lora_head import lora_head
from packshot.methods.lora_targets import Targets, text_targets, unet_targets
from packshot.runs.folder import log

if TYPE_CHECKING:  # imported where one is built
    from diffusers import DiffusionPipeline

Adapted: TypeAlias = Any  # a module that peft has wrapped: its attributes are set at run time
Networks: TypeAlias = dict[str, Adapted]  # by their names in a pipeline
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
KOHYA_FACTORS = {"lora_A": "lora_down", "lora_B": "lora_up"}


class Lora(Method):
    """Adapters of the layers that ``method.targets`` or ``method.target_modules`` name.

    All kinds start as the identity: one factor of each product is zero (for DoRA the magnitude is the norm of the
    weight as it is). With ``method.text_encoder`` the attention of both text encoders is adapted too; the last layer
    of the first one is left out, because SDXL reads only what goes into it.

    Raises:
        ConfigError: the targets match no layer, or one that cannot be adapted.
    """

    config: LoraMethod
    used_as = "adapters.lora=FOLDER"

    def __init__(self, parts: Parts, config: LoraMethod) -> None:
        super().__init__(parts, config)
        self.layouts = {"kohya": self.export_kohya}
        self.adapt("unet", unet_targets(self.unet, config))
        self.trains_text = config.text_encoder
        if self.trains_text:
            self.text_encoder = parts.text_encoder
            self.text_encoder_2 = parts.text_encoder_2
            # SDXL does not read the last layer of its first text encoder
            self.adapt("text_encoder", text_targets(self.text_encoder.config.num_hidden_layers - 1, config))
            self.adapt("text_encoder_2", text_targets(self.text_encoder_2.config.num_hidden_layers, config))
        if config.init:
            start_from(config.init, self.adapted())
        trainable_fp32(self)

    def adapt(self, name: str, targets: Targets) -> None:
        """Give one of the networks its adapters."""
        network = getattr(self, name)
        network.add_adapter(KINDS[self.config.kind].settings(self.config, targets))
        modules = sum(isinstance(module, BaseTunerLayer) for module in network.modules())
        trained = count_trainable(network)
        log.info("%s adapts %d layers of %s: %s trained parameters", self.config.kind, modules, name, f"{trained:,}")

    def adapted(self) -> Networks:
        """The networks that carry adapters, by their names in a pipeline."""
        names = ("unet", *TEXT_ENCODERS) if self.trains_text else ("unet",)
        return attributes(self, names)

    def encode_prompt(self, input_ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As the stock pipeline encodes prompts, with gradients.

        ``prompt_embeds``: the last layer's inputs of both encoders, concatenated (Podell et al. 2023, arXiv 2307.01952,
        section 2.1). ``pooled_prompt_embeds``: the second encoder's projection.
        """
        outputs = []
        for encoder, ids in zip((self.text_encoder, self.text_encoder_2), input_ids, strict=True):
            outputs.append(encoder(ids.to(encoder.device), output_hidden_states=True))
        prompt_embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return prompt_embeds.float(), outputs[1].text_embeds.float()

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, batch: Tensors) -> Tensor:
        """The adapted UNet's output."""
        return self.unet(noisy_BCHW, timesteps_B, **unet_conditioning(batch)).sample

    def pipeline(self) -> DiffusionPipeline:
        """Text to image with the LoRA active."""
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(**self.parts.pipeline_components(references=False) | self.adapted())

    def export(self, folder: Path, metadata: Mapping[str, object] = NO_METADATA) -> None:
        """What stock loaders read, and ``conv_in.safetensors`` where the UNet was given channels for the product.

        lora, dora, rslora: ``pytorch_lora_weights.safetensors`` with the layers of all networks, for
        ``pipe.load_lora_weights(folder)``; the scale is inside the weights, so readers that ignore alpha agree with
        the others. loha, lokr: ``adapter_model.safetensors`` and ``adapter_config.json``, for
        ``PeftModel.from_pretrained(pipe.unet, folder)``.
        """
        KINDS[self.config.kind].export(self.adapted(), folder, self.export_dtype)
        export_conv(self.unet, folder)
        write_metadata(folder, metadata)

    def export_kohya(self, folder: Path, exported: Exported | None = None) -> None:
        """``kohya_lora.safetensors``: the same weights under sd-scripts' own names (lora, rslora), for it and ComfyUI.

        Readers multiply by alpha/rank, layer by layer: each alpha is its layer's rank, the scale is in the weights.
        exported: is described in the file's head.
        """
        published = block_names(self.unet.config)
        tensors = {}
        for name, network in self.adapted().items():
            for key, value in scaled_layers(name, network).items():
                module, _, factor = key.removesuffix(".weight").rpartition(".")
                if name == "unet":
                    module = original_name(module, published)
                stem = f"{KOHYA_PREFIXES[name]}_{module.replace('.', '_')}"
                tensors[f"{stem}.{KOHYA_FACTORS[factor]}.weight"] = value.to(self.export_dtype).contiguous()
                if factor == "lora_A":
                    tensors[f"{stem}.alpha"] = value.new_tensor(float(len(value)), dtype=self.export_dtype)
        rank = {"ss_network_dim": str(self.config.rank), "ss_network_alpha": str(self.config.rank)}
        digest = {"sshs_model_hash": tensors_sha256(tensors)}
        about = lora_head(exported, self.config) if exported else {}
        save_file(tensors, folder / "kohya_lora.safetensors", metadata={"format": "pt", **about, **rank, **digest})


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a safetensors file without its head, by which other tools tell LoRAs apart."""
    whole = save(dict(tensors))
    head = int.from_bytes(whole[:8], "little")
    return hashlib.sha256(whole[8 + head :]).hexdigest()


@torch.no_grad()
def start_from(value: str, networks: Networks) -> None:
    """Give the adapters of these networks the weights of a LoRA in a file.

    Raises:
        ConfigError: it cannot be read, has another form or rank, or adapts layers that are not adapted here.
    """
    key = "method.init"
    path = find_lora(key, value)
    if path.is_dir():
        raise ConfigError(f"{key}={value} is a LoHa or LoKr.", "Merge it into the base with model.loras.")
    lora = read_lora(key, path, networks)
    for name, layers in lora.updates.items():
        for layer, update in layers.items():
            module = networks[name].get_submodule(layer)
            if not isinstance(module, BaseTunerLayer):
                raise ConfigError(
                    f"{key}={value} adapts {name}.{layer}, which this training does not.",
                    "Set method.targets, method.target_modules or method.text_encoder so that it does.",
                )
            if update.keys() - {"down", "up", "alpha"}:
                raise ConfigError(
                    f"{key}={value} has updates that are not products of two matrices.",
                    "Merge it into the base with model.loras.",
                )
            fill_layer(f"{key}={value}", module, update)
    log.info("started from %s: %d layers", path.name, sum(map(len, lora.updates.values())))


def fill_layer(what: str, module: Adapted, update: Update) -> None:
    """Copy one update into an adapted layer; ``lora_B`` takes the difference between the two scales."""
    down = module.lora_A["default"].weight
    up = module.lora_B["default"].weight
    if down.shape != update["down"].shape:
        raise ConfigError(
            f"{what} has rank {len(update['down'])}, method.rank is {len(down)}.",
            f"Set method.rank={len(update['down'])} (method.conv_rank for convolutions).",
        )
    if down.is_meta:
        return
    down.copy_(update["down"])
    up.copy_(update["up"] * scale_of(update, len(down)) / module.scaling["default"])


def scaled_layers(name: str, network: nn.Module) -> Tensors:
    """A low-rank adapter's tensors in peft's naming, with the scale of each layer multiplied into its lora_B.

    A DoRA's magnitudes stay: they divide by the norm of weight + scale·lora_B·lora_A, which stays the same.
    """
    scales = {}
    for path, module in network.named_modules():
        if isinstance(module, BaseTunerLayer):
            scales[path] = module.scaling["default"]
    layers = {}
    for key, value in get_peft_model_state_dict(network).items():
        path, is_up, _ = key.partition(".lora_B.")
        if name == "text_encoder":  # transformers 5 dropped a prefix that files and their readers have
            key = f"text_model.{key.removeprefix('text_model.')}"
        layers[key] = value * scales[path] if is_up else value
    return layers


def export_diffusers(networks: Networks, folder: Path, dtype: torch.dtype) -> None:
    """One file with the layers of all networks."""
    from diffusers import StableDiffusionXLPipeline

    # In peft's names: diffusers' older ones exist for attention alone, and its loader drops those from a mixed file.
    arguments: dict[str, object] = {}
    for name, network in networks.items():
        config = network.peft_config["default"]
        # the scale is in the weights, so every alpha is its layer's rank
        unscaled = {"lora_alpha": config.r, "alpha_pattern": config.rank_pattern, "use_rslora": False}
        arguments[f"{name}_lora_layers"] = on_cpu(scaled_layers(name, network), dtype)
        arguments[f"{name}_lora_adapter_metadata"] = config.to_dict() | unscaled
    StableDiffusionXLPipeline.save_lora_weights(folder, **arguments)  # type: ignore[arg-type]


def export_peft(networks: Networks, folder: Path, dtype: torch.dtype) -> None:
    """The UNet's adapter as peft saves it."""
    unet = networks["unet"]
    state = get_peft_model_state_dict(unet)
    tensors = on_cpu(dict(zip(map("base_model.model.{}".format, state), state.values(), strict=True)), dtype)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    unet.peft_config["default"].save_pretrained(str(folder))


def low_rank(config: LoraMethod, targets: Targets, **options: bool) -> PeftConfig:
    """peft's settings of an update by two factors."""
    return LoraConfig(
        r=targets.rank,
        lora_alpha=targets.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=targets.pattern,
        rank_pattern=targets.rank_pattern,
        alpha_pattern=targets.alpha_pattern,
        **options,  # type: ignore[arg-type]
    )


def lycoris(cls: type[LoHaConfig] | type[LoKrConfig], config: LoraMethod, targets: Targets) -> PeftConfig:
    """peft's settings of an update by Hadamard (LoHa) or Kronecker products (LoKr)."""
    return cls(
        r=targets.rank,
        alpha=targets.alpha,  # type: ignore[arg-type]
        rank_dropout=config.dropout,
        target_modules=targets.pattern,
        rank_pattern=targets.rank_pattern,
        alpha_pattern=targets.alpha_pattern,
    )


@dataclass(frozen=True)
class AdapterKind:
    """A value of ``method.kind``: peft's settings for some layers, and the writer of the export."""

    settings: Callable[[LoraMethod, Targets], PeftConfig]
    export: Callable[[Networks, Path, torch.dtype], None]


# LoRA: Hu et al. 2021, arXiv 2106.09685. DoRA: Liu et al. 2024, arXiv 2402.09353. rsLoRA: Kalajdzievski 2023, arXiv
# 2312.03732. LoHa: Hyeon-Woo et al. 2021 (FedPara), arXiv 2108.06098. LoKr: Yeh et al. 2023 (LyCORIS), arXiv
# 2309.14859.
KINDS: dict[LoraKind, AdapterKind] = {
    LoraKind.lora: AdapterKind(low_rank, export_diffusers),
    LoraKind.dora: AdapterKind(partial(low_rank, use_dora=True), export_diffusers),
    LoraKind.rslora: AdapterKind(partial(low_rank, use_rslora=True), export_diffusers),
    LoraKind.loha: AdapterKind(partial(lycoris, LoHaConfig), export_peft),
    LoraKind.lokr: AdapterKind(partial(lycoris, LoKrConfig), export_peft),
}
