"""Which weights made a picture: names and SHA-256 of files, for certificates."""

from __future__ import annotations

from pathlib import Path

from packshot.base.load import model_folder
from packshot.base.places import find_place
from packshot.config.schema import ModelConfig
from packshot.generate.json_types import Json
from packshot.runs.files import file_sha256


def file_hashes(place: Path) -> dict[str, str]:
    """SHA-256 by relative name of a folder's weights and JSON configs, or of a file."""
    if place.is_file():
        return {place.name: file_sha256(place)}
    hashes = {}
    for file in sorted(place.rglob("*")):
        if file.suffix in (".safetensors", ".json") and file.is_file():
            hashes[file.relative_to(place).as_posix()] = file_sha256(file)
    return hashes


def certified_name(folder: Path) -> str:
    """The name of a folder in certificates: its last part, and its parent's where that part is just ``export``.

    Certificates are handed out, and the rest of a path would show them the machine. The hashes identify the content.
    """
    parts = folder.resolve().parts
    return "/".join(parts[-2:]) if parts[-1] == "export" else parts[-1]


def describe_weights(value: str) -> Json:
    """Name and SHA-256 of a base or VAE."""
    folder = model_folder(ModelConfig(base=value))
    if folder is not None:
        used = {n: h for n, h in file_hashes(folder).items() if not n.endswith(".json")}
        return {"name": certified_name(folder), "files": used}
    from huggingface_hub import snapshot_download

    place = find_place("model.base", value)
    # The snapshot's folder is named by its commit; it was downloaded a moment ago, so this asks nobody.
    copied = snapshot_download(place.repository, revision=place.revision, local_files_only=True)
    return {"name": value, "revision": Path(copied).name}
