"""What generate.py has to make: one job for each product, or for each row of a campaign."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from packshot.config.schema import Generate
from packshot.dataset.walk import Unread, hidden, walk
from packshot.errors import ConfigError
from packshot.generate.group import Group, make_group
from packshot.imaging.files import IMAGE_SUFFIXES, is_image, pair_masks
from packshot.runs.files import readable
from packshot.runs.folder import log
from packshot.scene import Scene


@dataclass(frozen=True)
class Job:
    """The pictures of one product under one request.

    name: what the names of its files begin with. config: its settings. where: names it in messages. group: the
    products that ``product`` shows together, if it is a picture of several.
    """

    name: str
    product: Path
    mask: Path | None
    config: Generate
    where: str
    group: Group | None = None

    @property
    def request(self) -> Scene | str:
        """The free prompt, or the Scene of ``scene.*`` (an empty one asks for nothing in particular)."""
        return self.config.prompt or Scene.from_dict(asdict(self.config.scene))


def product_jobs(config: Generate) -> list[Job]:
    """A job for each product that the config names.

    Raises:
        ConfigError: a file is missing, or the masks do not belong to the products.
    """
    files = product_files("product", config.product)
    masks = mask_files(config.mask, files, folder_of("product", config.product))
    if config.together:
        return [group_job(config, files, masks, Path(config.product).resolve().name, config.product)]
    return [Job(name, file, masks[file], config, str(file)) for name, file in unique_names(files)]


def group_job(config: Generate, files: list[Path], masks: dict[Path, Path | None], name: str, where: str) -> Job:
    """One job for all products together. Raises what :func:`packshot.generate.group.make_group` does."""
    group = make_group(files, masks, config.matte)
    return Job(name, group.file, None, config, where, group)


def folder_of(key: str, path: str) -> Path | None:
    """The folder that a key names, or None where it names a file."""
    found = readable(key, path)
    return found if found.is_dir() else None


def product_files(key: str, path: str) -> list[Path]:
    """The file itself, or the images of a folder and of those below it, in the order of their paths.

    Hidden files and those of the system are left out, links to folders are followed, as build_data.py does it. What is
    left out is counted on the screen.

    Raises:
        ConfigError: the path does not exist or the folder has no images.
    """
    found = readable(key, path)
    if found.is_file():
        return [found]
    unread = Unread(key=f"{key}={path}")
    files = images_below(found, unread)
    for line in unread.lines():
        log.warning("%s", line)
    if not files:
        raise ConfigError(f"{key}={path} has no images.", f"Looked for {', '.join(IMAGE_SUFFIXES)}.")
    return files


def images_below(folder: Path, unread: Unread) -> list[Path]:
    """The pictures below a folder, in the order of their paths."""
    files = []
    for path in walk(str(folder), unread):
        file = Path(path)
        inside = str(file.relative_to(folder))
        if not is_image(file):
            continue
        if hidden(inside):
            unread.add("hidden or the system's", inside)
        elif not file.is_file():
            unread.add("not regular files", inside)
        else:
            files.append(file)
    return sorted(files)


def unique_names(files: list[Path]) -> list[tuple[str, Path]]:
    """(name, file): the stem, the file name where files share a stem, or the folder's name before it where they share
    that too.

    Raises:
        ConfigError: two files cannot be told apart by these names.
    """
    stems = Counter(file.stem for file in files)
    names = Counter(file.name for file in files)
    named = []
    taken: dict[str, Path] = {}
    for file in files:
        name = file.stem if stems[file.stem] == 1 else file.name
        if names[file.name] > 1:
            name = f"{file.parent.name}-{file.name}"
        if name in taken:
            raise ConfigError(f"product: {taken[name]} and {file} would get the same name {name}.", "Rename one.")
        taken[name] = file
        named.append((name, file))
    return named


def mask_files(mask: str | None, files: list[Path], root: Path | None = None) -> dict[Path, Path | None]:
    """The mask of every product: none, one file for one product, or a folder with a picture of the same path for each.

    root: the folder of the products, to which their paths are relative; by default they all lie in one.

    Raises:
        ConfigError: one mask for several products, a folder that lacks some, or several masks for one.
    """
    if mask is None:
        return dict.fromkeys(files)
    found = readable("mask", mask)
    if found.is_file():
        if len(files) > 1:
            raise ConfigError(f"mask={mask} is one file for {len(files)} products.", "Give a folder of masks.")
        return {files[0]: found}
    inside = {file: str(file.relative_to(root)) if root else file.name for file in files}
    masks = [str(path.relative_to(found)) for path in images_below(found, Unread(key=f"mask={mask}"))]
    pairs = pair_masks(f"mask={mask}", inside.values(), masks)
    missing = [name for name in inside.values() if name not in pairs]
    if missing:
        raise ConfigError(f"mask={mask} has no mask for {', '.join(missing[:5])}.", "File names must agree.")
    return {file: found / pairs[name] for file, name in inside.items()}
