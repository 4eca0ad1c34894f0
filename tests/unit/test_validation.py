"""Validation: what is measured and drawn, and which checkpoint is called the best."""

import json
import time

import cv2
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from test_loop import ROWS, Regression, Samples

from packshot.config.compose import compose
from packshot.config.schema import CaptionVLM, KeepBest, TrainConfig
from packshot.engine import checkpoints
from packshot.engine.checkpoints import exported_best, exported_step
from packshot.engine.loop import fit
from packshot.engine.processes import Session, make_accelerator
from packshot.engine.task import Validated
from packshot.errors import ConfigError, PackshotError
from packshot.imaging.matte import unmix
from packshot.imaging.outline import compare_size, measure_extension, segment_near
from packshot.imaging.pixels import from_network, to_bytes
from packshot.runs.folder import Run
from packshot.runs.tracking import Input, NullTracker, open_tracker
from packshot.train import validation
from packshot.train.run import build_task
from packshot.train.validation import means, measure, prepare_held_out, sheet

PROMPT = "Professional photo of an object on a stone podium"


# ---- what is measured ----


def grown(truth_HW3, matte_HW, factor):
    """The picture with its product enlarged about its middle, the way a model that continues a product shows it."""
    rows, columns = np.nonzero(matte_HW >= 128)
    middle = (float(columns.mean()), float(rows.mean()))
    larger = cv2.getRotationMatrix2D(middle, 0, factor)
    size = truth_HW3.shape[1::-1]
    alpha = cv2.warpAffine(matte_HW, larger, size)[..., None] / 255
    return np.rint(alpha * cv2.warpAffine(truth_HW3, larger, size) + (1 - alpha) * truth_HW3).astype(np.uint8)


def test_an_enlarged_product_has_a_higher_extension():
    """The truth has none."""
    truth = np.random.default_rng(0).integers(200, 230, (128, 128, 3), np.uint8)
    matte = np.zeros((128, 128), np.uint8)
    cv2.ellipse(matte, (64, 64), (24, 30), 0, 0, 360, 255, -1)
    truth[matte > 0] = (150, 30, 40)
    floor = measure_extension(truth, matte, segment_near, compare_size(128, 128))
    found = [measure(grown(truth, matte, factor), matte, floor) for factor in (1.0, 1.2, 1.4)]
    assert found[0]["product_iou"] > 0.95 > 0.75 > found[2]["product_iou"]
    assert {**found[0], "product_iou": 1} == {"extension": 0.0, "product_loss": 0.0, "extended": 0.0, "product_iou": 1}
    assert found[0]["extension"] < found[1]["extension"] < found[2]["extension"]
    assert found[2]["extension"] == pytest.approx(1.4**2 - 1, abs=0.2)  # less the tolerance around the outline
    assert found[2]["extended"] == 1.0
    blind = measure(grown(truth, matte, 1.4), matte, {"extension": found[2]["extension"], "loss": 0.0})
    assert blind["extension"] == blind["extended"] == 0  # what is found in the truth too
    empty = np.zeros_like(matte)
    assert measure(truth, empty, measure_extension(truth, empty, segment_near, (128, 128)))["extension"] is None


def test_figures_are_means_over_pictures_with_a_product():
    row = {"extension": 0.2, "product_loss": 0.1, "extended": 1.0, "product_iou": 0.8}
    other = {"extension": 0.0, "product_loss": 0.0, "extended": 0.0, "product_iou": 1.0}
    none = dict.fromkeys(row)
    expected = {"extension": 0.1, "extension_rate": 0.5, "product_loss": 0.05, "product_iou": 0.9}
    assert means([row, none, other]) == pytest.approx(expected)
    assert means([none]) == {}


# ---- what is drawn ----


class Few:
    """The first samples of a dataset."""

    def __init__(self, rows, count):
        self._rows, self.ids, self.texts, self.sizes = rows, rows.ids[:count], rows.texts[:count], rows.sizes[:count]
        self.read, self.digest, self.path = rows.read, rows.digest, rows.path

    def __len__(self):
        return len(self.ids)


