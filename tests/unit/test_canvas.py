"""Where the product stands: placement, the working copy, and the control maps made from it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from packshot.base.controlnets import read_control
from packshot.config.checks import validate
from packshot.config.compose import compose
from packshot.config.generate import POSITIONS
from packshot.config.schema import GenerateSettings, Placement
from packshot.errors import ConfigError
from packshot.evaluate.samples import place_photo
from packshot.generate.canvas import background_at, make_working, place, plan_frame
from packshot.generate.conditions import control_map
from packshot.generate.product import core_of, prepare
from packshot.imaging.control_maps import Control
from packshot.imaging.matte import held_cells, soften_hard_edge

CENTER = {"placement": Placement.center}


def photo_and_mask(width=90, height=61, box=(20, 12, 60, 50)):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return Image.fromarray(noise), mask


@given(st.integers(32, 6000), st.integers(32, 6000), st.sampled_from([128, 512, 1024]))
def test_the_working_copy_is_letterboxed_never_stretched(height, width, resolution):
    """Its sides are multiples of what the networks halve."""
    frame = plan_frame(height, width, resolution, 32)
    assert frame.height % 32 == frame.width % 32 == 0
    assert 0 <= frame.top <= frame.height - frame.content_height
    assert 0 <= frame.left <= frame.width - frame.content_width
    scale = min(frame.height / height, frame.width / width)
    assert abs(frame.content_height - height * scale) <= 0.5 or frame.content_height == 1
    assert abs(frame.content_width - width * scale) <= 0.5 or frame.content_width == 1


def test_original_placement_is_the_photo_itself():
    photo, mask = photo_and_mask()
    canvas = place(prepare(photo, mask), GenerateSettings())
    assert (canvas.rgb_HW3 == np.asarray(photo)).all()
    assert (canvas.core_HW == core_of(np.asarray(mask))).all()
    assert canvas.transform["resampling"] == "none"


@pytest.mark.parametrize("scale", [0.2, 0.5, 0.9])
def test_the_certificate_states_the_one_resampling(scale):
    """Doing it again gives the same pixels."""
    photo, mask = photo_and_mask()
    settings = GenerateSettings(**CENTER, size=[160, 96], product_scale=scale)
    canvas = place(prepare(photo, mask), settings)
    again = place_photo(photo, json.loads(json.dumps(canvas.transform)))
    assert canvas.core_HW.any()
    assert (canvas.rgb_HW3 == again)[canvas.core_HW].all()
    assert (canvas.foreground_HW3 == canvas.rgb_HW3)[canvas.core_HW].all()


@pytest.mark.parametrize("scale", [0.2, 0.5, 0.9])
def test_centered_core_has_seen_nothing_of_the_old_background(scale):
    """Same product before two backgrounds: the core must not tell them apart."""
    photo, mask = photo_and_mask()
    white = Image.composite(photo, Image.new("RGB", photo.size, "white"), mask)
    black = Image.composite(photo, Image.new("RGB", photo.size, "black"), mask)
    settings = GenerateSettings(**CENTER, size=[160, 96], product_scale=scale)
    a, b = (place(prepare(image, mask), settings) for image in (white, black))
    assert (a.core_HW == b.core_HW).all()
    assert np.abs(a.rgb_HW3[a.core_HW].astype(int) - b.rgb_HW3[a.core_HW]).max() <= 1


@pytest.mark.parametrize("placement", POSITIONS)
def test_named_places_keep_their_margin(placement):
    """The product touches the margin on the sides that the name gives, and lies in the middle of the others."""
    photo, mask = photo_and_mask()
    settings = GenerateSettings(placement=Placement[placement], size=[200, 160], product_scale=0.5, margin=0.1)
    validate(settings)
    canvas = place(prepare(photo, mask), settings)
    left, top = canvas.transform["offset"]
    width, height = canvas.transform["placed_size"]
    free = {"left": left, "right": 200 - left - width, "top": top, "bottom": 160 - top - height}
    assert min(free.values()) >= 16
    for side, room in free.items():
        assert (room == 16) == (side in placement)
    assert abs(width / height - 41 / 39) < 0.03


def test_coordinates_place_the_middle_of_the_product():
    """A place that would cut the product is refused."""
    photo, mask = photo_and_mask()
    asked = {"placement": Placement.coordinates, "size": [200, 160], "product_scale": 0.3}
    transform = place(prepare(photo, mask), GenerateSettings(**asked, position=[0.25, 0.6])).transform
    for axis, expected in enumerate((50, 96)):
        assert abs(transform["offset"][axis] + transform["placed_size"][axis] / 2 - expected) <= 1
    with pytest.raises(ConfigError, match=r"position=\[0.0, 0.6\] puts a product .* partly outside the canvas"):
        place(prepare(photo, mask), GenerateSettings(**asked, position=[0.0, 0.6]))


@pytest.mark.parametrize(("shape", "ratio"), [("4:5", 0.8), ("16:9", 16 / 9), ("1:1", 1.0)])
def test_an_aspect_ratio_keeps_the_products_own_pixels(shape, ratio):
    """The canvas grows around the product, whose pixels are the photograph's, byte for byte."""
    photo, mask = photo_and_mask()
    settings = GenerateSettings(**CENTER, aspect_ratio=shape, product_scale=0.8, margin=0.05)
    validate(settings)
    canvas = place(prepare(photo, mask), settings)
    width, height = canvas.transform["size"]
    assert abs(width / height - ratio) < 0.03
    left, top, right, bottom = canvas.transform["source_box"]
    x, y = canvas.transform["offset"]
    original = np.asarray(photo)[top:bottom, left:right]
    assert np.array_equal(canvas.rgb_HW3[y : y + bottom - top, x : x + right - left], original)
    assert canvas.core_HW.any()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["size=[256,144]"], r"size=\[256, 144\] has no effect with placement=original"),
        (["aspect_ratio=4:5"], "aspect_ratio=4:5 has no effect with placement=original"),
        (["margin=0.1"], "margin=0.1 has no effect with placement=original"),
        (["product_scale=0.4"], r"product_scale=0.4 has no effect with placement=original"),
        (["placement=left"], "placement=left needs a canvas size or a shape"),
        (["placement=left", "size=[256,144]", "aspect_ratio=1:1"], "one of the two"),
        (["placement=center", "aspect_ratio=4to5"], "aspect_ratio=4to5 is not a valid shape"),
        (["placement=center", "size=[9,9]"], "is not a valid canvas size; expected|is not a valid canvas size"),
        (["placement=coordinates", "size=[256,144]"], "placement=coordinates with position"),
        (["placement=center", "size=[256,144]", "position=[0.5,0.5]"], "do not belong together"),
        (
            ["negative_prompt=plastic", "guidance_scale=1"],
            "negative_prompt=plastic has no effect with guidance_scale=1",
        ),
        (["scene.surface='[a,b]'"], "this slot takes one text"),
    ],
)
def test_settings_without_effect_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        compose("generate", keys)


