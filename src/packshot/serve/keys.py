"""API keys by name, and how many requests a minute each of them may make."""

from __future__ import annotations

import hmac
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from packshot.config.schema import ServeConfig
from packshot.errors import ConfigError
from packshot.runs.files import readable

DEFAULT_NAME = "default"


@dataclass
class RateLimit:
    """A token bucket: ``per_minute`` requests at once, and then one whenever its share of a minute has passed."""

    per_minute: int
    clock: Callable[[], float] = time.monotonic
    tokens: float = field(init=False)
    updated: float = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = float(self.per_minute)
        self.updated = self.clock()

    def wait(self) -> float:
        """Take a token and return 0, or return the seconds until there is one."""
        now = self.clock()
        self.tokens = min(self.per_minute, self.tokens + (now - self.updated) * self.per_minute / 60)
        self.updated = now
        if self.tokens < 1:
            return (1 - self.tokens) * 60 / self.per_minute
        self.tokens -= 1
        return 0.0


@dataclass(frozen=True)
class ApiKey:
    """name: who uses the key; it may be logged, the secret may not. Jobs belong to the name."""

    name: str
    secret: str
    limit: RateLimit


def find_key(keys: list[ApiKey], authorization: bytes) -> ApiKey | None:
    """The key of an ``Authorization: Bearer <key>`` header, if there is one."""
    scheme, _, given = authorization.partition(b" ")
    known = None
    for key in keys:  # all are compared, so that the time does not tell which one came close
        if hmac.compare_digest(given.strip(), key.secret.encode()):
            known = key
    return known if scheme.lower() == b"bearer" else None


def load_keys(config: ServeConfig) -> list[ApiKey]:
    """The keys of ``serve.api_key`` (or the environment) and of the file ``serve.api_keys``.

    Without any of them a new key is made and printed once.

    Raises:
        ConfigError: the file is missing, or a line in it is wrong.
    """
    keys = read_keys(config.api_keys, config.requests_per_minute) if config.api_keys else []
    single = config.api_key or os.environ.get("PACKSHOT_API_KEY")
    if not single and not keys:
        single = secrets.token_urlsafe(24)
        # Printed, not logged: the key must reach the screen and never a file.
        print(f"API key of this server (set serve.api_key or PACKSHOT_API_KEY for your own): {single}", flush=True)
    if single:
        keys.append(ApiKey(DEFAULT_NAME, single, RateLimit(config.requests_per_minute)))
    return keys


def read_keys(path: str, per_minute: int) -> list[ApiKey]:
    """The keys of a file: a line is a name, a key and, if wanted, its requests per minute; # begins a comment."""
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(readable("serve.api_keys", path).read_text(encoding="utf-8").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        place = f"serve.api_keys={path}, line {number}"  # never the line itself: it holds the key
        if len(words) not in (2, 3) or (len(words) == 3 and not words[2].isdecimal()) or words[-1] == "0":
            raise ConfigError(f"{place} is not a name, a key and, if wanted, a number.", "Separate them by spaces.")
        if words[0] in keys or words[0] == DEFAULT_NAME:
            raise ConfigError(f"{place} repeats the name {words[0]}.", "Every key needs a name of its own.")
        rate = int(words[2]) if len(words) == 3 else per_minute
        keys[words[0]] = ApiKey(words[0], words[1], RateLimit(rate))
    if not keys:
        raise ConfigError(f"serve.api_keys={path} has no keys.", "A line is a name and a key.")
    return list(keys.values())
