"""LoRAs of other trainers: files of diffusers, kohya's sd-scripts and LyCORIS, recognised by their keys.

A file is read once into one update for each layer of the base. A tensor that belongs to no layer refuses the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from packshot.base.original_names import block_names, original_name
from packshot.base.places import find_place
from packshot.base.single_file import marked, tensor_shapes
from packshot.errors import ConfigError, first_line
from packshot.lists import ending, map_values
from packshot.runs.folder import log
from packshot.runs.networks import load_peft

if TYPE_CHECKING:
    from packshot.base.load import Parts

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"  # with its adapter_config.json: LoHa and LoKr of our own, which peft loads
NETWORKS = ("unet", "text_encoder", "text_encoder_2")
KOHYA_PREFIXES = {"lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
DOTTED_PREFIXES = {
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "base_model.model.": "unet",
    "diffusion_model.": "unet",
    "": "unet",
}
# The ends of keys, and which factor of an update each holds.
FACTORS = {
    r"lora_A(\.default)?\.weight|lora_down\.weight|lora\.down\.weight|lora_linear_layer\.down\.weight": "down",
    r"lora_B(\.default)?\.weight|lora_up\.weight|lora\.up\.weight|lora_linear_layer\.up\.weight": "up",
    r"lora_mid\.weight": "mid",
    r"alpha": "alpha",
    r"dora_scale|lora_magnitude_vector(\.default)?(\.weight)?": "magnitude",
    r"(hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2|diff)": "",  # named as they are
}
# What the keys of a file for another model have in common.
STRANGERS = {
    "single_transformer_blocks": "Flux",
    "double_blocks": "Flux",
    "single_blocks": "Flux",
    "joint_blocks": "Stable Diffusion 3",
    "lora_te_": "Stable Diffusion 1",
    "transformer.": "a model with a transformer instead of a UNet",
}
Update: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA in a file.

    updates: by network, then by the name of the layer: the factors of its update. metadata: of the file's head.
    """

    path: Path
    updates: dict[str, dict[str, Update]]
    metadata: dict[str, str] = field(default_factory=dict)

    def is_plain(self) -> bool:
        """Whether peft can hold it as an adapter, which can be switched on and off between two steps: every update is
        the product of two matrices, with a length for each output in all of them (DoRA) or in none."""
        magnitudes = set()
        for layers in self.updates.values():
            for update in layers.values():
                magnitude = update.get("magnitude")
                magnitudes.add(magnitude is not None)
                per_output = magnitude is None or magnitude.numel() == len(update.get("up", ()))
                if not per_output or update.keys() - {"down", "up", "alpha", "magnitude"}:
                    return False
        return len(magnitudes) <= 1


# ---- where it lies ----


def find_lora(key: str, value: str) -> Path:
    """The local file of a LoRA, or the folder of one that peft loads.

    value: a file, a folder with one LoRA in it, or either of them on the hub.

    Raises:
        ConfigError: there is none, or there are several.
    """
    place = find_place(key, value)
    if place.is_file:
        return place.fetch()
    names = place.names()
    for name in (DIFFUSERS_FILE, PEFT_FILE):
        if name in names:
            folder = place.fetch(ending(names, ".safetensors", ".json"))
            return folder if name == PEFT_FILE else folder / name
    files = ending(names, ".safetensors")
    if len(files) == 1:
        return place.fetch(files) / files[0]
    raise ConfigError(
        f"{key}={value} has {len(files) or 'no'} .safetensors files{': ' + ', '.join(files[:5]) if files else ''}.",
        "Name the file of the LoRA itself, or the export/ folder that a trainer wrote.",
    )


# ---- reading ----


