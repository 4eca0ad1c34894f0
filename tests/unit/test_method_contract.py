"""A fourth method, known to this file alone, from config to export: nothing else asks which method it is."""

import ast
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file
from torch import nn

from packshot.base.adapter_metadata import write_metadata
from packshot.base.load import load_parts
from packshot.config import compose as composing
from packshot.config.keys import opt
from packshot.config.schema import SCRIPTS, ExportConfig, TrainScript
from packshot.engine import checkpoints
from packshot.errors import ConfigError
from packshot.methods import METHODS, Method
from packshot.methods.base import unet_conditioning
from packshot.train.run import train

SRC = Path(__file__).resolve().parents[2] / "src" / "packshot"


@dataclass
class TintMethod:
    width: int = opt(8, "hidden units", min=1, max=64)


@dataclass
class TintExport(ExportConfig):
    plain: bool = opt(False, "also write the weights as text")


@dataclass
class TrainTint(TrainScript):
    method: TintMethod = field(default_factory=TintMethod)
    export: TintExport = field(default_factory=TintExport)


class Tint(Method):
    """Adds to the UNet's output what a small network makes of two colours: the mean of the picture as the image encoder
    prepares it, which is cached and may be a peer's, and that of the plate, which is read at each access."""

    config: TintMethod
    used_as = "adapters.tint=FOLDER"
    encoders = ("image_encoder",)

    def __init__(self, parts, config):
        super().__init__(parts, config)
        self.layouts = {"plain": self.export_plain}
        self.peer_key = lambda row: row["scene"].surface or None
        self.image_encoder = parts.image_encoder
        self.network = nn.Sequential(nn.Linear(6, config.width), nn.GELU(), nn.Linear(config.width, 4))
        nn.init.zeros_(self.network[-1].weight)
        nn.init.zeros_(self.network[-1].bias)

    @classmethod
    def pictures_of(cls, config):
        return ("plate",)

    def encode(self, samples):
        size = self.image_encoder.config.image_size
        pictures = [np.asarray(sample["image"].resize((size, size)), np.float32) / 255 for sample in samples]
        return [{"colour": torch.from_numpy(picture.mean((0, 1)))} for picture in pictures]

    def cache_key(self):
        return f"tint-{self.image_encoder.config.image_size}"

    def condition(self, sample, encoded, key):
        chosen = encoded[int(key.uniform("peer") * len(encoded))]["colour"]
        plate = np.asarray(sample["plate"], np.float32).mean((0, 1)) / 255
        return {"colours": torch.cat([chosen, torch.from_numpy(plate)])}

    def condition_shapes(self, resolution):
        return {"colours": (6,)}

    def predict(self, noisy_BCHW, timesteps_B, batch):
        tint = self.network(batch["colours"])
        return self.unet(noisy_BCHW, timesteps_B, **unet_conditioning(batch)).sample + tint[:, :, None, None]

    def pipeline(self):
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(**self.parts.pipeline_components(references=False))

    def export(self, folder, metadata=()):
        save_file(self.network.state_dict(), folder / "tint.safetensors")
        write_metadata(folder, {"width": self.config.width, **dict(metadata)})

    def export_plain(self, folder, exported):
        (folder / "tint.txt").write_text("\n".join(self.network.state_dict()))


@pytest.fixture
def tint(monkeypatch, tmp_path, root):
    """Registers the method as a user of the project would: script, config file, module; returns a runner."""
    monkeypatch.setitem(SCRIPTS, "train_tint", TrainTint)
    monkeypatch.setitem(METHODS, TintMethod, Tint)
    shutil.copytree(root / "conf", tmp_path / "conf")
    defaults = (root / "conf" / "train_lora.yaml").read_text().replace("train_lora", "train_tint")
    (tmp_path / "conf" / "train_tint.yaml").write_text(defaults)
    monkeypatch.setattr(composing, "CONF", tmp_path / "conf")
    (tmp_path / "set").mkdir()
    table = pq.read_table(sorted((root / "data" / "rendered" / "heldout").glob("*.parquet"))[0])
    pq.write_table(table.slice(0, 12), tmp_path / "set" / "part-00000.parquet")

    def run(name, *overrides):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        keys = [
            f"data.train={tmp_path / 'set'}", f"data.validation={tmp_path / 'set'}", "tracking=none",
            f"data.cache_dir={tmp_path / 'cache'}", "train.max_steps=4", "train.batch_size=2",
            "train.learning_rate=1e-3", "train.checkpointing_steps=2", "train.validation_steps=4",
            "train.validation_samples=1", f"run.dir={tmp_path / name}",
        ]  # fmt: skip
        train(composing.compose("train_tint", [*keys, *overrides]))
        return tmp_path / name

    return run


