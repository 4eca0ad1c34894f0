"""A user's words for a scene, as what the renderer can build. Runs in the main environment."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from packshot.core.errors import ConfigError
from packshot.render.sample import suits
from packshot.scene.scores import token_f1
from packshot.scene.vocabulary import (
    BACKGROUNDS,
    LIGHTING,
    MOODS,
    ON,
    PODIUMS,
    STYLES,
    SURFACES,
    SURROUNDINGS,
    TABLES,
    split_position,
)

_KNOWN: dict[str, Sequence[str]] = {
    "surface": SURFACES,
    "surroundings": SURROUNDINGS,
    "background": BACKGROUNDS,
    "lighting": LIGHTING,
    "mood": MOODS,
    "style": STYLES,
}


def _knows(slot: str, phrase: str) -> bool:
    if slot == "surroundings":
        phrase = split_position(phrase)[0]
    top, _, table = phrase.partition(ON)
    return phrase in _KNOWN[slot] or (slot == "surface" and top in PODIUMS and table in TABLES)


def _nearest(slot: str, phrase: str) -> str:
    """The known phrase that shares most words, then most letters."""
    thing, position = split_position(phrase) if slot == "surroundings" else (phrase, None)

    def likeness(known: str) -> tuple[float, float]:
        return token_f1(thing, known), difflib.SequenceMatcher(None, thing, known).ratio()

    return " ".join(filter(None, (max(_KNOWN[slot], key=likeness), position)))


def renderable(slots: dict[str, Any], nearest: bool = False) -> dict[str, Any]:
    """Slots of a Scene (empty ones are left out) as what the renderer can build.

    nearest: replace a phrase that it does not know by the most similar one.

    Raises:
        ConfigError: an unknown phrase, with what the slot knows; or a light that the background cannot show.
    """
    found: dict[str, Any] = {}
    for slot, value in slots.items():
        phrases = [value] if isinstance(value, str) else list(value or ())
        for phrase in phrases:
            if not nearest and not _knows(slot, phrase):
                raise ConfigError(
                    f"render.scene.{slot}={phrase!r} is nothing the renderer can build.",
                    f"It knows: {'; '.join(_KNOWN[slot])}. Nearest: {_nearest(slot, phrase)!r}; "
                    "render.nearest=true takes the nearest one.",
                )
        built = [phrase if _knows(slot, phrase) else _nearest(slot, phrase) for phrase in phrases]
        if built:
            found[slot] = built[0] if isinstance(value, str) else built
    if "background" in found and "lighting" in found and not suits(found["background"], found["lighting"]):
        fitting = [light for light in LIGHTING if suits(found["background"], light)]
        raise ConfigError(
            f"render.scene.lighting={found['lighting']!r} cannot be seen before {found['background']!r}.",
            f"What can: {'; '.join(fitting)}.",
        )
    return found
