"""Checks that run after composition and before anything heavy is imported.

The rules stand with what they rule: a config class that has any defines ``check()``, which raises ConfigError.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from packshot.config.keys import describe, fields
from packshot.errors import ConfigError


def check_ranges(config: Any) -> None:
    """Raises ConfigError for the first value, also in a list, that is outside its documented range or not finite."""
    for key, field, hint in fields(type(config)):
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        low = -math.inf if field.metadata.get("min") is None else field.metadata["min"]
        high = math.inf if field.metadata.get("max") is None else field.metadata["max"]
        for number in filter(is_number, value if isinstance(value, list) else [value]):
            if not math.isfinite(number) or not low <= number <= high:
                raise ConfigError(f"{key}={value} is out of range.", f"{key} takes {describe(field, hint)}.")


def is_number(value: object) -> bool:
    """Whether a value is an integer or a float."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def parts(config: Any) -> Iterator[Any]:
    """A config and all groups in it, each after the groups that it holds."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from parts(value)
    yield config


def validate(config: Any) -> None:
    """Raises ConfigError when a composed config cannot work. It reads no files and no models."""
    check_ranges(config)
    for part in parts(config):
        if hasattr(part, "check"):
            part.check()
