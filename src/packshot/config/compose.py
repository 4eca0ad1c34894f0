"""From ``conf/`` and command-line overrides to one validated dataclass."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from packshot.config.checks import validate
from packshot.config.keys import describe, fields, nearest
from packshot.config.renamed import refuse_renamed
from packshot.config.schema import SCRIPTS
from packshot.errors import ConfigError

CONF = Path(str(files("packshot.conf")))  # the checkout's conf/, or the wheel's copy of it


def groups() -> list[str]:
    """Config groups: folders of ``conf/`` from which ``group=option`` picks a file."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and any(path.glob("*.yaml")))


def options(group: str) -> list[str]:
    """The choices of a group, by name."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _nodes(keys: list[str]) -> set[str]:
    return {key.rsplit(".", depth)[0] for key in keys for depth in range(1, key.count(".") + 1)}


def _check_override(override: str, keys: dict[str, str]) -> None:
    """Refuses an override whose key or group option does not exist, with the nearest that does."""
    if "=" not in override:
        raise ConfigError(f"{override!r} is no override.", "Write key=value; --help lists the keys.")
    key, value = override.split("=", 1)
    key = key.lstrip("+~")
    if key in groups():
        if value and value not in (*options(key), "null"):
            close = nearest(value, options(key))
            raise ConfigError(
                f"{key}={value}: there is no conf/{key}/{value}.yaml.",
                (f"Did you mean {key}={close}? " if close else "")
                + f"{key} takes {', '.join(options(key)) or 'null'}.",
            )
        return
    if key in keys or key in _nodes(list(keys)):
        return
    refuse_renamed(key, keys, value)
    close = nearest(key, [*keys, *groups()])
    raise ConfigError(
        f"There is no key {key!r}.",
        f"Did you mean {close} ({keys.get(close, 'a config group')})?" if close else "--help lists the keys.",
    )


_QUOTED = re.compile(r"""'(\\.|[^'\\])*'|"(\\.|[^"\\])*\"""", re.DOTALL)


def _is_text(hint: Any) -> bool:
    return str in (hint, *getattr(hint, "__args__", ())) and getattr(hint, "__origin__", None) is not list


def _quoted(override: str, texts: set[str]) -> str:
    """The override with the value of a text key quoted, so that Hydra's grammar leaves it as it was typed: commas,
    apostrophes, brackets and letters of every alphabet are normal in prompts and file names. ``null``, interpolations
    and what is quoted already are left to Hydra."""
    key, _, value = override.partition("=")
    ready = value == "null" or "${" in value or _QUOTED.fullmatch(value)
    if key.lstrip("+") not in texts or ready:
        return override
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)  # backslashes are literal to Hydra except before a quote
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"{key}='{escaped}'"


def _translate(error: Exception, keys: dict[str, str]) -> ConfigError:
    """A Hydra or OmegaConf exception as a sentence with the key, the value and what is allowed."""
    from hydra.errors import OverrideParseException

    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        parts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(parts)
    full_key = re.search(r"full_key: ([\w.\[\]]+)", text)
    unknown = re.search(r"Key '([^']+)' (?:is )?not in", text)
    key = full_key.group(1) if full_key else (unknown.group(1) if unknown else "")
    first = parts[0].strip().splitlines()[0] if parts[0].strip() else type(error).__name__
    plain = re.sub(r"\[\d+\]$", "", key)
    if plain in keys:
        value = re.search(r"Value '([^']*)'|Invalid value '([^']*)'", text)
        shown = next((group for group in value.groups() if group is not None), "?") if value else "?"
        return ConfigError(f"{plain}={shown} has the wrong type.", f"{plain} takes {keys[plain]}.")
    if key:
        refuse_renamed(key, keys)
        close = nearest(key, list(keys))
        return ConfigError(f"There is no key {key!r}.", f"Did you mean {close}?" if close else "--help lists the keys.")
    way_out = "Overrides are key=value; --help lists the keys."
    if isinstance(error, OverrideParseException):
        way_out = "Put odd characters in quotes, and those in quotes for the shell: \"key=['a, b.png']\"."
    return ConfigError(f"The configuration cannot be read: {first}", way_out)


def compose(script: str, overrides: list[str]) -> Any:
    """The validated config dataclass of a script.

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
    keys = {key: describe(field, hint) for key, field, hint in fields(schema)}
    texts = {key for key, _, hint in fields(schema) if _is_text(hint)}
    for override in overrides:
        _check_override(override, keys)
    ConfigStore.instance().store(name=f"{script}_schema", node=schema)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            node = hydra_compose(script, [_quoted(override, texts) for override in overrides])
        config = OmegaConf.to_object(node)
    except (HydraException, OmegaConfBaseException) as error:
        raise _translate(error, keys) from error
    validate(config)
    return config


def to_yaml(config: Any) -> str:
    """The resolved config as YAML, ready to be read back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_plain(config: Any) -> dict[str, Any]:
    """The config as plain containers (trackers and JSON); enums by name."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
