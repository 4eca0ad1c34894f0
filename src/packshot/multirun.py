"""``--multirun``: one process for each combination of the values that overrides list, as Hydra's sweeps do."""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from packshot.config.compose import compose, explain
from packshot.config.schema import SCRIPTS
from packshot.errors import ConfigError, PackshotError
from packshot.runs.folder import default_dir


def expand(script: str, overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job, in the order of Hydra's basic sweeper: the last list changes fastest.

    Values are listed in Hydra's grammar: ``a=1,2``, ``a=range(1,4)``, ``a=choice(x,y)``, ``a=glob(*)`` for groups.

    Raises:
        ConfigError: an override cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    choices: list[list[str]] = []
    for override in overrides:
        try:
            parsed = parser.parse_override(override)
        except HydraException as error:
            raise explain(error, SCRIPTS[script], overrides) from error
        if parsed.is_sweep_override():
            key = parsed.get_key_element()
            choices.append([f"{key}={value}" for value in parsed.sweep_string_iterator()])
        else:
            choices.append([override])
    return list(map(list, itertools.product(*choices)))


def jobs(script: str, overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job, with a run folder and a tracker group that the jobs of a sweep share.

    The folder of job k is ``<run.dir>/<k>``; without ``run.dir`` it is a new folder in ``outputs``.
    """
    given = {override.partition("=")[0].lstrip("+"): override.partition("=")[2] for override in overrides}
    folder = Path(given.get("run.dir") or default_dir(script))
    kept = [override for override in overrides if override.partition("=")[0] != "run.dir"]
    if "tracking.group" not in given:
        kept.append(f"tracking.group={folder.name}")
    return [[*job, f"run.dir={folder / str(index)}"] for index, job in enumerate(expand(script, kept))]


def multirun(script: str, overrides: Sequence[str], config_dir: Path | None, dry: bool) -> None:
    """Run every job in a fresh process, one after the other; with ``dry`` print the commands instead.

    Every job is composed and checked before the first one starts. A job that fails does not stop the others.

    Raises:
        ConfigError: an override cannot be read, a job's config is refused, or a launcher started this process.
        PackshotError: jobs have failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "--multirun was started by a launcher of several processes.",
            "Print the commands with --multirun.dry=true, and start each with the launcher.",
        )
    planned = jobs(script, overrides)
    for job in planned:
        compose(script, job, config_dir)
    folder_flag = [] if config_dir is None else ["--config-dir", str(config_dir)]
    if dry:
        for job in planned:
            print(shlex.join(["packshot", script, *folder_flag, *job]))
        return
    failed: list[str] = []
    for index, job in enumerate(planned):
        print(f"job {index + 1} of {len(planned)}: {shlex.join(job)}", file=sys.stderr)
        code = subprocess.run([sys.executable, "-m", "packshot", script, *folder_flag, *job]).returncode
        if code:
            failed.append(f"{shlex.join(job)} (exit code {code})")
    if failed:
        raise PackshotError(
            f"{len(failed)} of {len(planned)} jobs failed:\n    " + "\n    ".join(failed),
            "Their messages stand above; the other jobs are finished.",
        )
