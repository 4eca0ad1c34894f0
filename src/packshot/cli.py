"""The command line of every script: help, overrides, errors, exit codes."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import version
from pathlib import Path

from packshot.config.compose import chosen_by_default, compose, groups, options, to_yaml
from packshot.config.keys import describe, fields, nearest
from packshot.config.schema import SCRIPTS
from packshot.errors import ConfigError, PackshotError


@dataclasses.dataclass
class CommandLine:
    """What the arguments of a stage ask for.

    prints_config: print the resolved config instead of running. multirun: one process for each combination of the
    values that overrides list. dry: only print the commands of these processes. config_dir: a folder laid out as
    ``conf/``, whose files are found in addition to the shipped ones.
    """

    overrides: list[str]
    help: bool = False
    prints_config: bool = False
    multirun: bool = False
    dry: bool = False
    config_dir: Path | None = None


FLAGS = ("--help", "--cfg", "--multirun", "--multirun.dry", "--config-dir")
SHORT_FLAGS = {"-h": "--help", "-c": "--cfg", "-m": "--multirun", "-cd": "--config-dir"}


def read_arguments(arguments: Sequence[str]) -> CommandLine:
    """Flags and overrides, in any order; Hydra's short flags are known too.

    Raises:
        ConfigError: a flag is not known, or its value is missing or wrong.
    """
    line = CommandLine(overrides=[])
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument.startswith("-"):
            read_flag(line, argument, rest)
        else:
            line.overrides.append(argument)
    return line


def read_flag(line: CommandLine, argument: str, rest: list[str]) -> None:
    """Enter one flag into ``line``; a value of its own is taken from the head of ``rest``."""
    flag, _, value = argument.partition("=")
    match SHORT_FLAGS.get(flag, flag):
        case "--help" if not value:
            line.help = True
        case "--cfg" if not value:
            line.prints_config = True
            if rest and rest[0] in ("job", "hydra", "all") and rest.pop(0) != "job":
                raise ConfigError("--cfg prints the config of the job only.", "Write --cfg job, or --cfg alone.")
        case "--multirun" if not value:
            line.multirun = True
        case "--multirun.dry":
            if value not in ("true", "false"):
                raise ConfigError(f"{argument} is not a valid flag.", "Write --multirun.dry=true or false.")
            line.multirun = True
            line.dry = value == "true"
        case "--config-dir":
            if not value and not rest:
                raise ConfigError("--config-dir names no folder.", "Write --config-dir <folder>.")
            line.config_dir = Path(value or rest.pop(0)).expanduser()
        case _:
            raise ConfigError(f"There is no flag {argument}.", f"Known are {', '.join(FLAGS)}.")


def default_of(field: dataclasses.Field) -> object:
    """The default of a key in its schema."""
    return field.default_factory() if callable(field.default_factory) else field.default


def as_written(value: object) -> str:
    """A value as it is written in an override."""
    if isinstance(value, Enum):
        return value.name
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def help_text(script: str, doc: str) -> str:
    """Usage, groups and every key with default, type and meaning; costs no heavy import."""
    lines = [doc.strip(), "", f"usage: python {script}.py [key=value ...] [flag ...]"]
    lines += [f"   or: packshot {script} [key=value ...] [flag ...]", "", "Flags:"]
    lines += ["  --cfg [job]          print the resolved config and stop"]
    lines += ["  --multirun           run every combination of listed values: a=1,2 b=range(0,3) group=glob(*)"]
    lines += ["  --multirun.dry=true  print the commands of these runs instead"]
    lines += ["  --config-dir DIR     also find config files in DIR, a folder laid out as conf/"]
    lines += ["", "Groups (experiment also takes the path of a .yaml file):"]
    schema = SCRIPTS[script]
    names = schema.__dataclass_fields__
    for group in groups():
        if group in names or (group == "experiment" and script.startswith(("train", "caption"))):
            lines.append(f"  {group}={'|'.join(options(group)) or 'null'}")
    lines += ["", "Keys (default: type: meaning):"]
    chosen = chosen_by_default(script)
    for key, field, hint in fields(schema):
        text = field.metadata.get("help", "")
        default = chosen.get(key, default_of(field))
        lines.append(f"  {key}={as_written(default)}\n      {describe(field, hint)}: {text}")
    return "\n".join(lines)


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
    "merge": Stage(
        "Merge LoRAs into a base: a pipeline folder that stock diffusers loads.", "packshot.base.merge:merge"
    ),
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


def run_target(target: str, config: object) -> None:
    """Call ``package.module:function`` with a config. A run that is refused before it did any work leaves no folder."""
    from packshot.runs.start import start_process

    start_process()
    module, function = target.split(":")
    try:
        getattr(importlib.import_module(module), function)(config)
    except ConfigError:
        from packshot.runs.folder import discard_refused

        discard_refused()
        raise


def run_stage(name: str, arguments: Sequence[str] | None = None) -> None:
    """Run a stage and exit: 0 done, 1 failed, 2 bad arguments or config.

    name: a key of ``STAGES``. arguments: overrides and flags; those of the command line by default.
    """
    with exiting():
        stage = STAGES[name]
        line = read_arguments(sys.argv[1:] if arguments is None else arguments)
        if line.help:
            print(help_text(name, stage.about))
            return
        refuse_other_encodings()
        if line.multirun:
            from packshot.multirun import multirun

            multirun(name, line.overrides, line.config_dir, line.dry)
        elif line.prints_config:
            print(to_yaml(compose(name, line.overrides, line.config_dir)), end="")
        else:
            run_target(stage.target, compose(name, line.overrides, line.config_dir))


# Errors of the system that a person can mend; any other one is a defect, and keeps its traceback.
MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


@contextmanager
def exiting() -> Iterator[None]:
    """End the process after a piece of work: 0 done, 1 failed, 2 bad arguments or config, with one message."""
    from packshot.runs.start import end_process

    prepare_screen()
    try:
        yield
        sys.stdout.flush()
    except PackshotError as error:
        print(f"error: {error}", file=sys.stderr)
        end_process(error.exit_code)
    except BrokenPipeError:
        if not reader_has_gone():
            raise
        end_process(0)
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        # Most places raise a PackshotError that also names the key. The others deserve no traceback either.
        print(system_message(error), file=sys.stderr)
        end_process(1)
    except KeyboardInterrupt:
        print("interrupted; the run folder keeps what is finished, run.resume=true continues", file=sys.stderr)
        end_process(130)
    end_process(0)


def prepare_screen() -> None:
    """Make sure that everything can be printed: a closed stream swallows it, and characters that the terminal's
    encoding lacks become escapes."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def reader_has_gone() -> bool:
    """Whether what reads standard output has closed it (``| head -1``); what is left for it goes nowhere then."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def system_message(error: OSError) -> str:
    """What the system refused, and the way out."""
    from packshot.runs.files import REMEDIES

    name = error.filename or "A file that the system does not name"
    remedy = REMEDIES.get(error.errno or 0, "")
    return f"error: {name} cannot be read or written: {error.strerror}.\n  {remedy}run.resume=true continues a run."


def refuse_other_encodings() -> None:
    """Raises ConfigError where the system's settings make Python read names and arguments as something else than UTF-8:
    captions and file names would be other ones, and files that cannot be named in it would be lost."""
    encoding = sys.getfilesystemencoding()
    if encoding.replace("-", "").lower() != "utf8":
        raise ConfigError(
            f"The language settings of this shell make Python read names and words as {encoding}, not as UTF-8.",
            "Start with PYTHONUTF8=1, or LC_ALL=C.UTF-8, in the environment.",
        )


def plan(arguments: Sequence[str]) -> None:
    """``packshot plan <stage> [key=value ...]``: the stage with ``mode=plan``."""
    planned = list(filter(lambda script: "mode" in SCRIPTS[script].__dataclass_fields__, SCRIPTS))
    name, *overrides = arguments or ["train_lora"]
    if name not in planned:
        raise ConfigError(f"There is nothing to plan for {name!r}.", f"Name one of {', '.join(planned)}.")
    run_stage(name, [*overrides, "mode=plan"])


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of the console script that is not a stage. usage: its arguments, which its function is given."""

    about: str
    usage: str
    target: str  # "package.module:function", with arguments of its own instead of a config


