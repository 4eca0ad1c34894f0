"""Keys that several scripts share: the run, its licences, its trackers, its models, and scenes."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from operator import attrgetter
from pathlib import Path
from typing import ClassVar

from packshot.config.captioners import CAPTIONERS
from packshot.config.keys import Names, nearest, opt
from packshot.config.mask_models import MASK_MODELS
from packshot.config.unread import SCRIPT_RULES, refuse_unread
from packshot.errors import ConfigError
from packshot.lists import in_words, map_values
from packshot.scene import SLOTS

TrackerKind = Names("TrackerKind", ["wandb", "tensorboard", "wandb_tensorboard", "none"])
Quantization = Names("Quantization", ["none", "nf4", "int8"])

LONGEST_TAG = 64  # characters that W&B accepts
NOT_IN_PROJECT = "/\\#?%:"  # characters that W&B refuses in the name of a project


@dataclass
class RunConfig:
    dir: str | None = opt(None, "folder of this run; default: outputs/<script>/<date-time>")
    seed: int = opt(0, "seed of every random draw", min=0, max=2**62)
    resume: bool = opt(False, "continue in an existing run.dir, from its newest whole checkpoint")


@dataclass
class LicenseConfig:
    commercial: bool = opt(
        False,
        "refuse data and weights whose licence is not known to allow commercial use; build_data.py rejects such rows",
    )
    allowed: list[str] = opt(
        [],
        "further licences to accept, and paths or ids of weights that name none and whose terms you have checked",
    )


@dataclass
class TrackingConfig:
    kind: TrackerKind = opt(
        TrackerKind.wandb, "wandb (offline when no key is set), tensorboard (in <run.dir>/tensorboard), both, or none"
    )
    project: str = opt("packshot", "W&B project")
    entity: str | None = opt(None, "W&B user or team; default: that of the key")
    group: str | None = opt(None, "W&B group of runs; --multirun sets one for its jobs")
    name: str | None = opt(None, "W&B run name; default: the name of run.dir")
    notes: str | None = opt(None, "W&B notes: what the run is for")
    tags: list[str] = opt([], "W&B tags, at most 64 characters each")
    upload: bool = opt(True, "log export/ as a W&B artifact with its files; false: only as a reference to the folder")

    @property
    def uses_wandb(self) -> bool:
        return self.kind in (TrackerKind.wandb, TrackerKind.wandb_tensorboard)

    def check(self) -> None:
        for tag in self.tags:
            if len(tag) > LONGEST_TAG:
                raise ConfigError(
                    f"tracking.tags: {tag!r} has {len(tag)} characters.", f"W&B accepts at most {LONGEST_TAG}."
                )
            if not tag.strip():
                raise ConfigError("tracking.tags has an empty tag.", f"W&B accepts 1 to {LONGEST_TAG} characters.")
        refused = sorted({*self.project} & {*NOT_IN_PROJECT})
        if refused or not self.project:
            raise ConfigError(
                f"tracking.project={self.project!r} cannot be the name of a W&B project.",
                f"Use a name without {' '.join(refused)}." if refused else "It needs a name.",
            )


def captioner_weights() -> list[tuple[str, object, object]]:
    """A key for the weights of each captioner family, as ``make_dataclass`` takes them."""
    fields: list[tuple[str, object, object]] = []
    for family in CAPTIONERS.values():
        if family.weights:
            fields.append((family.name, str, opt(family.weights, f"{family.title} folder or hub id")))
    return fields


@dataclass
class ModelConfig(make_dataclass("CaptionerWeights", captioner_weights())):
    base: str = opt(
        "data/models/sdxl",
        "SDXL: pipeline folder, checkpoint in one file, or hub id: owner/name[/folder or file][@revision]",
    )
    vae: str | None = opt(None, "VAE folder, file or hub id that replaces the base's VAE (sdxl-vae-fp16-fix)")
    image_encoder: str | None = opt(
        None, "CLIP vision encoder, folder, file or hub id (h94/IP-Adapter/models/image_encoder); default: the base's"
    )
    variant: str | None = opt(
        None, "preferred variant of weights, such as fp16, where a folder has several; default: the plain files"
    )
    config: str | None = opt(
        None, "pipeline folder or hub id with the configs of a base in one file whose shapes are not SDXL's (SSD-1B)"
    )
    loras: list[str] = opt(
        [], "LoRAs that are merged into the base, files, folders or hub ids: diffusers', kohya's or LyCORIS' layout"
    )
    lora_scales: list[float] = opt([], "one weight for each of model.loras; default 1.0 each", min=-10, max=10)
    resolution: int = opt(128, "side of the square the base was trained on, px", min=32, max=2048)
    quantization: Quantization = opt(
        Quantization.none, "format of the frozen UNet's transformer layers while a LoRA is trained"
    )

    def merged_loras(self) -> list[float]:
        """The weight of each of ``loras``."""
        return self.lora_scales or [1.0] * len(self.loras)

    def check(self) -> None:
        if self.lora_scales and len(self.lora_scales) != len(self.loras):
            raise ConfigError(
                f"model.lora_scales has {len(self.lora_scales)} values for {len(self.loras)} LoRAs.",
                "Give one for each of model.loras, or none.",
            )
        twice = {name for name in self.loras if self.loras.count(name) > 1}
        if twice:
            raise ConfigError(
                f"model.loras names {min(twice)} more than once.",
                "Name it once; model.lora_scales says how much it counts.",
            )


@dataclass
class Script:
    """Keys of every script. can_quantize: whether the script reads ``model.quantization``."""

    can_quantize: ClassVar[bool] = False

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self) -> None:
        refuse_unread(self, SCRIPT_RULES)
        if self.model.quantization is not Quantization.none and not self.can_quantize:
            raise ConfigError(
                f"model.quantization={self.model.quantization} only works in train_lora.py.",
                "Set model.quantization=none: a LoRA that was trained with it runs on the unquantized base.",
            )


@dataclass
class MatteConfig:
    model: str = opt(
        "auto",
        "what finds the product: "
        + in_words(map_values(attrgetter("about"), MASK_MODELS), "{} ({})", "; ")
        + "; or the ONNX file of a salient-object network",
    )
    min_confidence: float = opt(0.5, "masks below this confidence are rejected", min=0, max=1)
    strict: bool = opt(False, "refuse masks that are in doubt, instead of marking them needs_review")
    invert: bool = opt(False, "mask files are black where the product is")

    def check(self) -> None:
        """Raises ConfigError where ``model`` is neither a name nor a file that can be an ONNX network."""
        if self.model in MASK_MODELS or self.model.endswith(".onnx") or Path(self.model).expanduser().exists():
            return
        close = nearest(self.model, MASK_MODELS)
        raise ConfigError(
            f"matte.model={self.model} is neither a way to find masks nor a file."
            + (f" Did you mean {close}?" if close else ""),
            f"Allowed are {', '.join(MASK_MODELS)}, or the path of an .onnx file.",
        )


@dataclass
class DepthConfig:
    onnx: str | None = opt(
        None, "ONNX file of a monocular depth network (MiDaS, Depth Anything), for ControlNets that read depth"
    )


def scene_fields() -> list[tuple[str, object, object]]:
    """A key for each slot of a Scene, as ``make_dataclass`` takes them."""
    fields: list[tuple[str, object, object]] = []
    for name, slot in SLOTS.items():
        if slot.many:
            fields.append((name, list[str], opt([], slot.help)))
        elif slot.order == 0:
            fields.append((name, str, opt("", slot.help)))
        else:
            fields.append((name, str | None, opt(None, slot.help)))
    return fields


@dataclass
class SceneConfig(make_dataclass("SceneKeys", scene_fields())):
    """The slots of a Scene as config keys."""

    def check(self) -> None:
        for name, row in SLOTS.items():
            text = getattr(self, name)
            if not row.many and isinstance(text, str) and text.startswith("[") and text.endswith("]"):
                lists = ", ".join(f"scene.{other}" for other, slot in SLOTS.items() if slot.many)
                raise ConfigError(
                    f"scene.{name}={text} is a list; this slot takes one text.",
                    f"Write it without brackets, or use a slot that takes several ({lists}).",
                )
