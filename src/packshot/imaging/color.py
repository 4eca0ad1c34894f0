"""Colours as people see them."""

from __future__ import annotations

import cv2
import numpy as np


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB uint8 (..., 3) to CIELAB (D65) float32: L* in [0, 100], a* and b* roughly ±128; distances are ΔE*ab."""
    pixels = np.ascontiguousarray(rgb, np.float32) / 255
    # a picture keeps its rows, which OpenCV shares among its threads
    rows = pixels if rgb.ndim == 3 else pixels.reshape(1, -1, 3)
    return cv2.cvtColor(rows, cv2.COLOR_RGB2Lab).reshape(rgb.shape)
