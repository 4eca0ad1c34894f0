"""Entry point of caption_vlm.py; every task has a row in ``config/captioners.py`` and a module here."""

from __future__ import annotations

import pkgutil

from packshot.config.captioners import CAPTION_TASKS
from packshot.config.schema import CaptionMode, CaptionVLM
from packshot.runs.licenses import refuse_weights


def run(config: CaptionVLM) -> None:
    """Do ``config.task``, or plan it.

    Raises:
        ConfigError: a path, a dataset or a model that the config names cannot be used.
        PackshotError: training diverged, or no image could be captioned.
    """
    refuse_weights(config)
    if config.mode is CaptionMode.plan:
        from packshot.caption.plan import plan  # imports transformers

        plan(config)
        return
    pkgutil.resolve_name(CAPTION_TASKS[config.task.name].run)(config)
