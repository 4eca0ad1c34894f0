"""The published checkpoints' shapes, without their weights: configs, parameter counts, what the presets would train."""

import pkgutil
import re

import pytest
import torch
from transformers import (
    Florence2Config,
    Florence2ForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
)

from packshot.caption.models.mllama import cross_layers
from packshot.config.captioners import CAPTIONERS
from packshot.config.compose import compose
from packshot.config.schema import CaptionerKind

DAVIT = {
    "depths": (1, 1, 9, 1), "patch_size": (7, 3, 3, 3), "patch_stride": (4, 2, 2, 2), "patch_padding": (3, 1, 1, 1),
    "patch_prenorm": (False, True, True, True), "window_size": 12,
}  # fmt: skip
BART = {"model_type": "bart", "vocab_size": 51289, "max_position_embeddings": 1024}
SIZES = {
    "base": (
        {"embed_dim": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32), "num_groups": (4, 8, 16, 32)},
        {"d_model": 768, "layers": 6, "heads": 12, "ffn": 3072},
        231.4e6,
    ),
    "large": (
        {"embed_dim": (256, 512, 1024, 2048), "num_heads": (8, 16, 32, 64), "num_groups": (8, 16, 32, 64)},
        {"d_model": 1024, "layers": 12, "heads": 16, "ffn": 4096},
        770.2e6,
    ),
}


def florence(size):
    vision, text, _ = SIZES[size]
    bart = {
        f"{side}_{name}": text[key]
        for side in ("encoder", "decoder")
        for name, key in (("layers", "layers"), ("attention_heads", "heads"), ("ffn_dim", "ffn"))
    }
    config = Florence2Config(
        text_config={**BART, **bart, "d_model": text["d_model"]},
        vision_config={**DAVIT, **vision, "projection_dim": text["d_model"]},
        image_token_id=51289,
    )
    config.tie_word_embeddings = True
    with torch.device("meta"):
        return Florence2ForConditionalGeneration(config)


def low_rank(model, pattern, rank):
    """Parameters of a LoRA on the linear layers whose whole name matches."""
    return sum(
        rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and re.fullmatch(pattern, name)
    )


@pytest.mark.parametrize("size", SIZES)
def test_florence_2_has_its_published_size_and_layers(size):
    model = florence(size)
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert sum(unique.values()) == pytest.approx(SIZES[size][2], rel=0.003)
    presets = CAPTIONERS["florence2"].presets
    pattern = presets["language_lora"].modules
    names = [
        name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and re.fullmatch(pattern, name)
    ]
    layers = SIZES[size][1]["layers"]
    assert len(names) == layers * (4 + 2) + layers * (8 + 2)
    trained = presets["frozen_vision"].parameters
    frozen = [name for name, _ in model.named_parameters() if not re.fullmatch(trained, name)]
    assert frozen
    assert all("vision_tower" in name for name in frozen)


def test_llama_32_vision_has_its_published_size_and_layers():
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(MllamaConfig(vision_config={"image_size": 560}))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(10.67e9, rel=0.002)
    crossing = "|".join(map(str, cross_layers(model)))
    presets = CAPTIONERS["llama32_vision"].presets
    patterns = {name: preset.modules.replace("CROSS_LAYERS", crossing) for name, preset in presets.items()}
    assert low_rank(model, patterns["language_lora"], 16) == pytest.approx(52.4e6, rel=0.01)
    assert low_rank(model, patterns["cross_attention_lora"], 16) == pytest.approx(10.5e6, rel=0.01)
    pattern = patterns["vision_adapter"]
    reached = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and re.fullmatch(pattern, n)]
    assert sum("vision_model" in name for name in reached) == 40 * 6
    assert sum("multi_modal_projector" in name for name in reached) == 1
    assert len(reached) == 40 * 6 + 1 + 8 * 7
    assert not any(re.fullmatch(pattern, n) for n in ("lm_head", "model.language_model.embed_tokens"))


@pytest.mark.parametrize(
    ("choice", "kind", "key", "hub_id"),
    [
        ("florence2_base", "florence2", "florence2", "florence-community/Florence-2-base"),
        ("florence2_large", "florence2", "florence2", "florence-community/Florence-2-large"),
        ("llama32_vision_11b", "llama32_vision", "llama32_vision", "meta-llama/Llama-3.2-11B-Vision-Instruct"),
    ],
)
@pytest.mark.parametrize("script", ["caption_vlm", "build_data", "evaluate"])
def test_one_word_names_a_published_checkpoint(script, choice, kind, key, hub_id):
    config = compose(script, [f"captioner={choice}"])
    assert config.captioner.kind is CaptionerKind[kind]
    assert getattr(config.model, key) == hub_id
    assert compose(script, [f"captioner={choice}", "captioner.lora_rank=4"]).captioner.lora_rank == 4


@pytest.mark.parametrize("family", CAPTIONERS.values(), ids=CAPTIONERS)
def test_a_row_has_its_code_its_yaml_and_its_key(family):
    """A family is one row, one module and one YAML file; the rest derives from the row."""
    for path in filter(None, (family.adapter, family.connect)):
        assert callable(pkgutil.resolve_name(path))
    config = compose("build_data", [f"captioner={family.name}", *(f"captioner.{key}=a" for key in family.needs)])
    assert config.captioner.kind.name == family.name
    assert getattr(config.model, family.name, "") == family.weights
    assert (family.presets == {}) == (family.adapter == "")
