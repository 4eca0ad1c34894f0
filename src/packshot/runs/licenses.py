"""The commercial profile: which licences allow commercial use, and the refusal of weights and rows without one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from packshot.config.common import LicenseConfig
from packshot.config.conditions import split_condition
from packshot.config.mask_models import MASK_MODELS
from packshot.errors import ConfigError, first_line
from packshot.runs.files import resolve
from packshot.runs.folder import log

# Names as SPDX and the hub write them. Left out: anything "nc" (no commerce) or "nd" (no derivatives, and a product put
# into a scene is a derivative), "research", "other", and licences that exclude some users, such as llama3.2.
COMMERCIAL = re.compile(
    r"cc0-1\.0|cc0|pddl-1\.0|pddl|public[- ]domain|unlicense|0bsd|cc-by(-sa)?-\d\.\d|mit|mit-0|isc|zlib|"
    r"apache-2\.0|bsd(-[234]-clause)?|mpl-2\.0|(creativeml-|bigscience-)?openrail(\+\+|-m)?"
)
# Every key that can name weights, in any script. The keys of the base depend on the script; see named_weights.
WEIGHT_KEYS = (
    "matte.model", "depth.onnx", "captioner.adapter", "model.loras", "method.init", "method.extra_controlnets",
    "adapters.lora", "adapters.loras", "adapters.controlnets", "adapters.ip_adapter",
    "curation.encoder",
)  # fmt: skip


class Licensed(Protocol):
    """A script's config, of which ``licenses`` and every key that names weights are read here."""

    licenses: LicenseConfig


def allows(licenses: LicenseConfig, name: str | None) -> bool:
    """Whether the profile accepts something under this licence; None: the licence is not known."""
    known = (name or "").strip().lower()
    if not licenses.commercial or (known and known in {other.strip().lower() for other in licenses.allowed}):
        return True
    return bool(COMMERCIAL.fullmatch(known))


def refuse_weights(config: Licensed) -> None:
    """Raises ConfigError for the first weights in a config whose licence the profile does not accept."""
    if config.licenses.commercial:
        for key, source in named_weights(config):
            refuse_source(config.licenses, key, source)


def refuse_source(licenses: LicenseConfig, key: str, source: str) -> None:
    """Raises ConfigError where the profile does not accept the licence of the weights that ``key`` names."""
    if not licenses.commercial or source in licenses.allowed:
        return
    for name in weights_licenses(source) or [None]:
        if allows(licenses, name):
            continue
        problem = f"is under {name!r}, which is not known to allow commercial use" if name else "names no licence"
        raise ConfigError(
            f"{key}={source} {problem} (licenses.commercial=true).",
            f"If you know that it does: 'licenses.allowed=[\"{name or source}\"]'. Otherwise name other weights.",
        )


def refuse_rows(licenses: LicenseConfig, key: str, path: str, names: Iterable[str]) -> None:
    """Raises ConfigError when a dataset has rows under a licence that the profile does not accept."""
    bad = sorted(name for name in names if not allows(licenses, name))
    if bad:
        raise ConfigError(
            f"{key}={path} has rows under {', '.join(map(repr, bad))}, which is not known to allow commercial use "
            "(licenses.commercial=true).",
            "build_data.py licenses.commercial=true leaves such rows out; 'licenses.allowed=[...]' accepts more.",
        )


def weights_licenses(source: str) -> list[str]:
    """The licences of weights: of what an export was made from, or those in the model card; [] if there is neither.

    source: folder or file, the name of a public mask network, or a hub id, whose card is fetched.
    """
    public = MASK_MODELS.get(source)
    if public and public.license:
        return [public.license]
    path = resolve(source)
    if not path.exists():
        return licenses_of_card("/".join(source.partition("@")[0].split("/")[:2]))  # the card is the repository's
    if path.suffix == ".onnx" and (own := license_of_onnx(path)):
        return [own]
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent):  # the card of a part of a model, or of one of several ControlNets, is above
        if (place / "data.json").is_file():
            return licenses_of_export(place / "data.json")
        if (place / "README.md").is_file():
            return licenses_of_card(place / "README.md")
    return []


def license_of_onnx(file: Path) -> str | None:
    """The licence that an ONNX file's metadata names; None without one, or where the file is no ONNX model."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime has no common base for its errors; whoever needs the model refuses it
        return None
    return session.get_modelmeta().custom_metadata_map.get("license")


def licenses_of_export(file: Path) -> list[str]:
    """The licences in an export's ``data.json``: of its data, and of the weights that its training began with."""
    try:
        data = json.loads(file.read_text())
        return [*data["licenses"], *data.get("weights_licenses", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s names no licences (%s)", file, error)
        return []


def licenses_of_weights(config: object) -> list[str]:
    """The licences of the local weights that a training starts from: its export is made from them too.

    Weights on the hub are left out. Their cards are fetched when the commercial profile asks for them.
    """
    names: set[str] = set()
    for _, source in named_weights(config):
        if resolve(source).exists():
            names.update(weights_licenses(source) or ["unknown"])
    return sorted(names)


def licenses_of_card(source: str | Path) -> list[str]:
    """``license`` in a model card's head, or ``license_name`` where that is "other". source: a file or hub id."""
    from huggingface_hub import ModelCard

    try:
        head = ModelCard.load(source, ignore_metadata_errors=True).data
    except Exception as error:  # the hub's many errors: no card, no network, no access
        log.warning("the model card of %s cannot be read (%s)", source, first_line(error))
        return []
    name = head.get("license_name", "other") if head.get("license") == "other" else head.get("license")
    return [name] if isinstance(name, str) else list(name or [])


def named_weights(config: object) -> Iterator[tuple[str, str]]:
    """(key, source) of all weights that a config names."""
    captioner = getattr(config, "captioner", None)
    base_keys = ["model.base", "model.vae", "model.image_encoder"]
    if captioner is not None:  # the script draws no pictures
        base_keys = [f"model.{captioner.kind.name}"]
    for key in (*base_keys, *WEIGHT_KEYS):
        value = config
        for name in key.split("."):
            value = getattr(value, name, None)
        for source in value if isinstance(value, list) else [value]:
            named = MASK_MODELS.get(str(source))
            weights = named.weights if named and not named.public else source
            if weights:
                yield key, split_condition(str(weights))[1]
