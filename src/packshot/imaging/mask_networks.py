"""Segmentation networks that a mask can come from: the family's own, public ones, and any ONNX file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from packshot.config.mask_models import MASK_MODELS, MINI, reads_onnx
from packshot.errors import ConfigError
from packshot.imaging.onnx import load_session
from packshot.runs.files import readable, resolve
from packshot.runs.folder import log

MARGIN = 0.2  # of the product's longer side, that the network's second look leaves around it

_IMAGENET = (
    np.array([123.675, 116.28, 103.53], np.float32),
    np.array([58.395, 57.12, 57.375], np.float32),
)


@dataclass(frozen=True)
class Reading:
    """How a network reads RGB in 0..255, (x - mean) / scale, and whether its output still lacks the sigmoid."""

    mean: np.ndarray
    scale: np.ndarray
    logits: bool = False


_ISNET = Reading(np.full(3, 128, np.float32), np.full(3, 256, np.float32))  # IS-Net (DIS), 1024 px
_BY_NAME = {"birefnet-general": Reading(*_IMAGENET, logits=True)}
_BY_SIDE = {320: Reading(*_IMAGENET)}  # U²-Net


def network_file(model: str) -> Path:
    """The ONNX file behind a value of ``matte.model`` that is not the family's.

    A public network's file is fetched by rembg where it is not there yet.

    Raises:
        ConfigError: no such file; rembg is not installed; the file can neither be found nor fetched.
    """
    row = MASK_MODELS.get(model)
    if row is None:
        return readable("matte.model", model)
    try:
        from rembg.sessions import sessions
    except ImportError as error:
        raise ConfigError(
            f"matte.model={model} needs the package rembg.", "pip install 'packshot[matting]', or name an ONNX file."
        ) from error
    session = sessions[model]
    folder = session.model_dir()
    if session.resolve_existing(f"{model}.onnx") is None:
        log.info("matte.model=%s: fetching its file to %s", model, folder)
    try:
        return Path(session.download_models())
    except (OSError, ValueError) as error:  # no network, or a damaged file
        raise ConfigError(
            f"matte.model={model}: its file is not in {folder} and cannot be fetched ({type(error).__name__}).",
            f"Put {model}.onnx there, name an ONNX file, or set matte.model=auto.",
        ) from error


def load_network(model: str) -> None:
    """Load the network of ``matte.model``, once per process. Raises ConfigError: it is not usable."""
    if uses_family(model):
        from packshot.imaging.matting_network import load_matting

        load_matting(MINI)
    elif reads_onnx(model):
        load_session("matte.model", str(network_file(model)))


def uses_family(model: str) -> bool:
    """Whether the family's network is used: ``auto`` goes on without it where it is not installed."""
    if model == "auto" and not resolve(MINI).is_dir():
        log.warning("matte.model=auto: %s is not installed, masks are found by GrabCut alone", MINI)
        return False
    return model in MASK_MODELS and MASK_MODELS[model].weights is not None


@dataclass(frozen=True)
class Views:
    """A network's looks at one picture: it whole and its surroundings left out, each as it is and mirrored.

    alpha_HW: their mean, float32 in [0, 1]. spread_HW: their standard deviation; where it is large, the network's
    answer depends on what should make no difference.
    """

    alpha_HW: np.ndarray
    spread_HW: np.ndarray


def seen_by_family(rgb_HWC: np.ndarray, shape: tuple[int, int]) -> Views:
    """The family's network on several views of a picture, at a shape (H, W). rgb: uint8 of any size."""
    whole_2HW = both_ways(rgb_HWC, shape)
    box = close_box(whole_2HW.mean(axis=0) >= 0.5)
    if box is None:
        return Views(whole_2HW.mean(axis=0), whole_2HW.std(axis=0))
    scale = np.array(rgb_HWC.shape[:2]) / shape
    rows = slice(*(np.array([box[0].start, box[0].stop]) * scale[0]).astype(int))
    columns = slice(*(np.array([box[1].start, box[1].stop]) * scale[1]).astype(int))
    close_2hw = both_ways(rgb_HWC[rows, columns], (box[0].stop - box[0].start, box[1].stop - box[1].start))
    alpha_HW = whole_2HW.mean(axis=0)
    spread_HW = whole_2HW.std(axis=0)
    every_4hw = np.concatenate([whole_2HW[:, box[0], box[1]], close_2hw])
    alpha_HW[box] = every_4hw.mean(axis=0)
    spread_HW[box] = every_4hw.std(axis=0)
    return Views(alpha_HW, spread_HW)


def both_ways(rgb_HWC: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The network's alpha of a picture and of its mirror image, turned back: float32 (2, H, W) at a shape (H, W)."""
    from packshot.imaging.matting_network import (  # with torch, which mask files do not need
        input_side,
        load_matting,
        predict_alpha,
    )

    network = load_matting(MINI)
    side = input_side(network)
    square_HWC = cv2.resize(rgb_HWC, (side, side), interpolation=cv2.INTER_AREA)
    alphas = []
    for step in (1, -1):
        alpha_HW = predict_alpha(network, np.ascontiguousarray(square_HWC[:, ::step]))[:, ::step]
        alphas.append(cv2.resize(np.ascontiguousarray(alpha_HW), shape[::-1], interpolation=cv2.INTER_LINEAR))
    return np.stack(alphas)


def close_box(likely_HW: np.ndarray) -> tuple[slice, slice] | None:
    """The rows and columns of a bool mask and MARGIN of its longer side around it; None where it is empty."""
    left, top, width, height = cv2.boundingRect(likely_HW.astype(np.uint8))
    if width == 0:
        return None
    margin = int(MARGIN * max(width, height))
    rows, columns = likely_HW.shape
    return (
        slice(max(0, top - margin), min(rows, top + height + margin)),
        slice(max(0, left - margin), min(columns, left + width + margin)),
    )


def foreground_share(image: Image.Image, model: str) -> float:
    """Share of an RGB picture that a network sees as an object in front, in [0, 1]; GrabCut counts as the family's."""
    if reads_onnx(model):
        alpha_HW = seen_by_onnx(image, model)
    else:
        from packshot.imaging.matting_network import load_matting, predict_alpha

        alpha_HW = predict_alpha(load_matting(MINI), np.asarray(image))
    return float((alpha_HW > 0.5).mean())


def seen_by_onnx(image: Image.Image, model: str) -> np.ndarray:
    """A salient-object network: alpha in [0, 1] as it gives it, at the size of its input.

    The size is read from the model; a free size means 1024. Its pixels are normalised as a known network of that name
    or size has them, and else as IS-Net has them.
    """
    session = load_session("matte.model", str(network_file(model)))
    node = session.get_inputs()[0]
    side = node.shape[2] if isinstance(node.shape[2], int) else 1024
    reading = _BY_NAME.get(model) or _BY_SIDE.get(side, _ISNET)
    pixels_HWC = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), np.float32)
    input_BCHW = ((pixels_HWC - reading.mean) / reading.scale).transpose(2, 0, 1)[None]
    output = session.run([session.get_outputs()[0].name], {node.name: np.ascontiguousarray(input_BCHW)})[0]
    values_HW = np.asarray(output, np.float32).reshape(side, side)
    if reading.logits:
        values_HW = 1 / (1 + np.exp(-values_HW))
    return np.clip(values_HW, 0, 1)
