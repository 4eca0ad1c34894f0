"""``packshot.json`` in an export folder: the settings of an adapter's training that inference has to repeat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any

from packshot.config.schema import ObjectiveConfig, PredictionType, ProductConditioning, Unconditional
from packshot.errors import ConfigError
from packshot.lists import in_words, map_values, without_none
from packshot.runs.folder import log

METADATA_FILE = "packshot.json"
NO_METADATA: Mapping[str, object] = MappingProxyType({})
RENAMED = {"product_shown": "product_conditioning"}  # names in exports of earlier versions


@dataclass(frozen=True)
class AdapterMetadata:
    """The defaults hold where a file has no entry: the product was noised, and the rest was as the base has it.

    product_conditioning, unconditional: names of ``ProductConditioning`` and ``Unconditional``. prediction_type:
    epsilon or v_prediction, None for the base's own. zero_terminal_snr: whether the noise schedule was rescaled to end
    in pure noise. prompt_chunks: how many chunks of 75 tokens each caption filled.
    """

    product_conditioning: str = ProductConditioning.noised.name
    prediction_type: str | None = None
    zero_terminal_snr: bool = False
    unconditional: str = Unconditional.zeros.name
    prompt_chunks: int = 1


def objective_metadata(objective: ObjectiveConfig) -> dict[str, str | bool | int]:
    """The entries of ``packshot.json`` that follow from the objective; entries that equal the base are left out."""
    entries: dict[str, str | bool | int] = {"product_conditioning": objective.product_conditioning.name}
    if objective.prediction_type is not PredictionType.base:
        entries["prediction_type"] = objective.prediction_type.name
    if objective.zero_terminal_snr:
        entries["zero_terminal_snr"] = True
    if objective.unconditional is not Unconditional.zeros:
        entries["unconditional"] = objective.unconditional.name
    if objective.prompt_chunks > 1:
        entries["prompt_chunks"] = objective.prompt_chunks
    return entries


def write_metadata(folder: Path, entries: Mapping[str, object]) -> None:
    """Write ``packshot.json``; without entries there is no file."""
    if entries:
        (folder / METADATA_FILE).write_text(json.dumps(dict(entries), indent=2) + "\n")


def read_entries(folder: Path) -> dict[str, Any]:
    """The entries of an export's ``packshot.json`` under their present names.

    Raises:
        FileNotFoundError, OSError, ValueError: there is no file, or it cannot be read as a JSON object.
    """
    entries = json.loads((folder / METADATA_FILE).read_text())
    if not isinstance(entries, dict):
        raise ValueError("it holds no JSON object")
    for old in RENAMED.keys() & entries.keys():
        entries[RENAMED[old]] = entries.pop(old)
    return entries


def read_metadata(key: str, folder: Path) -> AdapterMetadata | None:
    """The metadata of an export folder; None where it has no such file, as in folders of other trainers.

    Raises:
        ConfigError: the file is broken, or has an unknown value; names ``key``.
    """
    try:
        entries = read_entries(folder)
        conditioning = entries.get("product_conditioning", AdapterMetadata.product_conditioning)
        prediction_type = entries.get("prediction_type")
        unconditional = entries.get("unconditional", AdapterMetadata.unconditional)
        return AdapterMetadata(
            ProductConditioning[conditioning].name,
            PredictionType[prediction_type].name if prediction_type else None,
            bool(entries.get("zero_terminal_snr", False)),
            Unconditional[unconditional].name,
            int(entries.get("prompt_chunks", 1)),
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        known = "|".join(ProductConditioning.__members__)
        raise ConfigError(
            f"{key}: {folder / METADATA_FILE} does not name how the adapter was trained ({error}).",
            f'Write "product_conditioning": "{known}" into it, as the adapter was trained.',
        ) from error


def common_metadata(folders: Mapping[str, Sequence[Path]]) -> AdapterMetadata:
    """The metadata that suits all adapters of a pipeline.

    Where they differ in the product's conditioning, ``channels`` wins over ``clean``, and that over ``noised``, which
    any network can read.

    folders: export folders by their kind, which is also the key below ``adapters``.

    Raises:
        ConfigError: a file is broken, or two adapters cannot be used together.
    """
    found: dict[Path, AdapterMetadata | None] = {}
    for kind, paths in folders.items():
        for folder in paths:
            found[folder] = read_metadata(f"adapters.{kind}", folder)
    conditioning = _common_conditioning(found)
    known = without_none(found)
    for name in ("prediction_type", "zero_terminal_snr", "unconditional"):
        values = map_values(attrgetter(name), known)
        if len(set(values.values())) > 1:
            raise ConfigError(
                f"adapters: objective.{name} differed in their training ({in_words(values, '{}: {}')}).",
                "Use adapters that were trained with the same value.",
            )
    first = next(iter(known.values()), AdapterMetadata())
    chunks = max(map(attrgetter("prompt_chunks"), known.values()), default=1)
    return AdapterMetadata(conditioning, first.prediction_type, first.zero_terminal_snr, first.unconditional, chunks)


def _common_conditioning(found: Mapping[Path, AdapterMetadata | None]) -> str:
    """The conditioning that is used for all adapters; a difference is logged."""
    given = map_values(lambda metadata: (metadata or AdapterMetadata()).product_conditioning, found)
    order = list(ProductConditioning.__members__)  # each one asks for more than those before it
    chosen = max(given.values(), key=order.index, default=ProductConditioning.noised.name)
    if len(set(given.values())) > 1:
        log.warning(
            "the adapters were trained with different objective.product_conditioning (%s); %s is used",
            in_words(given, "{}: {}"), chosen,
        )  # fmt: skip
    return chosen
