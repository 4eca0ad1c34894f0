"""Experiment tracking: W&B, TensorBoard, both, or neither, behind the same methods."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from packshot.config.common import RunConfig, TrackerKind, TrackingConfig
from packshot.config.compose import to_plain, to_yaml
from packshot.errors import ConfigError, PackshotError, first_line
from packshot.runs.files import resolve
from packshot.runs.folder import Run, log

MOST_FILES = 1_000_000  # of a folder that W&B only refers to


class TrackedScript(Protocol):
    """A script's config, of which the tracker's settings are read here."""

    run: RunConfig
    tracking: TrackingConfig


@dataclass(frozen=True)
class Input:
    """Something that a run is made from.

    kind: "dataset" or "model". key: the config key that names it. source: path or hub id. digest: identity of the
    content, "" where it is not known.
    """

    kind: str
    key: str
    source: str
    digest: str = ""

    def uri(self) -> str:
        """Where it lies: a file URI, or its page on the hub."""
        path = resolve(self.source)
        return path.resolve().as_uri() if path.exists() else f"https://huggingface.co/{self.source}"


class NullTracker:
    """``tracking=none``, and the methods of every tracker: they accept everything and keep nothing."""

    def log(self, figures: Mapping[str, float], step: int, space: str = "") -> None:
        """Figures of one step. space: ``train`` or ``val``, which becomes a prefix of their names."""

    def images(self, name: str, files: Sequence[Path], captions: Sequence[str], step: int) -> None:
        """Pictures that already lie on disk, with a line of text each."""

    def table(self, name: str, folder: Path, rows: Sequence[Mapping[str, object]], step: int) -> None:
        """Rows with the same keys. ``picture`` names a file in ``folder``, which is shown."""

    def inputs(self, inputs: Sequence[Input]) -> None:
        """What the run is made from."""

    def artifact(self, kind: str, folder: Path, facts: Mapping[str, object]) -> None:
        """A finished folder as an output of the run; facts: what it was made from."""

    def alert(self, title: str, text: str) -> None:
        """Tell the owner of the run that something is wrong."""

    def finish(self, failed: bool = False) -> None:
        """Close the tracker; everything is on disk or sent when this returns."""


Tracker = NullTracker


def tracked_name(name: str, space: str) -> str:
    """How a tracker names a figure: ``train/loss``, and ``val/loss`` for ``validation_loss``."""
    return f"{space}/{name.removeprefix('validation_')}" if space else name


class Trackers(NullTracker):
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = trackers

    def log(self, figures: Mapping[str, float], step: int, space: str = "") -> None:
        for tracker in self.trackers:
            tracker.log(figures, step, space)

    def images(self, name: str, files: Sequence[Path], captions: Sequence[str], step: int) -> None:
        for tracker in self.trackers:
            tracker.images(name, files, captions, step)

    def table(self, name: str, folder: Path, rows: Sequence[Mapping[str, object]], step: int) -> None:
        for tracker in self.trackers:
            tracker.table(name, folder, rows, step)

    def inputs(self, inputs: Sequence[Input]) -> None:
        for tracker in self.trackers:
            tracker.inputs(inputs)

    def artifact(self, kind: str, folder: Path, facts: Mapping[str, object]) -> None:
        for tracker in self.trackers:
            tracker.artifact(kind, folder, facts)

    def alert(self, title: str, text: str) -> None:
        for tracker in self.trackers:
            tracker.alert(title, text)

    def finish(self, failed: bool = False) -> None:
        for tracker in self.trackers:
            tracker.finish(failed)


class TensorboardTracker(NullTracker):
    """Event files in ``<run>/tensorboard``: figures, pictures and the config."""

    def __init__(self, run: Run, config: TrackedScript) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(run.path / "tensorboard"))
        self.writer.add_text("config", f"```yaml\n{to_yaml(config)}\n```", 0)

    def log(self, figures: Mapping[str, float], step: int, space: str = "") -> None:
        for name, value in figures.items():
            self.writer.add_scalar(tracked_name(name, space), value, step)

    def images(self, name: str, files: Sequence[Path], captions: Sequence[str], step: int) -> None:
        import numpy as np
        from PIL import Image

        for file, caption in zip(files, captions, strict=True):
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB"))
            self.writer.add_image(f"{name}/{file.stem}", pixels, step, dataformats="HWC")
            self.writer.add_text(f"{name}/{file.stem}", caption, step)

    def finish(self, failed: bool = False) -> None:
        self.writer.close()


class WandbTracker(NullTracker):
    """One W&B run per run folder; its id lies in ``wandb_id.txt`` so that a resumed run continues in it.

    Without a key the run is written offline to ``<run>/wandb`` and can be sent later with ``wandb sync``.
    """

    def __init__(self, run: Run, config: TrackedScript, job_type: str) -> None:
        import wandb

        settings = config.tracking
        has_key = bool(os.environ.get("WANDB_API_KEY") or netrc_knows_wandb())
        mode = os.environ.get("WANDB_MODE", "online" if has_key else "offline")
        id_file = run.path / "wandb_id.txt"
        known = id_file.read_text().strip() if id_file.exists() else None
        try:
            self.run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                group=settings.group,
                name=settings.name or run.path.name,
                notes=settings.notes,
                job_type=job_type,
                tags=list(settings.tags),
                config=to_plain(config),
                dir=str(run.path),
                id=known,
                resume="allow" if known else None,
                mode=mode,  # type: ignore[arg-type]
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.errors.Error, ValueError) as error:
            raise PackshotError(
                f"W&B does not start: {first_line(error)}",
                "Mend its key or settings, set WANDB_MODE=offline to send the run later, or tracking=none.",
            ) from error
        self.wandb = wandb
        self.online = mode == "online"
        self.upload = settings.upload
        self.rows: dict[str, list[list[object]]] = {}  # of every table, over all steps
        id_file.write_text(self.run.id)
        self.run.define_metric("*", step_metric="global_step")
        if not self.online:
            reason = "WANDB_MODE" if "WANDB_MODE" in os.environ else "no key"
            log.info("W&B is offline (%s): send the run with `wandb sync %s/wandb/*`", reason, run.path)

    def log(self, figures: Mapping[str, float], step: int, space: str = "") -> None:
        # The step travels as a value, so that a resumed run may go back without losing lines.
        named = {tracked_name(name, space): value for name, value in figures.items()}
        self.run.log({**named, "global_step": step})

    def images(self, name: str, files: Sequence[Path], captions: Sequence[str], step: int) -> None:
        pictures = [self.wandb.Image(str(f), caption=c) for f, c in zip(files, captions, strict=True)]
        self.run.log({name: pictures, "global_step": step})

    def table(self, name: str, folder: Path, rows: Sequence[Mapping[str, object]], step: int) -> None:
        if not rows:
            return
        # A logged table cannot grow: each one holds all steps so far, so that the newest compares them.
        known = self.rows.setdefault(name, [])
        for row in rows:
            shown = {**row, "picture": self.wandb.Image(str(folder / str(row["picture"])))}
            known.append([step, *shown.values()])
        table = self.wandb.Table(columns=["step", *rows[0]], data=list(known))
        self.run.log({name: table, "global_step": step})

    def inputs(self, inputs: Sequence[Input]) -> None:
        # An offline run cannot ask the server for an artifact, so the references also stand in its config.
        references = {given.key: {**asdict(given), "uri": given.uri()} for given in inputs}
        self.run.config.update({"inputs": references}, allow_val_change=True)
        if not self.online:
            return
        for given in inputs:
            name = "".join(c if c.isalnum() or c in "-_." else "-" for c in given.source).strip("-")
            artifact = self.wandb.Artifact(name[-128:], type=given.kind, metadata=asdict(given))
            artifact.add_reference(given.uri(), name=given.key, checksum=False, max_objects=MOST_FILES)
            self.run.use_artifact(artifact)

    def artifact(self, kind: str, folder: Path, facts: Mapping[str, object]) -> None:
        artifact = self.wandb.Artifact(f"{kind}-{self.run.id}", type=kind, metadata=dict(facts))
        if self.upload:
            # the folder is finished: it is uploaded, or kept for `wandb sync`, from where it lies, without a copy
            artifact.add_dir(str(folder), policy="immutable", skip_cache=True)
        else:
            artifact.add_reference(folder.resolve().as_uri(), checksum=False)
        self.run.log_artifact(artifact)

    def alert(self, title: str, text: str) -> None:
        self.run.alert(title=title, text=text, level=self.wandb.AlertLevel.ERROR)

    def finish(self, failed: bool = False) -> None:
        self.run.finish(exit_code=int(failed))


def netrc_knows_wandb() -> bool:
    """Whether ``wandb login`` has stored a key."""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(errors="replace")


def open_tracker(run: Run, config: TrackedScript, job_type: str) -> Tracker:
    """The tracker that ``config.tracking`` asks for. Call it on the main process only."""
    kind = config.tracking.kind
    trackers: list[Tracker] = []
    if config.tracking.uses_wandb:
        trackers.append(WandbTracker(run, config, job_type))
    if kind in (TrackerKind.tensorboard, TrackerKind.wandb_tensorboard):
        trackers.append(TensorboardTracker(run, config))
    return Trackers(trackers)


@contextmanager
def finishing(tracker: Tracker | None) -> Iterator[None]:
    """Work that a tracker follows. It is closed at the end; an error marks the run as failed and raises an alert.

    tracker: None on all processes but the main one. A refused config raises no alert: its owner is still there.
    """
    if tracker is None:
        yield
        return
    try:
        yield
    except BaseException as error:
        if isinstance(error, PackshotError) and not isinstance(error, ConfigError):
            tracker.alert("The run has stopped", str(error.args[0]))
        tracker.finish(failed=True)
        raise
    tracker.finish()
