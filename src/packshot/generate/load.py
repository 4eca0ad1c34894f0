"""The stock diffusers pipeline with every adapter that was asked for, and the identity of all its weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    MultiControlNetModel,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from packshot.base.adapter_metadata import common_metadata
from packshot.base.controlnets import load_controlnet, read_control
from packshot.base.inpainting import CONV_FILE, load_conv, reads_product, take_apart
from packshot.base.load import hint_of_failure, load_parts, model_folder, trained_scheduler
from packshot.config.schema import (
    AdaptersConfig,
    DepthConfig,
    IPAdapterLayers,
    ModelConfig,
    ProductConditioning,
    Unconditional,
)
from packshot.errors import ConfigError
from packshot.generate.adapter_schedule import ALWAYS, Span, Switch
from packshot.imaging.control_maps import Control
from packshot.imaging.onnx import load_session
from packshot.runs.files import file_sha256, readable

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"  # method.kind=loha and lokr, which diffusers has no loader for
IP_ADAPTER_FILE = "ip_adapter.safetensors"
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, TypeError)


@dataclass(frozen=True)
class Models:
    """A pipeline ready to draw.

    controls, controlnet_scales, controlnet_spans: what each ControlNet is shown, its weight, and the shares of the
        steps between which it counts; in the pipeline's order.
    switches: the other adapters that do not count at every step.
    has_ip_adapter: every call must then bring image embeddings.
    product_conditioning: how the network sees the product during denoising; a name of ``ProductConditioning``.
    unit: sides of the working copy are multiples of this, px.
    resolution: side of the square the base was trained on, px.
    manifest: names and SHA-256 of everything that was loaded, for certificates.
    """

    pipe: StableDiffusionXLPipeline | StableDiffusionXLControlNetPipeline
    controls: tuple[Control, ...]
    controlnet_scales: tuple[float, ...]
    controlnet_spans: tuple[Span, ...]
    switches: tuple[Switch, ...]
    has_ip_adapter: bool
    product_conditioning: str
    unit: int
    resolution: int
    manifest: dict[str, Any]


def pick_device() -> tuple[torch.device, torch.dtype]:
    """CUDA in fp16 when there is one, otherwise the CPU in fp32."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.float16
    return torch.device("cpu"), torch.float32


def load_models(model: ModelConfig, adapters: AdaptersConfig | None = None) -> Models:
    """Load base and adapters.

    Raises:
        ConfigError: a part is missing, broken or does not fit the base; names the key.
    """
    adapters = adapters or AdaptersConfig()
    folders = _adapter_folders(adapters)
    controls = tuple(read_control("adapters.controlnets", folder) for folder in folders["controlnets"])
    metadata = common_metadata(folders)
    scales = tuple(adapters.controlnet_scales or [1.0] * len(controls))
    device, dtype = pick_device()
    parts = load_parts(model).to(device, dtype)
    parts.scheduler = trained_scheduler(parts.scheduler, metadata.prediction_type, metadata.zero_terminal_snr)
    shown = _show_product(parts.unet, folders["lora"], metadata.product_conditioning)
    components = parts.pipeline_components(references=bool(folders["ip_adapter"]))
    pipe: Any
    if controls:
        sources = map(str, folders["controlnets"])
        nets = [load_controlnet("adapters.controlnets", source, parts.unet).eval() for source in sources]
        together = MultiControlNetModel([net.to(device, dtype) for net in nets])
        pipe = StableDiffusionXLControlNetPipeline(**components, controlnet=together)
    else:
        pipe = StableDiffusionXLPipeline(**components)
    switches = [
        *(_add_lora(pipe, folder, adapters) for folder in folders["lora"]),
        *(_add_ip_adapter(pipe, folder, adapters) for folder in folders["ip_adapter"]),
    ]
    pipe.set_progress_bar_config(disable=True)
    if metadata.unconditional == Unconditional.empty.name:  # the encoded '' instead of the zeros that SDXL's base has
        pipe.register_to_config(force_zeros_for_empty_prompt=False)
    manifest = _manifest(model, adapters, folders, controls, scales, device, dtype)
    return Models(
        pipe=pipe,
        controls=controls,
        controlnet_scales=scales,
        controlnet_spans=tuple(adapters.controlnet_spans()),
        switches=tuple(switch for switch in switches if switch.span != ALWAYS),
        has_ip_adapter=bool(folders["ip_adapter"]),
        product_conditioning=shown,
        unit=pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1),
        resolution=model.resolution,
        manifest={**manifest, "product_shown": shown, "prediction_type": pipe.scheduler.config.prediction_type},
    )


