"""From ``conf/`` and command-line overrides to one validated dataclass."""

from __future__ import annotations

import copy
import dataclasses
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

from packshot.config.checks import validate
from packshot.config.keys import Hint, describe, fields, nearest
from packshot.config.renamed import refuse_renamed
from packshot.config.schema import SCRIPTS
from packshot.errors import ConfigError
from packshot.lists import map_values

Settings = TypeVar("Settings")

CONF = Path(str(files("packshot.conf")))  # the checkout's conf/, or the wheel's copy of it
HELP = "--help lists the keys."
LAUNCH = "launch"  # configs of accelerate and Slurm, which are not options of a script
# By the start of its name, the script that a shipped experiment is for.
EXPERIMENTS = {
    "lora_": "train_lora",
    "ip_adapter_": "train_ip_adapter",
    "controlnet_": "train_controlnet",
    "captioner_": "caption_vlm",
}


def groups(config_dir: Path | None = None) -> list[str]:
    """Config groups: folders of ``conf/`` and of ``config_dir``, from which ``group=option`` picks a file."""
    names: set[str] = set()
    for folder in filter(None, (CONF, config_dir)):
        names.update(path.parent.name for path in folder.glob("*/*.yaml"))
    return sorted(names - {LAUNCH})


def options(group: str, config_dir: Path | None = None) -> list[str]:
    """The choices of a group, by name."""
    names: set[str] = set()
    for folder in filter(None, (CONF, config_dir)):
        names.update(path.stem for path in (folder / group).glob("*.yaml"))
    return sorted(names)


def chosen_by_default(script: str) -> dict[str, Any]:
    """What the files that a script takes by default set, by the key; read without Hydra, for ``--help``."""
    import yaml

    found: dict[str, Any] = {}
    for row in yaml.safe_load((CONF / f"{script}.yaml").read_text(encoding="utf-8"))["defaults"]:
        for group, option in row.items() if isinstance(row, dict) else ():
            file = CONF / group / f"{option}.yaml"
            if file.is_file():
                values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
                found |= {f"{group}.{key}": value for key, value in values.items()}
    return found


def refuse_another_scripts(experiment: str, script: str) -> None:
    """Many keys of an experiment stand in other scripts' configs too, where they would be taken without a word.

    Raises:
        ConfigError: a shipped experiment is for another script.
    """
    if not (CONF / "experiment" / f"{experiment}.yaml").is_file():
        return
    for start, owner in EXPERIMENTS.items():
        if experiment.startswith(start) and owner != script:
            raise ConfigError(
                f"experiment={experiment} is for {owner}.py, not for {script}.py.",
                f"Run python {owner}.py experiment={experiment}.",
            )


def parents(keys: Iterable[str]) -> set[str]:
    """The groups of dotted keys: ``a`` and ``a.b`` of ``a.b.c``."""
    found: set[str] = set()
    for key in keys:
        while "." in key:
            key = key.rpartition(".")[0]
            found.add(key)
    return found


def check_override(override: str, keys: Mapping[str, str], config_dir: Path | None) -> None:
    """Refuses an override whose key or group option does not exist, and names the nearest that does.

    keys: what each key takes, in words.
    """
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"{override!r} is not an override.", f"Write key=value; {HELP}")
    key = key.lstrip("+~")
    if key in groups(config_dir):
        known = options(key, config_dir)
        if value and value not in (*known, "null"):
            close = nearest(value, known)
            suggestion = f"Did you mean {key}={close}? " if close else ""
            raise ConfigError(
                f"{key}={value}: there is no conf/{key}/{value}.yaml.",
                f"{suggestion}{key} takes {', '.join(known) or 'null'}.",
            )
    elif key not in keys and key not in parents(keys):
        refuse_renamed(key, keys, value)
        raise unknown_key(key, keys, groups(config_dir))


def unknown_key(key: str, keys: Mapping[str, str], others: Sequence[str] = ()) -> ConfigError:
    """The error for a key that does not exist. others: names that are not keys, but that could be meant."""
    close = nearest(key, [*keys, *others])
    hint = f"Did you mean {close} ({keys.get(close, 'a config group')})?" if close else HELP
    return ConfigError(f"There is no key {key!r}.", hint)


def described(schema: type) -> dict[str, str]:
    """What each key of a script takes, by the key."""
    return {key: describe(field, hint) for key, field, hint in fields(schema)}


