"""Checkpoints: their contents, the settings that may change on resume, and a disk that is full."""

import errno
import json
import logging
import os
import re
import resource
from contextlib import contextmanager
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from test_loop import ROWS, Regression, Samples, run_fit
from torch import nn

from packshot.base.load import hint_of_failure
from packshot.config.compose import compose
from packshot.config.keys import fields
from packshot.config.schema import SCRIPTS, LRSchedule
from packshot.engine import checkpoints
from packshot.engine.compatibility import BY_EFFECT, FREE, RATES, check, made_with
from packshot.errors import PackshotError
from packshot.runs import files
from packshot.runs.folder import log
from packshot.train.run import train

CONSTANT = {"lr_schedule": LRSchedule.constant}


@pytest.fixture
def log_text(caplog, monkeypatch):
    """Lines of the log."""
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level(logging.INFO):
        yield lambda: caplog.text


# ---- what a checkpoint holds, and its page ----


def named_in_page(root):
    return set(re.findall(r"`([^`\n]+)`", (root / "docs" / "checkpoints.md").read_text()))


def test_the_page_names_every_file_and_key(tmp_path, root):
    run_fit(tmp_path, max_steps=4, ema_decay=0.9)
    folder = tmp_path / "checkpoints" / "4"
    state = json.loads((folder / "state.json").read_text())
    keys = set(state)
    keys |= {f"{part}.{key}" for part in ("progress", "made_with") for key in state[part]}
    files = {path.name for path in folder.iterdir()}
    assert files >= {"trainable.safetensors", "optimizer.pt", "ema.safetensors", "state.json"}
    assert set(state["files"]) == files - {"state.json"}
    assert keys | files <= named_in_page(root)


def test_the_page_names_every_setting_that_may_change(root):
    """Each pattern is in docs/checkpoints.md, and each matches a key that exists."""
    known = {key for schema in SCRIPTS.values() for key, _, _ in fields(schema)}
    for pattern in (*FREE, *RATES, *BY_EFFECT):
        assert pattern in named_in_page(root), pattern
        assert any(re.fullmatch(pattern.replace(".", r"\.").replace("*", ".*"), key) for key in known), pattern


def test_a_hash_taken_while_writing_is_that_of_the_file(tmp_path):
    run_fit(tmp_path, Large(), max_steps=4)
    folder = tmp_path / "checkpoints" / "4"
    stored = json.loads((folder / "state.json").read_text())["files"]
    assert set(stored) == {"trainable.safetensors", "optimizer.pt", "ema.safetensors"}
    for name, digest in stored.items():
        assert digest == files.file_sha256(folder / name)


def test_a_checkpoint_holds_the_resolved_config(tmp_path):
    run_fit(tmp_path, max_steps=4, learning_rate=0.02)
    made = json.loads((tmp_path / "checkpoints" / "4" / "state.json").read_text())["made_with"]
    assert made["config"]["train"]["learning_rate"] == 0.02
    assert made["config"]["optim"]["kind"] == "adamw"
    assert (made["processes"], made["samples"]) == (1, len(ROWS))


def test_a_checkpoint_of_another_format_is_refused_and_not_read(tmp_path):
    run_fit(tmp_path, max_steps=4, **CONSTANT)
    file = tmp_path / "checkpoints" / "4" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 0}))
    with pytest.raises(PackshotError, match="another version of packshot"):
        run_fit(tmp_path, max_steps=8, **CONSTANT)


# ---- another config ----


def made(script="train_lora", *overrides, processes=1, rows=ROWS):
    return made_with(compose(script, ["train.max_steps=100", *overrides]), Samples(rows), processes)


def test_every_difference_is_named_with_both_values():
    then = made("train_lora", "train.lr_schedule=constant")
    now = made(
        "train_lora", "train.lr_schedule=constant", "method.rank=32", "optim=lion", "objective.loss_weighting=min_snr",
        "run.seed=1", "model.resolution=256", "train.max_grad_norm=0.5", "method.text_encoder=true",
    )  # fmt: skip
    with pytest.raises(PackshotError) as caught:
        check(then, now, 50)
    lines = {line.strip() for line in str(caught.value).splitlines()}
    assert {
        "method.rank: 16 -> 32", "optim.kind: adamw -> lion", "objective.loss_weighting: none -> min_snr",
        "run.seed: 0 -> 1", "model.resolution: 128 -> 256", "train.max_grad_norm: 1.0 -> 0.5",
        "method.text_encoder: false -> true",
        "Keep the old settings, or start a new run with another run.dir.",
    } <= lines  # fmt: skip
    assert "step 50" in str(caught.value)
    assert caught.value.exit_code == 2


