"""Where the product is: from a mask file, the picture's own alpha, an ONNX network, or GrabCut, in that order.

GrabCut needs to be told roughly where the object is. The family's segmentation network does that. Without it, two cheap
measures of "differs from the frame of the picture" do: the geodesic distance to the border (Wei et al., "Geodesic
Saliency Using Background Priors", ECCV 2012), which knows regions, and the Mahalanobis distance to the colours along
the border, which knows colours. Their mean, cut by Otsu's threshold, is the first guess; each alone fails on textured
tables and on objects of several materials.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra

from packshot.config.schema import MatteConfig
from packshot.errors import ConfigError, PackshotError
from packshot.imaging.color import to_lab
from packshot.imaging.decode import flatten
from packshot.imaging.grabcut import grabcut
from packshot.imaging.onnx import load_session
from packshot.imaging.pixels import to_bytes, to_unit

WORK_SIDE = 400  # px, longer side at which GrabCut works: seconds at 12 megapixels, and its result is no better
REFINE_SIDE = 1024  # px, longer side at which the edge filter is fitted
# A cut-out has both: fully transparent and fully opaque pixels, at least this share of each.
CUTOUT_SHARE = 0.001
CUTOUT_PEAK = 0.9  # matting tools stop a little short of full; such a peak means opaque


class NoProductError(PackshotError):
    """No product was found; ``confidence`` says how far the best guess was trusted."""

    def __init__(self, name: str, confidence: float, wanted: float) -> None:
        super().__init__(
            f"no product found in {name} (confidence {confidence:.2f} < {wanted:g}).",
            "Give a mask file (white = product), or set matte.onnx to a segmentation network.",
        )
        self.confidence = confidence


class MaskFileError(ConfigError):
    """A given mask does not fit its image, or marks nothing or everything."""


@dataclass(frozen=True)
class Mask:
    """alpha_HW: float32, 1 = product. method: file, alpha, onnx, network or grabcut. Alpha, confidence: in [0, 1]."""

    alpha_HW: np.ndarray
    method: str
    confidence: float

    def to_image(self) -> Image.Image:
        """8-bit grey picture, white = product."""
        return Image.fromarray(to_bytes(self.alpha_HW))


def find_mask(image: Image.Image, matte: MatteConfig, mask: Image.Image | None = None, name: str = "the image") -> Mask:
    """The product's alpha.

    image: RGB or RGBA, as ``decode_image`` gives it.
    mask: a mask of the same size (white = product; a cut-out counts by its alpha). It is taken as it is.
    name: how messages call the image.
    Raises:
        NoProductError: nothing found, or the confidence is below ``matte.min_confidence``.
        MaskFileError: the mask has another size than the image, or marks nothing or everything.
        ConfigError: ``matte.onnx`` or ``matte.network`` is no usable model.
    """
    if mask is not None:
        found = _from_file(image, mask, name)
    elif (alpha_HW := _cutout_alpha(image)) is not None:
        found = Mask(alpha_HW, "alpha", 1.0)
    elif matte.onnx:
        found = _from_onnx(flatten(image), matte.onnx)
    else:
        found = _from_grabcut(flatten(image), matte.network)
    if found.confidence < matte.min_confidence or not (found.alpha_HW >= 0.5).any():
        raise NoProductError(name, found.confidence, matte.min_confidence)
    return found


def _from_file(image: Image.Image, mask: Image.Image, name: str) -> Mask:
    if mask.size != image.size:
        raise MaskFileError(
            f"the mask of {name} is {mask.width}x{mask.height}, the image {image.width}x{image.height}.",
            "Export the mask at the image's size; it would not fit its pixels otherwise.",
        )
    alpha_HW = _cutout_alpha(mask)
    if alpha_HW is None:
        alpha_HW = to_unit(np.asarray(mask.convert("L")))
    if alpha_HW.max() < 0.5:
        raise MaskFileError(
            f"the mask of {name} is empty: its brightest value is {round(float(alpha_HW.max()) * 255)} of 255.",
            "White (255) marks the product.",
        )
    if alpha_HW.min() >= 0.5:
        raise MaskFileError(
            f"the mask of {name} marks the whole picture as product.", "Black (0) marks the background."
        )
    return Mask(alpha_HW, "file", 1.0)


def _cutout_alpha(image: Image.Image) -> np.ndarray | None:
    """The alpha of a real cut-out; None for opaque pictures and for alpha that only fades a whole picture."""
    if image.mode != "RGBA":
        return None
    alpha_HW = to_unit(np.asarray(image.getchannel("A")))
    peak = alpha_HW.max()
    if peak >= CUTOUT_PEAK:
        alpha_HW = alpha_HW / peak
    shares = (np.mean(alpha_HW == 0), np.mean(alpha_HW == 1))
    return alpha_HW if min(shares) >= CUTOUT_SHARE else None


# --- a segmentation network -------------------------------------------------------------------------------------------

# Side of the network's input -> (mean, scale) of its pixels in 0..255; all take RGB as 1x3xSxS and give 1x1xSxS first.
ISNET = (np.float32(128), np.float32(256))  # IS-Net (DIS), 1024 px
U2NET = (
    np.array([123.675, 116.28, 103.53], np.float32),
    np.array([58.395, 57.12, 57.375], np.float32),
)  # U²-Net, 320 px: ImageNet's
_NORMALISATION = {1024: ISNET, 320: U2NET}
# Alpha that becomes 0 and 1. Their last layer is a sigmoid, which ends at .94 to .99 inside a product: taken as it is,
# a part of the new background would shine through, and no pixel would count as the product's core.
ONNX_LEVELS = (0.05, 0.95)


def load_segmentation(matte: MatteConfig) -> None:
    """Load what :func:`find_mask` would use. Raises ConfigError if it is no usable model."""
    if matte.onnx:
        load_session("matte.onnx", matte.onnx)
    elif matte.network:
        from packshot.imaging.matting_network import load_matting

        load_matting(matte.network)


def _from_onnx(image: Image.Image, path: str) -> Mask:
    """A salient-object network. Its input size is read from the model (a free size means 1024); IS-Net's
    normalisation, (x - 128) / 256, holds for every size but U²-Net's 320."""
    session = load_session("matte.onnx", path)
    node = session.get_inputs()[0]
    side = node.shape[2] if isinstance(node.shape[2], int) else 1024
    mean, scale = _NORMALISATION.get(side, ISNET)
    pixels_HWC = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), np.float32)
    input_BCHW = ((pixels_HWC - mean) / scale).transpose(2, 0, 1)[None]
    output = session.run([session.get_outputs()[0].name], {node.name: np.ascontiguousarray(input_BCHW)})[0]
    guess_HW = np.clip(np.asarray(output, np.float32).reshape(side, side), 0, 1)
    likely = guess_HW > 0.1
    # A sure network says 0 or 1; on noise and empty pictures it hedges.
    certainty = float(np.abs(2 * guess_HW[likely] - 1).mean()) if likely.any() else 0.0
    confidence = min(_ramp(certainty, 0.5, 0.9), _plausible_area(float((guess_HW >= 0.5).mean())))
    alpha_HW = cv2.resize(guess_HW, image.size, interpolation=cv2.INTER_LINEAR)
    return Mask(_stretched(alpha_HW, *ONNX_LEVELS), "onnx", confidence)


