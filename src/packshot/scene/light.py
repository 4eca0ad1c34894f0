"""The side from which light comes, by a lighting phrase."""

from __future__ import annotations

import re

SIDES = {"right": 0.0, "behind": 90.0, "back": 90.0, "rear": 90.0, "left": 180.0, "front": 270.0}  # degrees
# What follows "from", up to the end of the clause: "from the upper-left", "from a window on the left".
_FROM = re.compile(r"\bfrom\b([^,;.]*)")
_SIDE = re.compile(rf"\b({'|'.join(SIDES)})\b")
_BACKLIGHT = re.compile(r"\bback-?\s?(?:light|lit)|\bcontre-jour\b|\brim light")
_SHADOW = re.compile(r"\bshadows?\b")  # shadows "from the right" fall there: whether the light does is unknown


def light_angle(lighting: str | None) -> float | None:
    """Degrees in the picture: 0 from the right, 90 from behind, 180 from the left, 270 from the front.

    None where the phrase names no side, or several: "soft daylight", "light from the left and the right".
    """
    phrase = (lighting or "").lower()
    clauses = [] if _SHADOW.search(phrase) else _FROM.findall(phrase)
    angles = set(map(SIDES.__getitem__, _SIDE.findall("; ".join(clauses))))
    if _BACKLIGHT.search(phrase):
        angles.add(SIDES["behind"])
    return angles.pop() if len(angles) == 1 else None
