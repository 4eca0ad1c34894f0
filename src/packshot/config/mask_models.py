"""One row for each named way to find a product's mask, a value of ``matte.model``; other values are ONNX files.

docs/decisions.md explains why the rows live here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MaskModelRow:
    """A way to find masks. about: for ``--help``. weights: the folder of its network, or None."""

    name: str
    about: str
    weights: str | None


MINI = "data/models/matting"

_ROWS = (
    MaskModelRow("auto", "the family's network, or GrabCut alone where that is not installed", MINI),
    MaskModelRow("mini", "the family's network", MINI),
    MaskModelRow("grabcut", "GrabCut alone", None),
)
MASK_MODELS: dict[str, MaskModelRow] = {row.name: row for row in _ROWS}
