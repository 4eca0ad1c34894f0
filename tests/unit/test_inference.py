"""Precision and memory of generation."""

import numpy as np
import pytest
import torch
from PIL import Image

from packshot.config.compose import compose
from packshot.config.schema import GenerateSettings, InferenceConfig, InferenceDtype, ModelConfig
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
