"""Where a product lies in somebody's picture: at the place it had, moved, or on another scale."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from packshot.errors import PackshotError

SEARCH_SIDE = 256  # px, longer side of the picture in the first search
REFINED_SIDE = 512  # px, the same in the later searches
SCALE_STEPS = (0.12, 0.012, 0.003)  # by how much the scale is changed in each of them, at most
SCALES_EACH = 31  # a texture that is 2 % too large no longer fits
SCALES = np.geomspace(0.1, 1.0, 28)  # product's size in the picture, as a share of the largest that fits
LARGER_PASSES = 1.25  # a larger scale is taken although its error is up to this much above the smallest
SLACK = 4.0  # squared 8-bit differences that mean nothing
ASPECT_SLACK = 0.03  # by how much a stated box may stretch the photograph
SAME = 4  # 8-bit difference up to which two pixels look alike
INTERPOLATIONS = {
    "area": cv2.INTER_AREA,
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "lanczos": cv2.INTER_LANCZOS4,
}


@dataclass(frozen=True)
class Alignment:
    """The photograph's frame in a picture: its left top corner in px, and how much it was enlarged.

    resampling: "none", or the interpolation that explains the product's pixels best. stated: the system named the
    place, so that it was not searched. error: mean squared difference of the product's pixels, 0 to 65,025.
    """

    left: int
    top: int
    scale: float = 1.0
    resampling: str = "none"
    stated: bool = False
    error: float = 0.0

    def place(self, image: np.ndarray, size: tuple[int, int], fill: int = 0) -> np.ndarray:
        """A picture on the photograph's grid, brought to the result's grid of (width, height); its dtype stays.

        fill: the value where the photograph does not reach.
        """
        moved = image
        if self.resampling != "none":
            height, width = image.shape[:2]
            target = (max(1, round(width * self.scale)), max(1, round(height * self.scale)))
            moved = cv2.resize(image, target, interpolation=INTERPOLATIONS[self.resampling])
        canvas = np.full((size[1], size[0], *image.shape[2:]), fill, image.dtype)
        left, top = max(self.left, 0), max(self.top, 0)
        right = min(self.left + moved.shape[1], size[0])
        bottom = min(self.top + moved.shape[0], size[1])
        if right > left and bottom > top:
            canvas[top:bottom, left:right] = moved[
                top - self.top : bottom - self.top, left - self.left : right - self.left
            ]
        return canvas


def align(
    photo_HW3: np.ndarray,
    mask_HW: np.ndarray,
    picture_HW3: np.ndarray,
    box: tuple[float, float, float, float] | None = None,
) -> Alignment:
    """Find the photograph's product in a picture.

    A picture of the photograph's size is searched for a move by whole pixels, and the old place wins unless another one
    is clearly better. A picture of another size is searched over scales too. photo_HW3, picture_HW3: uint8.
    mask_HW: uint8, white = product. box: left, top, width, height of the photograph's frame, if they are known.

    Raises:
        PackshotError: the box has another shape than the photograph.
    """
    mask_HW = matched_part(mask_HW)
    if box is not None:
        left, top, wide, high = box
        if abs(wide / high / (mask_HW.shape[1] / mask_HW.shape[0]) - 1) > ASPECT_SLACK:
            raise PackshotError(
                f"runs: a box of {wide:g} x {high:g} px stretches a photograph of "
                f"{mask_HW.shape[1]} x {mask_HW.shape[0]} px.",
                "box is left,top,width,height of the whole photograph in the picture.",
            )
        place = Alignment(round(left), round(top), wide / mask_HW.shape[1], stated=True)
        return with_best_resampling(photo_HW3, mask_HW, picture_HW3, place)
    if picture_HW3.shape == photo_HW3.shape:
        return moved_by(photo_HW3, mask_HW, picture_HW3)
    return scaled_by(photo_HW3, mask_HW, picture_HW3)


def matched_part(mask_HW: np.ndarray) -> np.ndarray:
    """The product without its rim, which shows another background in every picture; the whole of a thin product."""
    core_HW = cv2.erode(np.where(mask_HW == 255, np.uint8(255), np.uint8(0)), np.ones((3, 3), np.uint8))
    return core_HW if core_HW.any() else mask_HW


def error_at(photo_HW3: np.ndarray, mask_HW: np.ndarray, picture_HW3: np.ndarray, place: Alignment) -> float:
    """Mean squared difference of the product's pixels at a place; infinite where less than half of it is inside."""
    size = (picture_HW3.shape[1], picture_HW3.shape[0])
    inside_HW = place.place(mask_HW, size) >= 128
    count = int(inside_HW.sum())
    if count < 0.5 * place.scale**2 * (mask_HW >= 128).sum():
        return float("inf")
    placed = place.place(photo_HW3, size)[inside_HW].astype(np.float32)
    return float(((placed - picture_HW3[inside_HW]) ** 2).mean())


