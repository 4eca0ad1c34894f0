"""Keys of the three training methods and of their scripts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from packshot.config.common import Quantization
from packshot.config.conditions import CONDITIONS, INPUTS
from packshot.config.keys import Names, opt
from packshot.config.train import ExportConfig, TrainScript
from packshot.errors import ConfigError


@dataclass(frozen=True)
class LoraKindRow:
    """What one value of ``method.kind`` allows; ``methods/lora.py`` has the code by kind.

    low_rank: the update is a product of two matrices, as every file format holds it. quantizations: of the base, over
        which it can be trained.
    """

    low_rank: bool = False
    quantizations: tuple[Quantization, ...] = (Quantization.none,)


# loha and lokr read the shape of the stored weight, which nf4 packs; dora needs the values of the weight itself, which
# int8 no longer has after the first step.
LORA_KINDS = {
    "lora": LoraKindRow(low_rank=True, quantizations=tuple(Quantization)),
    "dora": LoraKindRow(quantizations=(Quantization.none, Quantization.nf4)),
    "rslora": LoraKindRow(low_rank=True, quantizations=tuple(Quantization)),
    "loha": LoraKindRow(),
    "lokr": LoraKindRow(),
}
LoraKind = Names("LoraKind", list(LORA_KINDS))
LoraTargets = Names(
    "LoraTargets", ["attention", "cross_attention", "attention_and_ff", "attention_and_conv", "all_linear"]
)
Condition = Names("Condition", list(CONDITIONS))
IPAdapterVariant = Names("IPAdapterVariant", ["base", "plus"])
ReferenceSource = Names("ReferenceSource", ["self", "look", "place"])


@dataclass
class LoraMethod:
    rank: int = opt(16, "rank of the update", min=1, max=1024)
    alpha: float = opt(16.0, "scale: the update is multiplied by alpha/rank (rslora: alpha/sqrt(rank))", min=1e-3)
    kind: LoraKind = opt(
        LoraKind.lora, "form of the update; loha and lokr are exported for peft, the others for diffusers"
    )
    dropout: float = opt(
        0.0,
        "dropout on the adapter's input (loha, lokr: on its rows); unlike all other random draws it depends on batch "
        "size, accumulation and number of processes",
        min=0,
        max=0.9,
    )
    targets: LoraTargets = opt(LoraTargets.attention, "which layers of the UNet are adapted")
    target_modules: str | None = opt(None, "regular expression over whole module names, instead of targets")
    text_encoder: bool = opt(False, "also train a LoRA on the attention of both text encoders")
    text_rank: int | None = opt(
        None, "rank on the text encoders (alpha stays, so the scale is alpha/text_rank); null: rank", min=1, max=1024
    )
    init: str | None = opt(
        None, "LoRA to start from, file, folder or hub id, in diffusers' or kohya's layout; null: one without effect"
    )
    trigger_words: list[str] = opt([], "words that the captions share, recorded in the export for those who use it")
    conv_rank: int | None = opt(None, "rank on the convolutions among targets; null: rank", min=1, max=1024)
    conv_alpha: float | None = opt(None, "alpha on the convolutions among targets; null: alpha", min=1e-3)

    def check(self) -> None:
        if self.init and not LORA_KINDS[self.kind.name].low_rank:
            raise ConfigError(
                f"method.init={self.init} with method.kind={self.kind}: only products of two matrices are continued.",
                "Set method.kind=lora, or merge it into the base with model.loras.",
            )
        try:
            re.compile(self.target_modules or "")
        except re.error as error:
            raise ConfigError(
                f"method.target_modules={self.target_modules!r} is not a regular expression: {error}.",
                "It is matched against whole module names, such as mid_block.attentions.0.proj_in.",
            ) from error


@dataclass
class IPAdapterMethod:
    variant: IPAdapterVariant = opt(IPAdapterVariant.base, "base (pooled embedding) or plus (patch tokens)")
    num_tokens: int = opt(4, "image tokens that the cross-attention sees (plus: queries)", min=1, max=64)
    reference: ReferenceSource = opt(
        ReferenceSource.look,
        "the picture a sample is trained with: self, its own without the product; or, so that the adapter does not "
        "learn a reference's content, with probability peer_reference_prob another sample's: with the same surface "
        "and mood (look), or surface and background (place)",
    )
    peer_reference_prob: float = opt(
        0.5,
        "share of samples trained with the reference of another sample, where reference=look|place finds one; the "
        "others are trained with their own, which tells the network more",
        min=0,
        max=1,
    )
    image_dropout: float = opt(0.05, "share of samples trained without the reference", min=0, max=1)
    init: str | None = opt(
        None,
        "adapter to start from: a .safetensors or .bin file in the original layout, here or on the hub "
        "(h94/IP-Adapter/sdxl_models/ip-adapter_sdxl_vit-h.safetensors; plus: num_tokens=16), or an export/ folder; "
        "null: one without effect",
    )
    resampler_dim: int | None = opt(
        None, "inner width of variant=plus; null: that of init, or the image encoder's", min=64, max=8192
    )

    def check(self) -> None:
        if self.variant is not IPAdapterVariant.base:
            return
        if self.num_tokens != 4:
            raise ConfigError(
                f"method.num_tokens={self.num_tokens} with method.variant=base: stock loaders expect four.",
                "Set method.num_tokens=4, or method.variant=plus.",
            )
        if self.resampler_dim is not None:
            raise ConfigError(
                f"method.resampler_dim={self.resampler_dim} with method.variant=base: this variant has no resampler.",
                "Set method.variant=plus, or leave it out.",
            )


@dataclass
class ControlNetMethod:
    condition: Condition = opt(
        Condition.inpaint,
        "the control map: " + ", ".join(f"{name} ({row.help})" for name, row in CONDITIONS.items()),
    )
    init: str | None = opt(None, "ControlNet to start from, folder, file or hub id; null: a copy of the UNet's encoder")
    extra_controlnets: list[str] = opt(
        [],
        "ControlNets that work along, frozen unless method.train_extras=true: export/ folders, or folders, files and "
        "hub ids of others after their condition, such as canny:owner/name",
    )
    train_extras: bool = opt(
        False, "also train those of method.extra_controlnets; they are exported to export/beside-<k>"
    )
    mask_grow: float = opt(
        0.0, "px by which the product's mask grows before the map is drawn, in training and generation", min=-64, max=64
    )
    mask_feather: float = opt(0.0, "px over which the mask fades, in training and generation (inpaint)", min=0, max=64)
    mask_jitter: float = opt(0.0, "px by which the mask grows or shrinks at random in training", min=0, max=64)


@dataclass
class LoraExportConfig(ExportConfig):
    kohya: bool = opt(False, "also write the LoRA under sd-scripts' names, for it, ComfyUI and others")


@dataclass
class TrainLora(TrainScript):
    can_quantize: ClassVar[bool] = True
    trains_input_layer: ClassVar[bool] = True

    method: LoraMethod = field(default_factory=LoraMethod)
    export: LoraExportConfig = field(default_factory=LoraExportConfig)

    def check(self) -> None:
        super().check()
        kind = self.method.kind
        # transformers drops the magnitudes of a DoRA on loading; readers disagree about their shape in a kohya file
        for key, given in (("method.text_encoder", self.method.text_encoder), ("export.kohya", self.export.kohya)):
            if given and not LORA_KINDS[kind.name].low_rank:
                raise ConfigError(
                    f"{key}=true with method.kind={kind}: no file format holds that so that all stock loaders agree.",
                    f"Use method.kind=lora or rslora, or set {key}=false.",
                )
        if self.method.text_encoder and self.objective.prompt_chunks > 1:
            raise ConfigError(
                f"objective.prompt_chunks={self.objective.prompt_chunks} with method.text_encoder=true: a LoRA on the "
                "text encoders is trained on one chunk.",
                "Set objective.prompt_chunks=1, or method.text_encoder=false.",
            )
        quantization = self.model.quantization
        supported = [name for name, row in LORA_KINDS.items() if quantization in row.quantizations]
        if kind.name not in supported:
            raise ConfigError(
                f"method.kind={kind} cannot be trained over model.quantization={quantization}.",
                f"It works with {', '.join(supported)}.",
            )


@dataclass
class TrainIPAdapter(TrainScript):
    method: IPAdapterMethod = field(default_factory=IPAdapterMethod)


@dataclass
class TrainControlNet(TrainScript):
    method: ControlNetMethod = field(default_factory=ControlNetMethod)

    def check(self) -> None:
        super().check()
        directed = [name for name in CONDITIONS[self.method.condition.name].inputs if INPUTS[name].directed]
        if self.data.flip and directed:
            raise ConfigError(
                f"data.flip=true with method.condition={self.method.condition}: it reads {', '.join(directed)}, which "
                "tells a side.",
                "Leave data.flip out.",
            )
