"""A part of the training samples that is held out for validation: the same one in every run on these samples."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock
from PIL import Image

from packshot.dataset.near_duplicates import Groups, color_map, join_near, perceptual_hash
from packshot.dataset.rows import Rows
from packshot.errors import PackshotError
from packshot.imaging.decode import flatten
from packshot.runs.cores import cores
from packshot.runs.files import replacing_file, writing
from packshot.runs.folder import log
from packshot.runs.progress import progress

NEAR = 4  # bits of the perceptual hash, as quality.duplicate_distance of build_data.py
MOST_HELD = 256  # samples: validation reads fewer, and the rest would be lost to training
LARGEST = 0.5  # of the samples: a group above it is never held out
READ_SIDE = 256  # px: JPEGs are decoded at no more than they need for the hash
VERSION = 1  # raise it when the same picture gives another hash

ONE_PRODUCT = "its only product"
ONE_LOOK = "near-duplicates"

Look = tuple[int, bytes]  # perceptual hash and colour map of a picture


def choose(rows: Rows, owners: Sequence[int], share: float, cache: str) -> list[int]:
    """Indices of the samples that are held out, in order.

    A group (near-duplicates, and rows with one ``product_id``) is held out whole, by a hash of the first of its ids: so
    a sample stays on its side when others join the set. If all samples are one group, as those of one product are,
    near-duplicates alone stay together; if they all are, each sample is a group.

    owners: the set of each sample; no set is held out whole. share: about this part of the groups is held out, and at
    least one. cache: folder in which the hashes of the pictures are kept.

    Raises:
        PackshotError: a picture is broken, or the hashes cannot be kept.
    """
    count = len(rows)
    looks = read_looks(rows, Path(cache))
    for roots, apart in ((with_products(rows, looks), ""), (near_only(looks), ONE_PRODUCT), (range(count), ONE_LOOK)):
        if len(set(roots)) > 1:
            if apart:
                log.warning("the hold-out for validation shares %s with the training samples: there is no other", apart)
            return sorted(held_out(rows.ids, roots, owners, share))
    return []


def near_only(looks: Sequence[Look]) -> list[int]:
    """The group of each sample, by near-duplicates."""
    return roots_of(near_groups(looks), len(looks))


def with_products(rows: Rows, looks: Sequence[Look]) -> list[int]:
    """The group of each sample, by near-duplicates and ``product_id``."""
    groups = near_groups(looks)
    first: dict[object, int] = {}
    for index, product in enumerate(rows.column("product_id") or ()):
        if product:
            groups.join(index, first.setdefault(product, index))
    return roots_of(groups, len(looks))


def near_groups(looks: Sequence[Look]) -> Groups:
    """Near-duplicates joined."""
    groups = Groups(len(looks))
    hashes = [value for value, _ in looks]
    join_near(groups, hashes, NEAR, [colors for _, colors in looks])
    return groups


def roots_of(groups: Groups, count: int) -> list[int]:
    """The root of each of so many members."""
    return [groups.root(index) for index in range(count)]


def held_out(ids: Sequence[str], roots: Sequence[int], owners: Sequence[int], share: float) -> list[int]:
    """The samples of the groups that are held out. roots: the group of each sample."""
    members: dict[int, list[int]] = {}
    for index, root in enumerate(roots):
        members.setdefault(root, []).append(index)
    left = Counter(owners)
    found: list[int] = []
    most = min(MOST_HELD, LARGEST * len(ids))
    for position, group in sorted((hash_position(ids, group), group) for group in members.values()):
        if found and position >= share:
            break
        lost = Counter(owners[index] for index in group)
        empties = any(left[owner] <= count for owner, count in lost.items())
        if empties or len(found) + len(group) > most:
            continue
        left -= lost
        found += group
    return found


def hash_position(ids: Sequence[str], group: Sequence[int]) -> float:
    """A number from 0 to 1 that follows from the ids of a group."""
    first = min(ids[index] for index in group)
    return int.from_bytes(hashlib.sha256(f"held out {first}".encode()).digest()[:8], "big") / 2**64


# ---- what the pictures look like ----


def read_looks(rows: Rows, cache: Path) -> list[Look]:
    """The look of every picture, read once and kept in ``cache``; other processes wait for the one that reads."""
    pictures = hashlib.sha256(repr((VERSION, [rows.picture_digest(index) for index in range(len(rows))])).encode())
    path = cache / f"looks-{pictures.hexdigest()[:16]}.json"
    with writing(str(path), "data.cache_dir names another folder, and data.validation a set of its own."):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{path.name}.lock", mode=0o666):
            if not path.exists():
                found = look_at_all(rows)
                with replacing_file(path) as temporary:
                    temporary.write_text(json.dumps([[value, colors.hex()] for value, colors in found]))
            return [(value, bytes.fromhex(colors)) for value, colors in json.loads(path.read_text())]


def look_at_all(rows: Rows) -> list[Look]:
    """The look of every picture; threads decode, which does not hold the interpreter."""
    found: list[Look] = []
    with (
        ThreadPoolExecutor(min(8, cores())) as pool,
        progress("comparing pictures for the hold-out", len(rows)) as advance,
    ):
        for one in pool.map(lambda index: look(rows, index), range(len(rows))):
            found.append(one)
            advance()
    return found


def look(rows: Rows, index: int) -> Look:
    """The look of one picture. Raises PackshotError if it is broken."""
    try:
        image = Image.open(io.BytesIO(rows.encoded("image", index)))
        image.draft("RGB", (READ_SIDE, READ_SIDE))
        flat = image.convert("RGB") if image.mode in ("RGB", "L") else flatten(image.convert("RGBA"))
    except (OSError, Image.DecompressionBombError) as error:
        raise PackshotError(
            f"{rows.path}: sample {rows.ids[index]} has a broken image ({error}).", "Build the dataset again."
        ) from error
    return perceptual_hash(flat), color_map(flat)
