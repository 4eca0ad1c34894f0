"""Glass in a photograph is named: its mask is full, and the old ground would come along inside of it."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from packshot.config.schema import MatteConfig
from packshot.imaging.mask_doubt import Finding, codes_of, doubts, measure_signs
from packshot.imaging.masks import find_mask
from packshot.imaging.saliency import fit_ground, fit_rows
from packshot.imaging.see_through import clear_share, ground_inside

SIDE = 384
CODE = "product_see_through_in_photo"
BODY = (slice(90, 320), slice(132, 252))


def noisy(pixels):
    return (pixels + np.random.default_rng(4).normal(0, 1.2, pixels.shape)).clip(0, 255).astype(np.uint8)


def wall_and_table():
    pixels = np.full((SIDE, SIDE, 3), (150, 170, 200), float)
    pixels[230:] = (120, 90, 60)
    return pixels


def plain():
    return np.full((SIDE, SIDE, 3), (226, 222, 214), float)


def vessel(ground, opacity, body=(190, 210, 215), rim=(70, 90, 95)):
    """A tumbler of a given opacity with a dark rim of 5 px, and its mask."""
    mask = np.zeros((SIDE, SIDE), bool)
    mask[BODY] = True
    inner = np.zeros_like(mask)
    inner[95:315, 137:247] = True
    pixels = ground.copy()
    pixels[mask] = rim
    pixels[inner] = ground[inner] * (1 - opacity) + np.array(body) * opacity
    return noisy(pixels), mask


@pytest.mark.parametrize("opacity", [0.1, 0.3])
def test_the_edge_of_a_table_is_seen_through_glass(opacity):
    picture, mask = vessel(wall_and_table(), opacity)
    repeated = ground_inside(picture, mask)
    assert repeated is not None
    assert repeated > 0.35


def test_an_opaque_product_repeats_nothing_of_its_ground():
    picture, mask = vessel(wall_and_table(), 1.0)
    assert ground_inside(picture, mask) == pytest.approx(0, abs=0.2)


def test_a_ground_without_changes_tells_nothing():
    picture, mask = vessel(plain(), 0.2)
    assert ground_inside(picture, mask) is None


@pytest.mark.parametrize(("opacity", "clear"), [(0.1, True), (1.0, False)], ids=["glass", "opaque"])
def test_glass_has_the_grounds_colour_within_a_rim(opacity, clear):
    picture, mask = vessel(plain(), opacity, body=(90, 140, 190))
    assert (clear_share(picture, mask, fit_ground(picture)) > 0.5) == clear


def test_an_opaque_product_of_the_grounds_colour_is_not_glass():
    """White before white: it has no rim that stands out."""
    picture, mask = vessel(plain(), 1.0, body=(230, 227, 220), rim=(218, 214, 206))
    assert clear_share(picture, mask, fit_ground(picture)) == 0


@pytest.mark.parametrize("ground", [plain, wall_and_table])
@pytest.mark.parametrize(("opacity", "doubted"), [(0.15, True), (1.0, False)], ids=["glass", "opaque"])
def test_glass_in_a_photograph_is_in_doubt(ground, opacity, doubted):
    picture, mask = vessel(ground(), opacity, body=(60, 110, 190))
    found = Finding(
        picture,
        mask,
        None,
        mask,
        fit_ground(picture).spread,
        np.zeros_like(mask),
        ground=min(fit_ground(picture), fit_rows(picture), key=lambda fitted: fitted.spread),
    )
    assert (CODE in doubts(found)) == doubted


def test_the_default_mask_of_a_glass_is_not_accepted():
    picture, _ = vessel(plain(), 0.1)
    assert find_mask(Image.fromarray(picture), MatteConfig()).reasons


def test_a_small_picture_is_not_judged_by_its_outline():
    picture, mask = vessel(wall_and_table(), 0.1)
    small = np.ascontiguousarray(picture[::3, ::3])
    signs = measure_signs(Finding(small, mask[::3, ::3], None, mask[::3, ::3], 30.0, np.zeros((128, 128), bool)))
    assert "ground_inside" not in signs
    assert CODE not in codes_of(signs)


def test_rows_follow_a_wall_above_a_table_and_no_vertical_edge():
    assert fit_rows(noisy(wall_and_table())).spread < 3
    assert fit_ground(noisy(wall_and_table())).spread > 5
    image = Image.fromarray(noisy(plain()))
    ImageDraw.Draw(image).rectangle((130, 0, 230, SIDE), fill=(60, 60, 90))
    assert fit_rows(np.asarray(image)).spread > 5
