"""Scene <-> caption.

The grammar, every part but the head optional::

    Professional photo of an object on <surface>, surrounded by <a> and <b>, <background> in the background,
    <lighting>, <style>, ..., <mood> mood

Clauses are told apart by their form ("… mood") or by a key word ("… light …"). A value that the plain form could not
give back (it contains a comma, say, or lighting without a word of light) is written in the tagged form
``lighting "…"`` with backslash escapes. Rendering therefore never loses a Scene, and ordinary ones read as prose.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

from packshot.scene.scene import Scene

HEAD = "Professional photo of an object"
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_TAGGED = re.compile(rf"(surface|surroundings|background|lighting|mood|style)((?: {_QUOTED})+)", re.DOTALL)
_CLAUSE = re.compile(rf"(?:{_QUOTED}|[^,])+", re.DOTALL)
# Words by which a clause is known for light or style; scene/lark.py writes the same lists into the decoding grammar.
LIGHT_WORDS = (
    r"light\w*|\w*light|lit|\w*lit|shadows?|sun|sunny|sunshine|sunset|sunrise|golden hour|blue hour|glow\w*|neon|"
    r"illuminat\w*|bright|dim|rays?"
)
STYLE_WORDS = (
    r"photography|depth of field|close-?up|macro|top view|overhead|eye[- ]level|low angle|high angle|lens|"
    r"focus|resolution|[0-9]+k|[0-9]+ ?mm|hdr|sharp|detailed|photorealistic|realistic|film grain|cinematic"
)
_LIGHT = re.compile(rf"\b({LIGHT_WORDS})\b", re.IGNORECASE)
_STYLE = re.compile(rf"\b({STYLE_WORDS})\b", re.IGNORECASE)
_AROUND = re.compile(r"^(?:and )?(surrounded by|with|next to|beside|among|amid)\s+", re.IGNORECASE)
_FREE_HEAD = re.compile(
    r"^(?:an? |the )?(?:\w+ ){0,3}?(?:photo(?:graph)?|image|picture|shot)?(?: of)? ?"
    r"(?:an? |the )?(?:object|product)?\s*(?:\b(?:placed|standing|sitting|displayed|resting|lying)\s+)?"
    r"\b(?:on top of|on|upon|in)\s+",
    re.IGNORECASE,
)

_HEAD_WORDS = frozenset(
    """a an the of on upon in top at professional photo photograph photography image picture shot studio object product
    placed standing stands sitting sits displayed resting rests lying lies is""".split()
)


class SceneSyntaxError(ValueError):
    """A caption leaves the grammar. ``position`` is the index of the first character that does not fit."""

    def __init__(self, message: str, text: str, position: int) -> None:
        super().__init__(f"{message} at character {position}: {text[position : position + 40]!r}")
        self.position = position


@dataclass(frozen=True)
class Parsed:
    """A Scene read from text and the clauses that found no place in it, in their order."""

    scene: Scene
    leftover: tuple[str, ...] = field(default=())


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _unquote_all(text: str) -> tuple[str, ...]:
    return tuple(re.sub(r"\\(.)", r"\1", item[1:-1], flags=re.DOTALL) for item in re.findall(_QUOTED, text, re.DOTALL))


def _background_clause(value: str) -> str:
    return value if value.lower().endswith("background") else f"{value} in the background"


# In the order of the caption: how a slot's values become clauses when nothing has to be escaped.
_PLAIN: dict[str, Callable[[tuple[str, ...]], list[str]]] = {
    "surroundings": lambda values: ["surrounded by " + " and ".join(values)],
    "background": lambda values: [_background_clause(values[0])],
    "lighting": lambda values: list(values),
    "style": lambda values: list(values),
    "mood": lambda values: [f"{values[0]} mood"],
}


def _survives(slot: str, values: tuple[str, ...]) -> bool:
    """Whether the plain clauses of one slot are read back as that slot and nothing else."""
    if any(char in "".join(values) for char in ',"\\'):
        return False
    try:
        scene = parse_strict(", ".join([HEAD, *_PLAIN[slot](values)]))
    except SceneSyntaxError:
        return False
    return {key: found for key, found in scene.slots().items() if found} == {slot: values}


def render(scene: Scene) -> str:
    """The caption of a scene. ``parse_strict(render(scene)) == scene`` for every Scene."""
    slots = scene.slots()
    head, tagged_surface = HEAD, []
    if scene.surface:
        if any(char in scene.surface for char in ',"\\'):
            tagged_surface = ["surface " + _quote(scene.surface)]
        else:
            head = f"{HEAD} on {scene.surface}"
    clauses = [head, *tagged_surface]
    for slot, plain in _PLAIN.items():
        values = slots[slot]
        if not values:
            continue
        clauses += plain(values) if _survives(slot, values) else [" ".join([slot, *map(_quote, values)])]
    return ", ".join(clauses)


def _clauses(text: str) -> Iterator[tuple[int, str]]:
    """Position and text of every comma-separated clause; commas inside quotes do not separate."""
    for match in _CLAUSE.finditer(text):
        clause = match.group()
        stripped = clause.strip(" \t\n\r")
        if stripped:
            yield match.start() + clause.index(stripped), stripped


def _classify(clause: str) -> tuple[str, tuple[str, ...]] | None:
    """Slot and values of a clause in canonical form, or None."""
    if tagged := _TAGGED.fullmatch(clause):
        return tagged.group(1), _unquote_all(tagged.group(2))
    if clause.startswith("surrounded by "):
        return "surroundings", tuple(clause.removeprefix("surrounded by ").split(" and "))
    if clause.endswith(" in the background"):
        return "background", (clause.removesuffix(" in the background"),)
    if clause.endswith("background"):
        return "background", (clause,)
    if clause.endswith(" mood"):
        return "mood", (clause.removesuffix(" mood"),)
    if _STYLE.search(clause):
        return "style", (clause,)
    if _LIGHT.search(clause):
        return "lighting", (clause,)
    return None


def slot_spans(text: str) -> list[tuple[str, int, int]]:
    """Slot, first character and end of every clause of a caption in the grammar; [] for any other text."""
    with suppress(SceneSyntaxError):
        parse_strict(text)
        spans = []
        for number, (begin, clause) in enumerate(_clauses(text)):
            placed = _classify(clause) if number else ("surface", ())
            if placed and clause != HEAD:
                spans.append((placed[0], begin + (len(HEAD) if number == 0 else 0), begin + len(clause)))
        return spans
    return []


_ORDER = ("surface", *_PLAIN)


def parse_strict(text: str) -> Scene:
    """Read a caption that follows the grammar exactly; see :meth:`Scene.parse_strict`."""
    if not text.startswith(HEAD):
        at = next((i for i, (a, b) in enumerate(zip(text, HEAD, strict=False)) if a != b), min(len(text), len(HEAD)))
        raise SceneSyntaxError(f"a caption starts with {HEAD!r}; it differs", text, at)
    found: dict[str, tuple[str, ...]] = {}
    last = -1
    for number, (position, clause) in enumerate(_clauses(text)):
        if number == 0:
            if clause == HEAD:
                continue
            if not clause.startswith(f"{HEAD} on "):
                raise SceneSyntaxError("expected ' on <surface>' or a comma", text, len(HEAD))
            slot, values = "surface", (clause.removeprefix(f"{HEAD} on "),)
        else:
            placed = _classify(clause)
            if placed is None:
                raise SceneSyntaxError("this clause belongs to no slot", text, position)
            slot, values = placed
        rank = _ORDER.index(slot)
        if slot in found and slot != "style":
            raise SceneSyntaxError(f"a second {slot}", text, position)
        if rank < last:
            raise SceneSyntaxError(f"{slot} must come before {_ORDER[last]}", text, position)
        last = rank
        found[slot] = found.get(slot, ()) + values
    scene = _build(found)
    if {slot: values for slot, values in scene.slots().items() if values} != found:
        raise SceneSyntaxError("a value is not in its normal form (blank, or doubled words)", text, 0)
    return scene


def _build(found: dict[str, tuple[str, ...]]) -> Scene:
    single = {slot: found[slot][0] for slot in ("surface", "background", "lighting", "mood") if found.get(slot)}
    many = {slot: found[slot] for slot in ("surroundings", "style") if found.get(slot)}
    return Scene(**single, **many)  # type: ignore[arg-type]


def _classify_free(clause: str) -> tuple[str, tuple[str, ...]] | None:
    """Like :func:`_classify` for the wording captioners and people use."""
    bare = clause.rstrip(" .;!").strip()
    lowered = bare.lower()
    if tagged := _TAGGED.fullmatch(bare):
        return tagged.group(1), _unquote_all(tagged.group(2))
    for lead in ("in the background is ", "in the background, ", "the background is ", "the background features "):
        if lowered.startswith(lead):
            return "background", (bare[len(lead) :],)
    if lowered.endswith(" in the background"):
        return "background", (_AROUND.sub("", bare[: -len(" in the background")]),)
    if lowered.startswith(("against ", "in front of ")):
        return "background", (re.sub(r"^(against|in front of)\s+", "", bare, flags=re.IGNORECASE),)
    if lowered.endswith("background"):
        return "background", (bare,)
    if lowered.endswith((" mood", " atmosphere")):
        return "mood", (re.sub(r" (mood|atmosphere)$", "", bare, flags=re.IGNORECASE),)
    if around := _AROUND.match(bare):
        rest = bare[around.end() :]
        # "with a shadow", "with soft light": the light, not a thing beside the object
        if around.group(1).lower() == "with" and _LIGHT.search(rest) and " lights" not in lowered:
            return "lighting", (rest,)
        return "surroundings", tuple(item for item in re.split(r"\s+and\s+", rest) if item)
    if _STYLE.search(bare):
        return "style", (bare,)
    if _LIGHT.search(bare):
        return "lighting", (bare,)
    return None


def parse(text: str) -> Parsed:
    """Read any text as a Scene; never raises. Exact for text in the grammar, best effort for everything else.

    A slot that is named twice keeps its first value, the later clause goes to ``leftover``; further things after
    "surrounded by …" that fit no other slot join the surroundings.
    """
    with suppress(SceneSyntaxError):  # outside the grammar: read it as prose below
        return Parsed(parse_strict(text))
    found: dict[str, tuple[str, ...]] = {}
    leftover: list[str] = []
    previous = ""
    sentences = re.sub(r"\.\s+(?=[A-Z])", ", ", text)
    for number, (_, clause) in enumerate(_clauses(sentences)):
        placed = _classify_free(clause)
        head = _FREE_HEAD.match(clause) if number == 0 else None
        if head and clause[head.end() :].strip():
            placed = "surface", (clause[head.end() :].rstrip(" ."),)
            leftover += _named(head.group())
        elif placed is None and previous == "surroundings" and len(clause.split()) <= 5:
            placed = "surroundings", (re.sub(r"^and\s+", "", clause.rstrip(" .")),)
        elif number == 0 and placed and placed[0] not in ("background", "surroundings"):
            placed = None
        if placed is None:
            leftover.append(clause)
            continue
        slot, values = placed
        previous = slot
        if slot in found and slot not in ("style", "surroundings"):
            leftover.append(clause)
        else:
            found[slot] = found.get(slot, ()) + values
    return Parsed(_split_surface(_build(found)), tuple(leftover))


def _named(head: str) -> list[str]:
    """What the head of a free caption says besides "photo of an object on": usually the product's name."""
    words = [word for word in re.findall(r"[\w-]+", head) if word.lower() not in _HEAD_WORDS]
    return [" ".join(words)] if words else []


def _split_surface(scene: Scene) -> Scene:
    """Free captions run on: "on a table surrounded by leaves", "on a table with a box"."""
    match = re.match(r"(.+?)\s+(?:surrounded by|with)\s+(.+)", scene.surface, re.IGNORECASE)
    if not match or scene.surroundings:
        return scene
    return replace(scene, surface=match.group(1), surroundings=tuple(re.split(r"\s+and\s+", match.group(2))))