def share_changed(photo_HW3: np.ndarray, mask_HW: np.ndarray, picture_HW3: np.ndarray, place: Alignment) -> float:
    """Share of the product's pixels that differ visibly at a place. One recoloured part counts by its area alone."""
    size = (picture_HW3.shape[1], picture_HW3.shape[0])
    inside_HW = place.place(mask_HW, size) >= 128
    difference_HW = cv2.absdiff(place.place(photo_HW3, size), picture_HW3).max(axis=-1)
    return float((difference_HW[inside_HW] > SAME).mean()) if inside_HW.any() else 1.0


def moved_by(photo_HW3: np.ndarray, mask_HW: np.ndarray, picture_HW3: np.ndarray) -> Alignment:
    """The best move by whole pixels, found on a small copy first and then by steps of half the size."""
    old_error = error_at(photo_HW3, mask_HW, picture_HW3, Alignment(0, 0))
    unmoved = Alignment(0, 0, error=old_error)
    if old_error <= SLACK:
        return unmoved
    step = 1
    while max(mask_HW.shape) / step > SEARCH_SIDE:
        step *= 2
    left, top, _ = best_offset(shrunk(photo_HW3, 1 / step), shrunk(mask_HW, 1 / step), shrunk(picture_HW3, 1 / step))
    best = refined(photo_HW3, mask_HW, picture_HW3, Alignment(left * step, top * step), step)
    changed = share_changed(photo_HW3, mask_HW, picture_HW3, best)
    if changed >= 0.5 * share_changed(photo_HW3, mask_HW, picture_HW3, unmoved):
        return unmoved
    return best


def refined(
    photo_HW3: np.ndarray, mask_HW: np.ndarray, picture_HW3: np.ndarray, start: Alignment, reach: int
) -> Alignment:
    """The place with the least error near ``start``, by neighbours at half the distance each time, down to 1 px."""
    best = start
    least = error_at(photo_HW3, mask_HW, picture_HW3, start)
    distance = max(1, reach)
    while distance >= 1:
        around = best
        for dy in (-distance, 0, distance):
            for dx in (-distance, 0, distance):
                tried = Alignment(around.left + dx, around.top + dy, start.scale, start.resampling)
                error = error_at(photo_HW3, mask_HW, picture_HW3, tried)
                if error < least:
                    least, best = error, tried
        if best == around:
            distance //= 2
    return Alignment(best.left, best.top, best.scale, best.resampling, error=least)


def shrunk(image: np.ndarray, scale: float) -> np.ndarray:
    """A picture at another scale, by area."""
    height, width = image.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return image if size == (width, height) else cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def best_offset(photo_HW3: np.ndarray, mask_HW: np.ndarray, picture_HW3: np.ndarray) -> tuple[int, int, float]:
    """(left, top, error) of the photograph's frame where the product differs least from the picture.

    The product lies wholly inside the picture. The error is infinite where it does not fit.
    """
    product_HW = mask_HW >= 128
    if not product_HW.any():
        return 0, 0, float("inf")
    rows, columns = np.nonzero(product_HW)
    window = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    template = photo_HW3[window].astype(np.float32)
    if template.shape[0] > picture_HW3.shape[0] or template.shape[1] > picture_HW3.shape[1]:
        return 0, 0, float("inf")
    weights = np.repeat(product_HW[window][..., None], 3, axis=2).astype(np.float32)
    squares = cv2.matchTemplate(picture_HW3.astype(np.float32), template, cv2.TM_SQDIFF, mask=weights)
    least, _, (x, y), _ = cv2.minMaxLoc(squares)
    return x - int(columns.min()), y - int(rows.min()), max(0.0, least) / float(weights.sum())


