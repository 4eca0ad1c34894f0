"""The rules of a marketplace, checked on the pixels of the file that is handed over."""

from __future__ import annotations

import cv2
import numpy as np

from packshot.config.output import STANDARDS, StandardRow
from packshot.generate.canvas import Canvas
from packshot.generate.json_types import Json

FRINGE = 16  # px around the product in which a lossy file may mix it with the background: one block of coarse colour
FRINGE_STEPS = 32  # of 255 by which colours there may differ from the background


def background_error(picture_HW3: np.ndarray, canvas: Canvas, row: StandardRow) -> tuple[int, float]:
    """Distance of the background from its colour: the largest beyond the fringe, and the 99th percentile inside it."""
    difference = cv2.absdiff(picture_HW3, np.full_like(picture_HW3, row.background)).max(axis=2)
    side = 2 * FRINGE + 1
    near = cv2.dilate(canvas.matte_HW, np.ones((side, side), np.uint8)) > 0
    fringe = difference[near & (canvas.outside_HW > 0)]
    inside = float(np.percentile(fringe, 99)) if fringe.size else 0.0
    return int(difference[~near].max(initial=0)), inside


def product_share(canvas: Canvas) -> float:
    """The larger of the product's relative width and height in the frame."""
    rows = np.flatnonzero(canvas.matte_HW.any(axis=1))
    columns = np.flatnonzero(canvas.matte_HW.any(axis=0))
    height, width = canvas.matte_HW.shape
    return float(max((rows[-1] + 1 - rows[0]) / height, (columns[-1] + 1 - columns[0]) / width))


def check_standard(name: str, picture_HW3: np.ndarray, canvas: Canvas) -> Json:
    """Each rule of a standard with what it asks for, what was measured and whether it is kept; for certificates.

    picture_HW3: the pixels of the delivered file, uint8.
    """
    row = STANDARDS[name]
    beyond, fringe = background_error(picture_HW3, canvas, row)
    share = product_share(canvas)
    side = max(picture_HW3.shape[:2])
    checks = {
        "background_error": (beyond, 0, beyond == 0),
        "fringe_error": (round(fringe, 2), FRINGE_STEPS, fringe <= FRINGE_STEPS),
        "product_share": (round(share, 4), row.min_share, share >= row.min_share),
        "longer_side_px": (side, row.min_side, side >= row.min_side),
    }
    report: Json = {"name": name, "passed": True, "checks": {}}
    for rule, (measured, asked, kept) in checks.items():
        report["checks"][rule] = {"measured": measured, "asked": asked, "passed": kept}
        report["passed"] = report["passed"] and kept
    return report