def test_centered_product_is_whole_centred_and_not_stretched():
    photo, mask = photo_and_mask(box=(5, 20, 25, 30))
    canvas = place(prepare(photo, mask), GenerateSettings(**CENTER, size=[200, 200], product_scale=0.5))
    rows, columns = np.nonzero(canvas.matte_HW >= 128)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert 90 <= width <= 102
    assert abs(width / height - 21 / 11) < 0.15
    assert abs(rows.mean() - 99.5) < 1.5
    assert abs(columns.mean() - 99.5) < 1.5


def test_masks_are_max_pooled_to_condition_averaged_to_blend():
    """A one-pixel strap survives in the first, counts by its area in the second."""
    photo = Image.fromarray(np.full((400, 400, 3), 90, np.uint8))
    mask = Image.new("L", photo.size)
    ImageDraw.Draw(mask).rectangle((100, 100, 299, 199), fill=255)
    ImageDraw.Draw(mask).line((203, 200, 203, 330), fill=255)
    canvas = place(prepare(photo, mask), GenerateSettings())
    working = make_working(canvas, plan_frame(400, 400, 100, 4), 4)
    assert working.keep_HW[50:82, 50].all()
    assert (working.coverage_HW[55:80, 50] > 0.05).all()
    assert (working.coverage_HW[55:80, 50] < 0.5).all()
    assert not working.keep_HW[60, 60]


def test_a_core_pixel_has_full_alpha_all_around():
    """254 is not full; the picture's border does not count against a pixel."""
    alpha = np.full((20, 20), 255, np.uint8)
    alpha[10, 10] = 254
    core = core_of(alpha)
    assert not core[9:12, 9:12].any()
    assert core.sum() == 400 - 9