def test_settings_that_leave_the_weights_alone_may_change(log_text):
    then = made("train_lora", "run.dir=/a", "data.num_workers=0")
    now = made(
        "train_lora", "run.dir=/b", "run.resume=true", "data.num_workers=2", "tracking=none", "data.cache=false",
        "train.log_steps=5", "train.checkpointing_steps=7", "train.gradient_checkpointing=true", "export.kohya=true",
    )  # fmt: skip
    check(then, now, 50)
    for key in ("run.dir: /a -> /b", "data.num_workers: 0 -> 2", "tracking.kind: wandb -> none", "export.kohya: false"):
        assert key in log_text()


@pytest.mark.parametrize(
    ("before", "after", "steps", "allowed"),
    [
        (["train.lr_schedule=constant"], ["train.max_steps=300"], 100, True),
        (["train.lr_schedule=cosine"], ["train.max_steps=300"], 50, False),
        (["train.lr_schedule=wsd"], ["train.max_steps=300"], 80, True),  # its decay starts at 80
        (["train.lr_schedule=wsd"], ["train.max_steps=300"], 82, False),
        (["train.lr_schedule=constant"], ["train.warmup_steps=10"], 5, False),
        (["train.lr_schedule=wsd"], ["train.lr_decay_share=0.1"], 50, True),  # neither has begun to decay
        (["train.lr_schedule=constant"], ["train.learning_rate=2e-4"], 50, False),
    ],
)
def test_a_schedule_may_change_after_the_steps_so_far(before, after, steps, allowed):
    """Allowed if every step so far would have had the same learning rate."""
    then, now = made("train_lora", *before), made("train_lora", *before, *after)
    if allowed:
        check(then, now, steps)
        return
    key = after[0].partition("=")[0]
    with pytest.raises(PackshotError, match=rf"{re.escape(key)}: .* -> .*other learning rates"):
        check(then, now, steps)


def test_processes_may_change_if_the_step_size_stays():
    """Processes, micro-steps and batch size are compared by their product."""
    then = made("train_lora", "train.batch_size=4", processes=2)
    check(then, made("train_lora", "train.batch_size=2", "train.gradient_accumulation_steps=4"), 50)
    with pytest.raises(PackshotError, match=r"samples per optimizer step: 8 \(2 processes x 1 .* x 4\) -> 4 \(1 "):
        check(then, made("train_lora", "train.batch_size=4"), 50)


@pytest.mark.parametrize(
    ("overrides", "processes", "arithmetic"),
    [
        (["train.batch_size=4"], 2, "2 processes x 1 micro-steps x 4"),
        (["train.batch_size=4", "train.gradient_accumulation_steps=2"], 1, "1 processes x 2 micro-steps x 4"),
    ],
    ids=["processes", "accumulation"],
)
def test_with_dropout_the_split_of_a_step_must_stay(overrides, processes, arithmetic):
    """Dropout masks inside the network depend on how processes and micro-steps split a step."""

    def run(dropout, *keys, processes=1):
        return made("train_lora", f"method.dropout={dropout}", *keys, processes=processes)

    check(run(0.0, "train.batch_size=8"), run(0.0, *overrides, processes=processes), 50)
    then, now = run(0.1, "train.batch_size=8"), run(0.1, *overrides, processes=processes)
    check(then, then, 50)
    with pytest.raises(PackshotError, match=rf"1 processes x 1 .* x 8 -> {arithmetic} \(with method.dropout=0.1, "):
        check(then, now, 50)


def test_the_data_may_move_but_not_change(log_text):
    then = made("train_lora", "data.train=/old")
    check(then, made("train_lora", "data.train=/new"), 50)
    assert "data.train: /old -> /new" in log_text()
    with pytest.raises(PackshotError, match=r"data\.train: 7 samples .* -> 6 samples"):
        check(then, made("train_lora", "data.train=/old", rows=ROWS[:6]), 50)