def _stretched(alpha_HW: np.ndarray, black: float, white: float) -> np.ndarray:
    """Alpha with ``black`` and below at 0, ``white`` and above at 1, and a straight line between."""
    return np.clip((alpha_HW - black) / (white - black), 0, 1)


# --- GrabCut ----------------------------------------------------------------------------------------------------------


def _from_grabcut(image: Image.Image, network: str | None) -> Mask:
    rgb_HWC = np.asarray(image)
    small_HWC = _shrink(rgb_HWC, WORK_SIDE)
    guess_HW = _seen_by(network, rgb_HWC, small_HWC.shape[:2]) if network else _saliency(small_HWC)
    method = "network" if network else "grabcut"
    nothing = Mask(np.zeros(rgb_HWC.shape[:2], np.float32), method, 0.0)
    if guess_HW.max() == 0:
        return nothing
    raw_HW = _object_from(small_HWC, guess_HW)
    clean_HW = _clean(raw_HW)
    if not clean_HW.any() or clean_HW.all():
        return nothing
    # A mask is as good as the weakest thing that speaks for it.
    confidence = min(evidence(small_HWC, guess_HW, raw_HW, clean_HW).values())
    return Mask(_refine(rgb_HWC, clean_HW), method, confidence)


def _seen_by(network: str, rgb_HWC: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The network's alpha at a shape (H, W)."""
    from packshot.imaging.matting_network import (  # with torch, which masks from files do not need
        load_matting,
        predict_alpha,
    )

    alpha_HW = predict_alpha(load_matting(network), rgb_HWC)
    return cv2.resize(alpha_HW, shape[::-1], interpolation=cv2.INTER_LINEAR)


def _shrink(array: np.ndarray, side: int) -> np.ndarray:
    scale = min(1.0, side / max(array.shape[:2]))
    height, width = (max(1, round(length * scale)) for length in array.shape[:2])
    return cv2.resize(array, (width, height), interpolation=cv2.INTER_AREA)


def _saliency(rgb_HWC: np.ndarray) -> np.ndarray:
    """(H, W) in [0, 1]: how much a pixel differs from the frame of the picture; all 0 when nothing does."""
    flat_HWC = to_lab(cv2.pyrMeanShiftFiltering(rgb_HWC, 8, 16))  # texture goes, edges stay
    geodesic_HW = _geodesic_from_border(flat_HWC)
    top = float(np.percentile(geodesic_HW, 98))
    if top < 4.0:  # ΔE: no region stands out from the border at all
        return np.zeros(rgb_HWC.shape[:2], np.float32)
    colour_HW = _distance_to_border_colours(to_lab(cv2.GaussianBlur(rgb_HWC, (0, 0), 1.5)))
    colour_top = max(float(np.percentile(colour_HW, 98)), 1e-6)
    return (np.clip(geodesic_HW / top, 0, 1) / 2 + np.clip(colour_HW / colour_top, 0, 1) / 2).astype(np.float32)


def _geodesic_from_border(lab_HWC: np.ndarray, free: float = 1.0) -> np.ndarray:
    """(H, W) cost in ΔE of the cheapest way to the border; steps below ``free`` cost nothing (shading)."""
    height, width = lab_HWC.shape[:2]
    index = np.arange(height * width).reshape(height, width)
    starts, ends, costs = [], [], []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        a = (slice(0, height - dy), slice(max(0, -dx), width - max(0, dx)))
        b = (slice(dy, height), slice(max(0, dx), width - max(0, -dx)))
        difference = np.linalg.norm(lab_HWC[a] - lab_HWC[b], axis=-1)
        starts.append(index[a].ravel())
        ends.append(index[b].ravel())
        costs.append(np.maximum(difference - free, 0).ravel() + 1e-4)  # 0 would mean "no edge" to scipy
    edges = (np.concatenate(costs), (np.concatenate(starts), np.concatenate(ends)))
    graph = coo_matrix(edges, shape=(index.size, index.size)).tocsr()
    border = np.concatenate([index[0], index[-1], index[:, 0], index[:, -1]])
    distance = dijkstra(graph, directed=False, indices=border, min_only=True)
    return distance.reshape(height, width)


def _distance_to_border_colours(lab_HWC: np.ndarray, clusters: int = 5) -> np.ndarray:
    """(H, W) Mahalanobis distance to the nearest of the colour clusters along the border."""
    height, width = lab_HWC.shape[:2]
    ring = max(2, round(0.04 * min(height, width)))
    frame = np.ones((height, width), bool)
    frame[ring : height - ring, ring : width - ring] = False
    pixels = np.ascontiguousarray(lab_HWC[frame])
    cv2.setRNGSeed(0)
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 0.1)
    _, labels, centres = cv2.kmeans(
        pixels, min(clusters, len(pixels)), np.empty(0, np.int32), criteria, 3, cv2.KMEANS_PP_CENTERS
    )
    nearest = np.full((height, width), np.inf)
    for k, centre in enumerate(centres):
        members = pixels[labels[:, 0] == k]
        if len(members) < 4:
            continue
        covariance = np.cov(members.T) + 4.0 * np.eye(3)  # 2 ΔE of noise are no difference
        delta = lab_HWC - centre
        squared = np.einsum("hwi,ij,hwj->hw", delta, np.linalg.inv(covariance), delta)
        nearest = np.minimum(nearest, squared)
    return np.sqrt(nearest)