def scaled_by(photo_HW3: np.ndarray, mask_HW: np.ndarray, picture_HW3: np.ndarray) -> Alignment:
    """The best scale and place in a picture of another size.

    A plain product fits into itself at every smaller scale, so the largest scale that fits nearly as well as the best
    one is taken first, and its neighbours are then searched on larger copies.
    """
    rows, columns = np.nonzero(mask_HW >= 128)
    largest = min(picture_HW3.shape[0] / (np.ptp(rows) + 1), picture_HW3.shape[1] / (np.ptp(columns) + 1))
    same = refined_at_scale_1(photo_HW3, mask_HW, picture_HW3) if largest >= 1 else None
    if same is not None and same.error <= SLACK:
        return same
    tried = [place_at(photo_HW3, mask_HW, picture_HW3, share * largest, SEARCH_SIDE) for share in SCALES]
    least = min(place.error for place in tried)
    best = [place for place in tried if place.error <= LARGER_PASSES * least + SLACK][-1]
    for reach in SCALE_STEPS:
        scales = best.scale * (1 + np.linspace(-reach, reach, SCALES_EACH))
        around = []
        for scale in scales[scales <= largest]:
            around.append(place_at(photo_HW3, mask_HW, picture_HW3, scale, REFINED_SIDE))
        best = min([*around, best] if reach < SCALE_STEPS[0] else around or [best], key=lambda place: place.error)
    reach = max(1, round(max(picture_HW3.shape[:2]) / REFINED_SIDE))
    if same is not None and same.error <= error_at(photo_HW3, mask_HW, picture_HW3, best) + SLACK:
        return same
    return with_best_resampling(photo_HW3, mask_HW, picture_HW3, refined(photo_HW3, mask_HW, picture_HW3, best, reach))


def refined_at_scale_1(photo_HW3: np.ndarray, mask_HW: np.ndarray, picture_HW3: np.ndarray) -> Alignment:
    """The best place without resampling: a canvas of another size around the same pixels."""
    found = place_at(photo_HW3, mask_HW, picture_HW3, 1.0, REFINED_SIDE)
    reach = max(1, round(max(picture_HW3.shape[:2]) / REFINED_SIDE))
    return refined(photo_HW3, mask_HW, picture_HW3, Alignment(found.left, found.top), 2 * reach)


def place_at(photo_HW3: np.ndarray, mask_HW: np.ndarray, picture_HW3: np.ndarray, scale: float, side: int) -> Alignment:
    """The best place at one scale, searched on a copy of the picture whose longer side is at most ``side`` px."""
    shrink = min(1.0, side / max(picture_HW3.shape[:2]))
    left, top, error = best_offset(
        shrunk(photo_HW3, scale * shrink), shrunk(mask_HW, scale * shrink), shrunk(picture_HW3, shrink)
    )
    return Alignment(round(left / shrink), round(top / shrink), float(scale), "linear", error=error)


def with_best_resampling(
    photo_HW3: np.ndarray, mask_HW: np.ndarray, picture_HW3: np.ndarray, place: Alignment
) -> Alignment:
    """The same place with the interpolation under which the product's pixels differ least."""
    names = ["none"] if place.scale == 1 else list(INTERPOLATIONS)
    tried = []
    for name in names:
        candidate = Alignment(place.left, place.top, place.scale, name, place.stated)
        tried.append((error_at(photo_HW3, mask_HW, picture_HW3, candidate), name))
    error, name = min(tried)
    return Alignment(place.left, place.top, place.scale, name, place.stated, error)