def old_names(then):
    """The same, as a version with the old keys of the loss weighting kept it."""
    objective = dict(then.config["objective"])
    weighting, gamma = objective.pop("loss_weighting"), objective.pop("min_snr_gamma")
    objective |= {"debiased": weighting == "debiased", "snr_gamma": gamma if weighting == "min_snr" else None}
    return replace(then, config={**then.config, "objective": objective})


def test_renamed_keys_of_a_checkpoint_are_translated(log_text):
    """A resumed run compares the values of renamed keys, and reports none of them when they are equal."""
    then = made("train_lora", "objective.loss_weighting=debiased")
    check(old_names(then), then, 50)
    assert not log_text()
    with pytest.raises(PackshotError, match=r"objective\.loss_weighting: debiased -> none"):
        check(old_names(then), made("train_lora"), 50)


def test_a_key_unknown_to_one_version_is_reported(log_text):
    then = made()
    older = {**then.config, "optim": {k: v for k, v in then.config["optim"].items() if k != "eps"}}
    check(replace(then, config=older), then, 50)
    assert "optim.eps: (no such key) -> 1e-08" in log_text()


def test_other_settings_stop_before_anything_is_restored(tmp_path):
    run_fit(tmp_path, max_steps=4, **CONSTANT)
    task = Regression()
    before = task.linear.weight.clone()
    with pytest.raises(PackshotError, match=r"train\.learning_rate: 0\.01 -> 0\.02"):
        run_fit(tmp_path, task, max_steps=4, learning_rate=0.02, **CONSTANT)
    assert torch.equal(task.linear.weight, before)


def test_a_lengthened_constant_run_equals_a_long_one(tmp_path):
    whole, _ = run_fit(tmp_path / "a", max_steps=8, **CONSTANT)
    run_fit(tmp_path / "b", max_steps=5, **CONSTANT)
    longer, _ = run_fit(tmp_path / "b", max_steps=8, **CONSTANT)
    for a, b in zip(whole.parameters(), longer.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- a full disk ----


@contextmanager
def files_up_to(size):
    """Make writes beyond ``size`` bytes of a file fail, which is like a full disk and needs no rights."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Large(Regression):
    """4 MiB of weights and 8 MiB of optimizer state: more than the log of a test, which the limit also holds."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2**20))

    def forward(self, batch):
        return super().forward(batch) + self.table.mean()


@pytest.mark.parametrize("size", [3_000_000, 6_000_000], ids=["weights", "optimizer"])
def test_a_failed_checkpoint_leaves_the_one_before(tmp_path, size):
    """The run stops, and the resumed one ends with the weights of an unbroken run."""
    settings = {"max_steps": 4, "checkpointing_steps": 2, "checkpoints_total_limit": 1, "ema_decay": 0.0, **CONSTANT}
    whole, _ = run_fit(tmp_path / "a", Large(), **settings)
    run_fit(tmp_path / "b", Large(), **{**settings, "max_steps": 2})
    with files_up_to(size), pytest.raises(PackshotError, match=r"checkpoint .*4 cannot be written") as caught:
        run_fit(tmp_path / "b", Large(), **settings)
    assert "run.resume=true continues from step 2" in str(caught.value)
    assert [path.name for path in (tmp_path / "b" / "checkpoints").iterdir() if path.is_dir()] == ["2"]
    resumed, _ = run_fit(tmp_path / "b", Large(), **settings)
    assert torch.equal(whole.linear.weight, resumed.linear.weight)
    assert torch.equal(whole.table, resumed.table)


def test_a_full_disk_is_named_as_such(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_settle", full)
    with pytest.raises(PackshotError, match="No space left on device") as caught:
        run_fit(tmp_path)
    assert "no checkpoint yet: run.resume=true starts at step 0" in str(caught.value)
    assert not list((tmp_path / "checkpoints").glob("**/*"))


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EACCES, "the right to write"),
        (errno.EROFS, "read-only"),
        (errno.EIO, ""),
    ],
)
def test_the_hint_of_a_failed_write_fits_its_reason(number, remedy):
    """Missing rights were answered with "Make room"."""
    with pytest.raises(PackshotError) as caught, files.writing("the file", "Then resume."):
        raise OSError(number, os.strerror(number))
    assert remedy in caught.value.hint
    assert caught.value.hint.endswith("Then resume.")
    assert ("space" in caught.value.hint) == (number == errno.ENOSPC)


