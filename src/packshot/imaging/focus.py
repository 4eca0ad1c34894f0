"""How sharp a picture is, and narrower edges for a background that stands behind a sharper product."""

from __future__ import annotations

import cv2
import numpy as np

FEWEST_EDGES = 8  # px; a median over fewer says nothing
WEAKEST_EDGE = 4.0  # slope of Sobel's operator in 255ths; what is weaker is noise
SOFT = 1.4  # sigma in px of a smaller copy, from which on edges are measured there
SHARPEST = 0.5  # sigma in px that edges are narrowed to; noise reads as less
FAINT = 1.0  # slope in 255ths a pixel at which an edge is narrowed half as much: grain is fainter
MOST_ROUNDS = 12
ROUNDS_AT_ONCE = 3  # between two looks at the direction of edges
MOST_PIXELS = 2_000_000  # of the copy on which edges are narrowed
FADE = 4.0  # sigmas beside the product over which the narrowing sets in
_CROSS = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))


def sharpness(picture_HW3: np.ndarray, area_HW: np.ndarray) -> float | None:
    """Mean absolute Laplacian of the luminance over an area (uint8, 255 inside), in 255ths; None without pixels."""
    if not area_HW.any():
        return None
    grey = cv2.cvtColor(picture_HW3, cv2.COLOR_RGB2GRAY)
    edges = np.abs(cv2.Laplacian(grey, cv2.CV_32F))
    return round(float(cv2.mean(edges, mask=area_HW)[0]), 4)


