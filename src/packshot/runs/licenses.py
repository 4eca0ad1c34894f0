"""The commercial profile: which licences allow it, and weights that are refused because theirs does not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from packshot.config.schema import LicenseConfig
from packshot.errors import ConfigError
from packshot.runs.files import resolve
from packshot.runs.folder import log

# Names as SPDX and the hub write them. Not here: anything "nc" (no commerce) or "nd" (no derivatives, which a picture
# put into a scene is), "research", "other", and licences with conditions on who may use them, such as llama3.2.
_COMMERCIAL = re.compile(
    r"cc0-1\.0|cc0|pddl-1\.0|pddl|public[- ]domain|unlicense|0bsd|cc-by(-sa)?-\d\.\d|mit|mit-0|isc|zlib|"
    r"apache-2\.0|bsd(-[234]-clause)?|mpl-2\.0|(creativeml-|bigscience-)?openrail(\+\+|-m)?"
)
# Every key that can name weights, whatever the script; those of the base follow from what the script draws with.
_WEIGHTS = (
    "matte.onnx", "matte.network", "depth.onnx", "captioner.adapter", "method.init", "method.extra_controlnets",
    "adapters.lora", "adapters.controlnets", "adapters.ip_adapter",
)  # fmt: skip


def allows(licenses: LicenseConfig, name: str | None) -> bool:
    """Whether the profile lets something of this licence in; None: of no known licence."""
    known = (name or "").strip().lower()
    if not licenses.commercial or (known and known in {other.strip().lower() for other in licenses.allowed}):
        return True
    return bool(_COMMERCIAL.fullmatch(known))


def refuse_weights(config: Any) -> None:
    """Raises ConfigError for the first weights that a config names and whose licence the profile does not let in."""
    licenses: LicenseConfig = config.licenses
    if not licenses.commercial:
        return
    for key, source in _named(config):
        if source in licenses.allowed:
            continue
        refused = [name for name in weights_licenses(source) or [None] if not allows(licenses, name)]
        if refused:
            bad = refused[0]
            what = f"is under {bad!r}, which is not known to allow commercial use" if bad else "names no licence"
            raise ConfigError(
                f"{key}={source} {what} (licenses.commercial=true).",
                f"If you know that it allows it: 'licenses.allowed=[\"{bad or source}\"]'. Else name other weights.",
            )


def refuse_rows(licenses: LicenseConfig, key: str, path: str, names: Iterable[str]) -> None:
    """Raises ConfigError when a dataset has rows of a licence that the profile does not let in."""
    bad = sorted(name for name in names if not allows(licenses, name))
    if bad:
        raise ConfigError(
            f"{key}={path} has rows under {', '.join(map(repr, bad))}, not known to allow commercial use "
            "(licenses.commercial=true).",
            "build_data.py licenses.commercial=true leaves such rows out; 'licenses.allowed=[...]' names further ones.",
        )


def weights_licenses(source: str) -> list[str]:
    """What weights say of themselves: what an export was made from, or the model card beside them; [] if nothing.

    source: folder or file, or a hub id, whose card is fetched.
    """
    from huggingface_hub import ModelCard

    path = resolve(source)
    if not path.exists():
        return _declared(ModelCard, source)
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent):  # a part of a model, or one of several ControlNets, has its card above it
        if (place / "data.json").is_file():
            return _trained_from(place / "data.json")
        if (place / "README.md").is_file():
            return _declared(ModelCard, place / "README.md")
    return []


def _trained_from(file: Path) -> list[str]:
    try:
        data = json.loads(file.read_text())
        return [*data["licenses"], *data.get("weights_licenses", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s says no licences (%s)", file, error)
        return []


def licenses_of_weights(config: Any) -> list[str]:
    """What the weights say that a training starts from: its export is made from them too. Of local ones: cards on the
    hub are asked for when it matters."""
    sources = (source for _, source in _named(config) if resolve(source).exists())
    return sorted({name for source in sources for name in weights_licenses(source) or ["unknown"]})


def _declared(cards: Any, source: str | Path) -> list[str]:
    """``license`` of a model card's head; for "other" its ``license_name``."""
    try:
        head = cards.load(source, ignore_metadata_errors=True).data
    except Exception as error:  # the hub's many errors: no card, no network, no access
        log.warning("the model card of %s cannot be read (%s)", source, str(error).strip().splitlines()[0])
        return []
    name = head.get("license_name", "other") if head.get("license") == "other" else head.get("license")
    return [name] if isinstance(name, str) else list(name or [])


def _named(config: Any) -> Iterator[tuple[str, str]]:
    """(key, source) of all weights that a config names."""
    captioner = getattr(config, "captioner", None)
    parts = ("base", "vae", "image_encoder") if captioner is None else (captioner.kind.name,)
    for key in (*(f"model.{part}" for part in parts), *_WEIGHTS):
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name, None)
        for source in value if isinstance(value, list) else [value]:
            if source:
                yield key, source
