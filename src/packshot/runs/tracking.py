"""Experiment tracking: a W&B run, or a null object with the same methods."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from packshot.config.compose import to_plain
from packshot.config.schema import TrackerKind
from packshot.errors import PackshotError
from packshot.runs.folder import Run, log


class Tracker(Protocol):
    """Where figures and pictures of a run go besides its folder."""

    def log(self, figures: dict[str, float], step: int) -> None: ...

    def images(self, name: str, files: Sequence[Path], captions: Sequence[str], step: int) -> None: ...

    def table(self, name: str, folder: Path, rows: Sequence[dict[str, Any]], step: int) -> None: ...

    def record(self, facts: dict[str, Any]) -> None: ...

    def artifact(self, kind: str, folder: Path, facts: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...


class NullTracker:
    """``tracking=none``: takes everything, keeps nothing."""

    def log(self, figures: dict[str, float], step: int) -> None:
        """Does nothing."""

    def images(self, name: str, files: Sequence[Path], captions: Sequence[str], step: int) -> None:
        """Does nothing."""

    def table(self, name: str, folder: Path, rows: Sequence[dict[str, Any]], step: int) -> None:
        """Does nothing."""

    def record(self, facts: dict[str, Any]) -> None:
        """Does nothing."""

    def artifact(self, kind: str, folder: Path, facts: dict[str, Any]) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""


class WandbTracker:
    """One W&B run per run folder; its id lies in ``wandb_id.txt`` so that a resumed run goes on in it.

    Without a key the run is written offline to ``<run>/wandb`` and can be sent later with ``wandb sync``.
    """

    def __init__(self, run: Run, config: Any, job_type: str) -> None:
        import wandb

        online = bool(os.environ.get("WANDB_API_KEY") or _netrc_knows_wandb())
        mode = os.environ.get("WANDB_MODE", "online" if online else "offline")
        id_file = run.path / "wandb_id.txt"
        known = id_file.read_text().strip() if id_file.exists() else None
        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=config.tracking.project,
                name=config.tracking.name or run.path.name,
                job_type=job_type,
                tags=list(config.tracking.tags),
                config=to_plain(config),
                dir=str(run.path),
                id=known,
                resume="allow" if known else None,
                mode=mode,  # type: ignore[arg-type]
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.errors.Error, ValueError) as error:
            raise PackshotError(
                f"W&B does not start: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
                "Mend its key or settings, set WANDB_MODE=offline to send the run later, or tracking=none.",
            ) from error
        id_file.write_text(self._run.id)
        self._run.define_metric("*", step_metric="global_step")
        if mode == "offline":
            log.info("W&B has no key: the run is written offline; send it with `wandb sync %s/wandb/*`", run.path)

    def log(self, figures: dict[str, float], step: int) -> None:
        """Figures of one step. The step travels as a value, so a resumed run may go back without losing lines."""
        self._run.log({**figures, "global_step": step})

    def images(self, name: str, files: Sequence[Path], captions: Sequence[str], step: int) -> None:
        """Pictures that already lie on disk, with a line of text each."""
        pictures = [self._wandb.Image(str(f), caption=c) for f, c in zip(files, captions, strict=True)]
        self._run.log({name: pictures, "global_step": step})

    def table(self, name: str, folder: Path, rows: Sequence[dict[str, Any]], step: int) -> None:
        """Rows with the same keys; what stands under ``picture`` is a file in ``folder`` and is shown."""
        if not rows:
            return
        columns = list(rows[0])
        shown = [{**row, "picture": self._wandb.Image(str(folder / row["picture"]))} for row in rows]
        table = self._wandb.Table(
            columns=["step", *columns], data=[[step, *(row[column] for column in columns)] for row in shown]
        )
        self._run.log({name: table, "global_step": step})

    def record(self, facts: dict[str, Any]) -> None:
        """What the run was made from, in its summary. Only recorded: an offline run cannot ask for an artifact."""
        self._run.summary.update(facts)

    def artifact(self, kind: str, folder: Path, facts: dict[str, Any]) -> None:
        """A finished folder as an output of the run, with what it was made from as metadata."""
        artifact = self._wandb.Artifact(f"{kind}-{self._run.id}", type=kind, metadata=facts)
        # the folder is finished: it is uploaded, or kept for `wandb sync`, from where it lies instead of a second copy
        artifact.add_dir(str(folder), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact)

    def finish(self) -> None:
        """Close the run; everything is on disk or sent when this returns."""
        self._run.finish()


def _netrc_knows_wandb() -> bool:
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(errors="replace")


def open_tracker(run: Run, config: Any, job_type: str) -> Tracker:
    """The tracker that ``config.tracking`` asks for. Call it on the main process only."""
    makers = {TrackerKind.none: lambda: NullTracker(), TrackerKind.wandb: lambda: WandbTracker(run, config, job_type)}
    return makers[config.tracking.kind]()
