"""The Scene grammar as a constraint on decoding, in the Lark dialect that llguidance reads.

It allows a part of what ``parse_strict`` reads: a surface always, the other slots in their order and in plain form,
words of ASCII letters only, and no word that names a product. All that it accepts therefore parses and names no
product.
"""

from __future__ import annotations

from collections.abc import Iterable

from packshot.scene.grammar import HEAD, ORDER
from packshot.scene.scene import SLOTS, STYLE_WORDS
from packshot.scene.scores import PRODUCT_NOUNS, PROP_NOUNS

# Words that decide which slot a clause is read as: they stand where the grammar puts them and nowhere else.
_MARKERS = frozenset(("surrounded", "background", "backgrounds", "mood"))
# Every word that begins or makes up one of STYLE_WORDS: light with one of them in it would be read as style.
_STYLE = frozenset(
    """photography depth close closeup macro top overhead eye low high lens focus resolution hdr sharp detailed
    photorealistic realistic film cinematic""".split()
)


def with_plurals(nouns: Iterable[str]) -> set[str]:
    """Every noun with the plurals by which ``scores.product_words`` knows it."""
    words = set(nouns)
    for noun in nouns:
        words |= {noun + "s", noun + "es"}
        if noun.endswith("y"):
            words.add(noun[:-1] + "ies")
    return words


def word_except(words: Iterable[str]) -> str:
    """A word of ASCII letters that is none of ``words``; case does not count."""
    return rf"/[A-Za-z]+/ & ~/(?i:{'|'.join(sorted(words))})/"


def clause_rule(name: str) -> str:
    """The terminal of one slot's clause."""
    row = SLOTS[name]
    parts = (f'"{row.prefix}"' if row.prefix else "", row.decoding, f'"{row.suffix}"' if row.suffix else "")
    return f"{name.upper()}: {' '.join(filter(None, parts))}"


def scene_grammar() -> str:
    """The grammar's text. It is one terminal, hence a regular expression: nothing depends on how a lexer cuts it."""
    products = with_plurals(PRODUCT_NOUNS) | _MARKERS
    props = with_plurals(PROP_NOUNS) - (PRODUCT_NOUNS - PROP_NOUNS)  # "glasses" is not the plural of the prop "glass"
    optional = "".join(map('(", " {})?'.format, map(str.upper, ORDER[1:])))
    clauses = "\n".join(map(clause_rule, ORDER[1:]))
    return rf"""
start: CAPTION
CAPTION: "{HEAD} on " PHRASE {optional}

WORD: {word_except(products)}
THING: {word_except(products - props)}
OF_LIGHT: {word_except(products | _STYLE)}
BREAK: /[ '-]/
ASCII: /[ -~]+/
PHRASE: WORD (BREAK WORD)*

{clauses}
STYLE_TERM: (WORD BREAK)* (/(?i:product photography|{STYLE_WORDS})/ & ASCII) (BREAK WORD)*
"""
