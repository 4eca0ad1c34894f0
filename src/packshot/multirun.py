"""``--multirun``: one process for each combination of the values that overrides list, as Hydra's sweeps do."""

from __future__ import annotations

import itertools
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

from packshot.config.compose import compose, explain
from packshot.config.schema import SCRIPTS
from packshot.errors import ConfigError, PackshotError
from packshot.runs.folder import default_dir, read_metrics
from packshot.runs.markdown import markdown_table


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


def jobs(script: str, overrides: Sequence[str], config_dir: Path | None = None) -> list[list[str]]:
    """The overrides of each job, with a run folder and, for W&B, a group that the jobs of a sweep share.

    The folder of job k is ``<run.dir>/<k>``; without ``run.dir`` it is a new folder in ``outputs``.

    Raises:
        ConfigError: an override cannot be read, or a job's config is refused.
    """
    given = {override.partition("=")[0].lstrip("+"): override.partition("=")[2] for override in overrides}
    folder = Path(given.get("run.dir") or default_dir(script))
    kept = [override for override in overrides if override.partition("=")[0] != "run.dir"]
    found: list[list[str]] = []
    for index, job in enumerate(expand(script, kept)):
        config = compose(script, job, config_dir)
        if config.tracking.uses_wandb and "tracking.group" not in given:
            job.append(f"tracking.group={folder.name}")
        found.append([*job, f"run.dir={folder / str(index)}"])
    return found


def swept(planned: Sequence[Sequence[str]]) -> list[str]:
    """The keys whose values differ between jobs, but for their run folders."""
    different = [overrides[0].partition("=")[0] for overrides in zip(*planned, strict=True) if len(set(overrides)) > 1]
    return list(filter("run.dir".__ne__, different))


def compare(finished: Sequence[Sequence[str]], keys: Sequence[str]) -> list[str]:
    """A table of the last figures of trainings, the one with the lowest loss in validation first.

    finished: the overrides of each job. [] where no job has a loss.
    """
    found: list[tuple[float, list[object]]] = []
    for job in finished:
        given = dict(override.lstrip("+").split("=", 1) for override in job)
        last: dict[str, float] = {}
        for line in read_metrics(Path(given["run.dir"])):
            last |= line
        if "loss" in last:
            validation_loss = last.get("validation_loss", math.inf)
            figures = [f"{last['loss']:.5f}", f"{validation_loss:.5f}" if "validation_loss" in last else "–"]
            found.append((validation_loss, [*map(given.get, keys), *figures, given["run.dir"]]))
    rows = map(itemgetter(1), sorted(found, key=itemgetter(0)))
    return markdown_table([*keys, "last loss", "validation_loss", "run.dir"], rows) if found else []


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
    planned = jobs(script, overrides, config_dir)
    folder_flag = [] if config_dir is None else ["--config-dir", str(config_dir)]
    if dry:
        for job in planned:
            print(shlex.join(["packshot", script, *folder_flag, *job]))
        return
    failed: list[str] = []
    finished: list[list[str]] = []
    for index, job in enumerate(planned):
        print(f"job {index + 1} of {len(planned)}: {shlex.join(job)}", file=sys.stderr)
        code = subprocess.run([sys.executable, "-m", "packshot", script, *folder_flag, *job]).returncode
        if code:
            failed.append(f"{shlex.join(job)} (exit code {code})")
        else:
            finished.append(job)
    for line in compare(finished, swept(planned)):
        print(line)
    if failed:
        raise PackshotError(
            f"{len(failed)} of {len(planned)} jobs failed:\n    " + "\n    ".join(failed),
            "Their messages stand above; the other jobs are finished.",
        )
