"""Keys of the files that generate.py hands over: format, largest size, and the rules of a marketplace."""

from __future__ import annotations

from dataclasses import dataclass

from packshot.config.keys import Names, opt

BEST_QUALITY = 95  # where none is asked for
LOWEST_QUALITY = 30  # below it blocks show in even areas, and a smaller picture is the better way


@dataclass(frozen=True)
class FormatRow:
    """A file format. media_type: its name on the web. has_quality: whether it loses detail to save bytes."""

    media_type: str
    has_quality: bool


FORMATS = {
    "png": FormatRow("image/png", has_quality=False),
    "jpg": FormatRow("image/jpeg", has_quality=True),
    "webp": FormatRow("image/webp", has_quality=True),
}
OutputFormat = Names("OutputFormat", list(FORMATS))


@dataclass(frozen=True)
class StandardRow:
    """What a marketplace asks of a main picture.

    background: colour of every pixel that shows no product. min_share: of the frame's side that the product's relative
    larger side takes. min_side: px of the picture's longer side.
    """

    background: tuple[int, int, int]
    min_share: float
    min_side: int


STANDARDS = {"marketplace_main": StandardRow((255, 255, 255), min_share=0.85, min_side=1600)}
Standard = Names("Standard", list({"none": None, **STANDARDS}))


@dataclass
class OutputConfig:
    format: OutputFormat = opt(
        OutputFormat.png,
        "file that is handed over, in sRGB; jpg and webp lie next to the PNG, and the certificate has their difference",
    )
    quality: int | None = opt(
        None, f"highest quality of jpg and webp; default {BEST_QUALITY}", min=LOWEST_QUALITY, max=100
    )
    max_bytes: int | None = opt(
        None,
        f"largest file; jpg and webp then take the best quality that fits, from {LOWEST_QUALITY}, and a file that "
        "cannot be so small is refused",
        min=1,
    )
    standard: Standard = opt(
        Standard.none, "rules that the written file is checked against; preset=marketplace_main sets all that they need"
    )
