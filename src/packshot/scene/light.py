"""From which side a lighting phrase says that light comes."""

from __future__ import annotations

import re

SIDES = {"right": 0.0, "behind": 90.0, "back": 90.0, "left": 180.0, "front": 270.0}  # degrees, as light_angle has them
_FROM = re.compile(
    r"\bfrom (?:the |its |an? )?(?:far |upper |lower |top |bottom )?[- ]?(right|behind|back|left|front)\b"
)
_BACKLIGHT = re.compile(r"\bback-?\s?(?:light|lit)|\bcontre-jour\b|\brim light")


def light_angle(lighting: str | None) -> float | None:
    """Degrees in the picture: 0 from the right, 90 from behind, 180 from the left, 270 from the front.

    None where the phrase names no side, or several: "soft daylight", "light from the left and from the right".
    """
    phrase = (lighting or "").lower()
    angles = {SIDES[side] for side in _FROM.findall(phrase)}
    if _BACKLIGHT.search(phrase):
        angles.add(SIDES["behind"])
    return angles.pop() if len(angles) == 1 else None
