"""Measures of one picture against what is known of it: a row each, for pictures of any system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import nan

import cv2
import numpy as np
from scipy.ndimage import distance_transform_edt

from packshot.evaluate.alignment import Alignment, align
from packshot.evaluate.items import Item
from packshot.evaluate.results import Picture
from packshot.generate.color import delta_e
from packshot.generate.composite import blend
from packshot.generate.product import core_of
from packshot.imaging.check_network import judge
from packshot.imaging.matte import unmix
from packshot.imaging.outline import Segment, compare_size, measure_extension

LOST = 20.0  # mean CIEDE2000 on the core from which a product is taken for another thing
FEW_PIXELS = 12  # a mean over fewer says nothing
HALO_BAND = 2  # px outside the outline in which an old background can be left
CLEAR = 3  # px from the outline at which a picture shows its background alone
HALO_CONTRAST = 24.0  # 8-bit distance between the old background and the new one below which a halo cannot be seen
REACH = 0.6  # of the product's height: how far from the product its shadow is looked for
LOWER_PART = 0.3  # the ground begins this share of the product's height above its lowest point
FAINT = 0.05  # standard deviation of the shadow's logarithm below which no shadow can be told from the ground
DARK = 0.02  # added to linear light before the logarithm


@dataclass(frozen=True)
class Trial:
    """One picture with all that its measures read, on the picture's pixel grid; uint8, (H, W[, 3]).

    photo_HW3, matte_HW: the photograph and its mask, placed by ``alignment``. moved: whether the item asked for the
    photograph's own frame. floor: the extension that is measured on the photograph itself.
    """

    item: Item
    picture_HW3: np.ndarray
    photo_HW3: np.ndarray
    matte_HW: np.ndarray
    alignment: Alignment
    same_frame: bool
    segment: Segment
    floor: float

    @cached_property
    def core_HW(self) -> np.ndarray:
        return core_of(self.matte_HW)

    @cached_property
    def foreground_HW3(self) -> np.ndarray:
        """The product's colours without its old background."""
        return unmix(self.photo_HW3, self.matte_HW)

    @cached_property
    def clean_HW3(self) -> np.ndarray:
        """The product over the picture's background, which is continued under it."""
        return blend(self.foreground_HW3, self.matte_HW, nearest_outside(self.picture_HW3, self.matte_HW))

    @cached_property
    def outline(self) -> dict[str, float]:
        return measure_extension(
            self.picture_HW3, self.matte_HW, self.segment, compare_size(*self.picture_HW3.shape[:2])
        )

    @cached_property
    def shadow(self) -> float:
        """The strength of the true shadow in the picture; nan where no shadow is known, or it is too faint."""
        shadow_HW = true_shadow(self.item)
        if shadow_HW is None or not (self.matte_HW >= 128).any():
            return nan
        size = (self.picture_HW3.shape[1], self.picture_HW3.shape[0])
        placed_HW = self.alignment.place(shadow_HW, size)
        return shadow_strength(linear_light(self.picture_HW3), placed_HW, ground_near(self.matte_HW))


def open_trial(item: Item, picture: Picture, segment: Segment, floor: float) -> Trial:
    """Read a picture and find the product in it.

    Raises:
        PackshotError: a file is missing or damaged.
    """
    photo_HW3, mask_HW = item.photo_and_mask()
    picture_HW3 = picture.read()
    place = align(photo_HW3, mask_HW, picture_HW3, picture.box)
    size = (picture_HW3.shape[1], picture_HW3.shape[0])
    return Trial(
        item=item,
        picture_HW3=picture_HW3,
        photo_HW3=place.place(photo_HW3, size),
        matte_HW=place.place(mask_HW, size),
        alignment=place,
        same_frame=picture_HW3.shape == photo_HW3.shape,
        segment=segment,
        floor=floor,
    )


def floor_of(item: Item, segment: Segment) -> float:
    """The extension that the segmenter finds in the photograph itself, where nothing was extended."""
    photo_HW3, mask_HW = item.photo_and_mask()
    return measure_extension(photo_HW3, mask_HW, segment, compare_size(*mask_HW.shape))["extension"]


# ---- the product ----


def core_identical(trial: Trial) -> float:
    core = trial.core_HW
    if not core.any():
        return nan
    return float((trial.picture_HW3[core] == trial.photo_HW3[core]).all(axis=-1).mean())


