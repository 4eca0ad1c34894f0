"""What a run imports and loads: nothing that it has no use for."""

import json
import shutil
import subprocess
import sys
import threading

import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator

from packshot.base.load import load_parts, weights_hash
from packshot.base.places import Place
from packshot.base.sdxl import PARTS, Source
from packshot.config.compose import compose
from packshot.config.schema import IPAdapterMethod, LoraMethod, ModelConfig
from packshot.dataset.rows import load_rows
from packshot.errors import ConfigError
from packshot.methods import METHODS
from packshot.runs.files import resolve
from packshot.train.run import build_task

UNUSED = {  # by a LoRA that has encoded everything and draws nothing, and who would import it
    "pandas": "pyarrow.dataset",
    "pymatting": "packshot.imaging.matte",
    "wandb": "packshot.runs.tracking",
    "datasets": "packshot.make_dataset.steps",
    "diffusers.pipelines.pipeline_utils": "the methods' pipelines",
    "diffusers.models.autoencoders.autoencoder_kl": "packshot.base",
    "diffusers.models.controlnets.controlnet": "packshot.methods.controlnet",
    "transformers.models.clip.modeling_clip": "packshot.base",
}
RUN = """
import json, sys
from packshot.config.compose import compose
from packshot.runs.folder import Run
from packshot.base.sdxl import Source
from packshot.train.run import train

parts, seen, load = [], {}, Source.load
Source.load = lambda self, dtype: parts.append(self.name) or load(self, dtype)
def metrics(self, line):
    seen.setdefault("parts", list(parts))
    seen.setdefault("modules", [name for name, module in sys.modules.items() if module is not None])
Run.metrics = metrics
train(compose("train_lora", sys.argv[1:]))
print(json.dumps(seen))
"""


def python(*arguments):
    found = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture
def few(tmp_path):
    """Overrides of a small LoRA run whose samples are cached."""
    (tmp_path / "set").mkdir()
    table = pq.read_table(sorted(resolve("data/rendered/heldout").glob("part-*.parquet"))[0])
    pq.write_table(table.slice(0, 4), tmp_path / "set" / "part-00000.parquet")
    overrides = [f"data.{name}={tmp_path / 'set'}" for name in ("train", "validation")]
    overrides += [f"data.cache_dir={tmp_path / 'cache'}", "train.validation_steps=0", "train.max_steps=1"]
    config = compose("train_lora", overrides)
    rows, accelerator = load_rows("data.train", config.data.train[0]), Accelerator(cpu=True)
    _, examples = build_task(config, load_parts(config.model), rows, rows, accelerator)
    examples.fill(accelerator)
    return overrides


def test_a_lora_with_a_full_cache_loads_nothing_else(few, tmp_path):
    seen = json.loads(python("-c", RUN, *few, "tracking=none", f"run.dir={tmp_path / 'run'}").splitlines()[-1])
    assert seen["parts"] == ["unet", "scheduler"]
    imported = {name: by for name, by in UNUSED.items() if name in seen["modules"]}
    assert not imported
    assert "diffusers.models.unets.unet_2d_condition" in seen["modules"]  # the names are those of today's libraries


def test_help_imports_no_library_of_models():
    code = "import sys, runpy, atexit\natexit.register(lambda: print(sorted(sys.modules)))\nsys.argv[1:] = ['--help']\n"
    said = python("-c", code + "runpy.run_path('train_lora.py', run_name='__main__')")
    modules = said.splitlines()[-1]
    assert "'packshot.cli'" in modules
    assert not [name for name in ("torch", "numpy", "diffusers", "pyarrow") if f"'{name}'" in modules]


# ---- parts ----


def test_a_worker_of_a_build_imports_no_torch():
    """Its import is two thirds of a worker's start, and decoding and comparing pictures needs no network."""
    code = "import sys, packshot.make_dataset.steps, packshot.make_dataset.run\nprint('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]


def test_only_an_ip_adapter_loads_the_image_encoder():
    for config, loaded in ((LoraMethod(rank=2), False), (IPAdapterMethod(), True)):
        parts = load_parts(ModelConfig())
        METHODS[type(config)](parts, config)
        assert ("image_encoder" in parts.loaded()) is loaded


def test_a_part_that_is_loaded_later_is_placed_like_the_others():
    parts = load_parts(ModelConfig()).to(torch.device("cpu"), torch.bfloat16)
    assert parts.loaded() == {"unet", "scheduler"}
    assert parts.unet.dtype == parts.text_encoder.dtype == torch.bfloat16
    assert parts.vae.dtype == torch.float32
    for network in (parts.vae, parts.text_encoder, parts.image_encoder):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
    parts.text_encoder = None  # given up
    assert parts.text_encoder is None
    with pytest.raises(AttributeError, match="no 'decoder'"):
        parts.decoder  # noqa: B018