def _first_guess(saliency_HW: np.ndarray) -> tuple[np.ndarray, float]:
    """(H, W) bool and the threshold, Otsu's, that made it; both sides are non-empty unless the input is constant."""
    levels = to_bytes(saliency_HW)
    threshold, likely = cv2.threshold(levels, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return likely > 0, threshold / 255


def _object_from(rgb_HWC: np.ndarray, saliency_HW: np.ndarray, iterations: int = 6) -> np.ndarray:
    """(H, W) bool from GrabCut, started at Otsu's threshold of the saliency."""
    likely_HW, threshold = _first_guess(saliency_HW)
    labels_HW = np.where(likely_HW, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels_HW[saliency_HW < 0.3 * threshold] = cv2.GC_BGD
    return grabcut(rgb_HWC, labels_HW, iterations)


def _clean(mask_HW: np.ndarray) -> np.ndarray:
    """The largest component and those at least a tenth of it; holes below 2 % of it (reflections) are filled."""
    opened = cv2.morphologyEx(mask_HW.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=8)
    if count < 2:
        return np.zeros_like(mask_HW)
    areas = stats[1:, cv2.CC_STAT_AREA]
    keep = np.isin(labels, 1 + np.flatnonzero(areas >= 0.1 * areas.max()))
    _, holes, hole_stats, _ = cv2.connectedComponentsWithStats((~keep).astype(np.uint8), connectivity=4)
    small = np.flatnonzero(hole_stats[:, cv2.CC_STAT_AREA] < 0.02 * keep.sum())
    touching = np.unique(np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]]))
    return keep | np.isin(holes, np.setdiff1d(small, np.append(touching, 0)))