def core_delta_e(trial: Trial) -> float:
    core = trial.core_HW
    return float(delta_e(trial.picture_HW3[core], trial.photo_HW3[core]).mean()) if core.any() else nan


def edge_delta_e(trial: Trial) -> float:
    """Against the product's own colours over the new background: the photograph's rim still shows its old one."""
    edge = (trial.matte_HW >= 128) & ~trial.core_HW
    if not edge.any():
        return nan
    return float(np.median(delta_e(trial.picture_HW3[edge], trial.clean_HW3[edge])))


def extension(trial: Trial) -> float:
    return max(0.0, trial.outline["extension"] - trial.floor)


def growth(trial: Trial) -> float:
    judgement = judge(trial.picture_HW3, trial.matte_HW)
    return nan if judgement is None else judgement.extends


def loss(trial: Trial) -> float:
    return trial.outline["loss"]


def shift(trial: Trial) -> float:
    """Only where the picture has the photograph's frame; elsewhere the product was allowed to move.

    Undefined where the product is not recognised at the place that was found: it may be anywhere, or nowhere.
    """
    if not trial.same_frame or not core_delta_e(trial) < LOST:
        return nan
    rows, _ = np.nonzero(trial.matte_HW >= 128)
    if not len(rows):
        return nan
    return float(np.hypot(trial.alignment.left, trial.alignment.top) / (np.ptp(rows) + 1))


# ---- the edge ----


def nearest_outside(image_HW3: np.ndarray, matte_HW: np.ndarray) -> np.ndarray:
    """The background under and near a product: each pixel takes the nearest one that lies clear of the product."""
    near = cv2.dilate((matte_HW > 0).astype(np.uint8), np.ones((2 * CLEAR + 1,) * 2, np.uint8)) > 0
    if near.all():
        return image_HW3
    places = distance_transform_edt(near, return_distances=False, return_indices=True)
    assert isinstance(places, np.ndarray)
    smooth_HW3 = cv2.blur(image_HW3, (3, 3))
    return np.where(near[..., None], smooth_HW3[places[0], places[1]], image_HW3)


def halo(trial: Trial) -> float:
    """Projects what the picture has too much on the way from the new background to the old one.

    The clean picture of the band is the product's own colours over the new background, by the matte. A pixel that
    still shows the old background lies between this and the old background; the share of the way is what counts.
    """
    matte_HW = trial.matte_HW
    wide = cv2.dilate((matte_HW > 0).astype(np.uint8), np.ones((2 * HALO_BAND + 1,) * 2, np.uint8)) > 0
    old_HW3 = nearest_outside(trial.photo_HW3, matte_HW).astype(np.float32)
    new_HW3 = nearest_outside(trial.picture_HW3, matte_HW)
    way_HW3 = old_HW3 - new_HW3.astype(np.float32)
    length_HW = (way_HW3**2).sum(axis=-1)
    band = wide & (matte_HW < 255) & (length_HW > HALO_CONTRAST**2)
    if band.sum() < FEW_PIXELS:
        return nan
    surplus = trial.picture_HW3[band].astype(np.float32) - trial.clean_HW3[band]
    left = np.clip((surplus * way_HW3[band]).sum(axis=-1) / length_HW[band], 0, 1)
    # the upper tenth is left out: things of the scene that lie at the outline
    return float(np.sort(left)[: max(1, round(0.9 * len(left)))].mean())


# ---- the ground ----


def linear_light(image_HW3: np.ndarray) -> np.ndarray:
    """Luminance (Rec. 709) in linear light, in [0, 1]; float32 (H, W)."""
    linear = (image_HW3.astype(np.float32) / 255) ** 2.2
    return linear @ np.array([0.2126, 0.7152, 0.0722], np.float32)


def ground_near(matte_HW: np.ndarray) -> np.ndarray:
    """Bool (H, W): the ground beside and under a product, without the product and its soft edge."""
    rows, _ = np.nonzero(matte_HW >= 128)
    height = int(np.ptp(rows)) + 1
    distance_HW = cv2.distanceTransform((matte_HW == 0).astype(np.uint8), cv2.DIST_L2, 5)
    low_HW = np.indices(matte_HW.shape)[0] > rows.max() - LOWER_PART * height
    return low_HW & (distance_HW > 1) & (distance_HW <= REACH * height)


