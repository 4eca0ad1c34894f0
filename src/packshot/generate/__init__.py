"""Putting a product into a scene: adapters, canvas, denoising, composite and certificate.

``Packshot.load(...).set_product(photo).generate(scene)`` does all of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packshot.generate.packshot import Packshot, Result

__all__ = ["Packshot", "Result"]


def __getattr__(name: str) -> object:
    """Import the models' libraries only when a class is used: reading a photo for the server needs none of them."""
    if name in __all__:
        return getattr(importlib.import_module("packshot.generate.packshot"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
