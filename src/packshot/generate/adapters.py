"""The LoRAs, ControlNets and IP-Adapter of a request: found, checked, and put into a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from packshot.base.adapter_metadata import common_metadata
from packshot.base.controlnets import find_controlnet, read_control
from packshot.base.inpainting import CONV_FILE
from packshot.base.ip_adapters import find_ip_adapter, read_original, refuse_other_attentions, refuse_other_projection
from packshot.base.load import hint_of_failure
from packshot.base.lora_files import LoraFile, find_lora, merge_lora, merge_peft, peft_tensors, read_lora
from packshot.base.places import find_place
from packshot.config.conditions import INPUTS, split_condition
from packshot.config.schema import AdaptersConfig, GenerateSettings, IPAdapterLayers
from packshot.errors import ConfigError, first_line
from packshot.generate.adapter_schedule import ALWAYS, Span, Switch
from packshot.generate.conditions import refuse_unread
from packshot.generate.identity import certified_name, file_hashes
from packshot.generate.json_types import Json
from packshot.imaging.control_maps import Control
from packshot.imaging.onnx import load_session
from packshot.lists import ending
from packshot.runs.networks import Network

Pipe: TypeAlias = Any  # a pipeline of diffusers, whose attributes are set at run time, as those of a Network are
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, TypeError)


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter of a request: its weight, the shares of the steps between which it counts, and its control map."""

    kind: str
    folder: Path
    scale: float
    span: Span
    control: Control | None = None
    details: Json = field(default_factory=dict)

    def describe(self) -> Json:
        """The adapter in certificates."""
        details = self.details if self.control is None else asdict(self.control)
        stated = {"kind": self.kind, "name": certified_name(self.folder), "scale": self.scale, "steps": list(self.span)}
        return {**stated, **details, "files": file_hashes(self.folder)}


def adapter_entries(adapters: AdaptersConfig, folders: dict[str, list[Path]]) -> list[AdapterEntry]:
    """All adapters with their settings: LoRAs, then ControlNets, then the IP-Adapter.

    Raises:
        ConfigError: a ControlNet does not name its control map.
    """
    entries = []
    for folder, scale in zip(folders["lora"], adapters.weights_of_loras(), strict=True):
        entries.append(AdapterEntry("lora", folder, scale, (adapters.lora_start, adapters.lora_end)))
    controlnets = folders["controlnets"]
    scales = adapters.controlnet_scales or [1.0] * len(controlnets)
    conditions = [split_condition(value)[0] for value in adapters.controlnets]
    spans = adapters.controlnet_spans()
    for folder, scale, span, condition in zip(controlnets, scales, spans, conditions, strict=True):
        control = read_control("adapters.controlnets", folder, condition)
        entries.append(AdapterEntry("controlnet", folder, scale, span, control))
    for folder in folders["ip_adapter"]:
        span = (adapters.ip_adapter_start, adapters.ip_adapter_end)
        layers = {"layers": adapters.ip_adapter_layers.name}
        entries.append(AdapterEntry("ip_adapter", folder, adapters.ip_adapter_scale, span, details=layers))
    return entries


def check_adapters(
    adapters: AdaptersConfig, networks: Mapping[str, str], settings: GenerateSettings | None = None
) -> dict[str, str]:
    """What can be known without loading: folders, their main files, what their ``packshot.json`` names.

    networks: those that the config names, by the input of control maps that each estimates.

    Returns the networks that products need: those of the inputs that a ControlNet reads.

    Raises:
        ConfigError: something is missing or wrong, there is no network for an input that is needed, or nothing reads
            an input that the settings give.
    """
    folders = adapter_folders(adapters)
    common_metadata(folders)
    controls = {}
    for folder, value in zip(folders["controlnets"], adapters.controlnets, strict=True):
        controls[folder] = read_control("adapters.controlnets", folder, split_condition(value)[0])
    refuse_unread(settings or GenerateSettings(), controls.values())
    needed = {}
    for folder, control in controls.items():
        for name in control.inputs:
            network = INPUTS[name].network
            if network is None:
                continue
            if name not in networks:
                raise ConfigError(
                    f"adapters.controlnets: {folder} reads the product's {name}, which a photo does not have.",
                    f"Set {network.key} to a {name} network ({network.kinds}).",
                )
            load_session(network.key, networks[name])
            needed[name] = networks[name]
    return needed


def adapter_folders(adapters: AdaptersConfig) -> dict[str, list[Path]]:
    """The folders and files of all adapters by kind; those on the hub are fetched.

    Where a folder is named, it is the folder: an export of ours holds more than the weights.

    Raises:
        ConfigError: one has no weights, or cannot be fetched.
    """
    folders: dict[str, list[Path]] = {"lora": [], "controlnets": [], "ip_adapter": []}
    for value in adapters.lora_paths():
        folders["lora"].append(named_folder("adapters.lora", value, find_lora("adapters.lora", value)))
    for value in adapters.controlnets:
        folders["controlnets"].append(find_controlnet("adapters.controlnets", value))
    if adapters.ip_adapter:
        key = "adapters.ip_adapter"
        folders["ip_adapter"].append(named_folder(key, adapters.ip_adapter, find_ip_adapter(key, adapters.ip_adapter)))
    return folders


def named_folder(key: str, value: str, found: Path) -> Path:
    """The folder of the weights that were found, if the config names a folder; else their file."""
    return found if found.is_dir() or find_place(key, value).is_file else found.parent


