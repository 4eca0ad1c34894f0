"""The Scene: its slots describe everything around a product, and never the product itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from packshot.lists import map_values, without_none
from packshot.scene import vocabulary
from packshot.scene.slots import Slot, as_texts, slot

if TYPE_CHECKING:
    from packshot.scene.grammar import Parsed


# Words that mark a clause as light or as style; the decoding grammar uses the same lists.
LIGHT_WORDS = (
    r"light\w*|\w*light|lit|\w*lit|shadows?|sun|sunny|sunshine|sunset|sunrise|golden hour|blue hour|glow\w*|neon|"
    r"illuminat\w*|bright|dim|rays?"
)
STYLE_WORDS = (
    r"photography|depth of field|close-?up|macro|top view|overhead|eye[- ]level|low angle|high angle|lens|"
    r"focus|resolution|[0-9]+k|[0-9]+ ?mm|hdr|sharp|detailed|photorealistic|realistic|film grain|cinematic"
)
_AROUND = r"(?:and )?(?:surrounded by|with|next to|beside|among|amid)\s+"


@dataclass(frozen=True)
class Scene:
    """What surrounds "an object" in a photograph. A field's metadata is the row of its slot.

    Values are normalised on construction (white space; blank text becomes None; ``mood="calm mood"`` is stored
    without the word that the caption adds again), so that equal scenes compare equal and
    ``Scene.parse(scene.render()).scene == scene`` holds for every Scene.
    """

    surface: str = slot(
        "",
        help="where the object stands",
        vocabulary=vocabulary.SURFACES,
        order=0,
        example="a white marble table",
        prefix=" on ",
    )
    surroundings: tuple[str, ...] = slot(
        (),
        help="things around it",
        vocabulary=vocabulary.SURROUNDINGS,
        order=1,
        example="palm leaves",
        many=True,
        placed=True,
        prefix="surrounded by ",
        joiner=" and ",
        free=(rf"{_AROUND}(?P<value>.*)",),
        decoding="THING (BREAK THING)*",
    )
    background: str | None = slot(
        None,
        help="what is behind it",
        vocabulary=vocabulary.BACKGROUNDS,
        order=2,
        example="a pink wall",
        suffix=" in the background",
        ending="background",
        free=(
            r"(?:in the background is |in the background, |the background is |the background features )(?P<value>.*)",
            rf"(?:{_AROUND})?(?P<value>.*) in the background",
            r"(?:against|in front of)\s+(?P<value>.*)",
            r"(?P<value>.*background)",
        ),
    )
    lighting: str | None = slot(
        None,
        help="light and shadow",
        vocabulary=vocabulary.LIGHTING,
        order=3,
        example="soft light from the left side",
        words=LIGHT_WORDS,
        # "with a shadow", "with soft light": the light, not a thing around the object
        free=(rf"(?!.* lights)(?!.* (?:mood|atmosphere)$)(?:and )?with\s+(?P<value>(?=.*\b(?:{LIGHT_WORDS})\b).*)",),
        decoding=f"(OF_LIGHT BREAK)* (OF_LIGHT & /(?i:{LIGHT_WORDS})/) (BREAK OF_LIGHT)*",
    )
    mood: str | None = slot(
        None,
        help="mood",
        vocabulary=vocabulary.MOODS,
        order=5,
        example="fresh",
        suffix=" mood",
        free=(r"(?P<value>.*) (?:mood|atmosphere)",),
    )
    style: tuple[str, ...] = slot(
        (),
        help="camera and style terms",
        vocabulary=vocabulary.STYLES,
        order=4,
        example="shallow depth of field",
        many=True,
        weight=0.0,  # it is reported, and does not count in the mean
        words=STYLE_WORDS,
        decoding='STYLE_TERM (", " STYLE_TERM)*',
    )

    def __post_init__(self) -> None:
        for key in fields(self):
            value = key.metadata["slot"].normalized(key.name, getattr(self, key.name), key.default)
            object.__setattr__(self, key.name, value)

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

    def to_dict(self) -> dict[str, object]:
        """Plain JSON-able values, lists for tuples (the ``scene`` column of the datasets)."""
        return map_values(lambda value: list(value) if isinstance(value, tuple) else value, asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Scene:
        """Inverse of :meth:`to_dict`. Raises TypeError on an unknown slot."""
        return cls(**without_none(values))  # type: ignore[arg-type]

    def slots(self) -> dict[str, tuple[str, ...]]:
        """Every slot as a tuple of texts, empty when absent: the common form for scores and tables."""
        return {name: as_texts(getattr(self, name)) for name in SLOTS}

    @classmethod
    def from_slots(cls, found: Mapping[str, Sequence[str]]) -> Scene:
        """Inverse of :meth:`slots`; a slot that holds one text takes the first."""
        values: dict[str, object] = {}
        for name, texts in found.items():
            if texts:
                values[name] = tuple(texts) if SLOTS[name].many else texts[0]
        return cls(**values)  # type: ignore[arg-type]


SLOTS: dict[str, Slot] = {key.name: key.metadata["slot"] for key in fields(Scene)}
COUNTED = tuple(filter(lambda name: SLOTS[name].weight, SLOTS))  # the slots that count in the mean score


def scene_features() -> dict[str, object]:
    """The struct of a dataset's ``scene`` column, as types of ``datasets``: single texts first, then lists."""
    names = sorted(SLOTS, key=lambda name: SLOTS[name].many)
    return {name: SLOTS[name].feature() for name in names}
