"""The command line of every script: help, overrides, errors, exit codes."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import logging
import os
import sys
from enum import Enum
from typing import Any

from packshot.config.compose import compose, groups, options, to_yaml
from packshot.config.errors import PackshotError
from packshot.config.schema import SCRIPTS
from packshot.config.validate import describe, fields


def _default(field: dataclasses.Field) -> str:
    value: Any = field.default_factory() if callable(field.default_factory) else field.default
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def help_text(script: str, doc: str) -> str:
    """Usage, groups and every key with default, type and meaning; costs no heavy import."""
    lines = [doc.strip(), "", f"usage: python {script}.py [key=value ...] [--cfg] [--help]", "", "Groups:"]
    schema = SCRIPTS[script]
    names = {field.name for field in dataclasses.fields(schema)}
    for group in groups():
        if group in names or (group == "experiment" and script.startswith(("train", "caption"))):
            lines.append(f"  {group}={'|'.join(options(group)) or 'null'}")
    lines += ["", "Keys (default: type: meaning):"]
    for key, field, hint in fields(schema):
        text = field.metadata.get("help", "")
        lines.append(f"  {key}={_default(field)}\n      {describe(field, hint)}: {text}")
    return "\n".join(lines)


def _quiet_libraries() -> None:
    """Silence remarks that libraries make on import about parts we do not use (torchvision, GPU kernels)."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # also transformers' bar for weights
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def script(name: str, target: str, doc: str | None) -> None:
    """Run a script and exit: 0 done, 1 failed, 2 bad arguments or config.

    name: a key of ``SCRIPTS``, also the name of its file in ``conf/``.
    target: ``"package.module:function"``; imported only once the config is valid, then called with the config.
    doc: the script's docstring, the head of ``--help``.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(help_text(name, doc or ""))
        raise SystemExit(0)
    try:
        config = compose(name, [argument for argument in arguments if argument != "--cfg"])
        if "--cfg" in arguments:
            print(to_yaml(config), end="")
            raise SystemExit(0)
        _quiet_libraries()
        module, function = target.split(":")
        getattr(importlib.import_module(module), function)(config)
    except PackshotError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # Most writers say this themselves, with what is safe; whoever does not is no reason for a traceback.
        print(f"error: {error.filename or 'A file'} cannot be written: {error.strerror}.", file=sys.stderr)
        print("  Make room; run.resume=true goes on from what is finished.", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        print("interrupted; the run folder keeps what was finished, run.resume=true goes on", file=sys.stderr)
        raise SystemExit(130) from error
