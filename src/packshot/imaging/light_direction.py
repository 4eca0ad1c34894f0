"""Where a rendered scene's light comes from, read off the shadow that it makes the product throw."""

from __future__ import annotations

import numpy as np

FAINTEST = 0.06  # share of the light taken away; less is the renderer's noise and what a wall reflects
SMALLEST = 0.01  # of the product's area: smaller shadows do not count as evidence
ONE_SIDED = 0.6  # length of the mean direction from which on a shadow counts as thrown to one side


def light_direction(shadow_HW: np.ndarray, mask_HW: np.ndarray) -> tuple[float, float]:
    """Where the light comes from, (right, up) in the picture: away from the shadow, as seen from the product's foot.

    The mean resultant vector (Mardia and Jupp 2000, Directional Statistics, 2.2) of the directions from the foot to the
    shadow's pixels, each weighted by how dark it is. Its length is 1 for a shadow on one side, and 0 for one all around
    or none at all. On a floor up is behind the product; a shadow on the wall behind counts as light from the front.

    shadow_HW: share of the light that the product leaves, in [0, 1]. mask_HW: the product's alpha in [0, 1].
    """
    rows, columns = np.nonzero(mask_HW >= 0.5)
    if rows.size == 0:
        return 0.0, 0.0
    foot_row, foot_column = rows.max() + 1, (columns.min() + columns.max() + 1) / 2
    darkness_HW = np.where(mask_HW > 0.03, 0.0, 1 - shadow_HW)  # beneath the product the layer shows its inside
    darkness_HW = np.where(darkness_HW > FAINTEST, darkness_HW, 0.0)
    down_HW, right_HW = (axis + 0.5 for axis in np.indices(mask_HW.shape))
    down_HW, right_HW = down_HW - foot_row, right_HW - foot_column
    weight_HW = darkness_HW / np.maximum(np.hypot(down_HW, right_HW), 0.5)
    total = max(float(darkness_HW.sum()), SMALLEST * rows.size) * ONE_SIDED
    right, up = -float((weight_HW * right_HW).sum()) / total, float((weight_HW * down_HW).sum()) / total
    excess = max(1.0, float(np.hypot(right, up)))
    return right / excess, up / excess