def refuse_light(light_angle: float | None, controls: Iterable[Control]) -> None:
    """Raises ConfigError when an angle is given and no ControlNet reads it: nothing would come of it."""
    if light_angle is not None and all(control.needs != "light" for control in controls):
        raise ConfigError(
            f"light_angle={light_angle:g} has no effect: no ControlNet reads light.",
            "Say it in words (scene.lighting), or train one: train_controlnet.py method.condition=light.",
        )


def check_adapters(adapters: AdaptersConfig, depth: DepthConfig, light_angle: float | None = None) -> str | None:
    """What can be known without loading: folders, their main files, what they say of themselves.

    Returns the depth network that products need; None if no ControlNet reads their depth.

    Raises:
        ConfigError: something is missing or wrong, there is no network for a depth that is needed, or nothing that
            reads ``light_angle``.
    """
    folders = _adapter_folders(adapters)
    common_metadata(folders)
    refuse_light(light_angle, (read_control("adapters.controlnets", folder) for folder in folders["controlnets"]))
    readers = [f for f in folders["controlnets"] if read_control("adapters.controlnets", f).needs == "depth_HW"]
    if not readers:
        return None
    if not depth.onnx:
        raise ConfigError(
            f"adapters.controlnets: {readers[0]} reads the product's depth, which a photo does not have.",
            "Set depth.onnx to a depth network (MiDaS, Depth Anything).",
        )
    load_session("depth.onnx", depth.onnx)
    return depth.onnx


def _show_product(unet: Any, loras: list[Path], shown: str) -> str:
    """Give the UNet the input channels in which it reads the product, if it does; returns how the product is shown."""
    channels = ProductConditioning.channels.name
    if shown == channels:
        for folder in loras:
            try:
                load_conv(unet, folder)
            except (OSError, ValueError, KeyError) as error:
                raise _refusal("adapters.lora", folder, error) from error
    elif reads_product(unet):  # an inpainting base, and adapters that know nothing of it
        take_apart(unet)
        return channels
    return shown


def _adapter_folders(adapters: AdaptersConfig) -> dict[str, list[Path]]:
    wanted = {
        "lora": ([adapters.lora] if adapters.lora else [], (LORA_FILE, PEFT_FILE)),
        "controlnets": (adapters.controlnets, ("config.json",)),
        "ip_adapter": ([adapters.ip_adapter] if adapters.ip_adapter else [], (IP_ADAPTER_FILE,)),
    }
    folders = {}
    for kind, (paths, files) in wanted.items():
        key = f"adapters.{kind}"
        folders[kind] = [readable(key, path) for path in paths]
        for path, folder in zip(paths, folders[kind], strict=True):
            if not any((folder / file).is_file() for file in files):
                raise ConfigError(
                    f"{key}={path} has no {' or '.join(files)}.", "Name the export/ folder that the trainer wrote."
                )
    return folders


def _refusal(key: str, folder: Path, error: Exception) -> ConfigError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return ConfigError(f"{key}={folder} cannot be loaded into this base: {reason}", hint_of_failure(folder))


def _add_lora(pipe: Any, folder: Path, adapters: AdaptersConfig) -> Switch:
    span, scale = (adapters.lora_start, adapters.lora_end), adapters.lora_scale
    merged, own_channels = not (folder / LORA_FILE).is_file(), (folder / CONV_FILE).is_file()
    if span != ALWAYS and merged:
        raise ConfigError(
            f"adapters.lora={folder} is of a kind that is merged into the base: it counts at every step.",
            "Leave out adapters.lora_start and adapters.lora_end, or train method.kind=lora, dora or rslora.",
        )

    def set_weight(weight: float) -> None:
        if not merged:
            pipe.set_adapters(["lora"], [scale * weight])
        if own_channels:
            pipe.unet.conv_in.strength = scale * weight

    try:
        if merged:
            _merge_peft(pipe.unet, folder, scale)
        else:
            pipe.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name="lora")
        set_weight(1.0)
    except _LOAD_ERRORS as error:
        raise _refusal("adapters.lora", folder, error) from error
    return Switch(span, set_weight)


def _merge_peft(unet: Any, folder: Path, scale: float) -> None:
    """Add an adapter of peft's to the UNet's own weights, ``scale`` times; the UNet stays a plain one."""
    adapted = PeftModel.from_pretrained(unet, str(folder), torch_device=str(unet.device))
    modules: list[Any] = list(adapted.modules())
    for module in modules:
        if isinstance(module, BaseTunerLayer):
            module.set_scale("default", scale)
    adapted.merge_and_unload()


