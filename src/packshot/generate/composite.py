"""The product over the generated background, on the output's pixel grid."""

from __future__ import annotations

import numpy as np

from packshot.generate.canvas import Canvas, Working, background_at
from packshot.generate.color import ColourFit, fit_colour
from packshot.imaging.matte import covered_box


def blend(foreground_HW3: np.ndarray, matte_HW: np.ndarray, background_HW3: np.ndarray) -> np.ndarray:
    """``round((a F + (255 - a) B) / 255)`` in integers; all uint8. Where a is 255 the result is F, byte for byte."""
    blended = background_HW3.copy()
    # outside this box alpha is 0 and the result is the background: most of a large picture
    box = covered_box(matte_HW)
    alpha = matte_HW[box][..., None].astype(np.uint16)
    mixed = alpha * foreground_HW3[box] + (255 - alpha) * background_HW3[box]
    blended[box] = (mixed + 127) // 255
    return blended


def calibrate(decoded_HW3: np.ndarray, working: Working) -> ColourFit:
    """Colour drift of the decoder, from the cells that were held to the product. decoded_HW3: float in [0, 1]."""
    cell = working.keep_HW.shape[0] // working.held_hw.shape[0]
    inside = working.held_hw.repeat(cell, axis=0).repeat(cell, axis=1)
    truth = working.image_HW3[inside].astype(np.float64) / 255
    return fit_colour(decoded_HW3[inside].astype(np.float64), truth)


def drawn_background(canvas: Canvas, working: Working, decoded_HW3: np.ndarray) -> tuple[np.ndarray, ColourFit]:
    """(background, colour fit); the background is uint8 (H, W, 3) at the canvas's size."""
    fit = calibrate(decoded_HW3, working)
    height, width = canvas.matte_HW.shape
    return background_at(fit.apply(decoded_HW3), working.frame, height, width), fit