def unloadable(key: str, folder: Path, error: Exception) -> ConfigError:
    """The error for an adapter that the libraries refuse."""
    reason = first_line(error)
    return ConfigError(f"{key}={folder} cannot be loaded into this base: {reason}", hint_of_failure(folder))


def add_adapters(pipe: Pipe, entries: list[AdapterEntry], layers: IPAdapterLayers) -> list[Switch]:
    """Load LoRAs and IP-Adapter into a pipeline; returns what sets the weight of each.

    Raises:
        ConfigError: one cannot be loaded, or cannot be switched off at the steps at which it should not count.
    """
    weights: dict[str, float] = {}
    switches = []
    for entry in entries:
        if entry.kind == "lora":
            switches.append(add_lora(pipe, entry, weights))
        elif entry.kind == "ip_adapter":
            switches.append(add_ip_adapter(pipe, entry, layers))
    return switches


def add_lora(pipe: Pipe, entry: AdapterEntry, weights: dict[str, float]) -> Switch:
    """Load one LoRA. weights: those of all LoRAs of the pipeline by name; the new one is added.

    Products of two matrices become an adapter of peft's, which can be switched; other forms are merged into the base.
    """
    key = "adapters.lora"
    path = find_lora(key, str(entry.folder))
    networks = lora_networks(pipe)
    lora = None if path.is_dir() else read_lora(key, path, networks)
    merged = lora is None or not lora.is_plain()
    if entry.span != ALWAYS and merged:
        raise ConfigError(
            f"{key}={entry.folder} is of a kind that is merged into the base: it counts at every step.",
            "Leave out adapters.lora_start and adapters.lora_end, or train method.kind=lora, dora or rslora.",
        )
    own_channels = (entry.folder / CONV_FILE).is_file()
    name = f"lora_{len(weights)}"

    def set_weight(weight: float) -> None:
        if not merged:
            weights[name] = entry.scale * weight
            # diffusers switches off every LoRA that is not named, so all of them are
            pipe.set_adapters(list(weights), list(weights.values()))
        if own_channels:
            pipe.unet.conv_in.strength = entry.scale * weight

    try:
        add_weights(pipe, path, lora, networks, name, entry.scale)
        set_weight(1.0)
    except _LOAD_ERRORS as error:
        raise unloadable(key, entry.folder, error) from error
    return Switch(entry.span, set_weight)


def add_weights(
    pipe: Pipe, path: Path, lora: LoraFile | None, networks: Mapping[str, nn.Module], name: str, scale: float
) -> None:
    """Give a pipeline the weights of a LoRA: as an adapter called ``name``, or merged at ``scale``."""
    if lora is None:
        merge_peft(pipe.unet, path, scale)
    elif lora.is_plain():
        pipe.load_lora_weights(peft_tensors(lora), adapter_name=name)
    else:
        merge_lora(lora, networks, scale)


def lora_networks(pipe: Pipe) -> dict[str, nn.Module]:
    """The networks of a pipeline that a LoRA may adapt, by their names in files."""
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}


# Which of the two layers that InstantStyle found to carry style and layout a choice of layers has.
_LAYERS: dict[IPAdapterLayers, tuple[str, ...]] = {
    IPAdapterLayers.style: ("up",),
    IPAdapterLayers.layout: ("down",),
    IPAdapterLayers.style_and_layout: ("down", "up"),
}


def ip_adapter_scales(
    unet: Network, layers: IPAdapterLayers, scale: float
) -> float | dict[str, dict[str, list[float]]]:
    """The argument of ``pipe.set_ip_adapter_scale`` that lets a reference enter through some layers only; a layer that
    it does not name has scale 0.

    Style is the middle attention of the first up block that has any, layout the last attention of the last such down
    block (InstantStyle, Wang et al. 2024, arXiv 2404.02733, section 3.2): up_blocks.0.attentions.1 and
    down_blocks.2.attentions.1 of SDXL.
    """
    if layers not in _LAYERS:
        return scale
    last = attention_counts(unet.down_blocks)[-1]
    first = attention_counts(unet.up_blocks)[0]
    places = {"down": (*last, last[1] - 1), "up": (*first, first[1] // 2)}
    scales = {}
    for name in _LAYERS[layers]:
        block, count, place = places[name]
        weights = [0.0] * count
        weights[place] = scale
        scales[name] = {f"block_{block}": weights}
    return scales


def attention_counts(blocks: Iterable[Network]) -> list[tuple[int, int]]:
    """Number of each block that has attentions, and how many it has."""
    return [(number, len(block.attentions)) for number, block in enumerate(blocks) if hasattr(block, "attentions")]


def add_ip_adapter(pipe: Pipe, entry: AdapterEntry, layers: IPAdapterLayers) -> Switch:
    """Load the IP-Adapter. layers: those through which a reference enters."""

    def set_weight(weight: float) -> None:
        pipe.set_ip_adapter_scale(ip_adapter_scales(pipe.unet, layers, entry.scale * weight))

    key = "adapters.ip_adapter"
    file = find_ip_adapter(key, str(entry.folder))
    tensors = read_original(key, str(entry.folder), meta=True)
    attentions = ending(pipe.unet.attn_processors, "attn2.processor")
    try:
        refuse_other_attentions(tensors, len(attentions))
        pipe.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None)
        refuse_other_projection(tensors, pipe.unet.encoder_hid_proj.image_projection_layers[0])
        set_weight(1.0)
    except _LOAD_ERRORS as error:
        raise unloadable(key, entry.folder, error) from error
    return Switch(entry.span, set_weight)
