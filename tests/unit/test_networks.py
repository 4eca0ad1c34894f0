"""Networks are loaded whole: a file that lacks a tensor, or has one without a place, is refused with its name."""

import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from packshot.base.controlnets import load_controlnet
from packshot.base.load import load_parts, weights_hash
from packshot.config.schema import AdaptersConfig, ModelConfig
from packshot.engine.memory import return_freed_memory
from packshot.errors import ConfigError
from packshot.evaluate.features import named_encoder
from packshot.generate.load import load_models
from packshot.runs.files import resolve
from packshot.runs.networks import CLIP_REST, load_whole

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder")


def own_memory() -> int:
    """Bytes of this process's own memory, without mapped files and without what other tests have freed."""
    return_freed_memory()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def without_one(tensors, name):
    del tensors[name]


def with_another(tensors, name):
    tensors["somebody.else.weight"] = torch.zeros(3)


def cut(tensors, name):
    tensors[name] = tensors[name][:-1].contiguous()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_of_the_wanted_dtype_are_mapped_and_not_copied(tmp_path):
    config = CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16)
    CLIPTextModel(config).to(torch.bfloat16).save_pretrained(tmp_path)  # 300 MB
    before = own_memory()
    network = load_whole(CLIPTextModel, tmp_path, dtype=torch.bfloat16)
    size = sum(weight.nbytes for weight in network.parameters())
    assert own_memory() - before < size / 4
    copies = network.float()  # so that the measure is known to see them
    assert own_memory() - before > size
    del copies


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_one, "1 tensor is missing: "),
        (with_another, "1 tensor is unknown: somebody.else.weight"),
        (cut, "shape"),
    ],
)
def test_a_part_that_does_not_fit_its_file_is_refused(tmp_path, part, change, words):
    base = tmp_path / "sdxl"
    shutil.copytree(resolve("data/models/sdxl"), base)
    (file,) = (base / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(key for key, tensor in tensors.items() if tensor.ndim > 1)[3]
    change(tensors, name)
    save_file(tensors, file, metadata={"format": "pt"})
    config = ModelConfig(base=str(base), vae=None, image_encoder=str(base / "image_encoder"))
    with pytest.raises(ConfigError, match=words) as error:
        getattr(load_parts(config), part)
    assert change is with_another or name in str(error.value)


def test_half_of_a_whole_clip_model_is_enough(tmp_path, caplog):
    caplog.set_level("INFO")
    vision = CLIPVisionModelWithProjection.from_pretrained(resolve("data/models/sdxl/image_encoder"))
    text = CLIPTextModel.from_pretrained(resolve("data/models/sdxl/text_encoder"))
    config = CLIPModel.config_class(
        text_config=text.config.to_dict(),
        vision_config=vision.config.to_dict(),
        projection_dim=vision.config.projection_dim,
    )
    CLIPModel(config).save_pretrained(tmp_path)
    half = load_whole(CLIPVisionModelWithProjection, tmp_path, CLIP_REST)
    kept = load_file(tmp_path / "model.safetensors")
    assert torch.equal(half.visual_projection.weight, kept["visual_projection.weight"])
    assert "tensors are not used" in caplog.text
    with pytest.raises(ValueError, match="tensors are unknown"):
        load_whole(CLIPVisionModelWithProjection, tmp_path)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("task_embedding", "ControlNet Union"),
        ("lora_controlnet", "Control-LoRA"),
        ("lllite_unet_input_blocks_4.down.0.weight", "ControlNet-LLLite"),
        ("adapter.conv_in.weight", "T2I-Adapter"),
        ("model.diffusion_model.out.2.bias", "a whole checkpoint"),
    ],
)
def test_a_file_that_is_no_controlnet_is_named(tmp_path, parts, tensor, kind):
    file = tmp_path / "other.safetensors"
    save_file({tensor: torch.zeros(4, 4), "controlnet_mid_block.weight": torch.zeros(8, 8, 1, 1)}, file)
    with pytest.raises(ConfigError, match=f"is (a )?{kind}, which cannot be used"):
        load_controlnet("adapters.controlnets", str(file), parts.unet)


