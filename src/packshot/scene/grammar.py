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
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

from packshot.scene.scene import SLOTS, Scene
from packshot.scene.slots import Slot

HEAD = "Professional photo of an object"
# Slots in the order of the caption.
ORDER = tuple(sorted(SLOTS, key=lambda name: SLOTS[name].order))
# In this order free clauses are tried: single texts first, since "with a wall in the background" is a background.
_FREE_ORDER = sorted(SLOTS, key=lambda name: SLOTS[name].many)
# Style before light: "cinematic light" is style.
_BY_WORDS = list(filter(lambda name: SLOTS[name].words, reversed(ORDER)))
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_TAGGED = re.compile(rf"({'|'.join(SLOTS)})((?: {_QUOTED})+)", re.DOTALL)
_CLAUSE = re.compile(rf"(?:{_QUOTED}|[^,])+", re.DOTALL)
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


def quote(text: str) -> str:
    """A value in double quotes, escaped with backslashes."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def unquote_all(text: str) -> tuple[str, ...]:
    """The quoted values of a tagged clause."""
    values: list[str] = []
    for quoted in re.findall(_QUOTED, text, re.DOTALL):
        values.append(re.sub(r"\\(.)", r"\1", quoted[1:-1], flags=re.DOTALL))
    return tuple(values)


def needs_quotes(values: tuple[str, ...]) -> bool:
    """Whether a value has a character that ends or escapes a clause."""
    return not set(',"\\').isdisjoint("".join(values))


def survives(slot: str, values: tuple[str, ...]) -> bool:
    """Whether the plain clauses of one slot are read back as that slot and nothing else."""
    if needs_quotes(values):
        return False
    try:
        scene = parse_strict(", ".join([HEAD, *SLOTS[slot].clauses(values)]))
    except SceneSyntaxError:
        return False
    return filled(scene) == {slot: values}


def filled(scene: Scene) -> dict[str, tuple[str, ...]]:
    """The slots that are not empty."""
    return {slot: values for slot, values in scene.slots().items() if values}


def render(scene: Scene) -> str:
    """The caption of a scene. ``parse_strict(render(scene)) == scene`` for every Scene."""
    clauses = [HEAD]
    for name in ORDER:
        row = SLOTS[name]
        values = scene.slots()[name]
        if not values:
            continue
        if row.order == 0 and not needs_quotes(values):
            clauses = [HEAD + row.clauses(values)[0]]
        elif row.order > 0 and survives(name, values):
            clauses += row.clauses(values)
        else:
            clauses.append(" ".join([name, *map(quote, values)]))
    return ", ".join(clauses)


def split_clauses(text: str) -> Iterator[tuple[int, str]]:
    """Position and text of every comma-separated clause; commas inside quotes do not separate."""
    for match in _CLAUSE.finditer(text):
        clause = match.group()
        stripped = clause.strip(" \t\n\r")
        if stripped:
            yield match.start() + clause.index(stripped), stripped


def classify(clause: str) -> tuple[str, tuple[str, ...]] | None:
    """Slot and values of a clause in canonical form, or None."""
    if tagged := _TAGGED.fullmatch(clause):
        return tagged.group(1), unquote_all(tagged.group(2))
    for name in ORDER[1:]:
        if (values := SLOTS[name].read_clause(clause)) is not None:
            return name, values
    return by_words(clause)


def by_words(clause: str) -> tuple[str, tuple[str, ...]] | None:
    """Slot and value of a clause that is known by one of its words."""
    for name in _BY_WORDS:
        if re.search(rf"\b({SLOTS[name].words})\b", clause, re.IGNORECASE):
            return name, (clause,)
    return None


def slot_spans(text: str) -> list[tuple[str, int, int]]:
    """Slot, first character and end of every clause of a caption in the grammar; [] for any other text."""
    with suppress(SceneSyntaxError):
        parse_strict(text)
        spans = []
        for number, (begin, clause) in enumerate(split_clauses(text)):
            placed = classify(clause) if number else ("surface", ())
            if placed and clause != HEAD:
                spans.append((placed[0], begin + (len(HEAD) if number == 0 else 0), begin + len(clause)))
        return spans
    return []


def parse_strict(text: str) -> Scene:
    """Read a caption that follows the grammar exactly; see :meth:`Scene.parse_strict`."""
    if not text.startswith(HEAD):
        at = 0
        while text[at : at + 1] == HEAD[at]:
            at += 1
        raise SceneSyntaxError(f"a caption starts with {HEAD!r}; it differs", text, at)
    found: dict[str, tuple[str, ...]] = {}
    last = -1
    for number, (position, clause) in enumerate(split_clauses(text)):
        if number == 0:
            if clause == HEAD:
                continue
            if not clause.startswith(f"{HEAD} on "):
                raise SceneSyntaxError("expected ' on <surface>' or a comma", text, len(HEAD))
            slot, values = "surface", (clause.removeprefix(f"{HEAD} on "),)
        else:
            placed = classify(clause)
            if placed is None:
                raise SceneSyntaxError("this clause belongs to no slot", text, position)
            slot, values = placed
        rank = ORDER.index(slot)
        if slot in found and (not SLOTS[slot].many or SLOTS[slot].joiner):
            raise SceneSyntaxError(f"a second {slot}", text, position)
        if rank < last:
            raise SceneSyntaxError(f"{slot} must come before {ORDER[last]}", text, position)
        last = rank
        found[slot] = found.get(slot, ()) + values
    scene = Scene.from_slots(found)
    if filled(scene) != found:
        raise SceneSyntaxError("a value is not in its normal form (blank, or doubled words)", text, 0)
    return scene


def classify_free(clause: str) -> tuple[str, tuple[str, ...]] | None:
    """Like :func:`classify` for the wording captioners and people use."""
    bare = clause.rstrip(" .;!").strip()
    if tagged := _TAGGED.fullmatch(bare):
        return tagged.group(1), unquote_all(tagged.group(2))
    for name in _FREE_ORDER:
        for pattern in SLOTS[name].free:
            if found := re.fullmatch(pattern, bare, re.IGNORECASE | re.DOTALL):
                value = found.group("value")
                return name, free_values(SLOTS[name], value)
    return by_words(bare)


def free_values(row: Slot, value: str) -> tuple[str, ...]:
    """The values of a free clause: cut at the slot's joiner and the white space around it."""
    if row.joiner is None:
        return (value,)
    return tuple(filter(None, re.split(rf"\s+{row.joiner.strip()}\s+", value)))


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
    for number, (_, clause) in enumerate(split_clauses(sentences)):
        placed = classify_free(clause)
        head = _FREE_HEAD.match(clause) if number == 0 else None
        if head and clause[head.end() :].strip():
            placed = "surface", (clause[head.end() :].rstrip(" ."),)
            leftover += named(head.group())
        elif placed is None and previous == "surroundings" and len(clause.split()) <= 5:
            placed = "surroundings", (re.sub(r"^and\s+", "", clause.rstrip(" .")),)
        elif number == 0 and placed and placed[0] not in ("background", "surroundings"):
            placed = None
        if placed is None:
            leftover.append(clause)
            continue
        slot, values = placed
        previous = slot
        if slot in found and not SLOTS[slot].many:
            leftover.append(clause)
        else:
            found[slot] = found.get(slot, ()) + values
    return Parsed(split_surface(Scene.from_slots(found)), tuple(leftover))


def named(head: str) -> list[str]:
    """What the head of a free caption names in addition to "photo of an object on": usually the product's name."""
    words = [word for word in re.findall(r"[\w-]+", head) if word.lower() not in _HEAD_WORDS]
    return [" ".join(words)] if words else []


def split_surface(scene: Scene) -> Scene:
    """Free captions run on: "on a table surrounded by leaves", "on a table with a box"."""
    match = re.match(r"(.+?)\s+(?:surrounded by|with)\s+(.+)", scene.surface, re.IGNORECASE)
    if not match or scene.surroundings:
        return scene
    return replace(scene, surface=match.group(1), surroundings=tuple(re.split(r"\s+and\s+", match.group(2))))
