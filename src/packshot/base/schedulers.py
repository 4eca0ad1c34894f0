"""Another sampler than the base's own, on the base's noise schedule."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers

from packshot.config.schedulers import SCHEDULERS


def make_scheduler(name: str | None, base: Any) -> Any:
    """The sampler of a name (``config.schedulers``) with the noise schedule, the prediction and the spacing of the
    base's; a copy of the base's own without a name."""
    if name is None:
        return copy.deepcopy(base)
    row = SCHEDULERS[name]
    return getattr(diffusers, row.kind).from_config(base.config, **row.options)


@contextmanager
def sampling_with(pipe: Any, name: str | None) -> Iterator[None]:
    """A pipeline with another sampler while it is open."""
    base = pipe.scheduler
    if name is not None:
        pipe.scheduler = make_scheduler(name, base)
    try:
        yield
    finally:
        pipe.scheduler = base
