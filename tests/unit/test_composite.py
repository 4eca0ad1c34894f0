"""Compositing and colour: exact in the core, no old background at the edge, drift corrected only where it is known."""

import io

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from packshot.config.schema import GenerateSettings, Placement
from packshot.generate.canvas import place
from packshot.generate.certificate import encode_png, measure
from packshot.generate.color import ciede2000, delta_e, fit_colour
from packshot.generate.composite import blend
from packshot.generate.product import prepare, unmix
from packshot.imaging.color import to_lab

# Sharma, Wu, Dalal 2005, table 1: pairs that exercise hue wrap, grey partners and the rotation term.
SHARMA = [
    ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
    ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0000),
    ((50, 0, 0), (50, -1, 2), 2.3669),
    ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
    ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
    ((50, 2.5, 0), (73, 25, -18), 27.1492),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
    ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
]


@pytest.mark.parametrize(("a", "b", "expected"), SHARMA)
def test_ciede2000_equals_the_published_pairs(a, b, expected):
    assert ciede2000(np.array(a), np.array(b)) == pytest.approx(expected, abs=1e-4)
    assert ciede2000(np.array(b), np.array(a)) == pytest.approx(expected, abs=1e-4)


def test_blend_is_exact_at_both_ends_and_rounds_to_nearest():
    rng = np.random.default_rng(0)
    front, back = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
    assert (blend(front, np.full((64, 64), 255, np.uint8), back) == front).all()
    assert (blend(front, np.zeros((64, 64), np.uint8), back) == back).all()
    alpha = rng.integers(0, 256, (64, 64), np.uint8)
    exact = (alpha[..., None] * front.astype(float) + (255 - alpha[..., None]) * back.astype(float)) / 255
    assert np.abs(blend(front, alpha, back) - exact).max() <= 0.5


def disc(size=128, colour=(190, 30, 30), wall=(20, 220, 40)):
    """(photo, alpha, product colour layer): an anti-aliased disc before a wall, with its truth."""
    big = Image.new("L", (size * 8, size * 8))
    ImageDraw.Draw(big).ellipse((size * 2, size * 2, size * 6, size * 6), fill=255)
    alpha = np.asarray(big.resize((size, size), Image.Resampling.BOX))
    layer = np.broadcast_to(np.array(colour, np.uint8), (size, size, 3))
    behind = np.broadcast_to(np.array(wall, np.uint8), (size, size, 3))
    return blend(layer, alpha, behind), alpha, layer


def test_edge_has_no_halo_where_a_hard_paste_has_one():
    photo, alpha, layer = disc()
    new = np.full_like(photo, 240)
    truth = blend(layer, alpha, new)
    band = (alpha > 0) & (alpha < 255)
    ours = delta_e(blend(unmix(photo, alpha), alpha, new)[band], truth[band])
    hard = delta_e(np.where((alpha >= 128)[..., None], photo, new)[band], truth[band])
    assert np.percentile(ours, 95) < 2
    assert np.percentile(hard, 95) > 20


def test_rendered_products_keep_their_true_edge(rows):
    """Real light and shadow: a render's cut-out is the truth, another render's plate the new background."""
    ours, hard = [], []
    for index in range(6):
        row, plate = rows[index], np.asarray(rows[(index + 1) % 6]["plate"])
        cutout = np.asarray(row["cutout"])
        alpha = cutout[..., 3]
        band = (alpha > 16) & (alpha < 239)
        truth = blend(cutout[..., :3], alpha, plate)
        product = prepare(row["image"], Image.fromarray(alpha))
        made = blend(product.foreground_HW3, product.matte_HW, plate)
        pasted = np.where((alpha >= 128)[..., None], np.asarray(row["image"]), plate)
        ours.append(delta_e(made[band], truth[band]))
        hard.append(delta_e(pasted[band], truth[band]))
    ours, hard = np.concatenate(ours), np.concatenate(hard)
    assert len(ours) > 200
    assert np.median(ours) < 0.6 * np.median(hard)


def test_lab_of_a_picture_is_that_of_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    np.testing.assert_allclose(to_lab(pixels.reshape(-1, 3)).reshape(7, 5, 3), to_lab(pixels), atol=0.01)
    # the corners of sRGB, CIE 1976 with the D65 white of IEC 61966-2-1
    known = {(255, 255, 255): (100, 0, 0), (255, 0, 0): (53.24, 80.09, 67.20), (0, 0, 255): (32.30, 79.19, -107.86)}
    for rgb, lab in known.items():
        np.testing.assert_allclose(to_lab(np.array(rgb, np.uint8)), lab, atol=0.3)


