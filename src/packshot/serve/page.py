"""The page at ``/``: one file with nothing from elsewhere, and the policy that holds it to that."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

PAGE = files("packshot.serve").joinpath("page.html").read_text(encoding="utf-8")


def _hashes(tag: str, page: str) -> str:
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def headers(page: str) -> dict[str, str]:
    """Headers of a page that runs the scripts and styles in it and no others, shows pictures it made itself, and talks
    to its own server."""
    rules = [
        "default-src 'none'",
        f"script-src {_hashes('script', page)}",
        f"style-src {_hashes('style', page)}",
        "img-src blob:",
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