def make(rows, parts, *keys, script="train_lora", count=2):
    config = compose(script, ["tracking=none", "data.cache=false", f"train.validation_samples={count}", *keys])
    few = Few(rows, count)
    task, _ = build_task(config, parts, few, few, Accelerator(cpu=True))
    return task.eval()


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(validation, "STEPS", 3)


def pixels(file):
    return np.asarray(Image.open(file))


def test_pictures_sheet_and_table_of_products_prompts_and_seeds(rows, parts, tmp_path):
    task = make(rows, parts, f"train.validation_prompts=['{PROMPT}']", "train.validation_seeds=2")
    before = {name: p.clone() for name, p in task.named_parameters()}
    random = torch.get_rng_state()
    found = task.validate(tmp_path / "a", Accelerator(cpu=True))
    again = task.validate(tmp_path / "b", Accelerator(cpu=True))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], p) for name, p in task.named_parameters())
    assert set(found.figures) == {"validation_loss", "extension", "extension_rate", "product_loss", "product_iou"}
    assert found.figures == again.figures
    table = json.loads((tmp_path / "a" / "table.json").read_text())
    assert table == found.table == again.table
    names = [f"{number:03d}.png" for number in range(8)]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [*names, "grid.png", "table.json"]
    assert [row["picture"] for row in table] == names
    assert [row["product"] for row in table] == [rows.ids[0]] * 4 + [rows.ids[1]] * 4
    assert [row["prompt"] for row in table[:4]] == [rows.texts[0]] * 2 + [PROMPT] * 2
    assert [row["seed"] for row in table] == [0, 1000, 0, 1000, 1, 1001, 1, 1001]
    pictures = [pixels(tmp_path / "a" / name) for name in names]
    truth = np.asarray(task.validator.examples.seen(0)["image"])
    assert all((picture[:, :128] == truth).all() for picture in pictures[:4])
    assert all((a == pixels(tmp_path / "b" / name)).all() for a, name in zip(pictures, names, strict=True))
    assert len({picture.tobytes() for picture in pictures}) == 8
    with Image.open(tmp_path / "a" / "grid.png") as grid:
        assert grid.width >= 5 * 128
        assert (np.asarray(grid.convert("RGB"))[:128, :128] == truth).all()


@pytest.mark.parametrize("script", ["train_lora", "train_controlnet", "train_ip_adapter"])
def test_every_method_holds_the_products_latents(rows, parts, script, monkeypatch, tmp_path):
    """In the pictures of validation."""
    task = make(rows, parts, script=script, count=1)
    ready = prepare_held_out(task.validator.examples, 0, torch.device("cpu"))
    held = ready.held_1HW.bool()
    assert 4 < held.sum() < held.numel() / 2
    assert ready.sample["alpha"][held].min() > 0.99
    decoded = []
    decode = parts.vae.decode
    truth = to_bytes(from_network(decode(ready.sample["mean"][None]).sample[0]))
    assert ready.floor == measure_extension(truth, ready.matte_HW, segment_near, compare_size(128, 128))
    monkeypatch.setattr(parts.vae, "decode", lambda latents: decoded.append(latents) or decode(latents))
    task.validate(tmp_path, Accelerator(cpu=True))
    scaled = decoded[-1] * parts.vae.config.scaling_factor
    torch.testing.assert_close(scaled[:, :, held[0]], ready.known_1CHW[:, :, held[0]], rtol=1e-4, atol=1e-4)
    free = ~held[0]
    assert (scaled[:, :, free] - ready.known_1CHW[:, :, free]).abs().mean() > 0.1


def test_samples_without_a_mask_are_drawn_but_not_measured(rows, parts, tmp_path):
    bare = Few(rows, 1)
    bare.read = lambda index, images, covering=None: {**rows.read(index, images), "mask": None}
    config = compose("train_lora", ["tracking=none", "data.cache=false"])
    task, _ = build_task(config, parts, bare, bare, Accelerator(cpu=True))
    found = task.eval().validate(tmp_path, Accelerator(cpu=True))
    assert set(found.figures) == {"validation_loss"}
    assert found.table[0]["extension"] is None
    assert (tmp_path / "grid.png").exists()