QUOTED = re.compile(r"""'(\\.|[^'\\])*'|"(\\.|[^"\\])*\"""", re.DOTALL)


def is_text(hint: Hint) -> bool:
    """Whether a key takes text, or text or null."""
    return hint is str or (str in get_args(hint) and get_origin(hint) is not list)


def is_lone_text(field: dataclasses.Field, hint: Hint) -> bool:
    """Whether a key takes a list of texts, for which a text alone stands too."""
    return bool(field.metadata.get("lone")) and get_args(hint) == (str,)


def quoted(override: str, texts: Collection[str], lists: Collection[str] = ()) -> str:
    """The override with the value of a text key quoted, so that Hydra's grammar leaves it as it was typed.

    Commas, apostrophes, brackets and letters of every alphabet are normal in prompts and file names. ``null``,
    interpolations and values that are already quoted are left to Hydra. lists: keys that take a text alone as well as
    a list in brackets.
    """
    key, _, value = override.partition("=")
    name = key.lstrip("+")
    ready = value == "null" or "${" in value or QUOTED.fullmatch(value)
    if name not in texts and (name not in lists or value.startswith("[")):
        return override
    if ready:
        return override
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)  # backslashes are literal to Hydra except before a quote
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"{key}='{escaped}'"


def value_of_group(key: str, keys: Iterable[str]) -> ConfigError:
    """The error for a value that is given to a group of keys."""
    members = [name for name in keys if name.startswith(f"{key}.")]
    return ConfigError(f"{key} is a group of keys and takes no value.", f"Set {', '.join(members[:4])}, …")


