"""Which samples may be shown as their mirror image: those whose captions say nothing that a mirror makes untrue."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Sides, turns, and things with writing on them. Words of other languages are not known here.
_SIDES = r"left|right|leftmost|rightmost|leftward|rightward|lefthand|righthand|clockwise|counterclockwise|anticlockwise"
_WRITING = (
    r"text|texts|letter|letters|lettering|lettered|logo|logos|label|labels|labelled|labeled|sign|signs|signage|"
    r"word|words|writing|written|typography|watermark|number|numbers|digits|inscription|engraved|caption|clock"
)
_TELLING = re.compile(rf"\b(?:{_SIDES}|{_WRITING})\b", re.IGNORECASE)


def tells_sides(text: str) -> bool:
    """Whether a caption has a word for a side or for writing."""
    return _TELLING.search(text) is not None


def flippable(texts: Sequence[str], captions: Sequence[Sequence[str] | None]) -> list[bool]:
    """For each sample whether it may be flipped. captions: all of a sample, where there are several."""
    found = []
    for text, several in zip(texts, captions, strict=True):
        found.append(not any(map(tells_sides, several or (text,))))
    return found


def flip_note(flips: Sequence[bool]) -> str:
    """The line on the screen with the number of samples that are not flipped."""
    flipped = sum(flips)
    return (
        f"data.flip=true: {flipped} of {len(flips)} samples are shown mirrored at half of their accesses; "
        f"{len(flips) - flipped} are not, because a caption has a word for a side or for writing"
    )