def true_shadow(item: Item) -> np.ndarray | None:
    """Logarithm of the light that the product's shadow leaves, float (H, W): 0 where there is none."""
    shadow_HW = item.read_alike("shadow", "L")
    if shadow_HW is not None:
        return np.log((shadow_HW.astype(np.float32) / 255) ** 2.2 + DARK) - np.log(1 + DARK)
    truth_HW3 = item.read_alike("truth")
    plate_HW3 = item.read_alike("plate")
    if truth_HW3 is None or plate_HW3 is None:
        return None
    return np.minimum(0, np.log(linear_light(truth_HW3) + DARK) - np.log(linear_light(plate_HW3) + DARK))


def shadow_strength(light_HW: np.ndarray, shadow_HW: np.ndarray, ground_HW: np.ndarray) -> float:
    """How much of the true shadow lies on the ground of a picture: 1 the same, 0 none, below 0 a light instead.

    The coefficient of the shadow in a least-squares fit of the ground's logarithm of light by the shadow and a
    quadratic surface, which takes up the light's own gradient. The ground's pattern is independent of the shadow's
    shape, and hardly moves the coefficient. shadow_HW: as of :func:`true_shadow`. nan where the shadow is too faint.
    """
    y_N, x_N = (np.argwhere(ground_HW).T / max(ground_HW.shape)).astype(np.float64)
    shadow_N = shadow_HW[ground_HW].astype(np.float64)
    surface_NK = np.stack([np.ones_like(x_N), x_N, y_N, x_N * x_N, x_N * y_N, y_N * y_N], axis=1)
    if len(x_N) < 4 * FEW_PIXELS:
        return nan
    light_N = np.log(light_HW[ground_HW].astype(np.float64) + DARK)
    smooth, *_ = np.linalg.lstsq(surface_NK, np.stack([shadow_N, light_N], axis=1), rcond=None)
    shadow_N, light_N = (np.stack([shadow_N, light_N], axis=1) - surface_NK @ smooth).T
    if shadow_N.std() < FAINT:
        return nan
    return float(shadow_N @ light_N / (shadow_N @ shadow_N))


def shadow(trial: Trial) -> float:
    return trial.shadow


def shadow_error(trial: Trial) -> float:
    return abs(1 - trial.shadow)


@dataclass(frozen=True)
class Measure:
    """A row of the tables. about: what it measures, with its unit.

    lower_is_better: the direction; None where a value in the middle is right, so that systems are not ranked by it.
    """

    about: str
    function: Callable[[Trial], float]
    lower_is_better: bool | None = True


MEASURES: dict[str, Measure] = {
    "core_identical_share": Measure(
        "Share of the product's core pixels (mask 255, eroded by 1 px) that equal the photograph's, byte for byte, "
        "after the best alignment.",
        core_identical,
        lower_is_better=False,
    ),
    "core_delta_e": Measure("Mean CIEDE2000 to the photograph on the core, after the best alignment.", core_delta_e),
    "edge_delta_e": Measure(
        "Median CIEDE2000 on the product's rim (mask at least 1/2, outside the core) to the product's own colours over "
        "the new background.",
        edge_delta_e,
    ),
    "halo": Measure(
        f"Share of the old background that is left in the soft edge and up to {HALO_BAND} px outside it, 0 to 1; "
        "undefined where the old and the new background look alike.",
        halo,
    ),
    "extension": Measure(
        "Area of the object found outside the mask, relative to the product, above what is found in the photograph "
        "itself.",
        extension,
    ),
    "growth": Measure(
        "Probability, 0 to 1, that the product goes on beyond its mask, by the check network.",
        growth,
    ),
    "loss": Measure("Product area where no object is found, relative to the product.", loss),
    "shift": Measure(
        "How far the product was moved, relative to its height; only for pictures of the photograph's size in which it "
        "is recognised.",
        shift,
    ),
    "shadow_strength": Measure(
        "How much of the true shadow lies on the ground near the product: 1 the same, 0 none, above 1 a "
        "stronger one, below 0 a light instead; undefined where the true shadow is faint.",
        shadow,
        lower_is_better=None,
    ),
    "shadow_error": Measure(
        "|1 - shadow strength|, undefined where the true shadow is faint.",
        shadow_error,
    ),
}


def measure_all(trial: Trial) -> dict[str, float]:
    """Every measure of one picture; nan where it is not defined."""
    return {name: measure.function(trial) for name, measure in MEASURES.items()}
