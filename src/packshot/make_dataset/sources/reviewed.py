"""Masks that come back from a review: only those that a person edited or approved count."""

from __future__ import annotations

import json

from packshot.config.schema import SourceConfig
from packshot.errors import ConfigError
from packshot.make_dataset.sources.walk import open_path
from packshot.runs.files import sha256

APPROVED = "approved.txt"  # names of masks that are right as they are, one a line
WRITTEN = "review.json"  # digests of the masks as they were written


def looked_at(source: SourceConfig, masks: dict[str, str], notes: list[str]) -> dict[str, str]:
    """Without the masks that ``task=review_masks`` wrote and that nobody has edited or approved since.

    Raises:
        ConfigError: none is left.
    """
    fs, root = open_path(source.masks or "")
    record = f"{root}/{WRITTEN}"
    if not fs.exists(record):
        return masks
    written = json.loads(fs.cat_file(record))
    approved: set[str] = set()
    if fs.exists(f"{root}/{APPROVED}"):
        approved.update(fs.cat_file(f"{root}/{APPROVED}").decode("utf-8-sig").splitlines())
    kept = {}
    edited = 0
    for name, place in masks.items():
        changed = sha256(fs.cat_file(f"{root}/{name}")) != written.get(name)
        edited += changed
        if changed or name in approved:
            kept[name] = place
    if not kept:
        raise ConfigError(
            f"source.masks={source.masks}: none of its {len(masks)} masks was edited, and {APPROVED} names none.",
            "Edit masks under their own names, or save the page's list of right masks there.",
        )
    notes.append(
        f"source.masks: {edited} masks edited, {len(kept) - edited} approved, {len(masks) - len(kept)} neither and not "
        f"used ({WRITTEN}, {APPROVED})"
    )
    return kept
