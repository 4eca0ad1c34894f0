"""Precision and memory of generation."""

from functools import partial

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from PIL import Image

from packshot.config.compose import compose
from packshot.config.schema import GenerateSettings, InferenceConfig, InferenceDtype, ModelConfig, Offload
from packshot.diffusion.latents import encode_pixels
from packshot.errors import ConfigError
from packshot.generate.load import load_models, pick_device
from packshot.generate.packshot import Packshot


def product():
    photo = np.full((128, 128, 4), 200, np.uint8)
    photo[..., 3] = 0
    photo[40:90, 50:80, 3] = 255
    return Image.fromarray(photo)


def test_a_picture_is_drawn_in_bfloat16_and_in_tiles():
    """The product's core stays whole, whatever the precision."""
    inference = InferenceConfig(dtype=InferenceDtype.bfloat16, vae_tiling=True)
    tool = Packshot.load(inference=inference)
    assert tool.models.pipe.unet.dtype == torch.bfloat16
    assert tool.models.pipe.vae.dtype == torch.float32  # SDXL's overflows in half precision
    assert tool.models.pipe.vae.use_tiling
    assert (tool.models.manifest["dtype"], tool.models.manifest["vae_tiling"]) == ("bfloat16", True)
    settings = GenerateSettings(num_inference_steps=2)
    [picture] = tool.set_product(product()).generate("a marble table", num_images=1, settings=settings)
    assert picture.certificate["core"]["max_abs_diff"] == 0


def test_the_plain_precision_is_fp32_without_a_gpu():
    if not torch.cuda.is_available():
        assert pick_device() == (torch.device("cpu"), torch.float32)
        with pytest.raises(ConfigError, match=r"inference\.dtype=float16 needs a GPU"):
            pick_device(InferenceDtype.float16)
    models = load_models(ModelConfig())
    assert not models.pipe.vae.use_tiling


@pytest.mark.parametrize("script", ["generate", "serve"])
def test_inference_keys_are_those_of_generate_and_serve(script):
    config = compose(script, ["inference.dtype=bfloat16", "inference.vae_tiling=true"])
    assert config.inference == InferenceConfig(InferenceDtype.bfloat16, vae_tiling=True)


def test_offload_is_refused_where_nothing_would_be_saved():
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"inference\.offload=model needs a GPU"):
            load_models(ModelConfig(), inference=InferenceConfig(offload=Offload.model))


def test_a_picture_of_offloaded_networks_has_the_same_bytes(monkeypatch):
    """Without a GPU: with diffusers' own hooks, whose target is the CPU; the UNet leaves before the VAE comes."""

    def drawn(tool):
        settings = GenerateSettings(num_inference_steps=2)
        [picture] = tool.set_product(product()).generate("a marble table", num_images=1, settings=settings)
        return np.asarray(picture.image).tobytes()

    plain = drawn(Packshot.load())
    tool = Packshot.load()
    pipe = tool.models.pipe
    pipe.enable_model_cpu_offload(device="cpu")
    assert pipe.vae._hf_hook.prev_module_hook.model is pipe.unet
    called = []
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        hook = getattr(pipe, name)._hf_hook
        before = hook.pre_forward
        monkeypatch.setattr(hook, "pre_forward", partial(noted, called, name, before))
    assert drawn(tool) == plain
    assert set(called) == {"text_encoder", "text_encoder_2", "unet", "vae"}


def noted(called, name, before, *arguments, **options):
    called.append(name)
    return before(*arguments, **options)


def test_offloaded_networks_get_their_inputs_where_they_work():
    """The weights lie on the CPU and the hook's device is another one, which holds no values here: "meta"."""
    vae = load_models(ModelConfig()).pipe.vae
    cpu_offload_with_hook(vae, "meta")
    assert vae.device.type == "cpu"
    latents = encode_pixels(vae, torch.zeros(1, 3, 64, 64))
    assert (latents.device.type, latents.shape) == ("meta", (1, 4, 8, 8))
