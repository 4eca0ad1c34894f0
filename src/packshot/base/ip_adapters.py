"""Where an IP-Adapter lies: our export folder, or a file as the original repository publishes them."""

from __future__ import annotations

from pathlib import Path

from packshot.base.places import find_place
from packshot.errors import ConfigError
from packshot.lists import ending

EXPORT = "ip_adapter.safetensors"


def find_ip_adapter(key: str, value: str) -> Path:
    """The local file of an IP-Adapter. value: the file, or a folder that has one, here or on the hub.

    Raises:
        ConfigError: there is none, or there are several.
    """
    place = find_place(key, value)
    if place.is_file:
        return place.fetch()
    names = place.names()
    files = ending(names, ".safetensors")
    if EXPORT in files:
        files = [EXPORT]
    if len(files) != 1:
        raise ConfigError(
            f"{key}={value} has no {EXPORT}{', but ' + ', '.join(files[:5]) if files else ''}.",
            "Name a .safetensors or .bin file in the layout of the original IP-Adapter, or an export/ folder.",
        )
    return place.fetch([*ending(names, ".json"), *files]) / files[0]