def test_a_union_that_calls_itself_controlnet_is_refused(tmp_path, parts):
    from diffusers import ControlNetUnionModel

    union = ControlNetUnionModel.from_unet(parts.unet)
    union.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("ControlNetUnionModel", "ControlNetModel"))
    with pytest.raises(ConfigError, match="is a ControlNetUnionModel of diffusers"):
        load_controlnet("adapters.controlnets", str(tmp_path), parts.unet)


def test_a_unet_is_no_controlnet(parts):
    with pytest.raises(ConfigError, match="is a UNet2DConditionModel of diffusers"):
        load_controlnet("adapters.controlnets", "data/models/sdxl/unet", parts.unet)


@pytest.mark.parametrize("config", [LoHaConfig, LoraConfig])
@pytest.mark.parametrize(
    ("change", "words"), [(without_one, "1 tensor is missing"), (with_another, "1 tensor is unknown: somebody")]
)
def test_an_adapter_of_peft_that_does_not_fit_is_refused(tmp_path, config, change, words):
    unet = load_parts(ModelConfig()).unet
    get_peft_model(unet, config(r=2, target_modules=["to_q", "to_v"])).save_pretrained(tmp_path)
    load_models(ModelConfig(), AdaptersConfig(lora=str(tmp_path)))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors, sorted(tensors)[0])
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=words):
        load_models(ModelConfig(), AdaptersConfig(lora=str(tmp_path)))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ("ip_adapter.0.to_q_lora.down.weight", "1 tensor is unknown: ip_adapter"),
        ("image_proj.perceiver.weight", "of its projection"),
    ],
)
def test_an_ip_adapter_with_more_in_it_is_refused(tmp_path, parts, tensor, words):
    from packshot.config.schema import IPAdapterMethod
    from packshot.methods.ip_adapter import IPAdapter

    IPAdapter(parts, IPAdapterMethod()).export(tmp_path)
    tensors = load_file(tmp_path / "ip_adapter.safetensors")
    file = tmp_path / "ip-adapter-faceid_sdxl.safetensors"
    save_file({**tensors, tensor: torch.zeros(4, 64)}, file)
    with pytest.raises(ConfigError, match=words):
        load_models(ModelConfig(), AdaptersConfig(ip_adapter=str(file)))


@pytest.mark.parametrize("cls", [ViTForImageClassification, ViTModel])
def test_an_image_encoder_without_a_pooling_layer_is_used(tmp_path, cls):
    """DINO and classifiers have none: the first token is their embedding, never a layer of random numbers."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=32, patch_size=16)
    network = cls(config, **({"add_pooling_layer": False} if cls is ViTModel else {}))
    network.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    first, again = (named_encoder(str(tmp_path), "scores.dino")([picture]) for _ in range(2))
    assert first.shape == (1, 16)
    assert np.array_equal(first, again)


def test_a_base_of_pickles_loads_without_an_alarm(tmp_path, caplog, monkeypatch):
    base = tmp_path / "sdxl"
    shutil.copytree(resolve("data/models/sdxl"), base)
    for part, name in (("vae", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")):
        (file,) = (base / part).glob("*.safetensors")
        torch.save(load_file(file), base / part / name)
        file.unlink()
    for name in ("diffusers", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    ours = load_parts(ModelConfig(base=str(base), vae=None))
    shipped = load_parts(ModelConfig(vae=None))
    for part in ("vae", "text_encoder"):
        assert weights_hash(getattr(ours, part)) == weights_hash(getattr(shipped, part))
    assert "rror" not in caplog.text


def test_a_config_that_is_a_list_is_refused(tmp_path):
    base = tmp_path / "sdxl"
    shutil.copytree(resolve("data/models/sdxl"), base)
    (base / "text_encoder" / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="text_encoder holds no CLIPTextModel"):
        load_parts(ModelConfig(base=str(base))).text_encoder.eval()