def _ramp(value: float, low: float, high: float) -> float:
    """0 below ``low``, 1 above ``high``, a straight line between."""
    return float(np.clip((value - low) / (high - low), 0, 1))


def _plausible_area(share: float) -> float:
    """A product fills between 2 % and 80 % of a product photo."""
    return min(_ramp(share, 0.002, 0.02), 1 - _ramp(share, 0.8, 0.97))


def evidence(rgb_HWC: np.ndarray, saliency_HW: np.ndarray, raw_HW: np.ndarray, mask_HW: np.ndarray) -> dict[str, float]:
    """What speaks for a mask, each in [0, 1].

    area: its share of the picture. border: how little of the frame it touches. edges: the colour gradient along its
    outline as a percentile of the whole picture's (0.5 is what chance gives). contrast: mean saliency inside minus
    outside. start: agreement (IoU) of the first guess, from saliency alone, with the result, from colours. compact:
    agreement of GrabCut's own result with its cleaned form; noise is speckle. single: share of the largest piece.
    """
    lab_HWC = to_lab(cv2.GaussianBlur(rgb_HWC, (0, 0), 1.0))
    slopes = [cv2.Sobel(lab_HWC, cv2.CV_32F, dx, dy) for dx, dy in ((1, 0), (0, 1))]
    gradient_HW = np.sqrt((slopes[0] ** 2 + slopes[1] ** 2).sum(-1))
    outline = cv2.morphologyEx(mask_HW.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    ranks = np.searchsorted(np.sort(gradient_HW, axis=None), gradient_HW[outline], side="left") / gradient_HW.size
    frame = np.concatenate([mask_HW[1], mask_HW[-2], mask_HW[:, 1], mask_HW[:, -2]])
    first_HW, _ = _first_guess(saliency_HW)
    pieces = cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8))[2][1:, cv2.CC_STAT_AREA]
    return {
        "area": _plausible_area(float(mask_HW.mean())),
        "border": 1 - _ramp(float(frame.mean()), 0.15, 0.6),
        "edges": _ramp(float(ranks.mean()), 0.55, 0.85),
        "contrast": _ramp(float(saliency_HW[mask_HW].mean() - saliency_HW[~mask_HW].mean()), 0.2, 0.45),
        "start": _ramp(_iou(first_HW, mask_HW), 0.25, 0.75),
        "compact": _ramp(_iou(raw_HW, mask_HW), 0.4, 0.9),
        "single": _ramp(float(pieces.max() / pieces.sum()), 0.4, 0.8),
    }