COMMANDS: dict[str, Command] = {
    "verify": Command(
        "Check a picture against its certificate, and against the photograph if it is given.",
        "IMAGE CERTIFICATE [PHOTO] [--mask FILE] [--matte MODEL] | --schema",
        "packshot.generate.verify:main",
    ),
    "bench": Command(
        "Score pictures of any system on held-out renders whose mask, shadow and scene are known.",
        "PICTURES ... [--out DIR] [--set key=value] | --export DIR",
        "packshot.evaluate.bench:main",
    ),
    "show": Command(
        "Show one row of a dataset: its columns in words, and its pictures as files.",
        "DATASET [ROW] [show.id=ID | show.index=N] [show.out=FOLDER]",
        "packshot.dataset.show:main",
    ),
    "plan": Command(
        "Print what a training, or generation, will need before it starts.",
        "STAGE [key=value ...]",
        "packshot.cli:plan",
    ),
}


def run_command(name: str, arguments: Sequence[str]) -> None:
    """Run a command and exit, as :func:`run_stage` does."""
    command = COMMANDS[name]
    with exiting():
        if {"-h", "--help"} & set(arguments):
            print(f"{command.about}\n\nusage: packshot {name} {command.usage}")
            return
        refuse_other_encodings()
        from packshot.runs.start import start_process

        start_process()
        module, function = command.target.split(":")
        getattr(importlib.import_module(module), function)(arguments)


def usage_lines() -> list[str]:
    """What the console script offers."""
    lines = ["usage: packshot <stage> [key=value ...] [flag ...]; packshot <stage> --help lists keys and flags"]
    lines += ["", "Stages:"]
    lines += [f"  {name:18}{row.about}" for name, row in STAGES.items()]
    lines += ["", "Commands:"]
    lines += [f"  {name:18}{row.about}" for name, row in COMMANDS.items()]
    return lines


def main() -> None:
    """The console script: ``packshot <stage or command> ...``."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in STAGES:
        run_stage(name, arguments)
    if name in COMMANDS:
        run_command(name, arguments)
    if name in ("-h", "--help"):
        with exiting():
            print("\n".join(usage_lines()))
    if name == "--version":
        with exiting():
            print(version("packshot"))
    close = nearest(name, [*STAGES, *COMMANDS])
    hint = [f"  Did you mean {close}?"] if close else []
    print("\n".join([f"error: there is no stage or command {name!r}", *hint, *usage_lines()]), file=sys.stderr)
    raise SystemExit(2)
