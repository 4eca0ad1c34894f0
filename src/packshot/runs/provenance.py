"""What an export was made from: its configuration, its data and the licences of both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from packshot.config.compose import to_yaml
from packshot.runs.licenses import licenses_of_weights


class Dataset(Protocol):
    """The identity of a dataset."""

    path: str
    licenses: list[str]

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Digest over all samples, in order."""
        ...


def write_provenance(
    folder: Path, rows: Dataset, config: Any, sets: Sequence[Mapping[str, object]] = ()
) -> dict[str, Any]:
    """Write ``config.yaml`` and ``data.json``; returns the content of the latter.

    ``data.json`` holds the manifest hash and the licences of the data, each set of it, and the licences of the weights
    that training started from. sets: a record for each set that ``rows`` were read from.
    """
    (folder / "config.yaml").write_text(to_yaml(config))
    data = {"path": rows.path, "rows": len(rows), "sha256": rows.fingerprint(), "licenses": rows.licenses}
    if sets:
        data["sets"] = [dict(one) for one in sets]
    data["weights_licenses"] = licenses_of_weights(config)
    (folder / "data.json").write_text(json.dumps(data, indent=2) + "\n")
    return data


def provenance_lines(data: dict[str, Any]) -> list[str]:
    """Lines of a model card about the data."""
    lines = [f"- data: `{data['path']}`, {data['rows']} samples, manifest sha256 `{data['sha256']}`"]
    sets = data.get("sets", ())
    if len(sets) > 1 or any(one["shown_per_epoch"] != one["rows"] or one["prefix"] for one in sets):
        lines += [set_line(one) for one in sets]
    return [*lines, f"- licences of the data: {', '.join(data['licenses']) or 'not recorded'}"]


def set_line(one: Mapping[str, Any]) -> str:
    """One set in a model card."""
    line = f"  - `{one['path']}`: {one['rows']} samples at {one['shown_per_epoch']} places of an epoch"
    if one["prefix"]:
        line += f", each caption after `{one['prefix']}`"
    return f"{line}; licences: {', '.join(one['licenses'])}; sha256 `{one['sha256']}`"