def test_a_fourth_method_trains_resumes_and_exports(tint, tmp_path, monkeypatch):
    """Its own pictures, encodings of peers, cache, validation, checkpoint, layout and metadata; bit for bit."""
    export = tint("whole", "export.plain=true", "method.width=5") / "export"
    whole = load_file(export / "tint.safetensors")
    assert whole["0.weight"].shape == (5, 6)
    assert whole["2.weight"].any()
    assert (export / "tint.txt").read_text().splitlines() == ["0.weight", "0.bias", "2.weight", "2.bias"]
    written = json.loads((export / "packshot.json").read_text())
    assert written == {"width": 5, "product_conditioning": "noised"}
    card = (export / "README.md").read_text()
    assert "# tint trained by Packshot" in card
    assert "    python generate.py product=photo.png adapters.tint=FOLDER" in card.splitlines()
    assert (export / "samples" / "grid.png").is_file()
    assert [path.name.partition("-")[0] for path in sorted((tmp_path / "cache").glob("*-*/"))] == [
        "latents", "method", "seen", "text",
    ]  # fmt: skip

    class Killed(Exception):
        pass

    save = checkpoints.TrainState.save

    def killed(state, folder, made):
        save(state, folder, made)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.TrainState, "save", killed)
        with pytest.raises(Killed):
            tint("broken", "method.width=5")
    resumed = load_file(tint("broken", "method.width=5", "run.resume=true") / "export" / "tint.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_fourth_method_is_planned_and_checked(tint):
    planned = json.loads((tint("plan", "mode=plan") / "plan.json").read_text())
    assert planned["trained_parameters"] == 6 * 8 + 8 + 8 * 4 + 4
    assert planned["tflop_per_step"] > 0
    checked = tint("check", "mode=check") / "check"
    assert json.loads((checked / "check.json").read_text())["seconds_per_step"] > 0
    assert (checked / "batch.png").is_file()


def test_a_set_without_its_picture_is_refused_first(tint, tmp_path, monkeypatch):
    """Before any model is loaded."""
    file = tmp_path / "set" / "part-00000.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["plate"]), file)
    monkeypatch.setattr("packshot.train.run.load_parts", lambda model: pytest.fail("models were loaded"))
    with pytest.raises(ConfigError, match=r"data\.train=.* has no column plate"):
        tint("refused")
    assert not (tmp_path / "refused").exists()


def test_encoders_are_freed_as_the_method_declares(tint):
    from packshot.config.schema import DataConfig, ModelConfig
    from packshot.train.encode import Encoder

    parts = load_parts(ModelConfig())
    method = Tint(parts, TintMethod())
    Encoder(parts, method, 128, DataConfig()).release()
    assert parts.image_encoder is None
    assert method.image_encoder is None
    assert parts.text_encoder is None


@pytest.mark.parametrize("room", ["base", "engine", "train", "caption", "generate"])
def test_no_room_imports_a_method_or_its_config(room):
    """Whoever wants to ask which method it is needs one of these names."""
    named = {kind.__name__ for pair in METHODS.items() for kind in pair} | {
        schema.__name__ for schema in SCRIPTS.values() if issubclass(schema, TrainScript) and schema is not TrainScript
    }
    assert len(named) == 9
    for path in (SRC / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("packshot"):
                asked = named & {alias.name for alias in node.names}
                assert not asked, f"{path} imports {asked}"
