"""Which files are pictures, and which mask belongs to which picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePath, PurePosixPath

from packshot.errors import ConfigError

# Which files of a folder are offered to the decoder; their content decides what they are.
IMAGE_SUFFIXES = tuple(".png .jpg .jpeg .jpe .jfif .webp .tif .tiff .bmp .gif .ppm .pgm .avif .jp2 .heic .heif".split())


def is_image(path: str | PurePath) -> bool:
    """Whether a file has the name of a picture; hidden files do not."""
    parts = PurePosixPath(path)
    return parts.suffix.lower() in IMAGE_SUFFIXES and not parts.name.startswith(".")


def pair_masks(key: str, images: Iterable[str], masks: Iterable[str]) -> dict[str, str]:
    """The mask of every image that has one: of its own name, or of its stem. Paths inside their folders.

    Raises:
        ConfigError: several masks could be meant; ``key`` names their owner.
    """
    names, by_stem = set(images), defaultdict(list)
    for mask in masks:
        by_stem[stem_of(mask)].append(mask)
    pairs = {}
    for image in sorted(names):
        found = by_stem.get(stem_of(image), [])
        if image in found and names.issuperset(found):  # a.jpg and a.png are two pictures, each with its own mask
            pairs[image] = image
        elif len(found) > 1:
            raise ConfigError(f"{key} has several masks for {image}: {', '.join(found)}.", "Leave the right one.")
        elif found:
            pairs[image] = found[0]
    return pairs


def stem_of(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))
