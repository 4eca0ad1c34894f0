"""The Scene grammar as a constraint on decoding, in the Lark dialect that llguidance reads.

It allows a part of what ``parse_strict`` reads: a surface always, the other slots in their order and in plain form,
words of ASCII letters only, and no word that names a product. Whatever it lets through therefore parses and keeps the
product's name to itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from packshot.scene.grammar import HEAD, LIGHT_WORDS, STYLE_WORDS
from packshot.scene.scores import PRODUCT_NOUNS, PROP_NOUNS

# Words that decide which slot a clause is read as; they stand where the grammar puts them and nowhere else.
_MARKERS = frozenset(("surrounded", "background", "backgrounds", "mood"))
# Every word that begins or makes up one of grammar.STYLE_WORDS: light with one of them in it would be read as style.
_STYLE = frozenset(
    """photography depth close closeup macro top overhead eye low high lens focus resolution hdr sharp detailed
    photorealistic realistic film cinematic""".split()
)


def _forms(nouns: Iterable[str]) -> set[str]:
    """Every noun with the plurals by which ``scores.product_words`` knows it."""
    plurals = {noun + ending for noun in nouns for ending in ("s", "es")}
    return {*nouns, *plurals, *(noun[:-1] + "ies" for noun in nouns if noun.endswith("y"))}


def _but(words: Iterable[str]) -> str:
    """A word of ASCII letters that is none of ``words``, in whatever case."""
    return rf"/[A-Za-z]+/ & ~/(?i:{'|'.join(sorted(words))})/"


def scene_grammar() -> str:
    """The grammar's text. It is one terminal, hence a regular expression: nothing depends on how a lexer cuts it."""
    products = _forms(PRODUCT_NOUNS) | _MARKERS
    props = _forms(PROP_NOUNS) - (PRODUCT_NOUNS - PROP_NOUNS)  # "glasses" are no plural of the prop
    optional = "".join(f'(", " {clause})?' for clause in ("AROUND", "BACKGROUND", "LIGHTING", "STYLES", "MOOD"))
    return rf"""
start: CAPTION
CAPTION: "{HEAD} on " PHRASE {optional}

WORD: {_but(products)}
THING: {_but(products - props)}
OF_LIGHT: {_but(products | _STYLE)}
BREAK: /[ '-]/
ASCII: /[ -~]+/
PHRASE: WORD (BREAK WORD)*

AROUND: "surrounded by " THING (BREAK THING)*
BACKGROUND: PHRASE " in the background"
LIGHTING: (OF_LIGHT BREAK)* (OF_LIGHT & /(?i:{LIGHT_WORDS})/) (BREAK OF_LIGHT)*
STYLES: STYLE (", " STYLE)*
STYLE: (WORD BREAK)* (/(?i:product photography|{STYLE_WORDS})/ & ASCII) (BREAK WORD)*
MOOD: PHRASE " mood"
"""
