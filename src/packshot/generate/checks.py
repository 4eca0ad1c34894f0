"""Measures of a finished picture by which ``config.verify.CHECKS`` tell whether it can be handed over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pkgutil import resolve_name

import cv2
import numpy as np

from packshot.config.verify import CHECKS
from packshot.generate.canvas import Canvas
from packshot.generate.json_types import Json
from packshot.imaging import check_network, lettering, repeats
from packshot.imaging.halo import old_background_left
from packshot.imaging.mask_edge import shrink

RIM = 3  # px inside the outline where a good matte may be soft
SMALL_SIDE = 256  # px, longer side at which the background as a whole is judged
_SQUARE = np.ones((3, 3), np.uint8)


@dataclass(frozen=True)
class Shown:
    """A finished picture and the product in it, on one pixel grid.

    picture_HW3: uint8. measured: what ``certificate.measure`` found on the encoded file. sizes: see :meth:`at`.
    """

    picture_HW3: np.ndarray
    canvas: Canvas
    measured: Json
    sizes: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    def at(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """The picture and the matte with their longer side at most ``side`` px; several checks share each size."""
        if side not in self.sizes:
            self.sizes[side] = shrink(self.picture_HW3, side), shrink(self.canvas.matte_HW, side)
        return self.sizes[side]

    @cached_property
    def judgement(self) -> check_network.Judgement | None:
        """What a network thinks of the product's surroundings, for two checks."""
        return check_network.judge(*self.at(check_network.SIDE))

    @cached_property
    def even_HW3(self) -> np.ndarray:
        """The picture, small and without the noise of single pixels."""
        return cv2.blur(self.at(SMALL_SIDE)[0], (3, 3))

    @cached_property
    def small_outside_HW(self) -> np.ndarray:
        """uint8, 255 where the small picture shows background alone."""
        small_HW = shrink(self.canvas.outside_HW, SMALL_SIDE)
        return cv2.erode(np.where(small_HW == 255, np.uint8(255), np.uint8(0)), _SQUARE)


def core_difference(shown: Shown) -> float | None:
    return shown.measured["core"]["max_abs_diff"]


def core_pixels(shown: Shown) -> float | None:
    return shown.measured["core"]["pixels"]


def opaque_share(shown: Shown) -> float | None:
    """None where the product has nothing but rim."""
    matte_HW = shown.canvas.matte_HW
    inside = cv2.erode((matte_HW >= 128).astype(np.uint8), _SQUARE, iterations=RIM) > 0
    return float((matte_HW[inside] == 255).mean()) if inside.any() else None


def cut_sides(shown: Shown) -> float | None:
    transform = shown.canvas.transform
    return float(transform["placement"] != "original" and bool(transform["touches_frame"]))


def background_spread(shown: Shown) -> float | None:
    """None where the product leaves no background."""
    if not shown.small_outside_HW.any():
        return None
    _, spread = cv2.meanStdDev(shown.even_HW3, mask=shown.small_outside_HW)
    return float(spread.max())


def clipped_share(shown: Shown) -> float | None:
    """None where the product leaves no background."""
    at_an_end = np.zeros(256, np.uint8)
    at_an_end[[0, 255]] = 255
    clipped_HW = shown.canvas.outside_HW
    for channel_HW in cv2.split(cv2.LUT(shown.picture_HW3, at_an_end)):
        clipped_HW = cv2.min(clipped_HW, channel_HW)
    total = cv2.countNonZero(shown.canvas.outside_HW)
    return cv2.countNonZero(clipped_HW) / total if total else None


def background_change(shown: Shown) -> float | None:
    """None where the product leaves no background."""
    if not shown.canvas.outside_HW.any():
        return None
    change = cv2.mean(cv2.absdiff(shown.canvas.rgb_HW3, shown.picture_HW3), mask=shown.canvas.outside_HW)
    return float(np.mean(change[:3]))


def old_background(shown: Shown) -> float | None:
    """None where the product was moved: around it the canvas does not know the photo's background."""
    canvas = shown.canvas
    if canvas.transform["placement"] != "original":
        return None
    return old_background_left(shown.picture_HW3, canvas.rgb_HW3, canvas.foreground_HW3, canvas.matte_HW)


def extension(shown: Shown) -> float | None:
    """None without a product."""
    return None if shown.judgement is None else shown.judgement.extends


def floating(shown: Shown) -> float | None:
    """None without a product."""
    return None if shown.judgement is None else shown.judgement.hangs


def repeat(shown: Shown) -> float | None:
    return repeats.strongest_repeat(*shown.at(repeats.SIDE))


def writing_outside(shown: Shown) -> float | None:
    return lettering.writing(*shown.at(lettering.SIDE))


def run_checks(shown: Shown, expected: Collection[str] = (), ignored: Collection[str] = ()) -> Json:
    """What every check measured, for certificates, by its reason code.

    expected: codes of checks that mean nothing here, and are left out. ignored: see ``verify.ignore``.
    """
    found: Json = {}
    for code, row in CHECKS.items():
        if code in expected:
            continue
        measured = resolve_name(row.measure)(shown)
        found[code] = {
            "measured": None if measured is None else round(float(measured), 4),
            "limit": row.limit,
            "passed": row.passes(measured),
            "ignored": code in ignored,
        }
    return found


def failed(checks: Mapping[str, Json]) -> list[str]:
    """The reason codes of the checks that a picture failed and that count."""
    codes = []
    for code, check in checks.items():
        if not check["passed"] and not check["ignored"]:
            codes.append(code)
    return codes
