"""task=train: through the shared loop, to an export that can be used and resumed."""

import json

import pytest
from caption_fixtures import caption_vlm, save_tiny_florence, trained_run, write_dataset
from safetensors.torch import load_file

from packshot.errors import ConfigError, PackshotError


def test_the_export_loads_in_stock_transformers():
    from transformers import AutoProcessor, Florence2ForConditionalGeneration

    export = trained_run() / "export"
    model = Florence2ForConditionalGeneration.from_pretrained(export)
    assert model.generation_config.num_beams == 1
    assert AutoProcessor.from_pretrained(export).image_token == "<image>"
    assert json.loads((export / "packshot.json").read_text())["captioner"] == "florence2"
    data = json.loads((export / "data.json").read_text())
    assert data["rows"] == 4
    assert data["licenses"] == ["CC0-1.0"]
    card = (export / "README.md").read_text()
    assert data["sha256"] in card
    assert "| soft_f1 | 1 |" in card
    assert "| soft_f1_shuffled_images |" in card


def test_validation_stands_beside_its_baselines_in_the_metrics():
    lines = [json.loads(line) for line in (trained_run() / "metrics.jsonl").read_text().splitlines()]
    first, last = (line for line in lines if "soft_f1" in line)
    assert first["step"] == 0
    assert last["soft_f1"] == 1.0 > last["soft_f1_shuffled_images"]
    assert last["validation_loss"] < 0.1 < first["validation_loss"]
    assert last["soft_f1_constant_caption"] < 1.0
    assert len(list((trained_run() / "samples" / "120").glob("*.png"))) == 4


@pytest.fixture
def world(tmp_path):
    save_tiny_florence(tmp_path / "base")
    write_dataset(tmp_path / "data")
    return tmp_path


SHORT = ("train.validation_steps=0", "train.batch_size=2")


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(world):
    caption_vlm(world, "whole", *SHORT, "train.max_steps=4")
    caption_vlm(world, "parts", *SHORT, "train.max_steps=2")
    caption_vlm(world, "parts", *SHORT, "train.max_steps=4", "run.resume=true")
    whole, parts = (load_file(world / name / "export" / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(tensor.equal(parts[name]) for name, tensor in whole.items())


def test_a_refused_resume_keeps_the_config_of_the_run(world):
    run = caption_vlm(world, "run", *SHORT, "train.max_steps=2")
    before = (run / "config.yaml").read_text()
    with pytest.raises(PackshotError, match=r"run.seed: 0 -> 1"):
        caption_vlm(world, "run", *SHORT, "train.max_steps=4", "run.seed=1", "run.resume=true")
    assert (run / "config.yaml").read_text() == before
    caption_vlm(world, "run", *SHORT, "train.max_steps=4", "run.resume=true")
    assert "max_steps: 4" in (run / "config.yaml").read_text()


def test_frozen_vision_trains_all_but_the_vision_tower(world):
    run = caption_vlm(world, "run", *SHORT, "train.max_steps=2", "captioner.tuning=frozen_vision")
    before = load_file(world / "base" / "model.safetensors")
    after = load_file(run / "export" / "model.safetensors")
    moved = {name for name in after if not after[name].equal(before[name])}
    assert moved
    assert not any("vision_tower" in name for name in moved)
    assert any("multi_modal_projector" in name for name in moved)
    assert any("language_model" in name for name in moved)


def test_gradient_checkpointing_changes_no_weight(world):
    caption_vlm(world, "plain", *SHORT, "train.max_steps=2")
    caption_vlm(world, "checkpointed", *SHORT, "train.max_steps=2", "train.gradient_checkpointing=true")
    plain, other = (load_file(world / name / "export" / "model.safetensors") for name in ("plain", "checkpointed"))
    assert all(tensor.allclose(other[name], atol=1e-6) for name, tensor in plain.items())


def test_a_lora_is_exported_without_the_base(world):
    run = caption_vlm(
        world, "lora", *SHORT, "train.max_steps=2", "captioner.tuning=language_lora", "captioner.lora_rank=2"
    )
    names = set(load_file(run / "export" / "adapter_model.safetensors"))
    assert names
    assert all(".lora_" in name for name in names)
    assert not (run / "export" / "model.safetensors").exists()
    assert json.loads((run / "export" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        world / "base"
    )
    caption_vlm(world, "scores", f"captioner.adapter={run / 'export'}", task="evaluate")
    assert json.loads((world / "scores" / "scores.json").read_text())["samples"] == 4


def test_a_caption_longer_than_the_limit_is_refused_first(world):
    with pytest.raises(
        ConfigError, match=r"the caption of sample id0 has \d+ tokens, more than captioner.max_new_tokens=8"
    ):
        caption_vlm(world, "run", "captioner.max_new_tokens=8")
    assert not (world / "run").exists()
