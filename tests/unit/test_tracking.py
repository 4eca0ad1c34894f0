"""Trackers: what they are given, under which names, and what an error does to a run."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from PIL import Image

from packshot.config.compose import compose
from packshot.errors import ConfigError, PackshotError
from packshot.runs.folder import Run
from packshot.runs.tracking import (
    Input,
    NullTracker,
    TensorboardTracker,
    Trackers,
    WandbTracker,
    finishing,
    open_tracker,
    tracked_name,
)


class Recorder:
    """Stands in for a W&B run that is online: keeps every call."""

    def __init__(self):
        self.calls = []
        self.id = "abc"
        self.config = SimpleNamespace(update=lambda *a, **k: self.calls.append(("config", a, k)))

    def __getattr__(self, name):
        return lambda *a, **k: self.calls.append((name, a, k))

    def named(self, name):
        return [(a, k) for called, a, k in self.calls if called == name]


@pytest.fixture
def online(tmp_path, monkeypatch):
    """(tracker, what W&B was given) of a run with every setting of ``tracking``."""
    recorder = Recorder()

    def init(**settings):
        recorder.calls.append(("init", (), settings))
        return recorder

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("wandb.init", init)
    settings = ["entity=team", "group=rates", "notes=why", "tags=[a]", "upload=false"]
    config = compose("train_lora", [f"tracking.{setting}" for setting in settings])
    return open_tracker(Run(tmp_path, False), config, "train_lora"), recorder


def test_wandb_is_given_every_setting(online):
    _, wandb = online
    [(_, settings)] = wandb.named("init")
    expected = {"entity": "team", "group": "rates", "notes": "why", "tags": ["a"], "project": "packshot"}
    assert expected.items() <= settings.items()


def test_inputs_are_artifacts_or_references(online):
    """They are artifacts online and references in the config."""
    tracker, wandb = online
    data = Input("dataset", "data.train", "data/rendered/heldout", "f00")
    tracker.inputs([data, Input("model", "model.base", "some-one/a-base")])
    artifacts = [arguments[0] for arguments, _ in wandb.named("use_artifact")]
    assert [artifact.type for artifact in artifacts] == ["dataset", "model"]
    assert artifacts[0].metadata["digest"] == "f00"
    shards, base = (sorted(entry.ref for entry in artifact.manifest.entries.values()) for artifact in artifacts)
    assert f"{data.uri()}/part-00000.parquet" in shards
    assert base == ["https://huggingface.co/some-one/a-base"]
    [((written,), _)] = wandb.named("config")
    assert written["inputs"]["data.train"]["uri"].endswith("data/rendered/heldout")


def test_an_export_is_a_reference_without_upload(online, tmp_path):
    tracker, wandb = online
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "weights").write_text("x")
    tracker.artifact("adapter", tmp_path / "export", {"step": 3})
    [((artifact,), _)] = wandb.named("log_artifact")
    assert [entry.ref for entry in artifact.manifest.entries.values()] == [(tmp_path / "export/weights").as_uri()]


def test_the_newest_table_compares_all_steps(online, tmp_path):
    tracker, wandb = online
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    for step in (5, 10):
        tracker.table("val/pictures", tmp_path, [{"picture": "0.png", "prompt": "p"}], step)
    tables = [arguments[0]["val/pictures"] for arguments, _ in wandb.named("log")]
    assert [[row[0] for row in table.data] for table in tables] == [[5], [5, 10]]


@pytest.mark.parametrize(
    ("name", "space", "expected"),
    [("loss", "train", "train/loss"), ("validation_loss", "val", "val/loss"), ("rows", "", "rows")],
)
def test_figures_are_named_by_their_space(name, space, expected):
    assert tracked_name(name, space) == expected


@pytest.mark.parametrize(
    ("kind", "trackers"),
    [("none", []), ("tensorboard", [TensorboardTracker]), ("wandb_tensorboard", [WandbTracker, TensorboardTracker])],
)
def test_tracking_chooses_its_trackers(kind, trackers, tmp_path, monkeypatch):
    monkeypatch.setattr("wandb.init", lambda **settings: Recorder())
    tracker = open_tracker(Run(tmp_path, False), compose("train_lora", [f"tracking={kind}"]), "train_lora")
    assert isinstance(tracker, Trackers)
    assert [type(one) for one in tracker.trackers] == trackers


def test_tensorboard_files_hold_figures_and_pictures(tmp_path):
    tracker = open_tracker(Run(tmp_path, False), compose("evaluate", ["tracking=tensorboard"]), "evaluate")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    tracker.log({"validation_loss": 0.5}, 3, "val")
    tracker.images("val/samples", [tmp_path / "a.png"], ["a caption"], 3)
    tracker.finish()
    [file] = (tmp_path / "tensorboard").iterdir()
    written = file.read_bytes()
    assert all(text in written for text in (b"val/loss", b"val/samples/a", b"a caption", b"suite: full"))


@pytest.mark.parametrize(
    ("error", "alerts", "failed"),
    [
        (None, [], False),
        (PackshotError("The loss of step 3 is nan."), ["The loss of step 3 is nan."], True),
        (ConfigError("It does not fit."), [], True),
        (KeyboardInterrupt(), [], True),
    ],
)
def test_an_error_fails_the_run_and_raises_an_alert(error, alerts, failed):
    class Watched(NullTracker):
        def alert(self, title, text):
            self.seen.append(text)

        def finish(self, failed=False):
            self.failed = failed

    tracker = Watched()
    tracker.seen = []
    with pytest.raises(type(error)) if error else nullcontext(), finishing(tracker):
        if error:
            raise error
    assert (tracker.seen, tracker.failed) == (alerts, failed)


def test_all_trackers_are_given_the_same_calls():
    """``Trackers`` passes every method on."""
    forwarded = {name for name in vars(NullTracker) if not name.startswith("_")}
    assert forwarded <= set(vars(Trackers))
