"""One row for each named way to find a product's mask, a value of ``matte.model``; other values are ONNX files.

docs/decisions.md explains why the rows live here.
"""

from __future__ import annotations

from dataclasses import dataclass

from packshot.lists import by_name


@dataclass(frozen=True)
class MaskModelRow:
    """A way to find masks.

    about: for ``--help``. weights: the folder of its network, or None. public: the network comes from the package
    rembg, which the extra ``matting`` installs and which fetches the file once. license: that of a public network.
    """

    name: str
    about: str
    weights: str | None = None
    public: bool = False
    license: str | None = None


MINI = "data/models/matting"

_ROWS = (
    MaskModelRow("auto", "the family's network, or GrabCut alone where that is not installed", MINI),
    MaskModelRow("mini", "the family's network", MINI),
    MaskModelRow("grabcut", "GrabCut alone"),
    MaskModelRow("isnet-general-use", "IS-Net, from rembg (the extra matting)", public=True, license="apache-2.0"),
    MaskModelRow("birefnet-general", "BiRefNet, from rembg (the extra matting)", public=True, license="mit"),
)
MASK_MODELS: dict[str, MaskModelRow] = by_name(_ROWS)


def reads_onnx(model: str) -> bool:
    """Whether a value of ``matte.model`` is a public network or an ONNX file, and not the family's way."""
    row = MASK_MODELS.get(model)
    return row is None or row.public
