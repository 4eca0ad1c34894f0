"""Errors with a way out. Defined in ``packshot.config`` (which may not import core) and used from here."""

from packshot.config.errors import ConfigError, PackshotError

__all__ = ["ConfigError", "PackshotError"]
