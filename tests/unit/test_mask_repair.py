"""What is added to a mask, and cut off it, after colours have found it."""

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from packshot.config.schema import MatteConfig
from packshot.imaging.mask_repair import left_out, mirror_line, shadow_at_foot, soft_shadow, united
from packshot.imaging.masks import find_mask
from packshot.imaging.saliency import fit_ground

FOOT = 250  # px from above, where the bottle stands


def noisy(picture):
    pixels = np.asarray(picture, float) + np.random.default_rng(3).normal(0, 1.5, (360, 360, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def bottle(mirror=0.0, height=1.0):
    """A bottle on a floor that mirrors it; the picture, the bottle, and the bottle with its mirror image."""
    image, truth = Image.new("RGB", (360, 360), (200, 200, 205)), Image.new("L", (360, 360))
    ImageDraw.Draw(image).rectangle((0, 200, 360, 360), fill=(120, 120, 125))
    parts = (((140, 90, 220), (40, 90, 160)), ((160, 50, 200), (30, 30, 36)), ((142, 150, 218), (235, 225, 205)))
    for (left, top, right), color in parts:
        bottom = {90: FOOT, 50: 92, 150: 200}[top]
        ImageDraw.Draw(image).rectangle((left, top, right, bottom), fill=color)
        ImageDraw.Draw(truth).rectangle((left, top, right, bottom), fill=255)
    picture, whole = np.asarray(image, float), np.asarray(truth) > 0
    size = (360, round((FOOT + 1) * height))
    colours = cv2.resize(picture[FOOT::-1], size, interpolation=cv2.INTER_AREA)[: 359 - FOOT]
    cover = cv2.resize(whole[FOOT::-1].astype(float), size, interpolation=cv2.INTER_AREA)[: 359 - FOOT, :, None]
    below = slice(FOOT + 1, FOOT + 1 + len(colours))
    picture[below] += mirror * cover * (colours - picture[below])
    both = whole.copy()
    both[below] |= cover[..., 0] > 0.5
    return noisy(picture), whole, both


@pytest.mark.parametrize("height", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("mirror", [0.3, 0.6])
def test_a_mirror_image_is_found_at_the_foot(mirror, height):
    picture, whole, both = bottle(mirror, height)
    line = mirror_line(picture, both)
    assert line is not None
    assert abs(line - FOOT) <= 3
    assert mirror_line(picture, whole) is None


@pytest.mark.parametrize("drawn", ["ellipse", "rectangle"])
def test_a_symmetric_product_keeps_its_lower_half(drawn):
    """A ring or a box looks alike above and below its middle, with the same contrast."""
    image = Image.new("RGB", (360, 360), (210, 205, 200))
    getattr(ImageDraw.Draw(image), drawn)((100, 100, 260, 260), fill=(170, 60, 50), outline=(40, 20, 20), width=14)
    mask = np.asarray(image)[..., 1] < 150
    assert mirror_line(noisy(image), mask) is None


def test_the_mask_of_a_mirrored_bottle_ends_at_its_foot():
    picture, whole, _ = bottle(0.5)
    found = find_mask(Image.fromarray(picture), MatteConfig()).alpha_HW >= 0.5
    assert (found & whole).sum() / (found | whole).sum() > 0.95


def on_studio_ground(draw):
    image = Image.new("RGB", (360, 360), (228, 226, 222))
    draw(ImageDraw.Draw(image))
    return noisy(image)


def test_a_small_piece_of_a_set_stays():
    def draw(pen):
        pen.rectangle((60, 100, 140, 280), fill=(190, 40, 40))
        pen.rectangle((220, 60, 300, 280), fill=(40, 70, 180))
        pen.rectangle((172, 256, 186, 280), fill=(30, 120, 40))

    found = find_mask(Image.fromarray(on_studio_ground(draw)), MatteConfig())
    assert found.alpha_HW[258:278, 174:184].min() > 0.5
    assert found.reasons == ()


@pytest.mark.parametrize("width", [2, 4])
def test_both_arms_of_a_chain_stay(width):
    def draw(pen):
        for x in (90, 270):
            pen.line((x, 50, 180, 220), fill=(25, 25, 25), width=width)
        pen.ellipse((140, 215, 220, 295), fill=(25, 25, 25))

    picture = on_studio_ground(draw)
    drawn = picture.max(axis=-1) < 100
    found = find_mask(Image.fromarray(picture), MatteConfig()).alpha_HW >= 0.5
    assert found[drawn].mean() > 0.9


@pytest.mark.parametrize(("color", "kept"), [((160, 158, 155), 0.0), ((40, 120, 60), 1.0)], ids=["shadow", "thing"])
def test_a_hard_shadow_is_no_piece(color, kept):
    """It has the ground's colour with less light."""
    picture = on_studio_ground(lambda pen: pen.rectangle((200, 250, 280, 270), fill=color))
    mask = np.zeros((360, 360), bool)
    mask[100:250, 80:160] = True
    added = left_out(picture, mask, fit_ground(picture))
    assert added[252:268, 204:276].mean() == pytest.approx(kept, abs=0.02)


@pytest.mark.parametrize(("around", "cut"), [((24, 20, 18), True), ((150, 125, 105), False)], ids=["shadow", "sole"])
def test_a_dark_piece_is_cut_where_it_melts_into_the_ground(around, cut):
    """Where it ends sharply it is a part of the product, such as a black sole."""
    image = Image.new("RGB", (360, 360), (190, 180, 170))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 200, 360, 360), fill=(150, 125, 105))
    pen.rectangle((120, 251, 240, 290), fill=around)
    pen.rectangle((100, 80, 260, 250), fill=(200, 60, 40))
    pen.rectangle((140, 251, 220, 275), fill=(22, 18, 16))
    mask = np.zeros((360, 360), bool)
    mask[80:251, 100:261] = True
    mask[251:276, 140:221] = True
    found = shadow_at_foot(noisy(image), mask)
    assert (found[255:272, 145:215].mean() > 0.9) == cut
    assert not found[80:245].any()


def test_a_fading_mirror_image_is_no_piece():
    """It lies below the product and has less and less contrast."""

    def draw(pen):
        pen.rectangle((120, 60, 240, 250), fill=(40, 90, 160))
        for row in range(254, 320):
            share = 0.5 * (320 - row) / 66
            ground = np.array((228, 226, 222)) * (1 - share)
            color = tuple(int(value) for value in ground + share * np.array((40, 90, 160)))
            pen.line((120, row, 240, row), fill=color)

    picture = on_studio_ground(draw)
    mask = np.zeros((360, 360), bool)
    mask[60:251, 120:241] = True
    assert not left_out(picture, mask, fit_ground(picture)).any()


@pytest.mark.parametrize(("soft", "cut"), [(True, True), (False, False)], ids=["shadow", "base"])
def test_a_soft_shadow_leaves_the_mask_and_a_base_stays(soft, cut):
    """Both are grey; the shadow has no edge against the ground."""
    dark = np.zeros((360, 360), np.float32)
    dark[252:276, 120:240] = 0.35
    dark = cv2.GaussianBlur(dark, (0, 0), 7) if soft else dark
    picture = on_studio_ground(lambda pen: None) * (1 - dark[..., None])
    picture[80:252, 110:250] = (40, 90, 160)
    mask = np.zeros((360, 360), bool)
    mask[80:252, 110:250] = True
    mask[252:276, 120:240] = True
    picture = picture.clip(0, 255).astype(np.uint8)
    found = soft_shadow(picture, mask, fit_ground(picture))
    assert (found[256:270, 130:230].mean() > 0.8) == cut
    assert not found[80:248].any()


def white_bottle():
    """A white bottle with a faint outline and a red label, before white; the picture and the bottle."""
    image = Image.new("RGB", (360, 360), (252, 252, 252))
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((120, 60, 240, 300), 10, fill=(251, 251, 251), outline=(238, 238, 238), width=3)
    pen.rectangle((120, 150, 240, 210), fill=(190, 40, 40))
    truth = np.zeros((360, 360), bool)
    truth[60:301, 120:241] = True
    return np.asarray(image), truth


def test_a_white_bottle_keeps_the_body_that_the_network_sees():
    """Its colours are the ground's, but a faint outline goes all around; between two things there is none."""
    picture, whole = white_bottle()
    label = np.zeros((360, 360), bool)
    label[150:211, 120:241] = True
    mask, holes = united(picture, whole, label, fit_ground(picture))
    assert mask[whole].mean() > 0.98
    assert not holes.any()
    seen = whole.copy()
    seen[60:301, 241:330] = True  # the network's mask runs on over the ground
    bottle_alone, holes = united(picture, seen, whole, fit_ground(picture))
    assert not bottle_alone[:, 245:].any()
    assert holes[:, 245:320].any()


def test_the_hole_of_a_ring_is_open_though_the_network_fills_it():
    picture = on_studio_ground(lambda pen: pen.ellipse((90, 90, 270, 270), outline=(170, 130, 40), width=30))
    ring = picture[..., 2] < 130
    disc = cv2.dilate(ring.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    disc[np.hypot(*(np.indices((360, 360)) - 180)) < 80] = True
    mask, holes = united(picture, disc, ring, fit_ground(picture))
    assert not mask[160:200, 160:200].any()
    assert holes[160:200, 160:200].all()
