"""``mode=check``: the sheet shows what the network gets, findings name what is odd, a step is measured."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from packshot.base.tokens import lost_words
from packshot.config.compose import compose
from packshot.config.schema import LoraMethod
from packshot.methods.lora import Lora
from packshot.train.check import drawing
from packshot.train.check.findings import findings, kept_words
from packshot.train.encode import Encoder
from packshot.train.examples import Examples
from packshot.train.run import train

LONG = "Professional photo of an object on a table, " + ", ".join(f"word{number}" for number in range(40))


class Set:
    """Samples given one by one: (caption, mask as an array or None, size)."""

    def __init__(self, samples):
        self.ids = [f"s{number}" for number in range(len(samples))]
        self.texts = [text for text, _, _ in samples]
        self.sizes = [size for _, _, size in samples]
        self._masks = [mask for _, mask, _ in samples]

    def __len__(self):
        return len(self.ids)

    def read(self, index, images, covering=None):
        mask = self._masks[index]
        return {"mask": None if mask is None else Image.fromarray(mask)}


def mask(box, size=(128, 128)):
    """White in (top, left, bottom, right)."""
    array = np.zeros(size, np.uint8)
    array[box[0] : box[2], box[1] : box[3]] = 255
    return array


GOOD = mask((30, 30, 90, 90))


@pytest.fixture(scope="module")
def encoder():
    from packshot.base.load import load_parts
    from packshot.config.schema import DataConfig, ModelConfig

    parts = load_parts(ModelConfig())
    return Encoder(parts, Lora(parts, LoraMethod(rank=1, target_modules="mid_block.*attn2.to_q")), 128, DataConfig())


def found(encoder, samples, *overrides, held_out=(), processes=1):
    rows: Any = Set(samples)
    config = compose("train_lora", ["train.batch_size=2", f"train.max_steps={len(samples)}", *overrides])
    return {f.name: f for f in findings(Examples(rows, encoder, None), held_out, config, processes)}


def test_a_set_in_order_has_no_findings(encoder):
    assert not found(encoder, [(f"caption {n}", GOOD, (128, 128)) for n in range(4)])


@pytest.mark.parametrize(
    ("name", "odd"),
    [
        ("captions_empty", (" ", GOOD, (128, 128))),
        ("captions_too_long", (LONG, GOOD, (128, 128))),
        ("mask_empty", ("b", mask((0, 0, 0, 0)), (128, 128))),
        ("mask_full", ("b", mask((0, 0, 128, 128)), (128, 128))),
        ("product_tiny", ("b", mask((60, 60, 70, 70)), (128, 128))),
        ("product_at_frame", ("b", mask((60, 30, 128, 90)), (128, 128))),
        ("upscaled", ("b", mask((20, 20, 50, 50), (80, 80)), (80, 80))),
    ],
)
def test_an_odd_sample_is_named(encoder, name, odd):
    samples = [("a", GOOD, (128, 128)), odd, ("c", GOOD, (128, 128))]
    report = found(encoder, samples)
    assert set(report) == {name}
    assert report[name].samples == ["s1"]
    assert report[name].says.startswith("1 of 3 ")


def test_what_is_lost_of_a_long_caption_is_said(encoder):
    assert "word39" in found(encoder, [(LONG, GOOD, (128, 128)), ("b", GOOD, (128, 128))])["captions_too_long"].says


def test_captions_that_repeat_are_counted(encoder):
    samples = [(text, GOOD, (128, 128)) for text in ("a", "b", "a", "a")]
    assert found(encoder, samples)["captions_duplicate"].says.startswith("3 of 4 captions occur more than once (2 diff")


def test_a_bucket_below_a_step_is_named(encoder):
    samples = [("a", GOOD, (128, 128)), ("b", GOOD, (128, 128)), ("c", mask((20, 30, 80, 90), (96, 160)), (96, 160))]
    report = found(encoder, samples)
    assert set(report) == {"bucket_small"}
    assert report["bucket_small"].samples == ["s2"]
    assert "has 1 samples for steps of 2" in report["bucket_small"].says
    assert "has 2 samples for steps of 4" in found(encoder, samples[:2], processes=2)["bucket_small"].says


@pytest.mark.parametrize(
    ("overrides", "name", "says"),
    [
        (["train.learning_rate=0.1"], "learning_rate", "0.1 is unusual for optim=adamw"),
        (["train.learning_rate=1e-3", "optim=lion"], "learning_rate", "unusual for optim=lion"),
        (["train.learning_rate=0.5", "optim=prodigy"], "learning_rate", r"(usual: 1)"),
        (["train.max_steps=300"], "many_epochs", "seen 150 times"),
        (["train.max_steps=1"], "not_all_seen", "50% of the samples are never seen"),
    ],
)
def test_odd_settings_are_named(encoder, overrides, name, says):
    samples = [(f"caption {n}", GOOD, (128, 128)) for n in range(4)]
    report = found(encoder, samples, *overrides)
    assert set(report) == {name}
    assert says in report[name].says


def test_validation_samples_that_are_trained_on_are_named(encoder):
    samples = [(f"caption {n}", GOOD, (128, 128)) for n in range(4)]
    report = found(encoder, samples, held_out=["s2", "other"])
    assert report["validated_on_training_data"].says == "1 of 2 validation samples are also trained on"


# ---- the sheet ----


def test_the_words_that_are_read_end_where_the_tokens_do(encoder):
    tokenizer = encoder.parts.tokenizer
    read, lost = kept_words(tokenizer, LONG)
    assert f"{read} {lost}" == LONG
    assert not lost_words(tokenizer, read)
    assert lost_words(tokenizer, f"{read} {lost.split()[0]}")
    assert kept_words(tokenizer, "a short one") == ("a short one", "")


def test_the_outline_runs_around_the_product_and_nowhere_else():
    grey = Image.new("RGB", (128, 128), (90, 90, 90))
    drawn = np.asarray(drawing.outlined(grey, Image.fromarray(GOOD)))
    changed = np.argwhere((drawn != 90).any(axis=2)) * 128 / drawing.SIDE
    assert changed.min() == pytest.approx(30, abs=2)
    assert changed.max() == pytest.approx(90, abs=2)
    inside = drawn[int(45 * 2.5) : int(75 * 2.5), int(45 * 2.5) : int(75 * 2.5)]
    assert (inside == 90).all()
    assert np.array_equal(np.asarray(drawing.outlined(grey, None)), np.asarray(drawing.fitted(grey)))


def test_unknown_pixels_of_a_control_map_are_magenta():
    control = torch.full((3, 2, 2), 0.5)
    control[:, 0, 0] = -1
    pixels = np.asarray(drawing.from_condition(control))
    assert tuple(pixels[0, 0]) == drawing.UNKNOWN
    assert tuple(pixels[1, 1]) == (128, 128, 128)


def test_lost_words_are_red(encoder):
    picture = Image.new("RGB", (8, 8))
    for lost in ("", "lost words"):
        drawn = np.asarray(drawing.sheet([drawing.Line([("one", picture)], "read words", lost, [])], "title")).astype(
            int
        )
        red = ((drawn[..., 0] - drawn[..., 1]) > 100).sum()
        assert (red > 20) == bool(lost)


# ---- the whole mode ----


def checked(script, path, *overrides):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    common = ["mode=check", "tracking=none", "data.train=data/rendered/heldout", "train.batch_size=2"]
    train(compose(script, [*common, f"run.dir={path}", f"data.cache_dir={path}-cache", *overrides]))
    report = json.loads((path / "check" / "check.json").read_text())
    return report, Image.open(path / "check" / "batch.png")


def test_check_writes_sheet_findings_and_a_measured_step(tmp_path, capsys, monkeypatch):
    steps, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: steps.append(1) or step(self, *a, **k))
    report, lora = checked(
        "train_lora", tmp_path / "lora", "train.max_steps=1000", "train.gradient_accumulation_steps=2"
    )
    assert len(steps) == 3  # what is measured includes the optimizer
    assert report["samples_per_step"] == 4
    assert report["seconds_per_step"] > 0
    assert report["images_per_second"] == pytest.approx(4 / report["seconds_per_step"])
    assert report["eta_seconds"] == pytest.approx(1000 * report["seconds_per_step"])
    assert report["peak_memory_gib"] > 0
    assert "captions_duplicate" in {warning["name"] for warning in report["warnings"]}
    assert not (tmp_path / "lora" / "checkpoints").exists()
    assert (tmp_path / "lora" / "metrics.jsonl").read_text() == ""
    said = capsys.readouterr().out
    assert "one optimizer step of 4 samples" in said
    assert "train.max_steps=1000 would take" in said

    _, control = checked("train_controlnet", tmp_path / "controlnet")
    assert control.width == lora.width + drawing.SIDE + drawing.GAP  # the control map has a panel of its own
    assert (np.asarray(control) == drawing.UNKNOWN).all(axis=2).mean() > 0.05
