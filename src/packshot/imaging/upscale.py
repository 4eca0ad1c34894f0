"""Enlarging a picture with a network given as an ONNX file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from packshot.errors import ConfigError
from packshot.imaging.onnx import load_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

KEY = "background.upscaler"


def open_upscaler(path: str) -> InferenceSession:
    """The network that ``background.upscaler`` names. Raises ConfigError: the file is not a network."""
    return load_session(KEY, path)


def upscale(picture_HW3: np.ndarray, path: str) -> np.ndarray:
    """A picture enlarged by the whole factor of a network, float32 (H, W, 3) in [0, 1].

    picture_HW3: float in [0, 1]. path: a network from 1x3xHxW to 1x3x(sH)x(sW), both in [0, 1], such as ESRGAN's.

    Raises:
        ConfigError: the file is not such a network.
    """
    session = open_upscaler(path)
    node = session.get_inputs()[0]
    height, width = picture_HW3.shape[:2]
    for given, wanted in zip((height, width), node.shape[2:], strict=True):
        if isinstance(wanted, int) and wanted != given:
            raise ConfigError(
                f"{KEY}={path} takes {node.shape[3]}x{node.shape[2]} px alone, the picture has {width}x{height}.",
                "Export the network with free height and width.",
            )
    input_BCHW = np.ascontiguousarray(picture_HW3.astype(np.float32).transpose(2, 0, 1)[None])
    output = np.asarray(session.run([session.get_outputs()[0].name], {node.name: input_BCHW})[0])
    factor = output.shape[-1] // width
    if output.shape != (1, 3, height * factor, width * factor) or factor < 2 or not np.isfinite(output).all():
        raise ConfigError(
            f"{KEY}={path} makes {list(output.shape)} of a picture of {width}x{height} px.",
            "It has to give one RGB picture, enlarged by a whole factor of at least 2.",
        )
    return np.clip(output[0].transpose(1, 2, 0), 0, 1).astype(np.float32)