def grey_canvas(height, width):
    """A grey photo of a product that fills the left half."""
    photo = Image.fromarray(np.full((height, width, 3), 90, np.uint8))
    mask = Image.new("L", photo.size)
    mask.paste(255, (0, 0, width // 2, height))
    return place(prepare(photo, mask), GenerateSettings())


def test_pixels_of_half_alpha_and_more_are_kept():
    """Condition and composite agree on where the product is."""
    canvas = grey_canvas(100, 100)
    matte = np.full((100, 100), 127, np.uint8)
    matte[:, :50] = 128
    keep = make_working(replace(canvas, matte_HW=matte), plan_frame(100, 100, 100, 4), 4).keep_HW
    assert keep[:, :50].all()
    assert not keep[:, 50:].any()


def test_letterbox_bars_continue_the_picture_without_product():
    """A border of another colour would be read as a part of the scene; the bars themselves show no product."""
    matte = np.full((60, 100), 255, np.uint8)
    canvas = replace(grey_canvas(60, 100), matte_HW=matte, inputs={"depth": np.full((60, 100), 200, np.uint8)})
    frame = plan_frame(60, 100, 77, 32)
    working = make_working(canvas, frame, 8)
    bars = np.ones((frame.height, frame.width), bool)
    bars[frame.content] = False
    assert bars.sum() >= frame.width
    assert (working.image_HW3[bars] == 90).all()
    np.testing.assert_allclose(working.inputs["depth"][bars], 200 / 255, atol=1e-6)
    assert not working.keep_HW[bars].any()
    assert not working.coverage_HW[bars].any()


def test_coverage_is_the_mean_of_what_a_pixel_shows():
    """Every pixel of the matte counts in it, none is skipped."""
    canvas = grey_canvas(100, 100)
    matte = np.random.default_rng(0).integers(0, 256, (100, 100), np.uint8)
    coverage = make_working(replace(canvas, matte_HW=matte), plan_frame(100, 100, 50, 2), 2).coverage_HW
    np.testing.assert_allclose(coverage, matte.reshape(50, 2, 50, 2).mean(axis=(1, 3)) / 255, atol=1 / 255)


def test_inpaint_map_shows_nothing_of_the_old_background():
    """Without un-mixing, the green wall would stand in the map's edge pixels."""
    mask = Image.new("L", (96, 96))
    ImageDraw.Draw(mask).ellipse((20, 20, 75, 75), fill=255)
    photo = Image.composite(Image.new("RGB", mask.size, (200, 40, 40)), Image.new("RGB", mask.size, (0, 255, 0)), mask)
    canvas = place(prepare(photo, mask), GenerateSettings())
    working = make_working(canvas, plan_frame(96, 96, 64, 32), 8)
    known = control_map(Control("inpaint"), working)[0].permute(1, 2, 0).numpy()
    assert (known[~working.keep_HW] == -1).all()
    assert (known[working.keep_HW] >= 0).all()
    assert (known[working.keep_HW][:, 0] > known[working.keep_HW][:, 1]).mean() > 0.99


def test_canny_map_is_binary_and_empty_on_the_background():
    photo, mask = photo_and_mask()
    working = make_working(place(prepare(photo, mask), GenerateSettings()), plan_frame(61, 90, 128, 32), 8)
    edges = control_map(Control("canny"), working)[0]
    assert set(edges.unique().tolist()) == {0.0, 1.0}
    far = np.asarray(Image.fromarray(working.keep_HW).filter(ImageFilter.MaxFilter(5)))
    assert not edges[:, ~far].any()


def test_control_condition_is_read_from_the_export(tmp_path):
    (tmp_path / "packshot.json").write_text('{"condition": "canny"}')
    assert read_control("adapters.controlnets", tmp_path) == Control("canny")
    (tmp_path / "packshot.json").write_text('{"condition": "inpaint", "mask_grow": -2, "mask_feather": 3.5}')
    assert read_control("adapters.controlnets", tmp_path) == Control("inpaint", -2.0, 3.5)
    for content in ("{}", "[]", "nonsense", '{"condition": "depthy"}', '{"condition": "canny", "mask_grow": "two"}'):
        (tmp_path / "packshot.json").write_text(content)
        with pytest.raises(ConfigError, match="condition"):
            read_control("adapters.controlnets", tmp_path)
    (tmp_path / "packshot.json").unlink()
    with pytest.raises(ConfigError, match=r"has no packshot\.json"):
        read_control("adapters.controlnets", tmp_path)


def test_hard_masks_get_a_soft_edge_and_soft_ones_stay():
    """The core is the same before and after."""
    _, mask = photo_and_mask()
    hard = np.asarray(mask)
    soft = soften_hard_edge(hard)
    assert ((soft > 0) & (soft < 255)).any()
    assert (soft[core_of(hard)] == 255).all()
    assert soften_hard_edge(soft) is soft


def test_letterbox_is_cut_off_again():
    frame = plan_frame(40, 90, 64, 32)
    decoded = np.zeros((frame.height, frame.width, 3), np.float32)
    decoded[frame.content] = 1
    assert (background_at(decoded, frame, 40, 90) == 255).all()


def test_only_cells_well_inside_the_product_are_held():
    """A cell on the edge is free, and so is what the erosion (1 px at 128) takes: the scene grows under the rim."""
    coverage = np.zeros((128, 128), np.float32)
    coverage[16:96, 20:112] = 1
    held = held_cells(coverage, 8)
    expected = np.zeros((16, 16), bool)
    expected[3:11, 3:13] = True  # the cells 16..24 and 88..96 lose a row to the erosion
    assert (held == expected).all()
