"""Config keys that have another name today: the one table from which refusals and translations derive.

A renamed key is refused on the command line and in YAML files, with its new name. The config that a run folder keeps in
its checkpoints is translated instead, because nobody can edit it: a resumed run compares it with today's keys.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from packshot.config.schema import ObjectiveConfig
from packshot.errors import ConfigError


@dataclass(frozen=True)
class Renamed:
    """One key that was renamed, in every script that has the new key.

    value: the new value, from the group that held the old key in a finished config; None: the old value stays.
    hint: what to write instead, where that is more than the new key with the old value.
    """

    old: str
    new: str
    value: Callable[[dict[str, Any]], Any] | None = None
    hint: str = ""


def loss_weighting(objective: dict[str, Any]) -> str:
    """``objective.loss_weighting`` from the two keys that it replaces."""
    if objective.get("snr_gamma") is not None:
        return "min_snr"
    return "debiased" if objective["debiased"] else "none"


def min_snr_gamma(objective: dict[str, Any]) -> float:
    """``objective.min_snr_gamma`` from ``objective.snr_gamma``, whose null switched the weighting off."""
    return objective["snr_gamma"] or ObjectiveConfig.min_snr_gamma


def mask_model(matte: dict[str, Any]) -> str:
    """``matte.model`` from the two keys that it replaces; without either GrabCut worked alone."""
    return matte.get("onnx") or ("mini" if matte.get("network") else "grabcut")


RENAMED = (
    Renamed(
        "objective.debiased", "objective.loss_weighting", loss_weighting, "Write objective.loss_weighting=debiased."
    ),
    Renamed(
        "objective.snr_gamma",
        "objective.min_snr_gamma",
        min_snr_gamma,
        "Write objective.loss_weighting=min_snr, and objective.min_snr_gamma=<value> if it is not 5.",
    ),
    Renamed("objective.product_shown", "objective.product_conditioning"),
    Renamed("matte.onnx", "matte.model", mask_model, "Write matte.model=<file.onnx>."),
    Renamed("matte.network", "matte.model", mask_model, "Write matte.model=mini."),
    Renamed("method.lent_share", "method.peer_reference_prob"),
    Renamed("method.beside", "method.extra_controlnets"),
    Renamed("method.joint", "method.train_extras"),
)


# Keys that took one text in older versions and take a list today.
NOW_LISTS = ("data.train",)


def refuse_renamed(key: str, keys: Collection[str], value: str = "") -> None:
    """Raises ConfigError when ``key`` is the old name of one of ``keys``, the keys of a script.

    value: what the user gave it, for the way out.
    """
    for row in RENAMED:
        if row.old == key and row.new in keys:
            instead = row.hint or f"Write {row.new}={value or '<value>'}."
            raise ConfigError(f"{key} is now called {row.new}.", instead)


def translate(config: dict[str, Any]) -> dict[str, Any]:
    """A finished config of an older version, as nested plain containers, with today's keys."""
    translated = copy.deepcopy(config)
    for row in RENAMED:
        group_name, _, name = row.old.rpartition(".")
        new_group_name, _, new_name = row.new.rpartition(".")
        group = _group(config, group_name)
        new_group = _group(translated, new_group_name)
        if name in group:
            if new_name not in new_group:
                new_group[new_name] = row.value(group) if row.value else group[name]
            del _group(translated, group_name)[name]
    for key in NOW_LISTS:
        group_name, _, name = key.rpartition(".")
        group = _group(translated, group_name)
        if isinstance(group.get(name), str):
            group[name] = [group[name]]
    return translated


def _group(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The dict of a dotted group; empty where the config has no such group."""
    for part in name.split(".") if name else ():
        config = config.get(part, {})
    return config