def test_safetensors_names_the_reason_of_a_failed_write(tmp_path):
    tensors = {"x": torch.zeros(2**20)}
    with (
        pytest.raises(PackshotError, match="the file cannot be written") as caught,
        files.writing("the file", "Resume."),
    ):
        save_file(tensors, tmp_path / "none" / "x.safetensors")
    assert caught.value.hint == "Resume."


def test_damaged_weights_are_not_blamed_on_another_model(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file({"x": torch.zeros(2)}, whole / "x.safetensors")
    assert hint_of_failure(whole) == "Was it trained on another model?"
    (whole / "y.safetensors").touch()
    assert hint_of_failure(whole) == f"{whole / 'y.safetensors'}: the file is empty. Copy or export it again."


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), checkpoints.exporting(tmp_path):
        raise RuntimeError("shapes do not fit")
    assert not (tmp_path / "export").exists()


def test_a_failed_export_names_the_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "old").touch()

    def write(folder):
        (folder / "half").touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(PackshotError, match="No space left") as caught, checkpoints.exporting(tmp_path) as folder:
        write(folder)
    assert str(tmp_path / "checkpoints" / "4") in str(caught.value)
    assert "run.resume=true" in str(caught.value)
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["old"]


# ---- a whole run with text encoders ----


def train_text(path, tmp_path, *overrides):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    config = compose(
        "train_lora",
        [
            "experiment=lora_mini", "method.text_encoder=true", "method.text_rank=2", "train.max_steps=4",
            "train.warmup_steps=0", "train.batch_size=2", "train.checkpointing_steps=2", "train.validation_steps=0",
            f"data.train={tmp_path / 'set'}", f"data.validation={tmp_path / 'set'}", "tracking=none",
            f"data.cache_dir={tmp_path / 'cache'}", f"run.dir={path}", *overrides,
        ],
    )  # fmt: skip
    train(config)
    return load_file(path / "export" / "pytorch_lora_weights.safetensors")


def test_a_text_encoder_lora_resumes_and_exports_again(tmp_path, root, monkeypatch):
    """A whole run with text encoders: stock loaders read it, a kill changes no bit, a failed export is made up for."""
    shards = sorted((root / "data" / "rendered" / "heldout").glob("*.parquet"))
    (tmp_path / "set").mkdir()
    pq.write_table(pq.read_table(shards[0]).slice(0, 5), tmp_path / "set" / "part-00000.parquet")
    whole = train_text(tmp_path / "a", tmp_path)
    for part in ("unet.", "text_encoder.", "text_encoder_2."):
        assert any(key.startswith(part) and "lora_B" in key and bool(value.any()) for key, value in whole.items()), part

    pipeline = StableDiffusionXLPipeline.from_pretrained(files.resolve("data/models/sdxl"), torch_dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path / "a" / "export")
    assert set(pipeline.get_list_adapters()) == {"unet", "text_encoder", "text_encoder_2"}

    class Killed(Exception):
        pass

    save = checkpoints.TrainState.save

    def killed(state, *given):
        save(state, *given)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.TrainState, "save", killed)
        with pytest.raises(Killed):
            train_text(tmp_path / "b", tmp_path)
    resumed = train_text(tmp_path / "b", tmp_path, "run.resume=true")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)

    sync = files._settle

    def full(path):
        if ".export." in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    again = tmp_path / "b" / "export"
    with monkeypatch.context() as patched:
        patched.setattr(files, "_settle", full)
        with pytest.raises(PackshotError, match=r"run\.resume=true then exports"):
            train_text(tmp_path / "b", tmp_path, "run.resume=true")
    (again / "pytorch_lora_weights.safetensors").unlink()
    exported = train_text(tmp_path / "b", tmp_path, "run.resume=true")
    assert all(torch.equal(whole[key], exported[key]) for key in whole)
    lines = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == [1, 2, 3, 4]  # nothing was trained again