# Which of the two layers that InstantStyle found to carry style and layout a choice of layers has.
_LAYERS: dict[IPAdapterLayers, tuple[str, ...]] = {
    IPAdapterLayers.style: ("up",),
    IPAdapterLayers.layout: ("down",),
    IPAdapterLayers.style_and_layout: ("down", "up"),
}


def ip_adapter_scales(unet: Any, layers: IPAdapterLayers, scale: float) -> float | dict[str, dict[str, list[float]]]:
    """The argument of ``pipe.set_ip_adapter_scale`` that lets a reference enter through some layers only; a layer that
    it does not name has scale 0.

    Style is the middle attention of the first up block that has any, layout the last attention of the last such down
    block (InstantStyle, Wang et al. 2024, arXiv 2404.02733, section 3.2): up_blocks.0.attentions.1 and
    down_blocks.2.attentions.1 of SDXL.
    """
    if layers not in _LAYERS:
        return scale
    last, first = _attentions(unet.down_blocks)[-1], _attentions(unet.up_blocks)[0]
    places = {"down": (*last, last[1] - 1), "up": (*first, first[1] // 2)}
    chosen = {name: places[name] for name in _LAYERS[layers]}
    return {
        name: {f"block_{block}": [scale if number == place else 0.0 for number in range(count)]}
        for name, (block, count, place) in chosen.items()
    }


def _attentions(blocks: Any) -> list[tuple[int, int]]:
    """Number of each block that has attentions, and how many it has."""
    return [(number, len(block.attentions)) for number, block in enumerate(blocks) if hasattr(block, "attentions")]


def _add_ip_adapter(pipe: Any, folder: Path, adapters: AdaptersConfig) -> Switch:
    def set_weight(weight: float) -> None:
        scale = adapters.ip_adapter_scale * weight
        pipe.set_ip_adapter_scale(ip_adapter_scales(pipe.unet, adapters.ip_adapter_layers, scale))

    try:
        pipe.load_ip_adapter(str(folder), subfolder="", weight_name=IP_ADAPTER_FILE, image_encoder_folder=None)
        set_weight(1.0)
    except _LOAD_ERRORS as error:
        raise _refusal("adapters.ip_adapter", folder, error) from error
    return Switch((adapters.ip_adapter_start, adapters.ip_adapter_end), set_weight)


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by relative name of a folder's weights and JSON configs."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".safetensors", ".json") and file.is_file())
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}


def certified_name(folder: Path) -> str:
    """The name of a folder in certificates: its last part, and its parent's where that part is just ``export``.

    Certificates are handed out, and the rest of a path would show them the machine. The hashes identify the content.
    """
    parts = folder.resolve().parts
    return "/".join(parts[-2:]) if parts[-1] == "export" else parts[-1]


def _source(value: str) -> dict[str, Any]:
    folder = model_folder(ModelConfig(base=value))
    if folder is not None:
        used = {n: h for n, h in file_hashes(folder).items() if n.endswith(".safetensors")}
        return {"name": certified_name(folder), "files": used}
    from huggingface_hub import snapshot_download

    # The snapshot's folder is named by its commit; it was downloaded a moment ago, so this asks nobody.
    return {"name": value, "revision": Path(snapshot_download(value, local_files_only=True)).name}


def _manifest(
    model: ModelConfig,
    adapters: AdaptersConfig,
    folders: dict[str, list[Path]],
    controls: tuple[Control, ...],
    scales: tuple[float, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    used = {"base": model.base, "vae": model.vae}
    if folders["ip_adapter"]:
        used["image_encoder"] = model.image_encoder
    parts = {name: _source(value) for name, value in used.items() if value}
    described: dict[str, list[dict[str, Any]]] = {
        "lora": [{}],
        "controlnets": [asdict(control) for control in controls],
        "ip_adapter": [{"layers": adapters.ip_adapter_layers.name}],
    }
    entries = []
    for kind, weights, spans in (
        ("lora", [adapters.lora_scale], [(adapters.lora_start, adapters.lora_end)]),
        ("controlnets", scales, adapters.controlnet_spans()),
        ("ip_adapter", [adapters.ip_adapter_scale], [(adapters.ip_adapter_start, adapters.ip_adapter_end)]),
    ):
        for number, folder in enumerate(folders[kind]):
            entry = {"kind": kind.removesuffix("s"), "name": certified_name(folder), "scale": weights[number]}
            entry |= {"steps": list(spans[number])}
            entry |= described[kind][number]
            entries.append({**entry, "files": file_hashes(folder)})
    return {**parts, "adapters": entries, "device": device.type, "dtype": str(dtype).removeprefix("torch.")}
