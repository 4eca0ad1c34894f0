"""The product's shadow: a layer of its own that darkens the ground, follows the light and leaves the product alone."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from packshot.config.compose import compose
from packshot.config.schema import GenerateSettings, Shadow
from packshot.generate.canvas import place
from packshot.generate.composite import blend
from packshot.generate.grounding import DARKENED, ground, layer_around, shaded, times
from packshot.generate.packshot import Packshot
from packshot.generate.product import prepare
from packshot.imaging.shadows import DARKEST, Light, ground_darkening, is_harsh, log_layer, shadow_layer
from tools.fit_shadows import measure_groups, read_shots

PLAIN = compose("generate", ["background.color=[230,230,230]"])


def bottle(scale=1):
    """Photo and mask of a bottle with room around it."""
    width = 200 * scale
    height = 240 * scale
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).rectangle((70 * scale, 60 * scale, 130 * scale, 180 * scale), fill=255)
    return Image.fromarray(noise), mask


def drawn(shadow, **values):
    settings = replace(GenerateSettings(background=PLAIN.background), shadow=Shadow[shadow], **values)
    return Packshot(None).with_product(prepare(*bottle())).drawer("", settings)(0, True)


@pytest.fixture(scope="module")
def mask():
    return np.asarray(bottle()[1])


def test_a_shadow_darkens_the_ground_and_never_the_core():
    without = drawn("none")
    result = drawn("contact")
    assert "shadow" not in without.layers
    assert result.certificate["core"]["max_abs_diff"] == 0
    difference = np.asarray(without.image).astype(int) - np.asarray(result.image)
    assert difference.min() >= 0
    assert difference[182:186, 80:120].mean() > 5
    assert difference[:30].max() <= 1
    assert not difference[result.canvas.core_HW].any()


def test_layers_and_shadow_give_the_picture_again():
    result = drawn("contact")
    product = np.asarray(result.layers["product"])
    background = shaded(np.asarray(result.layers["background"]), np.asarray(result.layers["shadow"]))
    again = blend(product[..., :3], product[..., 3], background)
    assert (again == np.asarray(result.image)).all()
    assert result.layers["shadow"].mode == "L"


def test_auto_adds_a_shadow_only_where_there_is_none(mask):
    canvas = place(prepare(*bottle()), GenerateSettings())
    bright = np.full((240, 200, 3), 200, np.uint8)
    dark = bright.copy()
    dark[170:195, 60:140] = 90
    settings = GenerateSettings(shadow=Shadow.auto)
    added = ground(canvas, bright, settings, Light())
    assert added.report["applied"]
    assert added.layer_HW is not None
    left = ground(canvas, dark, settings, Light())
    assert left.layer_HW is None
    assert left.report["darkening"] > DARKENED > added.report["darkening"]
    assert ground(canvas, dark, replace(settings, shadow=Shadow.contact), Light()).report["applied"]


def test_each_thing_of_a_group_has_its_own_shadow():
    alone = np.zeros((120, 240), np.uint8)
    alone[30:80, 40:70] = 255
    other = np.zeros_like(alone)
    other[50:80, 150:190] = 255
    light = Light(180.0, True)
    both = layer_around(np.maximum(alone, other), light)
    assert (both == times(layer_around(alone, light), layer_around(other, light))).all()
    assert (layer_around(alone, light) == shadow_layer(alone, light)).mean() > 0.99
    speck = alone.copy()
    speck[80, 200] = 255
    assert (layer_around(speck, light) == layer_around(alone, light)).all()


def test_an_angle_turns_the_shadow_on_a_plain_colour():
    """Where no words can: scene.* is refused with a plain colour."""
    darker = {}
    for angle in (0.0, 180.0):
        result = drawn("contact", light_angle=angle)
        assert result.certificate["request"]["light_angle"] == angle
        layer = 255 - np.asarray(result.layers["shadow"]).astype(int)
        darker[angle] = layer[150:200, :70].sum(), layer[150:200, 130:].sum()
    assert darker[0.0][0] > darker[0.0][1]  # light from the right: the shadow lies on the left
    assert darker[180.0][0] < darker[180.0][1]


def test_without_ground_in_sight_auto_adds_nothing():
    full = np.full((100, 100), 255, np.uint8)
    full[:4] = 0
    assert ground_darkening(np.full((100, 100, 3), 128, np.uint8), full) is None
    assert ground_darkening(np.full((100, 100, 3), 128, np.uint8), np.zeros((100, 100), np.uint8)) is None


def test_a_shadow_falls_away_from_the_light(mask):
    """Of a harsh light from the right, the left side is darker, and the other way round."""
    layers = {angle: shadow_layer(mask, Light(angle, harsh=True)).astype(float) for angle in (0.0, 180.0)}
    ground_rows = slice(140, 200)
    for angle, dark, bright in ((0.0, np.s_[20:68], np.s_[133:181]), (180.0, np.s_[133:181], np.s_[20:68])):
        assert layers[angle][ground_rows, dark].mean() < layers[angle][ground_rows, bright].mean() - 3


def test_strength_is_a_power_of_the_layer(mask):
    layer = shadow_layer(mask, Light(0.0)).astype(float) / 255
    doubled = shadow_layer(mask, Light(0.0), 2.0).astype(float) / 255
    assert np.abs(doubled - np.maximum(layer**2, DARKEST)).max() < 0.01
    assert doubled[150:200].mean() < layer[150:200].mean() - 0.02


def test_a_stronger_shadow_is_stated_in_the_certificate():
    plain, strong = drawn("contact"), drawn("contact", shadow_strength=2.0)
    assert plain.certificate["request"]["shadow_strength"] is None
    assert strong.certificate["request"]["shadow_strength"] == strong.certificate["shadow"]["strength"] == 2.0
    lights = [np.asarray(result.layers["shadow"]).astype(float).mean() for result in (plain, strong)]
    assert lights[1] < lights[0]


def test_the_layer_does_not_depend_on_the_pictures_size():
    small = shadow_layer(np.asarray(bottle()[1]), Light()).astype(float)
    large = shadow_layer(np.asarray(bottle(4)[1]), Light())
    again = np.asarray(Image.fromarray(large).resize((200, 240), Image.Resampling.BOX)).astype(float)
    assert np.abs(again - small).mean() < 1.5


def test_layers_stay_between_dark_and_nothing(mask):
    layer = shadow_layer(mask, Light(0.0, harsh=True))
    assert layer.min() >= DARKEST * 255 - 1
    assert (layer[:20] == 255).all()
    assert (shadow_layer(np.zeros((50, 50), np.uint8), Light()) == 255).all()
    assert log_layer(mask >= 128, Light()).max() <= 0


def test_the_words_of_harsh_light():
    for phrase in ("harsh light from the left side", "Direct sunlight", "golden hour light"):
        assert is_harsh(phrase)
    for phrase in ("soft light from the left side", None, "studio lighting"):
        assert not is_harsh(phrase)


def test_the_network_is_nearer_to_rendered_shadows_than_none(root):
    """On held-out products; docs/log.md has the figures."""
    groups = measure_groups(list(read_shots(root / "data/rendered/heldout"))[:60])
    for with_it, without, *_ in groups.values():
        assert with_it < without
    with_it, without, *_ = groups["within .1 sizes of the foot, matt surfaces"]
    assert (with_it / without) ** 0.5 < 0.8
