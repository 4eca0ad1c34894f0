"""The command line of every script: help, overrides, errors, exit codes."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from enum import Enum
from typing import Any

from packshot.config.compose import compose, groups, options, to_yaml
from packshot.config.keys import describe, fields
from packshot.config.schema import SCRIPTS
from packshot.errors import PackshotError


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


@dataclasses.dataclass(frozen=True)
class Stage:
    """A script: what it does (the head of ``--help``), and the function that is called with its config."""

    about: str
    target: str  # "package.module:function"; imported only once the config is valid


# By the name of the script, which is also the name of its file in conf/ and a key of config.schema.SCRIPTS.
STAGES: dict[str, Stage] = {
    "build_data": Stage(
        "Build a dataset: photographs in, Parquet shards with image, mask, caption and scene out.",
        "packshot.make_dataset.run:build",
    ),
    "caption_vlm": Stage(
        "Teach a vision-language model to caption scenes, score it, or let it caption a dataset.",
        "packshot.caption.run:run",
    ),
    "train_lora": Stage("Train a LoRA of SDXL on scenes.", "packshot.train.run:train"),
    "train_ip_adapter": Stage("Train an IP-Adapter: a reference image guides the scene.", "packshot.train.run:train"),
    "train_controlnet": Stage("Train a ControlNet that knows where the product is.", "packshot.train.run:train"),
    "generate": Stage(
        "Put a product into a new scene. Its own pixels stay, and a certificate proves it.",
        "packshot.generate.run:generate",
    ),
    "evaluate": Stage(
        "Score finished generate.py runs: product identity, product extension, slot adherence.",
        "packshot.evaluate.run:evaluate",
    ),
    "serve": Stage("Serve generation over HTTP.", "packshot.serve.server:serve"),
}


def run_stage(name: str, arguments: Sequence[str] | None = None) -> None:
    """Run a stage and exit: 0 done, 1 failed, 2 bad arguments or config.

    name: a key of ``STAGES``. arguments: overrides and flags; those of the command line by default.
    """
    stage = STAGES[name]
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(help_text(name, stage.about))
        raise SystemExit(0)
    try:
        config = compose(name, [argument for argument in arguments if argument != "--cfg"])
        if "--cfg" in arguments:
            print(to_yaml(config), end="")
            raise SystemExit(0)
        _quiet_libraries()
        module, function = stage.target.split(":")
        getattr(importlib.import_module(module), function)(config)
    except PackshotError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # Most writers say this themselves, with what is safe; whoever does not is no reason for a traceback.
        print(
            f"error: {error.filename or 'A file that the system does not name'} cannot be written: {error.strerror}.",
            file=sys.stderr,
        )
        print("  Free some space; run.resume=true continues from what is finished.", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        print("interrupted; the run folder keeps what was finished, run.resume=true goes on", file=sys.stderr)
        raise SystemExit(130) from error


def main() -> None:
    """The console script: ``packshot <stage> [key=value ...]``."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in STAGES:
        run_stage(name, arguments)
    lines = ["usage: packshot <stage> [key=value ...] [--cfg] [--help]", "", "Stages:"]
    lines += [f"  {stage:18}{row.about}" for stage, row in STAGES.items()]
    if name in ("-h", "--help"):
        print("\n".join(lines))
        raise SystemExit(0)
    print("\n".join([f"error: there is no stage {name!r}", *lines]), file=sys.stderr)
    raise SystemExit(2)
