"""What an export was made from: its configuration, its data and the licences of both."""

from __future__ import annotations

import json
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


def write_provenance(folder: Path, rows: Dataset, config: Any) -> dict[str, Any]:
    """Write ``config.yaml`` and ``data.json``; returns the content of the latter.

    ``data.json`` holds the manifest hash and the licences of the data, and the licences of the weights that training
    started from.
    """
    (folder / "config.yaml").write_text(to_yaml(config))
    data = {"path": rows.path, "rows": len(rows), "sha256": rows.fingerprint(), "licenses": rows.licenses}
    data["weights_licenses"] = licenses_of_weights(config)
    (folder / "data.json").write_text(json.dumps(data, indent=2) + "\n")
    return data


def provenance_lines(data: dict[str, Any]) -> list[str]:
    """Lines of a model card about the data."""
    return [
        f"- data: `{data['path']}`, {data['rows']} samples, manifest sha256 `{data['sha256']}`",
        f"- licences of the data: {', '.join(data['licenses']) or 'not recorded'}",
    ]
