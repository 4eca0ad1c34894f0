"""How near every pixel of a photograph is, by a monocular depth network given as an ONNX file."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from packshot.errors import PackshotError
from packshot.imaging.onnx import load_session
from packshot.imaging.pixels import to_bytes, to_unit

FREE_SIDE, MULTIPLE = 518, 14  # px: where the model leaves its input's size open; patches of a ViT are 14 px wide
_MEAN = np.array((0.485, 0.456, 0.406), np.float32)  # ImageNet's, of pixels in [0, 1]
_SCALE = np.array((0.229, 0.224, 0.225), np.float32)


def input_size(shape: list[int | str], image: Image.Image) -> tuple[int, int]:
    """(width, height) that the network is given: its own, or the picture's shape with a shorter side of FREE_SIDE."""
    height, width = shape[2:]
    if isinstance(height, int) and isinstance(width, int):
        return width, height
    scale = FREE_SIDE / min(image.size)
    free = [max(MULTIPLE, round(side * scale / MULTIPLE) * MULTIPLE) for side in image.size]
    return free[0], free[1]


def estimate_depth(image: Image.Image, onnx: str) -> Image.Image:
    """Relative nearness of an RGB picture, mode L of its size: 255 is the nearest point, 0 the farthest.

    onnx: a network with ImageNet's normalisation that gives inverse depth, as MiDaS and Depth Anything do.

    Raises:
        ConfigError: ``onnx`` is not a usable model.
        PackshotError: the network's output is not a map of one picture, or not finite.
    """
    session = load_session("depth.onnx", onnx)
    node = session.get_inputs()[0]
    size = input_size(node.shape, image)
    pixels_HWC = to_unit(np.asarray(image.resize(size, Image.Resampling.BICUBIC)))
    input_BCHW = np.ascontiguousarray(((pixels_HWC - _MEAN) / _SCALE).transpose(2, 0, 1)[None])
    output = np.squeeze(np.asarray(session.run([session.get_outputs()[0].name], {node.name: input_BCHW})[0]))
    if output.ndim != 2 or not np.isfinite(output).all():
        raise PackshotError(
            f"depth.onnx={onnx} gives an output of shape {output.shape}{'' if output.ndim != 2 else ' with NaN'}.",
            "It has to give one map of inverse depth.",
        )
    nearness_HW = (output - output.min()) / max(float(np.ptp(output)), 1e-12)
    full_HW = cv2.resize(nearness_HW.astype(np.float32), image.size, interpolation=cv2.INTER_LINEAR)
    return Image.fromarray(to_bytes(full_HW))
