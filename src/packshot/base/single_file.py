"""A base in one file, in the layout of the published SDXL code: its parts by diffusers' conversion, without the hub.

The conversion wants a folder of configs. They are written from the published shapes (``base.shapes``), or come from
``model.config`` for a base of other shapes.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import pickle
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from packshot.base.places import Place
from packshot.errors import ConfigError, first_line
from packshot.lists import ending
from packshot.runs.files import CHECKOUT, file_sha256
from packshot.runs.networks import CLIP_REST, load_whole

TOKENIZERS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}  # the token that each pads with
UNET_INPUT = "model.diffusion_model.input_blocks.0.0.weight"
SECOND_TEXT_ENCODER = "conditioner.embedders.1.model.positional_embedding"
# The first part of the names of each network's tensors.
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.",
    "text_encoder_2": "conditioner.embedders.1.",
}
CONFIG_FILES = {"scheduler": "scheduler_config.json"}
Shapes: TypeAlias = dict[str, tuple[int, ...]]
# What a file is, by a part of a key that no base of SDXL has.
OTHERS = {
    "lora_": "a LoRA; name it in model.loras or adapters.lora",
    "cond_stage_model.": "a checkpoint of Stable Diffusion 1 or 2",
    "double_blocks.": "a checkpoint of Flux",
    "joint_blocks.": "a checkpoint of Stable Diffusion 3",
    "down_blocks.": "one network in diffusers' layout; name the whole pipeline's folder",
}


def tensor_shapes(file: Path) -> Shapes:
    """The shape of each tensor in a .safetensors file, by name; only the head of the file is read.

    Raises:
        ValueError: with the reason why it cannot be read, or why it is not a file of weights.
    """
    with file.open("rb") as opened:
        head = opened.read(64)
    if not head:
        raise ValueError("the file is empty")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError("it is only a pointer of Git LFS: run git lfs pull")
    if file.suffix != ".safetensors" and not is_safetensors(head):
        return pickled_shapes(file)
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"the file is damaged or cut off ({error})") from error


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins as those of safetensors do: with the length of a JSON object."""
    return head[8:9] == b"{"


def pickled_shapes(file: Path) -> Shapes:
    """:func:`tensor_shapes` of a .ckpt, .bin or .pt file. Raises ValueError: it holds something else than tensors."""
    try:
        tensors = torch.load(file, map_location="meta", weights_only=True)
        named = tensors.get("state_dict", tensors)
        return {name: tuple(tensor.shape) for name, tensor in named.items() if isinstance(tensor, torch.Tensor)}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        raise ValueError(f"it is no file of tensors, or it is damaged ({first_line(error)})") from error


def marked(names: Iterable[str], marks: Mapping[str, str]) -> str | None:
    """What a file is: the first of ``marks`` that is a part of one of its keys; None if no mark is."""
    keys = "\n".join(names)
    for mark, kind in marks.items():
        if mark in keys:
            return kind
    return None


def read_shapes(place: Place) -> Shapes:
    """The tensors of a base's file.

    Raises:
        ConfigError: it cannot be read, or is not a whole base of SDXL; names what it seems to be.
    """
    try:
        shapes = tensor_shapes(place.fetch())
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(f"{place.key}={place.value} cannot be read: {error}.", "Copy or fetch it again.") from error
    if UNET_INPUT in shapes and SECOND_TEXT_ENCODER in shapes:
        return shapes
    kind = marked(shapes, OTHERS)
    seems = f"; it seems to be {kind}" if kind else ""
    raise ConfigError(
        f"{place.key}={place.value} is not a whole SDXL checkpoint{seems}.",
        "A base is one file with UNet, VAE and both text encoders, a pipeline folder, or a hub id.",
    )


