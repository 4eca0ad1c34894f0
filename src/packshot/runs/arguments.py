"""Arguments of commands that are not ``key=value``."""

from __future__ import annotations

import argparse
from typing import NoReturn

from packshot.errors import ConfigError


class Arguments(argparse.ArgumentParser):
    """Refuses wrong arguments with a ConfigError, as every command does, and with its usage as the way out."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}.", " ".join(self.format_usage().split()))
