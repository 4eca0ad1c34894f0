"""Packshot: put a product photo into a new scene; the product's own pixels stay."""

import importlib
from typing import TYPE_CHECKING

from packshot.scene import Scene

if TYPE_CHECKING:
    from packshot.api import run
    from packshot.config.schema import AdaptersConfig, GenerateSettings, MatteConfig, ModelConfig
    from packshot.errors import ConfigError, PackshotError
    from packshot.generate import Packshot, Result
    from packshot.generate.verify import verify

# Where the other names live. They are imported when they are used: Packshot pulls in torch and diffusers, seconds that
# `from packshot import Scene` should not cost.
_HOMES = {
    "AdaptersConfig": "packshot.config.schema",
    "ConfigError": "packshot.errors",
    "GenerateSettings": "packshot.config.schema",
    "MatteConfig": "packshot.config.schema",
    "ModelConfig": "packshot.config.schema",
    "Packshot": "packshot.generate",
    "PackshotError": "packshot.errors",
    "Result": "packshot.generate",
    "run": "packshot.api",
    "verify": "packshot.generate.verify",
}

__all__ = [
    "AdaptersConfig",
    "ConfigError",
    "GenerateSettings",
    "MatteConfig",
    "ModelConfig",
    "Packshot",
    "PackshotError",
    "Result",
    "Scene",
    "run",
    "verify",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'packshot' has no attribute {name!r}")