def test_choosing_by_extension_needs_products(rows, parts):
    """It is refused before the first step."""
    bare = Few(rows, 1)
    bare.read = lambda index, images, covering=None: {**rows.read(index, images), "mask": None}
    config = compose("train_lora", ["tracking=none", "data.cache=false", "train.keep_best=extension"])
    with pytest.raises(ConfigError, match="no mask"):
        build_task(config, parts, bare, bare, Accelerator(cpu=True))


def test_the_sheet_frames_what_has_grown(tmp_path):
    Image.new("RGB", (80, 40), "blue").save(tmp_path / "000.png")
    row = {"picture": "000.png", "product": "p", "own_caption": True, "prompt": "", "seed": 0}
    kept = sheet([{**row, "extension": 0.0, "extended": 0.0}], tmp_path)
    framed = sheet([{**row, "extension": 0.5, "extended": 1.0}], tmp_path)
    red = [(np.asarray(picture) == (255, 0, 0)).all(axis=-1).any() for picture in (kept, framed)]
    assert red == [False, True]


def test_preparing_a_product_leaves_torch_its_threads(monkeypatch):
    # numba sets OpenMP's number of threads: training would go on with another one, so with other last bits
    import pymatting

    before = torch.get_num_threads()

    def estimate(image, alpha):
        torch.set_num_threads(before + 1)
        return image

    monkeypatch.setattr(pymatting, "estimate_foreground_ml", estimate)
    try:
        unmix(np.full((64, 64, 3), 90, np.uint8), np.full((64, 64), 200, np.uint8))
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)


# ---- which checkpoint is the best ----


class Scored(Regression):
    """Validates to a given value per step; dies before a validation if asked to."""

    def __init__(self, values, dies_at=None):
        super().__init__()
        self.values, self.dies_at, self.validated = values, dies_at, []

    def validate(self, folder, accelerator):
        step = int(folder.name)
        if step == self.dies_at:
            raise InterruptedError
        self.validated.append(step)
        return Validated(self.values[step])


def train(path, task, **settings):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    path.mkdir(exist_ok=True)
    config = CaptionVLM()
    defaults = {"max_steps": 12, "batch_size": 3, "checkpointing_steps": 4, "validation_steps": 3, "ema_decay": 0.9}
    config.train = TrainConfig(**{**defaults, "checkpoints_total_limit": 1, "learning_rate": 1e-2, **settings})
    ema = fit(
        task, Samples(ROWS), config, Session(make_accelerator(config.train), path, Run(path, False), NullTracker())
    )
    return config, ema


def steps_kept(path):
    return sorted(int(folder.name) for folder in (path / "checkpoints").iterdir() if folder.is_dir())


def losses(*values):
    return {3 * (number + 1): {"validation_loss": value} for number, value in enumerate(values)}


def test_the_best_checkpoint_survives_pruning_and_is_exported(tmp_path):
    config, ema = train(tmp_path, task := Scored(losses(3.0, 1.0, 2.0, 1.5)), export_best=True)
    assert steps_kept(tmp_path) == [6, 12]
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert (best["step"], best["figure"], best["value"]) == (6, "validation_loss", 1.0)
    saved = checkpoints.load_file(tmp_path / "checkpoints" / "6" / "trainable.safetensors")
    average = checkpoints.load_file(tmp_path / "checkpoints" / "6" / "ema.safetensors")
    assert torch.equal(task.linear.weight, saved["linear.weight"])
    assert torch.equal(ema.shadow["linear.weight"], average["linear.weight"])
    assert exported_step(tmp_path, config.train) == 6


def test_keeping_the_best_changes_nothing_of_the_training(tmp_path):
    plain = Scored(losses(3.0, 1.0, 2.0, 1.5))
    train(tmp_path / "a", plain, keep_best=KeepBest.none)
    kept = Scored(losses(3.0, 1.0, 2.0, 1.5))
    config, _ = train(tmp_path / "b", kept)
    assert not (tmp_path / "a" / "checkpoints" / "best.json").exists()
    assert torch.equal(plain.linear.weight, kept.linear.weight)
    assert exported_step(tmp_path / "b", config.train) == 12
    assert exported_best(tmp_path / "b", config.train) is None


