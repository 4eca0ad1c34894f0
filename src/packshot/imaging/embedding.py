"""What a picture shows, as a vector of an image encoder: pictures of one thing have near vectors."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from packshot.errors import ConfigError, first_line
from packshot.imaging.onnx import load_session
from packshot.runs.files import readable
from packshot.runs.networks import CLIP_REST, Network, load_whole

KEY = "curation.encoder"
MINI_ENCODER = "data/models/sdxl/image_encoder"
# CLIP's normalisation of RGB in [0, 1].
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_SCALE = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def encoder_input(image: Image.Image, side: int) -> np.ndarray:
    """An RGB picture squeezed to a square, whole: (1, 3, side, side) float32, normalised as for CLIP."""
    small = image.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0)
    pixels_HWC = (np.asarray(small, np.float32) / 255 - _MEAN) / _SCALE
    return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)[None])


@lru_cache(maxsize=1)
def load_clip(path: str) -> Network:
    """CLIP's image tower in a folder, once per process. Raises ConfigError: there is none."""
    from transformers import CLIPVisionModelWithProjection

    folder = readable(KEY, path)
    try:
        return load_whole(CLIPVisionModelWithProjection, folder, CLIP_REST).eval()
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"{KEY}: {path} cannot be loaded: {reason}", "Name a folder with CLIP's image tower, or an ONNX file."
        ) from error


def load_encoder(encoder: str) -> None:
    """Load the encoder, once per process. Raises ConfigError: it cannot be used."""
    if encoder.endswith(".onnx"):
        load_session(KEY, encoder)
    else:
        load_clip(encoder)


def embed(image: Image.Image, encoder: str) -> np.ndarray:
    """The picture's vector, float32 of length 1. image: RGB of any size.

    encoder: a folder with CLIP's image tower, or an ONNX file whose first output is a vector; of a sequence of
        tokens the first counts.
    """
    if encoder.endswith(".onnx"):
        session = load_session(KEY, encoder)
        node = session.get_inputs()[0]
        side = node.shape[2] if isinstance(node.shape[2], int) else 224
        output = session.run([session.get_outputs()[0].name], {node.name: encoder_input(image, side)})[0]
        vector = np.asarray(output, np.float32)[0]
        vector = (vector[0] if vector.ndim == 2 else vector).ravel()
    else:
        import torch

        network = load_clip(encoder)
        pixels_BCHW = torch.from_numpy(encoder_input(image, network.config.image_size))
        with torch.inference_mode():
            vector = network(pixels_BCHW).image_embeds[0].numpy()
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
