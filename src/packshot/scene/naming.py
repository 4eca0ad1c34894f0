"""Whether a person's caption names a product, by the sense of its words.

Many nouns of products mean other things in captions of scenes: light *can* enter, a *ring* light, a *cream* wall, a
*glass* table. The check cuts a caption into phrases at its commas and prepositions and asks for each noun whether it is
the head of its phrase, in a sense that means a product, in a phrase that is not part of the scenery.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from packshot.scene.scores import PRODUCT_NOUNS, PROP_NOUNS, singular

# Words before which a phrase ends. "of" does not end one: "a jar of cream" names the cream.
_BREAKS = frozenset(
    """on upon in at with against before behind beside near next under over below above by through from into onto
    across around along between inside outside during while where that which as and or but surrounded""".split()
)
_PLACES = _BREAKS - {"with", "and", "or", "but", "that", "which", "as", "in"}
_SCENERY_BEFORE = frozenset(("surrounded", "against", "behind", "around", "below", "between", "among"))
_SCENERY_AFTER = re.compile(
    r"^\s*(?:in the (?:background|distance|corner|field|garden)|behind it|around it|below it|above it|"
    r"behind the object|on the (?:left|right)(?: side)?|along the|under the|against the)\b"
)
_POSTURE = re.compile(
    r"^\s*(?:standing|stands?|sitting|sits?|placed|lying|lies|resting|rests|displayed|floating|is|are)\b"
)
_SUBJECT_BEFORE = re.compile(
    r"(?:photo|photograph|picture|image|shot|close-?up|packshot|view) of$|"
    r"(?:featuring|showing|depicting|middle|cent(?:er|re))$"
)
# A noun before one of these describes it: a coffee table, candle light, bottle green, a book shelf.
_SCENE_HEADS = frozenset(
    """table tables wall walls light lights lighting background backdrop counter shelf shelves shop store cabinet rack
    green blue red tones tone colored coloured color colour window board stand house room garden field plantation beans
    leaves plant trees tree print pattern fabric bar strap shaped shape crumbs glow lit shade""".split()
)


def words(text: str) -> frozenset[str]:
    """The words of a text as a set."""
    return frozenset(text.split())


@dataclass(frozen=True)
class Sense:
    """When a noun with several meanings is a product.

    before: one of these is among the three words before it. behind: one of these follows it.
    filled: it holds something ("a can of soda"), unless that is one of these.
    alone: as the subject of the picture, after an article.
    """

    before: frozenset[str]
    behind: frozenset[str] = frozenset()
    filled: frozenset[str] | None = None
    alone: bool = False


_COLOURS = words("white black red blue green yellow pink grey gray silver gold golden orange small large big tall")
_LIGHTS = words(
    "light sunlight shadow shadows sun sunshine flowers leaves petals stones pebbles candles smoke trees hills"
)
_SENSES: dict[str, Sense] = {
    "can": Sense(
        words("tin aluminium aluminum metal steel beer soda cola drink energy spray paint soup food coffee watering"),
        filled=_LIGHTS,
        alone=True,
    ),
    "ring": Sense(
        words(
            "gold golden silver platinum diamond engagement wedding sapphire ruby emerald signet jewellery jewelry "
            "pearl"
        ),
        alone=True,
    ),
    "cream": Sense(
        words(
            "face hand night day eye body skin foot sun shaving moisturizing moisturising anti-aging aging facial "
            "cosmetic hydrating nourishing jar tube pot tub"
        ),
        behind=words("jar tube pot tub bottle dispenser container"),
    ),
    "case": Sense(
        words(
            "phone iphone smartphone watch pencil guitar violin camera laptop tablet leather makeup jewellery jewelry "
            "carrying protective earbuds headphone glasses cosmetic"
        ),
        behind=words("for"),
    ),
    "glass": Sense(
        words("wine champagne drinking cocktail beer whisky whiskey shot martini pint juice cognac"),
        filled=_LIGHTS | words("a the"),
        alone=True,
    ),
    "box": Sense(
        words("gift cardboard jewellery jewelry cereal chocolate tea shoe present packaging product pizza storage"),
        filled=_LIGHTS | words("flowers plants sand"),
        alone=True,
    ),
    "bar": Sense(
        words("chocolate soap protein granola candy energy cereal snack muesli shampoo"),
        filled=_LIGHTS | words("a the an gold iron"),
    ),
}
# Things that furnish a scene or stand around in it: products only as the subject of the picture.
_FURNISHING = frozenset("chair sofa lamp candle book vase bowl plate cup mug gift drink plant kettle tray".split()) | (
    PROP_NOUNS - set(_SENSES)
)
_PICTURES = words("photo photograph picture image shot packshot view close-up closeup")
_ARTICLES = words("a an the this that one two three some my our your its his her")


@dataclass(frozen=True)
class Phrase:
    """A run of words without a preposition. scenery, subject: its role in the picture."""

    tokens: list[str]
    scenery: bool
    subject: bool


def phrases(text: str) -> Iterator[Phrase]:
    """The phrases of a caption, in order."""
    first = True
    for clause in re.split(r"[,;.:!?()\n]+", text.lower()):
        lead = ""
        lead_scenery = False
        found = list(re.finditer(r"[a-z0-9'’-]+", clause))
        opened = 0
        for position in range(len(found) + 1):
            at_end = position == len(found)
            if not at_end and found[position].group() not in _BREAKS:
                continue
            tokens = [match.group() for match in found[opened:position]]
            rest = clause[found[position].start() :] if not at_end else ""
            before = clause[: found[opened].start()].rstrip() if opened < len(found) else clause
            if tokens:
                scenery = lead_scenery or bool(_SCENERY_AFTER.match(rest))
                shown = lead not in _PLACES and subject(tokens, before, rest, first)
                first = False
                yield Phrase(shown_by(tokens), scenery, shown)
            if not at_end:
                lead = found[position].group()
                lead_scenery = lead in _SCENERY_BEFORE or (lead_scenery and lead in ("and", "or", "by"))
                opened = position + 1


def shown_by(tokens: list[str]) -> list[str]:
    """A phrase without "photo of" and the like: what the picture shows."""
    for position in range(len(tokens) - 1, 0, -1):
        if tokens[position] == "of" and tokens[position - 1] in _PICTURES:
            return tokens[position + 1 :]
    return tokens


def subject(tokens: list[str], before: str, rest: str, first: bool) -> bool:
    """Whether a phrase states what the picture shows: after "photo of", before "standing", or first in the caption."""
    if len(shown_by(tokens)) < len(tokens) or _SUBJECT_BEFORE.search(before):
        return True
    if _POSTURE.match(rest) or any(map(_POSTURE.match, tokens[1:])):
        return True
    return (first and bool(rest)) or tokens[0] in ("middle", "center", "centre")


def names_product(text: str) -> list[str]:
    """The words of a caption that name a product, in order; empty when it names none."""
    hits = []
    for phrase in phrases(text):
        for position, word in enumerate(phrase.tokens):
            if is_product(phrase, position, singular_sense(word)):
                hits.append(word)
    return hits


def singular_sense(word: str) -> str:
    """The noun of a word, plural or not; "glasses" stays as it is, because glasses are worn."""
    if word == "glasses":
        return word
    for ending in ("es", "s"):
        if word.endswith(ending) and word[: -len(ending)] in _SENSES:
            return word[: -len(ending)]
    return singular(word)


def is_product(phrase: Phrase, position: int, noun: str) -> bool:
    """Whether the word at this position of a phrase names a product."""
    tokens = phrase.tokens
    following = tokens[position + 1] if position + 1 < len(tokens) else ""
    if phrase.scenery:
        return False
    if noun in _SENSES:
        return has_sense(_SENSES[noun], phrase, position, following)
    if noun not in PRODUCT_NOUNS or noun in ("product", "item"):
        return False
    if following in _SCENE_HEADS or (following.rstrip("s") in _SENSES and following.rstrip("s") != "can"):
        return False
    if noun in _FURNISHING:
        return phrase.subject
    return True


def has_sense(sense: Sense, phrase: Phrase, position: int, following: str) -> bool:
    """Whether a noun of several meanings is a product here."""
    tokens = phrase.tokens
    before = tokens[max(0, position - 3) : position]
    if following in sense.behind:
        return True
    content = tokens[position + 2] if following == "of" and position + 2 < len(tokens) else ""
    if content and sense.filled is not None:
        return content not in sense.filled
    if sense.before & set(before) and (not following or not modifies(following)):
        return True
    heads = not following or not modifies(following)
    return sense.alone and phrase.subject and heads and bool(before) and before[-1] in _ARTICLES | _COLOURS


def modifies(following: str) -> bool:
    """Whether the next word makes a noun a mere description: a ring light, a glass wall."""
    if following in _SCENE_HEADS:
        return True
    if following in words("of for open full") or _POSTURE.match(following):
        return False
    return following.isalpha() and not following.endswith(("ed", "ing"))
