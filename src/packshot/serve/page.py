"""The page at ``/``: one file without foreign parts, and the policy that enforces this."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from importlib.resources import files

from packshot.config.generate import POSITIONS
from packshot.generate.reasons import REASONS
from packshot.scene import SLOTS
from packshot.scene.slots import Slot


def slot_control(name: str, row: Slot) -> str:
    """Label and input of one slot with its vocabulary: suggestions for a line of text, a list to add from for several.

    The vocabulary consists of plain phrases, so nothing has to be escaped.
    """
    title = f"{name.capitalize()}: {row.help}"
    phrases = "".join(f"<option>{phrase}</option>" for phrase in row.vocabulary)
    if not row.many:
        field = f'<input id="{name}" name="{name}" maxlength="2000" placeholder="{row.example}" list="{name}-words">'
        return f'<label for="{name}">{title}</label>\n{field}\n<datalist id="{name}-words">{phrases}</datalist>'
    field = f'<textarea id="{name}" name="{name}" rows="2" data-lines placeholder="{row.example}"></textarea>'
    choice = f'<select data-add="{name}" aria-label="Add to {name}"><option value="">add …</option>{phrases}</select>'
    return f'<label for="{name}">{title}, one a line</label>\n{field}\n{choice}'


def place_option(name: str) -> str:
    """The option of one named place on a canvas."""
    return f'<option value="{name}">{name.replace("_", " ")}</option>'


def reason_item(code: str) -> str:
    """What one reason code of a certificate means."""
    return f'<li data-code="{code}">{html.escape(REASONS[code])}</li>'


def page_text() -> str:
    """The page with the controls that follow from registry rows."""
    text = files("packshot.serve").joinpath("page.html").read_text(encoding="utf-8")
    slots = "\n".join(slot_control(name, row) for name, row in SLOTS.items())
    places = "\n".join(map(place_option, POSITIONS))
    reasons = "\n".join(map(reason_item, REASONS))
    text = text.replace("<!-- the slots of the scene -->", slots).replace("<!-- the places on a canvas -->", places)
    return text.replace("<!-- what the reason codes mean -->", reasons)


PAGE = page_text()


def hashes(tag: str, page: str) -> str:
    """Sources of a policy that allow the scripts or styles in a page, and no others."""
    sources = []
    for block in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        sources.append(f"'sha256-{digest}'")
    return " ".join(sources) or "'none'"


def headers(page: str) -> dict[str, str]:
    """Headers of a page that runs only its own scripts and styles, shows only pictures that it made itself, and talks
    only to its own server."""
    rules = [
        "default-src 'none'",
        f"script-src {hashes('script', page)}",
        f"style-src {hashes('style', page)}",
        "img-src blob: data:",
        "connect-src 'self'",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
    return {
        "Content-Security-Policy": "; ".join(rules),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "Vary": "Accept",
    }
