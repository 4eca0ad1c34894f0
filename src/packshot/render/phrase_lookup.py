"""A user's words for a scene, as what the renderer can build. Runs in the main environment."""

from __future__ import annotations

import difflib

from packshot.errors import ConfigError
from packshot.render.frame import Words
from packshot.render.sample import suits
from packshot.scene import SLOTS
from packshot.scene.scores import token_f1
from packshot.scene.vocabulary import (
    BACKGROUNDS,
    LIGHTING,
    ON,
    PODIUMS,
    POSITIONS,
    SURFACES,
    TABLES,
    split_position,
)


def _hint(slot: str) -> str:
    """What the slot takes in addition to its vocabulary."""
    if SLOTS[slot].placed:
        return f" (with {', '.join(map(repr, POSITIONS))} after it, or without)"
    return "; any podium which is on any table" if SLOTS[slot].vocabulary is SURFACES else ""


def _knows(slot: str, phrase: str) -> bool:
    if SLOTS[slot].placed:
        phrase = split_position(phrase)[0]
    top, _, table = phrase.partition(ON)
    return phrase in SLOTS[slot].vocabulary or (
        SLOTS[slot].vocabulary is SURFACES and top in PODIUMS and table in TABLES
    )


def _nearest(slot: str, phrase: str) -> str:
    """The known phrase that shares most words, then most letters."""
    thing, position = split_position(phrase) if SLOTS[slot].placed else (phrase, None)

    def likeness(known: str) -> tuple[float, float]:
        return token_f1(thing, known), difflib.SequenceMatcher(None, thing, known).ratio()

    return " ".join(filter(None, (max(SLOTS[slot].vocabulary, key=likeness), position)))


def renderable(slots: Words, nearest: bool = False) -> Words:
    """Slots of a Scene (empty ones are left out) as what the renderer can build.

    nearest: replace a phrase that it does not know by the most similar one.

    Raises:
        ConfigError: an unknown phrase, with what the slot knows; or a light that the background cannot show.
    """
    found: Words = {}
    for slot, value in slots.items():
        if not value:
            continue
        phrases = [value] if isinstance(value, str) else list(value)
        for phrase in phrases:
            if not nearest and not _knows(slot, phrase):
                raise ConfigError(
                    f"render.scene.{slot}={phrase!r} is nothing the renderer can build.",
                    f"It knows: {'; '.join(SLOTS[slot].vocabulary)}{_hint(slot)}. Nearest: {_nearest(slot, phrase)!r}; "
                    "render.nearest=true takes the nearest one.",
                )
        built = [phrase if _knows(slot, phrase) else _nearest(slot, phrase) for phrase in phrases]
        found[slot] = built[0] if isinstance(value, str) else built
    _check_light(found)
    return found


def _check_light(found: Words) -> None:
    """Some light cannot be seen on some surface or before some background, however the rest is drawn."""
    if "lighting" not in found:
        return
    surfaces = [found["surface"]] if "surface" in found else SURFACES
    backgrounds = [found["background"]] if "background" in found else BACKGROUNDS

    def visible(light: str) -> bool:
        return any(suits(surface, background, light) for surface in surfaces for background in backgrounds)

    if not visible(found["lighting"]):
        where = " and ".join(repr(found[slot]) for slot in ("surface", "background") if slot in found)
        raise ConfigError(
            f"render.scene.lighting={found['lighting']!r} cannot be seen with {where}.",
            f"What can: {'; '.join(filter(visible, LIGHTING))}.",
        )