@cache
def config_folder(place: Place, configs: Place | None) -> Path:
    """A folder of configs, one subfolder for each part, for the base in a file.

    configs: a pipeline folder whose configs are taken, for bases of other shapes than SDXL's.
    """
    shapes = read_shapes(place)
    if configs is not None:
        return copied_configs(configs)
    folder = Path(tempfile.mkdtemp(prefix="packshot-configs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, config in published_configs(shapes).items():
        write_config(folder, name, config)
    return folder


def write_config(folder: Path, part: str, config: Mapping[str, object]) -> None:
    """Write the config of one part, where libraries look for it."""
    (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / part / CONFIG_FILES.get(part, "config.json")).write_text(json.dumps(dict(config), indent=2) + "\n")


def published_configs(shapes: Shapes) -> dict[str, dict[str, object]]:
    """The configs of SDXL's parts.

    What a file itself decides is taken from it: the UNet's input channels, and the marks of v-prediction.
    """
    from packshot.base.shapes import SCHEDULER, TEXT, TEXT_2, UNET, VAE

    scheduler = dict(SCHEDULER)
    if "v_pred" in shapes:
        scheduler["prediction_type"] = "v_prediction"
    if "ztsnr" in shapes:
        scheduler["rescale_betas_zero_snr"] = True
        scheduler["timestep_spacing"] = "trailing"
    return {
        "unet": {**UNET, "in_channels": shapes[UNET_INPUT][1]},
        "vae": VAE,
        "text_encoder": {**TEXT, "model_type": "clip_text_model"},
        "text_encoder_2": {**TEXT_2, "model_type": "clip_text_model"},
        "scheduler": scheduler,
    }


def copied_configs(configs: Place) -> Path:
    """The configs of a pipeline folder or repository."""
    folder = configs.path
    if folder is None:
        files = []
        for part in ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler"):
            names = configs.below(part).names()
            files += map(f"{part}/{{}}".format, ending(names, "config.json"))
        folder = configs.fetch(files)
    if not (folder / "unet" / "config.json").is_file():
        raise ConfigError(
            f"{configs.key}={configs.value} has no unet/config.json.", "Name the folder of a diffusers pipeline."
        )
    return folder


def load_network(cls: type, part: str, place: Place, configs: Place | None, dtype: torch.dtype) -> nn.Module:
    """One network of a base in a file.

    Raises:
        ConfigError: the file has other shapes than its configs, or lacks the network.
    """
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm, load_single_file_checkpoint

    file = str(place.fetch())
    folder = str(config_folder(place, configs))
    arguments = {"config": folder, "subfolder": part, "torch_dtype": dtype, "local_files_only": True}
    try:
        if hasattr(cls, "from_single_file"):
            network = cls.from_single_file(file, **arguments)
        else:
            checkpoint = load_single_file_checkpoint(file, local_files_only=True)
            network = create_diffusers_clip_model_from_ldm(cls, checkpoint=checkpoint, **arguments)
        refuse_missing(network)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"{place.key}: {place.value} holds no {cls.__name__} of SDXL's shapes ({reason}).",
            "For a base of other shapes, such as SSD-1B, set model.config to a pipeline folder with its configs.",
        ) from error
    return network


def digest(part: str, place: Place, configs: Place | None) -> str:
    """Digest of one network in a file and of its config. No more than one tensor is in memory at a time."""
    file = place.fetch()
    whole = place.key == "model.base"
    config = (config_folder(place, configs) / part / "config.json").read_text() if whole else part_config(part, configs)
    found = hashlib.sha256(json.dumps(config).encode())
    if file.suffix != ".safetensors":
        found.update(file_sha256(file).encode())
        return found.hexdigest()
    with safe_open(file, framework="pt") as opened:
        for name in sorted(opened.keys()):
            if not whole or name.startswith(PREFIXES[part]):
                tensor = opened.get_tensor(name)
                found.update(f"{name} {tensor.dtype}".encode())
                found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def load_part(cls: type, part: str, place: Place, configs: Place | None, dtype: torch.dtype) -> nn.Module:
    """A VAE or an image encoder in a file of its own, in diffusers', transformers' or the original layout.

    Raises:
        ConfigError: the file cannot be read, or has other shapes than its config.
    """
    file = place.fetch()
    try:
        tensor_shapes(file)  # its errors name what is wrong with a file
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_config(folder, part, part_config(part, configs))
            if hasattr(cls, "from_single_file"):
                arguments = {"config": name, "subfolder": part, "torch_dtype": dtype, "local_files_only": True}
                network = cls.from_single_file(str(file), **arguments)
            else:
                config = cls.config_class.from_pretrained(folder / part)
                network = load_whole(cls, None, CLIP_REST, config=config, state_dict=load_file(file), dtype=dtype)
        refuse_missing(network)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"{place.key}: {place.value} holds no {cls.__name__} that fits ({reason}).",
            "Name the folder or hub id of one that belongs to SDXL.",
        ) from error
    return network


def part_config(part: str, configs: Place | None) -> dict[str, object]:
    """The config of a VAE or image encoder: that of a local pipeline folder, else of SDXL's shapes."""
    from packshot.base.shapes import VAE, VISION

    if configs is not None and configs.path is not None:
        file = configs.path / part / "config.json"
        if file.is_file():
            return json.loads(file.read_text())
    return {"vae": VAE, "image_encoder": {**VISION, "model_type": "clip_vision_model"}}[part]


def vision_side(place: Place, configs: Place | None) -> int:
    """The side of the pictures that an image encoder reads, px."""
    if not place.is_file and "config.json" in place.names():
        return int(json.loads((place.fetch(["config.json"]) / "config.json").read_text())["image_size"])
    side = part_config("image_encoder", configs)["image_size"]
    assert isinstance(side, int)
    return side


def refuse_missing(network: nn.Module) -> None:
    """Raises ValueError where a file had no values for some of a network's parameters."""
    missing = [name for name, tensor in network.state_dict().items() if tensor.is_meta]
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")


def load_tokenizer(part: str) -> object:
    """CLIP's tokenizer with the padding of SDXL's first or second one."""
    from transformers import CLIPTokenizer

    folder = Path(str(files("packshot"))) / "clip_tokenizer"  # the wheel's copy of the mini family's, which is CLIP's
    if not folder.is_dir():
        folder = CHECKOUT / "data" / "models" / "sdxl" / "tokenizer"
    return CLIPTokenizer.from_pretrained(folder, pad_token=TOKENIZERS[part])
