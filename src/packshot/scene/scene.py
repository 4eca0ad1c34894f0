"""The Scene: five slots that describe everything around a product, and never the product itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packshot.scene.grammar import Parsed


def _clean(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _without_suffix(text: str, suffix: str) -> str:
    while text.lower().endswith(suffix):
        text = text[: -len(suffix)].rstrip(" ,")
    return text


def _texts(name: str, value: Any) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(item, str) for item in values):
        raise TypeError(f"Scene.{name} takes a text or a sequence of texts, not {value!r}")
    return tuple(text for text in map(_clean, values) if text)


@dataclass(frozen=True)
class Scene:
    """What surrounds "an object" in a photograph.

    surface: where the object stands ("a stone podium which is on a marble table"); "" when unknown.
    surroundings: things around it, in order of mention.
    background, lighting, mood: optional text. ``mood="calm mood"`` and ``background="a wall in the background"``
        are stored without the words that the caption adds again.
    style: camera and style terms ("shallow depth of field").

    Values are normalised on construction (white space; blank text becomes None), so that equal scenes compare equal
    and ``Scene.parse(scene.render()).scene == scene`` holds for every Scene.
    """

    surface: str = ""
    surroundings: tuple[str, ...] = ()
    background: str | None = None
    lighting: str | None = None
    mood: str | None = None
    style: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("surface", "background", "lighting", "mood"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"Scene.{name} takes text, not {value!r}")
        set_ = object.__setattr__
        set_(self, "surface", _clean(self.surface or ""))
        set_(self, "surroundings", _texts("surroundings", self.surroundings))
        set_(self, "background", _without_suffix(_clean(self.background or ""), " in the background") or None)
        set_(self, "lighting", _clean(self.lighting or "") or None)
        set_(self, "mood", _without_suffix(_clean(self.mood or ""), " mood") or None)
        set_(self, "style", _texts("style", self.style))

    def render(self) -> str:
        """The caption: what a captioner is taught to write and what SDXL is prompted with."""
        from packshot.scene.grammar import render

        return render(self)

    @staticmethod
    def parse(text: str) -> Parsed:
        """Read any caption; never raises. Returns ``.scene`` and ``.leftover`` (clauses that fit no slot)."""
        from packshot.scene.grammar import parse

        return parse(text)

    @staticmethod
    def parse_strict(text: str) -> Scene:
        """Read a caption written in the grammar.

        Raises:
            SceneSyntaxError: with ``.position``, the character at which the text leaves the grammar.
        """
        from packshot.scene.grammar import parse_strict

        return parse_strict(text)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, lists for tuples (the ``scene`` column of the datasets)."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scene:
        """Inverse of :meth:`to_dict`. Raises TypeError on an unknown slot."""
        known = {key: value for key, value in values.items() if value is not None}
        return cls(**known)

    def slots(self) -> dict[str, tuple[str, ...]]:
        """Every slot as a tuple of texts, empty when absent: the common form for scores and tables."""

        def as_tuple(value: str | Iterable[str] | None) -> tuple[str, ...]:
            return ((value,) if value else ()) if isinstance(value, str) or value is None else tuple(value)

        return {key: as_tuple(getattr(self, key)) for key in SLOTS}


SLOTS = ("surface", "surroundings", "background", "lighting", "mood", "style")