def test_threads_that_ask_for_a_part_together_get_the_same(monkeypatch):
    parts, found, ready = load_parts(ModelConfig()), [], threading.Barrier(3)

    def ask():
        ready.wait()
        found.append(parts.text_encoder)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(part is found[0] for part in found)
    assert len(found) == 3


def test_identity_follows_weights_config_and_dtype(tmp_path):
    parts = load_parts(ModelConfig())
    vae, text = parts.identity("vae"), parts.identity("text_encoder", "text_encoder_2")
    assert parts.loaded() == {"unet", "scheduler"}
    parts.load("vae")
    assert parts.identity("vae") == vae
    parts.to(torch.device("cpu"), torch.bfloat16)
    assert parts.identity("vae") == vae
    assert parts.identity("text_encoder", "text_encoder_2") != text
    shutil.copytree(resolve("data/models/sdxl/vae"), tmp_path / "vae")
    changed = ModelConfig(vae=str(tmp_path / "vae"))
    assert load_parts(changed).identity("vae") == vae  # the same files elsewhere
    for variant in ("README.md", "diffusion_pytorch_model.fp16.safetensors"):
        (tmp_path / "vae" / variant).write_text("not read")
    assert load_parts(changed).identity("vae") == vae
    written = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**written, "scaling_factor": 1.0}))
    assert load_parts(changed).identity("vae") != vae
    assert load_parts(changed).vae_config("scaling_factor") == 1.0
    assert load_parts(changed).vae_config("latent_channels") == parts.vae.config.latent_channels
    shifted = {**written, "latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [2.0] * 4}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(shifted))
    changed_parts, latents = load_parts(changed), torch.ones(1, 4, 2, 2)
    from_file = changed_parts.latent_scale().to_unet(latents)
    assert "vae" not in changed_parts.loaded()
    assert from_file[0, :, 0, 0].tolist() == pytest.approx(
        [(1 - mean) / 2 * written["scaling_factor"] for mean in shifted["latents_mean"]]
    )
    changed_parts.load("vae")
    assert torch.equal(changed_parts.latent_scale().to_unet(latents), from_file)
    # where there are no files, as of a base on the hub, the weights tell
    parts._sources = {}
    hashed = parts.identity("vae")
    with torch.no_grad():
        next(parts.vae.parameters()).mul_(1.5)
    assert parts.identity("vae") != hashed
    assert weights_hash(parts.vae) not in (vae, hashed)


def test_a_missing_part_is_named_as_early_as_possible(tmp_path):
    base = tmp_path / "sdxl"
    shutil.copytree(resolve("data/models/sdxl"), base)
    for part in ("image_encoder", "feature_extractor"):
        shutil.rmtree(base / part)
    parts = load_parts(ModelConfig(base=str(base)))  # SDXL's own repository has none either
    assert parts.pipeline_components().keys().isdisjoint({"image_encoder", "feature_extractor"})
    with pytest.raises(ConfigError, match=r"model\.image_encoder: .*sdxl/image_encoder holds no CLIPVisionModel"):
        parts.image_encoder  # noqa: B018
    with pytest.raises(ConfigError, match=r"model\.image_encoder: .* holds no CLIPVisionModel.* \(no config\.json\)"):
        load_parts(ModelConfig(base=str(base), image_encoder=str(base / "tokenizer")))
    shutil.rmtree(base / "vae")
    with pytest.raises(ConfigError, match=r"model\.base: .*sdxl/vae holds no AutoencoderKL"):
        load_parts(ModelConfig(base=str(base)))
    with pytest.raises(ConfigError, match=r"model\.vae: .* holds no AutoencoderKL"):
        load_parts(ModelConfig(vae=str(base / "scheduler")))


def test_a_part_that_cannot_be_read_is_named_with_its_key(tmp_path):
    shutil.copytree(resolve("data/models/sdxl/vae"), tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    parts = load_parts(ModelConfig(vae=str(tmp_path / "vae")))
    with pytest.raises(ConfigError, match=r"model\.vae: .*vae holds no AutoencoderKL that can be loaded"):
        parts.vae  # noqa: B018


def test_sources_on_the_hub_are_taken_to_be_there():
    source = Source("vae", Place("model.vae", "owner/name", None, "owner/name"), PARTS["vae"])
    assert source.found
    assert source.folder is None
    assert source.config() == {}


def test_pictures_that_are_not_asked_for_stay_on_disk():
    rows = load_rows("data.validation", "data/rendered/heldout", pictures=("image", "mask"))
    whole = load_rows("data.validation", "data/rendered/heldout")
    assert set(whole.pictures.column_names) - set(rows.pictures.column_names) >= {"plate", "cutout"}
    seen, all_of_it = rows.read(0, ("image", "mask")), whole.read(0, ("image", "mask"))
    assert seen["image"].tobytes() == all_of_it["image"].tobytes()
    assert {key: seen[key] for key in ("id", "text", "scene")} == {
        key: all_of_it[key] for key in ("id", "text", "scene")
    }
    assert rows.fingerprint() == whole.fingerprint()
    assert rows.digest(0) == whole.digest(0)