def edge_blur(picture_HW3: np.ndarray, area_HW: np.ndarray) -> float | None:
    """How soft the strongest edges of an area are: the sigma in px of the blur that makes such edges of steps.

    It says what a picture resolves, however much detail there is. Soft edges are measured on a smaller copy, because
    8 bits hardly show how little a further blur does to them. area_HW: uint8, 255 inside. None without edges.
    """
    grey_HW = cv2.cvtColor(picture_HW3, cv2.COLOR_RGB2GRAY)
    found = None
    for scale in (8, 4, 2, 1):  # the full size of 12 megapixels takes a third of a second
        size = (max(1, area_HW.shape[1] // scale), max(1, area_HW.shape[0] // scale))
        small_HW = cv2.resize(grey_HW, size, interpolation=cv2.INTER_AREA).astype(np.float32)
        blur = blur_of_edges(small_HW, cv2.resize(area_HW, size, interpolation=cv2.INTER_AREA) == 255)
        if blur is not None:
            found = round(scale * blur, 2)
            if blur >= SOFT:
                break
    return found


def blur_of_edges(grey_HW: np.ndarray, area_HW: np.ndarray) -> float | None:
    """:func:`edge_blur` at one scale. Two blurs are compared where edges are strongest: the softer an edge is already,
    the less a further blur weakens it (after Zhuo and Sim 2011, doi 10.1016/j.patcog.2011.03.009)."""
    inside_HW = cv2.erode(area_HW.astype(np.uint8), np.ones((19, 19), np.uint8)) > 0  # no edge from outside is seen
    slopes = []
    for sigma in (1.0, 2.0):
        blurred = cv2.GaussianBlur(grey_HW, (0, 0), sigma)
        slopes.append(cv2.magnitude(cv2.Sobel(blurred, cv2.CV_32F, 1, 0), cv2.Sobel(blurred, cv2.CV_32F, 0, 1)))
    fine_HW, coarse_HW = slopes
    middle_HW = inside_HW & (fine_HW >= cv2.dilate(fine_HW, np.ones((3, 3), np.uint8)))  # of an edge
    if not middle_HW.any():
        return None
    strong_HW = middle_HW & (fine_HW >= max(WEAKEST_EDGE, float(np.quantile(fine_HW[middle_HW], 0.95))))
    if strong_HW.sum() < FEWEST_EDGES:
        return None
    ratio = float(np.median(fine_HW[strong_HW] / coarse_HW[strong_HW])) ** 2  # (s^2 + 2^2) / (s^2 + 1^2)
    return float(np.sqrt(max(0.0, 4 - ratio) / max(ratio - 1, 0.01)))


def fill_from_around(picture_HW3: np.ndarray, hidden_HW: np.ndarray) -> np.ndarray:
    """A picture whose hidden part shows what stands next to it; the rest stays. hidden_HW: bool, not all True."""
    if not hidden_HW.any():
        return picture_HW3
    hidden = hidden_HW.astype(np.uint8)
    _, nearest = cv2.distanceTransformWithLabels(hidden, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    label_HW = np.asarray(nearest, np.int64)
    shown = np.zeros((int(label_HW.max()) + 1, 3), picture_HW3.dtype)
    shown[label_HW[~hidden_HW]] = picture_HW3[~hidden_HW]
    smooth = cv2.GaussianBlur(shown[label_HW], (0, 0), 2.0)  # nearest pixels alone make stripes
    return np.where(hidden_HW[..., None], smooth, picture_HW3)


def side_of_edges(grey_HW: np.ndarray, sigma: float) -> np.ndarray:
    """On which side of an edge a pixel is, float32 (H, W): -1 the bright side, 1 the dark one, 0 on none.

    The sign of the second derivative along the structure tensor's first direction (coherence-enhancing shock filter,
    Weickert 2003, doi 10.1007/978-3-540-45243-0_1), less where slopes are faint.
    """
    smooth = cv2.GaussianBlur(grey_HW, (0, 0), sigma)
    across = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, scale=1 / 8)
    down = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, scale=1 / 8)
    tensor = [cv2.GaussianBlur(product, (0, 0), 2 * sigma) for product in (across**2, across * down, down**2)]
    xx, xy, yy = tensor
    spread = cv2.magnitude(xx - yy, 2 * xy) + 1e-6
    cosine = (xx - yy) / spread  # of twice the angle of the first direction
    sine = 2 * xy / spread
    second = (1 + cosine) * cv2.Sobel(across, cv2.CV_32F, 1, 0, scale=1 / 16)
    second += sine * cv2.Sobel(across, cv2.CV_32F, 0, 1, scale=1 / 8)
    second += (1 - cosine) * cv2.Sobel(down, cv2.CV_32F, 0, 1, scale=1 / 16)
    slope_squared = xx + yy
    steepness = second * (sigma / 0.15) / np.maximum(cv2.sqrt(slope_squared), 0.05)
    side = steepness / cv2.sqrt(1 + steepness * steepness)
    return side * (slope_squared / (slope_squared + FAINT**2))


def narrowed(picture_HW3: np.ndarray, weight_HW: np.ndarray, sigma: float) -> np.ndarray:
    """A float32 picture after ``ROUNDS_AT_ONCE`` rounds. weight_HW: float32 in [0, 1], how far each pixel takes part.

    A pixel moves towards the darkest or the brightest of its neighbours, so no value is beyond theirs: no halo.
    """
    side = 0.4 * weight_HW * side_of_edges(cv2.cvtColor(picture_HW3, cv2.COLOR_RGB2GRAY), sigma)
    share = np.abs(side)
    stays = cv2.merge([1 - share] * 3)
    moves = cv2.merge([share] * 3)
    to_dark = cv2.merge([(side > 0).astype(np.uint8)] * 3)
    for _ in range(ROUNDS_AT_ONCE):
        target = cv2.dilate(picture_HW3, _CROSS)
        cv2.copyTo(cv2.erode(picture_HW3, _CROSS), to_dark, target)
        picture_HW3 = cv2.add(cv2.multiply(stays, picture_HW3), cv2.multiply(moves, target))
    return picture_HW3


def narrow_edges(picture_HW3: np.ndarray, product_HW: np.ndarray, blur: float, aim: float) -> np.ndarray:
    """A background whose edges are narrowed from an :func:`edge_blur` to about another one, uint8 (H, W, 3).

    product_HW: uint8, 0 where the picture shows; nothing changes there or at its edge. Flat walls keep their grain, and
    edges wider than a dozen rounds reach stay soft.
    """
    height, width = product_HW.shape
    scale = min(1.0, (MOST_PIXELS / (height * width)) ** 0.5)
    size = (round(width * scale), round(height * scale))
    small = cv2.resize(picture_HW3, size, interpolation=cv2.INTER_AREA)
    hidden = cv2.resize(product_HW, size, interpolation=cv2.INTER_AREA) > 0
    if hidden.all():
        return picture_HW3
    sigma = max(1.0, scale * blur / 2)
    distance = cv2.distanceTransform((~hidden).astype(np.uint8), cv2.DIST_L2, 5)
    weight = np.clip(distance / (FADE * sigma) - 0.5, 0, 1)
    start = fill_from_around(small, hidden).astype(np.float32)
    result = start
    area = np.where(weight == 1, np.uint8(255), np.uint8(0))
    for _ in range(0, MOST_ROUNDS, ROUNDS_AT_ONCE):
        result = narrowed(result, weight, sigma)
        now = edge_blur(np.rint(result).astype(np.uint8), area)
        if now is None or now <= scale * aim:
            break
    change = cv2.resize(result - start, (width, height), interpolation=cv2.INTER_LINEAR)
    left, top, across, down = cv2.boundingRect(product_HW)
    box = np.s_[top : top + down, left : left + across]
    change[box][product_HW[box] > 0] = 0
    return cv2.add(picture_HW3, change, dtype=cv2.CV_8U)  # rounds and clips
