"""ONNX networks that read one picture: loading them, and refusing what they are not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from packshot.errors import ConfigError
from packshot.runs.files import readable

# In this order. TensorRT, which onnxruntime would take first, compiles each network for minutes at its first picture.
PROVIDERS = ("CUDAExecutionProvider", "CoreMLExecutionProvider", "CPUExecutionProvider")


def providers(available: Sequence[str]) -> list[str]:
    """The execution providers to use, of those that are there."""
    return list(filter(available.__contains__, PROVIDERS))


@lru_cache(maxsize=2)
def load_session(key: str, path: str) -> Any:
    """The ONNX session of a file that the configuration names under ``key``; loaded once per process.

    Raises:
        ConfigError: no such file, no ONNX model, or not one with a 1x3xHxW input.
    """
    import onnxruntime

    file = readable(key, path)
    try:
        session = onnxruntime.InferenceSession(str(file), providers=providers(onnxruntime.get_available_providers()))
    except Exception as error:  # onnxruntime has no common base for its errors
        raise ConfigError(f"{key}={path} cannot be loaded: {error}", "Name an ONNX model file.") from error
    shape = session.get_inputs()[0].shape
    if len(shape) != 4 or shape[1] != 3:
        raise ConfigError(f"{key}={path} takes an input of shape {shape}.", "It has to take one RGB image, 1x3xHxW.")
    return session
