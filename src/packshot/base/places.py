"""Where weights lie: a file, a folder, or a folder or file of a repository on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from packshot.errors import ConfigError, first_line
from packshot.lists import ending
from packshot.runs.files import resolve
from packshot.runs.folder import log

HUB_SECONDS = 3.0  # the hub has to answer within this, otherwise what was fetched earlier is used
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
# owner/name, then perhaps a folder or file, then perhaps a branch, tag or commit
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)((?:/[\w .+-]+)*)(?:@([\w./-]+))?")
WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model|pytorch_model)"
    r"(-\d+-of-\d+)?(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.(?P<suffix>safetensors|bin)"
)


@dataclass(frozen=True)
class Place:
    """Where the weights lie that a value of the config names.

    key, value: as in the config. path: the local file or folder; None for the hub. repository, inside, revision: the
    repository, a folder or file inside it, and a branch, tag or commit; for the hub.
    """

    key: str
    value: str
    path: Path | None
    repository: str = ""
    inside: str = ""
    revision: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether it names a file of weights and not a folder."""
        if self.path is not None:
            return self.path.is_file()
        return self.inside.endswith(WEIGHT_SUFFIXES)

    def below(self, subfolder: str | None) -> Place:
        """The place of a folder inside this one."""
        if not subfolder:
            return self
        if self.path is not None:
            return Place(self.key, self.value, self.path / subfolder)
        inside = f"{self.inside}/{subfolder}" if self.inside else subfolder
        return Place(self.key, self.value, None, self.repository, inside, self.revision)

    def names(self) -> list[str]:
        """Names of the files in this folder, without those of its subfolders; [] if there is no such folder.

        Raises:
            ConfigError: the repository cannot be read.
        """
        if self.path is not None:
            if not self.path.is_dir():
                return []
            return sorted(file.name for file in self.path.iterdir() if file.is_file())
        names = []
        for file in repository_files(f"{self.key}={self.value}", self.repository, self.revision):
            path = PurePosixPath(file)
            if str(path.parent) == (self.inside or "."):
                names.append(path.name)
        return sorted(names)

    def fetch(self, names: Sequence[str] = ()) -> Path:
        """The local path of this file, or of this folder with at least these files in it.

        Raises:
            ConfigError: the hub does not answer and the files were not fetched earlier.
        """
        if self.path is not None:
            return self.path
        files = [self.inside] if self.is_file else [f"{self.inside}/{name}".lstrip("/") for name in names]
        return fetch_files(f"{self.key}={self.value}", self.repository, self.revision, files) / self.inside


def find_place(key: str, value: str) -> Place:
    """The place that a config value names: an existing path, or ``owner/name[/folder or file][@revision]`` on the hub.

    Raises:
        ConfigError: it is neither.
    """
    path = resolve(value)
    if path.exists():
        return Place(key, value, path.absolute())
    named = HUB_NAME.fullmatch(value)
    if named is None or value.startswith((".", "~", "data/", "outputs/")):
        raise ConfigError(
            f"{key}={value}: there is no such file or folder.",
            f"Looked for {path.absolute()}. On the hub it would be owner/name[/folder][@revision].",
        )
    return Place(key, value, None, named[1], named[2].strip("/"), named[3])


def fetch_model(key: str, value: str) -> Path:
    """The local path of a whole model in one folder, as transformers reads it.

    Raises:
        ConfigError: there is none, or the hub does not answer and it was not fetched earlier.
    """
    place = find_place(key, value)
    names = place.names()
    _, weights = choose_weights(names)
    return place.fetch([*ending(names, ".json", ".txt", ".model", ".jinja"), *weights])


def choose_weights(names: Iterable[str], variant: str | None = None) -> tuple[str | None, list[str]]:
    """(variant, file names) of the weights that are loaded from a folder.

    ``variant`` if the folder has it, else the plain files, else fp16, else the first other variant in the alphabet;
    safetensors wherever there are some. ([] of files: the folder has no weights.)
    """
    found: dict[str, dict[str | None, list[str]]] = {"safetensors": {}, "bin": {}}
    for name in names:
        weights = WEIGHTS.fullmatch(name)
        if weights:
            found[weights["suffix"]].setdefault(weights["variant"], []).append(name)
    for variants in found.values():
        for wanted in (variant, None, "fp16", *sorted(filter(None, variants))):
            if wanted in variants:
                return wanted, sorted(variants[wanted])
    return None, []


# ---- the hub ----


@cache
def hub_answers() -> bool:
    """Whether the hub can be asked; tried once per process, for a few seconds at most."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS).raise_for_status()  # a proxy may refuse it
    except Exception as error:  # of the HTTP library in use, which has changed between versions of huggingface_hub
        reason = first_line(error)
        log.warning("the hub does not answer (%s): only what was fetched earlier is used", reason)
        return False
    return True


@cache
def repository_files(key: str, repository: str, revision: str | None) -> tuple[str, ...]:
    """The files of a repository, by their paths in it; without the hub those that were fetched earlier.

    Raises:
        ConfigError: there is no such repository or revision, or it may not be read; names ``key``.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not hub_answers():
        folder = fetch_files(key, repository, revision, [])
        return tuple(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    try:
        return tuple(HfApi().list_repo_files(repository, revision=revision))
    except (HfHubHTTPError, ValueError) as error:
        raise refused_by_hub(key, repository, revision, error) from error


def fetch_files(key: str, repository: str, revision: str | None, files: Sequence[str]) -> Path:
    """The local copy of a repository that has at least these files.

    Raises:
        ConfigError: they cannot be fetched, and were not fetched earlier.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    offline = not hub_answers()
    try:
        copied = snapshot_download(repository, revision=revision, allow_patterns=list(files), local_files_only=offline)
    except LocalEntryNotFoundError as error:
        raise unreachable(key, repository, revision) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise refused_by_hub(key, repository, revision, error) from error
    folder = Path(copied)
    if offline and not all((folder / file).exists() for file in files):
        raise unreachable(key, repository, revision)
    return folder


def unreachable(key: str, repository: str, revision: str | None) -> ConfigError:
    """The error where the hub does not answer and its files were not fetched earlier."""
    named = f"{repository}@{revision}" if revision else repository
    return ConfigError(
        f"{key}: there is no local path of that name; {named} was not fetched from the hub, which does not answer.",
        f"Fetch it where the hub answers (hf download {repository}), or name a local file or folder.",
    )


def refused_by_hub(key: str, repository: str, revision: str | None, error: Exception) -> ConfigError:
    """The error for a repository, a revision or a file that the hub refuses."""
    named = f"{repository}@{revision}" if revision else repository
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
    return ConfigError(
        f"{key}: the hub refuses {named} ({type(error).__name__}: {reason}).",
        "Check the spelling; some repositories want their licence accepted and a token (hf auth login).",
    )