def test_colour_fit_recovers_an_affine_drift():
    rng = np.random.default_rng(1)
    truth = rng.random((4000, 3))
    drifted = truth * [0.9, 1.0, 0.95] + [0.05, -0.03, 0.02]
    drifted[:200] = rng.random((200, 3))  # detail that the autoencoder lost
    fit = fit_colour(drifted, truth)
    assert fit.applied
    assert np.abs(fit.apply(drifted[200:][None]) - truth[200:]).mean() < 0.01
    assert fit.report["error_after"] < 0.3 * fit.report["error_before"]


def test_colour_fit_leaves_unseen_colours_alone():
    """An all-red product says nothing about greens and blues beyond a shift."""
    rng = np.random.default_rng(2)
    truth = np.array([0.7, 0.1, 0.1]) + 0.005 * rng.standard_normal((2000, 3))
    fit = fit_colour(truth + 0.02 + 0.01 * rng.standard_normal(truth.shape), truth)
    grey = np.array([[[0.2, 0.8, 0.6]]])
    assert np.abs(fit.apply(grey) - (grey - 0.02)).max() < 0.02


@pytest.mark.parametrize(
    ("decoded", "truth", "reason"),
    [
        (np.zeros((10, 3)), np.zeros((10, 3)), "only 10 product pixels"),
        (np.full((500, 3), 0.4), np.full((500, 3), 0.4), "explains too little"),
        (np.full((500, 3), 0.9), np.full((500, 3), 0.1), "would move colours"),
    ],
)
def test_untrustworthy_colour_fits_are_not_applied_and_say_why(decoded, truth, reason):
    fit = fit_colour(decoded, truth)
    assert not fit.applied
    assert reason in fit.report["reason"]
    picture = np.random.default_rng(0).random((4, 4, 3))
    assert (fit.apply(picture) == picture).all()


@st.composite
def photographs(draw):
    """A noisy photo with a mask of random shapes, hard or soft; wires, holes and pieces at the frame among them."""
    height, width = draw(st.integers(32, 56)), draw(st.integers(32, 56))
    seed = draw(st.integers(0, 2**32 - 1))
    mask = Image.new("L", (width, height))
    pen = ImageDraw.Draw(mask)
    for _ in range(draw(st.integers(1, 3))):
        left, top = draw(st.integers(-8, width - 4)), draw(st.integers(-8, height - 4))
        box = (left, top, left + draw(st.integers(3, width)), top + draw(st.integers(3, height)))
        draw(st.sampled_from([pen.ellipse, pen.rectangle]))(box, fill=255)
    if draw(st.booleans()):
        pen.line((0, 0, width, height), fill=255, width=draw(st.integers(1, 2)))
    if draw(st.booleans()):
        pen.ellipse((width // 2 - 5, height // 2 - 5, width // 2 + 5, height // 2 + 5), fill=0)
    if draw(st.booleans()):
        mask = mask.filter(ImageFilter.GaussianBlur(draw(st.sampled_from([0.6, 1.5]))))
    alpha = np.asarray(mask)
    assume((alpha >= 128).any() and (alpha >= 128).mean() < 0.95)
    photo = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return photo, alpha, seed


@pytest.mark.slow
@given(photographs(), st.sampled_from(["original", "center", "bottom_left"]))
@settings(max_examples=500)
def test_the_core_is_the_input_in_any_composite(drawn, placement):
    """Core identity over 500 composites: in the photograph's frame its very bytes, elsewhere those of the stated
    resampling. The core is found here again, from the mask alone."""
    photo, alpha, seed = drawn
    product = prepare(Image.fromarray(photo), Image.fromarray(alpha))
    wanted = GenerateSettings()
    if placement != "original":
        wanted = GenerateSettings(placement=Placement[placement], size=[96, 80], product_scale=0.9)
    canvas = place(product, wanted)
    background = np.random.default_rng(seed + 1).integers(0, 256, canvas.rgb_HW3.shape, np.uint8)
    png = encode_png(blend(canvas.foreground_HW3, canvas.matte_HW, background))
    core = measure(png, canvas)["core"]
    assert core["max_abs_diff"] in (0, None)
    assert core["sha256_input"] == core["sha256_output"]
    if placement == "original":
        inside = cv2.erode((alpha == 255).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        written = np.asarray(Image.open(io.BytesIO(png)))
        assert core["pixels"] == inside.sum()
        assert (written[inside] == photo[inside]).all()
        outside = cv2.dilate(alpha, np.ones((3, 3), np.uint8)) == 0
        assert (written[outside] == background[outside]).all()