@pytest.mark.parametrize("dies_at", [6, 9, 12])
def test_a_killed_run_finds_the_same_best_with_the_same_weights(tmp_path, dies_at):
    values = losses(3.0, 2.0, 2.5, 1.0)
    whole = Scored(values)
    train(tmp_path / "a", whole)
    with pytest.raises(InterruptedError):
        train(tmp_path / "b", Scored(values, dies_at))
    resumed = Scored(values)
    train(tmp_path / "b", resumed)
    assert torch.equal(whole.linear.weight, resumed.linear.weight)
    one, two = (json.loads((tmp_path / name / "checkpoints" / "best.json").read_text()) for name in "ab")
    assert one == two
    assert steps_kept(tmp_path / "a") == steps_kept(tmp_path / "b")


def test_of_equal_extensions_the_smaller_loss_is_better(tmp_path):
    """NaN is never better."""
    values = {
        3: {"validation_loss": float("nan"), "extension": 0.0},
        6: {"validation_loss": 2.0, "extension": 0.1},
        9: {"validation_loss": 1.0, "extension": 0.1},
        12: {"validation_loss": 0.5, "extension": 0.2},
    }
    train(tmp_path, Scored(values), keep_best=KeepBest.extension)
    best = checkpoints.read_best(tmp_path / "checkpoints")
    assert (best.step, best.figure, best.value) == (9, "extension", 0.1)


def test_a_damaged_or_foreign_best_is_forgotten(tmp_path):
    """Foreign: chosen by another figure."""
    train(tmp_path, Scored(losses(3.0, 1.0, 2.0, 1.5)))
    folder = tmp_path / "checkpoints"
    assert checkpoints.open_best(folder, KeepBest.validation_loss, 12).step == 6
    assert checkpoints.open_best(folder, KeepBest.validation_loss, 4).step is None
    assert checkpoints.open_best(folder, KeepBest.extension, 12).step is None
    assert checkpoints.open_best(folder, KeepBest.none, 12) is None
    (folder / "6" / "trainable.safetensors").write_bytes(b"half")
    assert checkpoints.open_best(folder, KeepBest.validation_loss, 12).step is None


@pytest.mark.parametrize(
    ("script", "keys", "named"),
    [
        ("train_lora", ["train.export_best=true", "train.validation_steps=0"], "train.validation_steps=0"),
        ("train_lora", ["train.export_best=true", "train.keep_best=none"], "train.keep_best=none"),
        ("caption_vlm", ["train.keep_best=extension"], "train.keep_best=extension"),
        ("caption_vlm", ["train.validation_prompts=[a wall]"], "train.validation_prompts"),
    ],
)
def test_what_can_choose_or_draw_nothing_is_refused(script, keys, named):
    with pytest.raises(ConfigError, match=named):
        compose(script, keys)


# ---- tracking ----


def test_a_key_that_wandb_refuses_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    with pytest.raises(PackshotError, match="W&B does not start: ") as refused:
        open_tracker(Run(tmp_path, False), compose("train_lora", ["tracking=wandb"]), "train_lora")
    assert "tracking=none" in refused.value.hint


def test_an_offline_run_tracks_table_sources_and_export(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = compose("train_lora", ["tracking=wandb", "tracking.name=t"])
    tracker = open_tracker(Run(tmp_path, False), config, "train_lora")
    Image.new("RGB", (8, 8)).save(tmp_path / "000.png")
    export = tmp_path / "export"
    export.mkdir()
    (export / "adapter.bin").write_bytes(b"weights")
    tracker.table("validation", tmp_path, [{"picture": "000.png", "prompt": "p", "extension": None}], 5)
    tracker.inputs([Input("dataset", "data.train", "data/rendered/train", "data_sha256")])
    tracker.artifact("adapter", export, {"sha256": "abc", "base": "mini"})
    tracker.finish()
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60  # its service may still be writing
    while not all(word in file.read_bytes() for word in (b"data_sha256", b"adapter-", b"adapter.bin", b"000.png")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/table/validation*.table.json"))
    assert (export / "adapter.bin").read_bytes() == b"weights"