def read_lora(key: str, path: Path, networks: Mapping[str, nn.Module]) -> LoraFile:
    """The updates in a file, for the layers of these networks.

    networks: by ``unet``, ``text_encoder`` and ``text_encoder_2``.

    Raises:
        ConfigError: the file cannot be read, a value is not finite, or a tensor belongs to no layer; names ``key``.
    """
    try:
        shapes = tensor_shapes(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={path} cannot be read: {error}.", "Copy or fetch it again.") from error
    places: dict[str, tuple[str, str, str]] = {}
    strange = []
    layers = {name: layer_names(name, network) for name, network in networks.items()}
    for tensor_name in shapes:
        found = place_of(tensor_name, layers)
        if found is None:
            strange.append(tensor_name)
        else:
            places[tensor_name] = found
    if strange:
        raise foreign(key, path, strange, len(shapes))
    updates: dict[str, dict[str, Update]] = {}
    with opened_lora(key, path) as opened:
        metadata = dict(opened.metadata() or {})
        for tensor_name, (network, layer, factor) in places.items():
            update = updates.setdefault(network, {}).setdefault(layer, {})
            update[factor] = opened.get_tensor(tensor_name)
            if not torch.isfinite(update[factor]).all():
                raise ConfigError(
                    f"{key}={path}: {tensor_name} has values that are not finite.",
                    "Its training had diverged: use an earlier checkpoint.",
                )
    add_alphas(updates, metadata)
    refuse_misfits(key, path, updates, networks)
    return LoraFile(path, updates, metadata)


def opened_lora(key: str, path: Path) -> safe_open:
    """A LoRA's file, opened. Raises ConfigError: it is a pickle."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:  # its shapes could be read
        raise ConfigError(
            f"{key}={path} is a pickle, and LoRAs are read from .safetensors files.",
            "Convert it once: safetensors.torch.save_file(torch.load(file, weights_only=True), new_file).",
        ) from error


def layer_names(kind: str, network: nn.Module) -> dict[str, str]:
    """Every name that a file may give a layer of a network, with its own name."""
    published = block_names(getattr(network, "config")) if kind == "unet" else {}  # noqa: B009 (its type is not known)
    names: dict[str, str] = {}
    for name, module in network.named_modules():
        if getattr(module, "weight", None) is None or module.weight.ndim not in (2, 4):
            continue
        own = name.removesuffix(".base_layer")
        spellings = [own]
        if kind == "unet":
            spellings.append(original_name(own, published))
        else:  # transformers 5 dropped a prefix of one of them, and files have it for both
            spellings.append(f"text_model.{own.removeprefix('text_model.')}")
        for spelling in spellings:
            names[spelling] = own
            names[spelling.replace(".", "_")] = own
    return names


def place_of(tensor_name: str, layers: Mapping[str, Mapping[str, str]]) -> tuple[str, str, str] | None:
    """(network, layer, factor) of a tensor; None if it belongs to no layer."""
    # the names of diffusers' first LoRAs
    plain = re.sub(r"\.processor\.to_(\w+)_lora\.(down|up)\.weight$", r".to_\1.lora.\2.weight", tensor_name)
    plain = re.sub(r"\.to_out\.lora\.", ".to_out.0.lora.", plain)
    for pattern, name in FACTORS.items():
        found = re.fullmatch(rf"(.+?)\.({pattern})", plain)
        if found is None:
            continue
        factor = name or found[2]
        for prefix, network in {**KOHYA_PREFIXES, **DOTTED_PREFIXES}.items():
            known = layers.get(network, {})
            if found[1].startswith(prefix) and found[1].removeprefix(prefix) in known:
                return network, known[found[1].removeprefix(prefix)], factor
    return None


def add_alphas(updates: Mapping[str, Mapping[str, Update]], metadata: Mapping[str, str]) -> None:
    """Add the alphas that diffusers writes into a file's head, where the updates have none of their own."""
    written = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    for network, layers in updates.items():
        alpha = written.get(f"{network}.lora_alpha")
        if alpha is None:
            continue
        patterns = written.get(f"{network}.alpha_pattern") or {}
        for layer, update in layers.items():
            own = float(patterns.get(layer, alpha))
            if written.get(f"{network}.use_rslora"):  # alpha/sqrt(rank) written as alpha/rank
                own *= len(update["down"]) ** 0.5
            update.setdefault("alpha", torch.tensor(own))


def foreign(key: str, path: Path, strange: Sequence[str], total: int) -> ConfigError:
    """The error for tensors that belong to no layer of the base."""
    model = marked(strange, STRANGERS)
    guess = (
        f"It seems to be for {model}." if model else "It was made for another model, or for a kind of layer not known."
    )
    listed = ", ".join(strange[:3])
    return ConfigError(
        f"{key}={path}: {len(strange)} of {total} tensors belong to no layer of this base, such as {listed}.", guess
    )


def refuse_misfits(
    key: str, path: Path, updates: Mapping[str, Mapping[str, Update]], networks: Mapping[str, nn.Module]
) -> None:
    """Raises ConfigError for an update that lacks a factor, or whose layer has another shape."""
    for network, layers in updates.items():
        for layer, update in layers.items():
            shape = layer_weight(networks[network], layer).shape
            try:
                made = difference(map_values(lambda factor: factor.to("meta"), update), shape)
            except (KeyError, RuntimeError, ValueError, IndexError) as error:
                raise ConfigError(
                    f"{key}={path}: the update of {network}.{layer} does not fit its weight of shape {tuple(shape)} "
                    f"({first_line(error)}).",
                    "It was made for a model of another size, or the file is not whole.",
                ) from error
            assert made.shape == shape


# ---- using ----


def layer_weight(network: nn.Module, layer: str) -> Tensor:
    """The weight of a layer, also where peft has wrapped it."""
    module = network.get_submodule(layer)
    weight = getattr(module, "base_layer", module).weight
    assert isinstance(weight, Tensor)
    return weight


def difference(update: Update, shape: torch.Size) -> Tensor:
    """What an update adds to a weight of this shape, at full strength and without the magnitudes of a DoRA."""
    if "diff" in update:
        return update["diff"].reshape(shape)
    if "up" in update:
        return low_rank(update).reshape(shape)
    if "hada_w1_a" in update:
        return hadamard(update).reshape(shape)
    return kronecker(update).reshape(shape)


def scale_of(update: Update, rank: int) -> Tensor | float:
    """alpha/rank; 1 without an alpha."""
    return update["alpha"].float() / rank if "alpha" in update else 1.0


def low_rank(update: Update) -> Tensor:
    """up·down, or up·mid·down for convolutions in three steps (LoCon)."""
    down = update["down"].float()
    up = update["up"].float()
    rank = down.shape[0]
    if "mid" in update:
        made = torch.einsum("oi,ijkl,jc->ockl", up.flatten(1), update["mid"].float(), down.flatten(1))
    else:
        made = up.flatten(1) @ down.flatten(1)
    return made * scale_of(update, rank)


def hadamard(update: Update) -> Tensor:
    """Element-wise product of two low-rank matrices (LoHa; Hyeon-Woo et al. 2021, arXiv 2108.06098)."""
    halves = []
    for number in ("1", "2"):
        left = update[f"hada_w{number}_a"].float()
        right = update[f"hada_w{number}_b"].float()
        core = update.get(f"hada_t{number}")
        halves.append(left @ right if core is None else tucker(core.float(), left, right))
    return halves[0] * halves[1] * scale_of(update, update["hada_w1_b"].shape[0])


def kronecker(update: Update) -> Tensor:
    """Kronecker product of two matrices, each whole or of low rank (LoKr; Yeh et al. 2023, arXiv 2309.14859)."""
    scale: Tensor | float = 1.0
    factors = []
    for number in ("1", "2"):
        whole = update.get(f"lokr_w{number}")
        if whole is None:
            left = update[f"lokr_w{number}_a"].float()
            right = update[f"lokr_w{number}_b"].float()
            scale = scale_of(update, right.shape[0])
            core = update.get("lokr_t2") if number == "2" else None
            whole = left @ right if core is None else tucker(core.float(), left, right)
        factors.append(whole.float())
    first, second = factors
    if second.ndim == 4 and first.ndim == 2:
        first = first[:, :, None, None]
    return torch.kron(first, second) * scale


def tucker(core_ijkl: Tensor, left_ip: Tensor, right_jr: Tensor) -> Tensor:
    """A convolution's weight (p, r, k, l) from its core and two matrices."""
    return torch.einsum("ijkl,ip,jr->prkl", core_ijkl, left_ip, right_jr)


def merged_weight(weight: Tensor, update: Update, strength: float) -> Tensor:
    """The weight with an update added, in its own dtype; ``strength`` 1 is what the file asks for."""
    before = weight.float()
    moved = map_values(lambda factor: factor.to(weight.device), update)
    after = before + difference(moved, weight.shape)
    magnitude = moved.get("magnitude")
    if magnitude is not None:  # DoRA (Liu et al. 2024, arXiv 2402.09353): directions and lengths apart
        per_input = magnitude.ndim > 1 and magnitude.shape[0] == 1 and weight.shape[0] != 1
        dims = np.delete(range(weight.ndim), 1 if per_input else 0).tolist()
        lengths = after.norm(dim=dims, keepdim=True)
        after = after * (magnitude.float().reshape(lengths.shape) / lengths)
    return (before + strength * (after - before)).to(weight.dtype)


@torch.no_grad()
def merge_lora(lora: LoraFile, networks: Mapping[str, nn.Module], strength: float) -> None:
    """Add a LoRA to the weights of its networks."""
    for name, layers in lora.updates.items():
        for layer, update in layers.items():
            weight = layer_weight(networks[name], layer)
            weight.data = merged_weight(weight.data, update, strength)


def peft_tensors(lora: LoraFile) -> dict[str, Tensor]:
    """A plain LoRA in the names that diffusers' loader reads, with alpha/rank multiplied into ``lora_B``."""
    tensors = {}
    for network, layers in lora.updates.items():
        for layer, update in layers.items():
            if network == "text_encoder":  # the loader expects the prefix that transformers 5 dropped
                layer = f"text_model.{layer.removeprefix('text_model.')}"
            tensors[f"{network}.{layer}.lora_A.weight"] = update["down"]
            tensors[f"{network}.{layer}.lora_B.weight"] = update["up"] * scale_of(update, len(update["down"]))
            if "magnitude" in update:
                tensors[f"{network}.{layer}.lora_magnitude_vector"] = update["magnitude"].flatten()
    return tensors


def merge_loras(parts: Parts, values: Sequence[str], scales: Sequence[float]) -> None:
    """Merge ``model.loras`` into a base.

    Text encoders are loaded only if a file adapts them.

    Raises:
        ConfigError: one cannot be read or does not fit.
    """
    for value, scale in zip(values, scales, strict=True):
        path = find_lora("model.loras", value)
        if path.is_dir():
            merge_peft(parts.unet, path, scale)
            continue
        networks: dict[str, nn.Module] = {"unet": parts.unet}
        if adapts_text(path):
            networks |= {"text_encoder": parts.text_encoder, "text_encoder_2": parts.text_encoder_2}
        lora = read_lora("model.loras", path, networks)
        merge_lora(lora, networks, scale)
        parts.changed(*lora.updates)  # cached embeddings must not outlive the text encoders that made them
        layers = sum(map(len, lora.updates.values()))
        log.info("merged %s into the base: %d layers, weight %g", path.name, layers, scale)


def adapts_text(path: Path) -> bool:
    """Whether a file has tensors for a text encoder. A file that cannot be read is refused later, with its reason."""
    try:
        names = tensor_shapes(path)
    except (OSError, ValueError):
        return False
    return any(name.startswith(("lora_te", "text_encoder")) for name in names)


def merge_peft(unet: nn.Module, folder: Path, scale: float) -> None:
    """Add an adapter of peft's to the UNet's own weights, ``scale`` times; the UNet stays a plain one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = load_peft(unet, folder, str(unet.device))
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_scale("default", scale)  # type: ignore[operator]
    adapted.merge_and_unload()  # type: ignore[operator]
