"""Whether the object in a picture goes on beyond the product's mask: a longer neck, a handle, a wider foot.

GrabCut, seeded by the mask, proposes what may belong to the object. In true pictures it proposes shadows and props as
well, so the proposal is then looked at: its size, its colours next to the product's and the scene's, the edges around
it, and whether the product's colours go on across the seam.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.ndimage import distance_transform_edt

from packshot.imaging.color import to_lab
from packshot.imaging.mask_edge import narrowed, shrink, widened
from packshot.imaging.outline import segment_near, touching

SIDE = 128  # px, longer side at which pictures are compared
ITERATIONS = 3  # of GrabCut
FEWEST = 6  # px of a proposal that is looked at
PALETTE = 12  # colours of the product, and of the scene
GOES_ON = 10.0  # ΔE across the seam below which a colour counts as going on
LOW = 0.25  # of the product's height: what lies lower is rather a shadow
# A logistic fit on rendered training scenes and the same with products that grow in three ways (tools/fit_checks.py).
WEIGHTS = (0.6292, 0.5837, -0.7475, 0.0158, 0.0515, -2.4292, -0.1312, 0.0809, 0.3891, 10.2676, -5.1114)
OFFSET = 1.4572


@dataclass(frozen=True)
class Proposal:
    """What may belong to the object beyond its mask, bool (H, W) each. lab_HW3: of the picture.

    keep_HW: the mask. grown_HW: what was proposed. object_HW: both.
    """

    lab_HW3: np.ndarray
    keep_HW: np.ndarray
    grown_HW: np.ndarray
    object_HW: np.ndarray


def propose(picture_HW3: np.ndarray, matte_HW: np.ndarray) -> Proposal | None:
    """The part beyond the mask that GrabCut takes for the object; None without a product."""
    keep_HW = shrink(matte_HW, SIDE) >= 128
    if not keep_HW.any() or keep_HW.all():
        return None
    small_HW3 = shrink(picture_HW3, SIDE)
    found_HW = segment_near(small_HW3, keep_HW, ITERATIONS)
    grown_HW = touching(found_HW | keep_HW, keep_HW) & found_HW & ~widened(keep_HW)
    return Proposal(to_lab(small_HW3), keep_HW, grown_HW, found_HW | keep_HW)


def palette_distance(colours_NC: np.ndarray, others_NC: np.ndarray) -> float:
    """Mean distance of colours to the nearest of the main ones of others, ΔE."""
    cv2.setRNGSeed(0)
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 0.5)
    count = min(PALETTE, len(others_NC))
    start = np.empty(0, np.int32)
    _, _, centres = cv2.kmeans(
        np.ascontiguousarray(others_NC, np.float32), count, start, criteria, 2, cv2.KMEANS_PP_CENTERS
    )
    distances = np.linalg.norm(colours_NC[:, None] - centres[None], axis=-1)
    return float(distances.min(axis=1).mean())


def edge_strengths(proposal: Proposal) -> tuple[float, float]:
    """Mean slope of the colour on the proposal's own outline, and on its seam with the product."""
    smooth_HW3 = cv2.GaussianBlur(proposal.lab_HW3, (0, 0), 0.7)
    across = cv2.Sobel(smooth_HW3, cv2.CV_32F, 1, 0)
    down = cv2.Sobel(smooth_HW3, cv2.CV_32F, 0, 1)
    slope_HW = np.sqrt((across**2 + down**2).sum(axis=-1))
    outline_HW = widened(proposal.grown_HW) & ~proposal.object_HW
    rim_HW = widened(proposal.keep_HW) & ~narrowed(proposal.keep_HW)
    seam_HW = rim_HW & widened(proposal.grown_HW, 2)
    own = float(slope_HW[outline_HW].mean()) if outline_HW.any() else 0.0
    seam = float(slope_HW[seam_HW].mean()) if seam_HW.any() else 0.0
    return own, seam


def continuity(proposal: Proposal) -> tuple[float, float]:
    """Where the product's colours go on across its outline into the proposal: share of the seam, and of the outline."""
    keep_HW = proposal.keep_HW
    inner_HW = narrowed(keep_HW) & ~narrowed(keep_HW, 2)
    outer_HW = widened(keep_HW, 3) & ~widened(keep_HW, 2)
    if not inner_HW.any() or not outer_HW.any():
        return 0.0, 0.0
    places = distance_transform_edt(~inner_HW, return_distances=False, return_indices=True)
    assert isinstance(places, np.ndarray)
    difference_HW = np.linalg.norm(proposal.lab_HW3 - proposal.lab_HW3[places[0], places[1]], axis=-1)
    seam_HW = outer_HW & widened(proposal.grown_HW)
    if not seam_HW.any():
        return 0.0, 0.0
    going_on = difference_HW[seam_HW] < GOES_ON
    return float(going_on.mean()), float(going_on.sum() / outer_HW.sum())


def looks(proposal: Proposal) -> np.ndarray:
    """What is known of a proposal, float (11,); the first is the logarithm of its size."""
    lab_HW3 = proposal.lab_HW3
    grown_HW = proposal.grown_HW
    keep_HW = proposal.keep_HW
    area = float(grown_HW.sum() / keep_HW.sum())
    own, seam = edge_strengths(proposal)
    share, length = continuity(proposal)
    distance_HW = cv2.distanceTransform((~grown_HW).astype(np.uint8), cv2.DIST_L2, 5)
    around_HW = ~proposal.object_HW & (distance_HW > 2) & (distance_HW < 8)
    colour = np.median(lab_HW3[grown_HW], axis=0)
    ground = np.median(lab_HW3[around_HW], axis=0) if around_HW.any() else colour
    rows = np.nonzero(keep_HW)[0]
    foot = rows.max() - LOW * (np.ptp(rows) + 1)
    core_HW = narrowed(keep_HW)
    far_HW = ~widened(proposal.object_HW, 2)
    inside = lab_HW3[core_HW if core_HW.sum() > 20 else keep_HW]
    outside = lab_HW3[far_HW if far_HW.sum() > 50 else ~keep_HW]
    return np.array(
        [
            np.log(area + 0.005),
            np.log(own + 1),
            np.log(seam + 1),
            max(0.0, float(ground[0] - colour[0])),
            float(np.hypot(*(colour - ground)[1:])),
            float((np.nonzero(grown_HW)[0] > foot).mean()),
            palette_distance(lab_HW3[grown_HW], inside),
            palette_distance(lab_HW3[grown_HW], outside),
            share,
            length,
            share * area,
        ]
    )


def extends(picture_HW3: np.ndarray, matte_HW: np.ndarray) -> float | None:
    """Probability, in [0, 1], that the object goes on beyond the mask; None without a product. All uint8."""
    proposal = propose(picture_HW3, matte_HW)
    if proposal is None:
        return None
    if proposal.grown_HW.sum() < FEWEST:
        return 0.0
    return float(1 / (1 + np.exp(-(looks(proposal) @ np.array(WEIGHTS) + OFFSET))))
