"""What inference has to repeat of an adapter's training, as ``packshot.json`` in its export folder says it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packshot.base.controlnets import USAGE
from packshot.config.schema import PredictionType, ProductShown, Unconditional
from packshot.errors import ConfigError
from packshot.runs.folder import log


@dataclass(frozen=True)
class Usage:
    """Where a file says nothing of it: the product was noised, and the rest was as the base has it.

    product_shown, unconditional: names of ``ProductShown`` and ``Unconditional``. prediction_type: epsilon or
    v_prediction, None for the base's own. zero_terminal_snr: whether the noise schedule was rescaled to end in noise.
    """

    product_shown: str = ProductShown.noised.name
    prediction_type: str | None = None
    zero_terminal_snr: bool = False
    unconditional: str = Unconditional.zeros.name


def read_usage(key: str, folder: Path) -> Usage | None:
    """What an export folder says; None where it has no such file, as those of other trainers.

    Raises:
        ConfigError: the file is broken, or names a way that does not exist.
    """
    file = folder / USAGE
    try:
        said = json.loads(file.read_text())
        given = said.get("prediction_type")
        return Usage(
            ProductShown[said.get("product_shown", Usage.product_shown)].name,
            given and PredictionType[given].name,
            bool(said.get("zero_terminal_snr", False)),
            Unconditional[said.get("unconditional", Usage.unconditional)].name,
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        known = "|".join(member.name for member in ProductShown)
        raise ConfigError(
            f"{key}: {file} does not say how the product is shown and the noise predicted ({error}).",
            f'Write "product_shown": "{known}" into it, as the adapter was trained.',
        ) from error


def common_usage(folders: Mapping[str, Sequence[Path]]) -> Usage:
    """What all adapters need. Of the ways to show the product ``channels`` comes before ``clean``, and that before
    ``noised``, which any network can be shown.

    folders: of export folders, by their kind.

    Raises:
        ConfigError: a file is broken, or two adapters cannot be used together.
    """
    each = {folder: read_usage(f"adapters.{kind}", folder) for kind, paths in folders.items() for folder in paths}
    known = {folder: usage for folder, usage in each.items() if usage}
    shown = {folder: (usage or Usage()).product_shown for folder, usage in each.items()}
    ways = (ProductShown.channels.name, ProductShown.clean.name, ProductShown.noised.name)
    taken = next((way for way in ways if way in shown.values()), ProductShown.noised.name)
    if len(set(shown.values())) > 1:
        listed = ", ".join(f"{folder}: {way}" for folder, way in shown.items())
        log.warning("the adapters were trained to see the product differently (%s); it is shown %s", listed, taken)
    for name in ("prediction_type", "zero_terminal_snr", "unconditional"):
        said = {folder: getattr(usage, name) for folder, usage in known.items()}
        if len(set(said.values())) > 1:
            listed = ", ".join(f"{folder}: {value}" for folder, value in said.items())
            raise ConfigError(
                f"adapters: objective.{name} differed in their training ({listed}).",
                "Use those that were trained alike.",
            )
    first = next(iter(known.values()), Usage())
    return Usage(taken, first.prediction_type, first.zero_terminal_snr, first.unconditional)