def find_value(values: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key in nested values; None where it or one of its groups is missing.

    Raises:
        ConfigError: a group of the key has a value instead of keys.
    """
    found: Any = values
    path = ""
    for part in key.split("."):
        if found is not None and not isinstance(found, Mapping):
            raise value_of_group(path, [key])
        found = found.get(part) if found else None
        path = f"{path}.{part}".lstrip(".")
    return found


def with_lists(values: Mapping[str, Any], schema: type) -> dict[str, Any]:
    """Nested values of a script's keys, where a value alone has become a list for keys that take one of those too.

    Raises:
        ConfigError: a group of keys has a value.
    """
    whole = copy.deepcopy(dict(values))
    for key, field, _ in fields(schema):
        value = find_value(whole, key)
        if field.metadata.get("lone") and isinstance(value, (str, int, float)):
            group, _, name = key.rpartition(".")
            (find_value(whole, group) if group else whole)[name] = [value]
    return whole


def refuse_numbers(values: Mapping[str, Any], schema: type) -> None:
    """A key that takes true or false takes 1 and 0 too, but no other number, which OmegaConf would read as true.

    Raises:
        ConfigError: it has one.
    """
    for key, field, hint in fields(schema):
        value = find_value(values, key)
        if hint is bool and value not in (None, True, False) and isinstance(value, (int, float)):
            raise wrong_value(key, str(value), hint, describe(field, hint))


def wrong_value(key: str, value: str, hint: Hint, takes: str) -> ConfigError:
    """The error for a value of the wrong kind."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        allowed = ", ".join(hint.__members__)
        return ConfigError(f"{key}={value} is not an allowed value.", f"Allowed are {allowed}.")
    return ConfigError(f"{key}={value} has a value of the wrong type.", f"{key} takes {takes}.")


def explain(error: Exception, schema: type, overrides: Sequence[str]) -> ConfigError:
    """A Hydra or OmegaConf exception as an error message with the key, the value and what is allowed."""
    from hydra.errors import OverrideParseException

    messages: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        messages.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(messages)
    keys = described(schema)
    found = re.search(r"full_key: ([\w.\[\]]+)", text) or re.search(r"Key '([^']+)' (?:is )?not in", text)
    key = re.sub(r"\[\d+\]$", "", found.group(1)) if found else ""
    if key in keys:
        given = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
        quoted_value = re.search(r"[Vv]alue '([^']*)'", text)  # of a YAML file
        value = given.get(key) or (quoted_value.group(1) if quoted_value else "…")
        hint = next(hint for name, _, hint in fields(schema) if name == key)
        return wrong_value(key, value, hint, keys[key])
    if key in parents(keys):
        return value_of_group(key, keys)
    if key:
        refuse_renamed(key, keys)
        return unknown_key(key, keys)
    hint = f"Overrides are key=value; {HELP}"
    if isinstance(error, OverrideParseException):
        hint = "Put unusual characters in quotes, and those in quotes for the shell: \"key=['a, b.png']\"."
    first = messages[0].strip().partition("\n")[0] or type(error).__name__
    return ConfigError(f"The configuration cannot be read: {first}", hint)


@contextmanager
def experiment_files(overrides: Sequence[str]) -> Iterator[tuple[list[str], Path | None]]:
    """The overrides with ``experiment=<path>.yaml`` as a group option, and the config folder that holds the option.

    Raises:
        ConfigError: the file does not exist.
    """
    with tempfile.TemporaryDirectory(prefix="packshot-") as folder:
        named: list[str] = []
        found = False
        for override in overrides:
            key, _, value = override.partition("=")
            if key.lstrip("+") == "experiment" and value.endswith((".yaml", ".yml")):
                file = Path(value).expanduser()
                if not file.is_file():
                    raise ConfigError(f"experiment={value}: there is no such file.", f"Looked for {file.absolute()}.")
                (Path(folder) / "experiment").mkdir(exist_ok=True)
                shutil.copyfile(file, Path(folder) / "experiment" / f"{file.stem}.yaml")
                override = f"{key}={file.stem}"
                found = True
            named.append(override)
        yield named, Path(folder) if found else None


def compose(script: str, overrides: Sequence[str], config_dir: Path | None = None) -> Any:
    """The validated config dataclass of a script.

    config_dir: a folder laid out as ``conf/``, whose files are found in addition to the shipped ones.

    Raises:
        ConfigError: for an unknown key (also inside a YAML file), a wrong type, a value out of range, or values that
            contradict each other; with the key, the value, what is allowed and the nearest right key.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    schema = SCRIPTS[script]
    keys = described(schema)
    texts = {key for key, _, hint in fields(schema) if is_text(hint)}
    lists = {key for key, field, hint in fields(schema) if is_lone_text(field, hint)}
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: there is no such folder.", "Name a folder laid out as conf/.")
    with experiment_files(overrides) as (named, own_dir):
        for override in named:
            if not (own_dir and override.partition("=")[0].lstrip("+") == "experiment"):
                check_override(override, keys, config_dir)
            if override.lstrip("+").startswith("experiment="):
                refuse_another_scripts(override.partition("=")[2], script)
        given = list(map(partial(quoted, texts=texts, lists=lists), named))
        folders = [f"'file://{folder.absolute()}'" for folder in (own_dir, config_dir) if folder]
        if folders:
            given.append(f"hydra.searchpath=[{','.join(folders)}]")
        # Hydra composes plain values, because a list key may also be given a value alone; the schema checks the result.
        defaults = OmegaConf.to_container(OmegaConf.structured(schema), enum_to_str=True)
        ConfigStore.instance().store(name=f"{script}_schema", node=defaults)
        try:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                node = hydra_compose(script, given)
            values = cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True))
            refuse_numbers(values, schema)
            config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), with_lists(values, schema)))
        except (HydraException, OmegaConfBaseException) as error:
            raise explain(error, schema, overrides) from error
    validate(config)
    return config


def to_yaml(config: object) -> str:
    """The resolved config as YAML, ready to be read back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_plain(config: object) -> dict[str, Any]:
    """The config as plain containers (trackers and JSON); enums by name."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def with_values(settings: Settings, values: Mapping[str, object]) -> Settings:
    """A copy of a config dataclass with other values, checked as those of a command line are.

    Raises:
        ConfigError: a key does not exist, or a value is of the wrong kind or out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    schema = type(settings)
    keys = described(schema)
    for key in values:
        if key not in keys and key not in parents(keys):  # a group takes a dict
            raise unknown_key(key, keys)
    plain = map_values(lambda value: list(value) if isinstance(value, tuple) else value, values)
    plain = with_lists(plain, schema)
    refuse_numbers(plain, schema)
    try:
        changed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(settings), plain))
    except OmegaConfBaseException as error:
        raise explain(error, schema, [f"{key}={value}" for key, value in values.items()]) from error
    validate(changed)
    assert isinstance(changed, schema)
    return changed