def _iou(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    return float((a_HW & b_HW).sum() / max(1, (a_HW | b_HW).sum()))


# --- the edge ---------------------------------------------------------------------------------------------------------


def _refine(rgb_HWC: np.ndarray, mask_HW: np.ndarray, radius: int = 3, eps: float = 1e-4) -> np.ndarray:
    """Alpha at full size from a small hard mask.

    Colour guided filter (He, Sun, Tang, ECCV 2010), fitted at REFINE_SIDE and applied at full size (He, Sun, "Fast
    Guided Filter", 2015). Only a band around the mask's outline is taken from it; the rest stays 0 or 1.
    """
    height, width = rgb_HWC.shape[:2]
    guide_HWC = to_unit(_shrink(rgb_HWC, REFINE_SIDE))
    size = guide_HWC.shape[1::-1]
    soft_HW = cv2.resize(mask_HW.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    scale = size[0] / mask_HW.shape[1]
    window = max(1, round(radius * scale))
    slope_HWC, offset_HW = _guided_fit(guide_HWC, soft_HW, window, eps)
    full = (width, height)
    alpha_HW = (cv2.resize(slope_HWC, full) * to_unit(rgb_HWC)).sum(-1) + cv2.resize(offset_HW, full)
    band = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * window + 1,) * 2)
    hard = (soft_HW >= 0.5).astype(np.uint8)
    sure = (cv2.erode(hard, band), 1 - cv2.dilate(hard, band))
    inside, outside = (cv2.resize(part, full, interpolation=cv2.INTER_NEAREST) > 0 for part in sure)
    # The fit is an average over windows; stretching it back gives whole pixels beside the edge their 0 or 1.
    alpha_HW = _stretched(alpha_HW, 0.1, 0.9)
    alpha_HW[inside], alpha_HW[outside] = 1.0, 0.0
    return alpha_HW.astype(np.float32)


def _guided_fit(guide_HWC: np.ndarray, target_HW: np.ndarray, radius: int, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Slope (H, W, 3) and offset (H, W) of the local linear models target ≈ slope · guide + offset."""

    def mean(array: np.ndarray) -> np.ndarray:
        return cv2.blur(array, (2 * radius + 1, 2 * radius + 1), borderType=cv2.BORDER_REFLECT)

    mean_guide, mean_target = mean(guide_HWC), mean(target_HW)
    products = np.stack([mean(guide_HWC[..., i] * guide_HWC[..., j]) for i in range(3) for j in range(3)], -1)
    covariance = products.reshape(*target_HW.shape, 3, 3) - mean_guide[..., :, None] * mean_guide[..., None, :]
    cross = mean(guide_HWC * target_HW[..., None]) - mean_guide * mean_target[..., None]
    slope = np.linalg.solve(covariance + eps * np.eye(3, dtype=np.float32), cross[..., None])[..., 0]
    offset = mean_target - (slope * mean_guide).sum(-1)
    return mean(slope), mean(offset)
