"""GrabCut (Rother, Kolmogorov, Blake 2004): the object of a picture by its colours, from labels that it starts with."""

from __future__ import annotations

import cv2
import numpy as np


def grabcut(rgb_HW3: np.ndarray, labels_HW: np.ndarray, iterations: int) -> np.ndarray:
    """Bool (H, W), true for the object. The same input gives the same bytes.

    rgb_HW3: uint8. labels_HW: uint8, OpenCV's ``GC_BGD``, ``GC_FGD``, ``GC_PR_BGD`` and ``GC_PR_FGD``; it is changed.
    """
    cv2.setRNGSeed(0)
    background_model = np.zeros((1, 65))
    object_model = np.zeros((1, 65))
    bgr = np.ascontiguousarray(rgb_HW3[..., ::-1])
    box = (0, 0, bgr.shape[1], bgr.shape[0])  # OpenCV does not read it when it starts from labels
    cv2.grabCut(bgr, labels_HW, box, background_model, object_model, iterations, cv2.GC_INIT_WITH_MASK)
    return (labels_HW == cv2.GC_FGD) | (labels_HW == cv2.GC_PR_FGD)
