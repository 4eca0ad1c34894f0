"""Finding the product: which method is asked, what it finds, and what is refused."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from onnx_fixtures import dark_is_product
from PIL import Image, ImageDraw

from packshot.config.schema import MatteConfig
from packshot.dataset.rows import load_rows
from packshot.errors import ConfigError
from packshot.imaging.decode import decode_image
from packshot.imaging.depth import _input_size, estimate_depth
from packshot.imaging.masks import MaskFileError, NoProductError, find_mask, load_segmentation
from packshot.imaging.onnx import load_session

COFFEE = Path(__file__).resolve().parents[2] / "data/products/coffee.png"
RNG = np.random.default_rng(0)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def product(background, colour, noise=4, size=(240, 180)):
    """A noisy picture of an ellipse, and where it is."""
    image, truth = Image.new("RGB", size, background), Image.new("L", size)
    box = (size[0] // 3, size[1] // 4, size[0] * 2 // 3, size[1] * 4 // 5)
    ImageDraw.Draw(image).ellipse(box, fill=colour)
    ImageDraw.Draw(truth).ellipse(box, fill=255)
    pixels = np.asarray(image) + RNG.normal(0, noise, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), np.asarray(truth) > 0


# --- GrabCut


@pytest.mark.parametrize(
    ("background", "colour", "noise"),
    [((230, 230, 230), (180, 20, 20), 6), ((60, 90, 60), (200, 180, 90), 10), ((245, 245, 245), (225, 225, 225), 2)],
    ids=["red on grey", "yellow on green", "white on white"],
)
def test_grabcut_finds_a_product(background, colour, noise):
    image, truth = product(background, colour, noise)
    mask = find_mask(image, MatteConfig())
    assert mask.method == "grabcut"
    assert mask.alpha_HW.shape == truth.shape
    assert mask.alpha_HW.dtype == np.float32
    assert 0 <= mask.alpha_HW.min() <= mask.alpha_HW.max() <= 1
    assert iou(mask.alpha_HW > 0.5, truth) > 0.95


def test_grabcut_finds_the_cup_with_saucer_and_spoon_on_a_wooden_table():
    mask = find_mask(decode_image(COFFEE, "coffee.png"), MatteConfig(), name="coffee.png")
    assert mask.confidence > 0.7
    inside = {
        "coffee": (290, 160),
        "saucer": (130, 220),
        "spoon": (365, 290),
        "spoon's end": (412, 85),
        "cup": (290, 25),
    }
    outside = {"wood left": (30, 300), "wood right": (540, 200), "wood top": (480, 40), "dark corner": (40, 30)}
    for where, (x, y) in inside.items():
        assert mask.alpha_HW[y, x] > 0.95, where
    for where, (x, y) in outside.items():
        assert mask.alpha_HW[y, x] < 0.05, where
    assert 0.44 < (mask.alpha_HW > 0.5).mean() < 0.50


def test_the_network_guides_grabcut_where_colours_alone_mislead_it():
    rows = load_rows("set", "data/rendered/showcase", pictures=("image", "mask"))
    found = {None: [], "data/models/matting": []}
    for row in (rows.read(index, ("image", "mask")) for index in range(0, len(rows), 6)):
        for network, scores in found.items():
            mask = find_mask(row["image"], MatteConfig(network=network, min_confidence=0.0))
            assert mask.method == ("network" if network else "grabcut")
            assert mask.alpha_HW.shape == row["image"].size[::-1]
            scores.append(iou(mask.alpha_HW >= 0.5, np.asarray(row["mask"]) >= 128))
    assert np.mean(found["data/models/matting"]) > np.mean(found[None])


def test_a_network_that_is_not_there_is_refused():
    image, _ = product("white", "navy")
    for ask in (lambda matte: find_mask(image, matte), load_segmentation):
        with pytest.raises(ConfigError, match=r"matte\.network=nowhere: no such file"):
            ask(MatteConfig(network="nowhere"))


def test_grabcut_gives_the_same_bytes_twice():
    image, _ = product("white", "navy")
    first, second = (find_mask(image, MatteConfig()) for _ in range(2))
    assert first.alpha_HW.tobytes() == second.alpha_HW.tobytes()


NOTHING = {
    "blank": np.full((120, 160, 3), 240),
    "noise": RNG.integers(0, 256, (120, 160, 3)),
    "sensor noise": 128 + RNG.normal(0, 12, (120, 160, 3)),
    "clouds": cv2.normalize(cv2.GaussianBlur(RNG.random((120, 160, 3)), (0, 0), 8), None, 0, 255, cv2.NORM_MINMAX),
    "gradient": np.linspace(0, 255, 160)[None, :, None] * np.ones((120, 1, 3)),
    "one pixel": np.zeros((1, 1, 3)),
}


@pytest.mark.parametrize("name", NOTHING)
def test_pictures_without_a_product_are_refused(name):
    image = Image.fromarray(NOTHING[name].clip(0, 255).astype(np.uint8))
    with pytest.raises(NoProductError, match=f"no product found in {name}") as caught:
        find_mask(image, MatteConfig(), name=name)
    assert caught.value.confidence < 0.5
    assert "mask file" in caught.value.hint


def test_the_required_confidence_decides():
    image = decode_image(COFFEE, "coffee.png")
    confidence = find_mask(image, MatteConfig()).confidence
    with pytest.raises(NoProductError):
        find_mask(image, MatteConfig(min_confidence=min(1.0, confidence + 0.01)))


def test_edges_are_refined_at_full_size():
    image, truth = product("white", "navy", noise=0, size=(1200, 900))
    alpha_HW = find_mask(image, MatteConfig()).alpha_HW
    # GrabCut works at 400 px: without refinement its 3 px steps would leave some 0.5 % of all pixels wrong.
    assert np.mean((alpha_HW > 0.5) != truth) < 0.001


# --- mask file and alpha


def test_a_mask_file_wins_over_alpha_and_is_taken_as_it_is():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 8))
    given = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    mask = find_mask(image, MatteConfig(), given)
    assert (mask.method, mask.confidence) == ("file", 1.0)
    np.testing.assert_array_equal(np.asarray(mask.to_image()), np.asarray(given))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (Image.new("L", (9, 8), 255), "9x8"),
        (Image.new("L", (8, 8), 0), "empty"),
        (Image.new("L", (8, 8), 1), "1 of 255"),
        (Image.new("L", (8, 8), 255), "whole picture"),
    ],
)
def test_unusable_mask_files_are_refused(given, says):
    with pytest.raises(MaskFileError, match=says):
        find_mask(Image.new("RGB", (8, 8)), MatteConfig(), given, "cup.png")


def test_a_cut_out_is_its_own_mask():
    image, truth = product("white", "navy")
    image.putalpha(Image.fromarray(truth.astype(np.uint8) * 255))
    mask = find_mask(image, MatteConfig())
    assert mask.method == "alpha"
    np.testing.assert_array_equal(mask.alpha_HW > 0.5, truth)


def test_alpha_that_cuts_nothing_out_is_not_taken_for_a_mask():
    image, truth = product("white", "navy")
    image.putalpha(200)  # a faded picture
    mask = find_mask(image, MatteConfig())
    assert mask.method == "grabcut"
    assert iou(mask.alpha_HW > 0.5, truth) > 0.95


# --- ONNX


def test_an_onnx_network_is_used_at_its_own_size_with_isnet_normalisation(tmp_path):
    path = dark_is_product(tmp_path / "dark.onnx", 64)
    image, truth = product("white", "black", noise=0)
    mask = find_mask(image, MatteConfig(onnx=path))
    assert mask.method == "onnx"
    assert mask.confidence > 0.9
    assert iou(mask.alpha_HW > 0.5, truth) > 0.93
    # A product of value 64 is (64 - 128) / 256 = -0.25, so exactly 0.5: that normalisation and no other.
    image, truth = product("white", (64, 64, 64), noise=0)
    found = find_mask(image, MatteConfig(onnx=path, min_confidence=0.0)).alpha_HW
    np.testing.assert_allclose(np.median(found[truth]), 0.5, atol=1e-6)


def test_the_inside_of_a_networks_soft_matte_is_product_and_nothing_else(tmp_path):
    path = dark_is_product(tmp_path / "dark.onnx", 64)
    # 4 and 124 are 0.97 and 0.03 to this network: as sure as a sigmoid gets
    image, truth = product((124, 124, 124), (4, 4, 4), noise=0)
    mask = find_mask(image, MatteConfig(onnx=path))
    inner = cv2.erode(truth.astype(np.uint8), np.ones((17, 17), np.uint8)) > 0
    outer = cv2.dilate(truth.astype(np.uint8), np.ones((17, 17), np.uint8)) == 0
    assert (np.asarray(mask.to_image())[inner] == 255).all()
    assert (np.asarray(mask.to_image())[outer] == 0).all()
    assert np.isin(np.asarray(mask.to_image()), (0, 255), invert=True).any(), "the edge stays soft"


def test_an_unsure_network_is_not_believed(tmp_path):
    image, _ = product("white", (90, 90, 90), noise=0)  # 0.3 where the product is
    with pytest.raises(NoProductError, match=r"confidence 0\.00"):
        find_mask(image, MatteConfig(onnx=dark_is_product(tmp_path / "dark.onnx", 32)))


def test_unusable_onnx_files_are_refused(tmp_path):
    text = tmp_path / "notes.onnx"
    text.write_text("not a model")
    for path, says in (
        (str(text), "cannot be loaded"),
        (str(tmp_path / "gone.onnx"), "no such file"),
        (dark_is_product(tmp_path / "grey.onnx", 32, channels=1), "shape"),
    ):
        with pytest.raises(ConfigError, match=says):
            load_session("matte.onnx", path)


def test_depth_is_estimated_at_the_pictures_size_by_a_network_of_any_input_size(tmp_path):
    """The test's network answers dark with near."""
    image = Image.new("RGB", (96, 64), "white")
    image.paste((0, 0, 0), (48, 0, 96, 64))
    near = np.asarray(estimate_depth(image, dark_is_product(tmp_path / "dark.onnx", 32)))
    assert near.shape == (64, 96)
    assert near[:, :40].max() == 0
    assert near[:, 56:].min() == 255
    free = np.asarray(estimate_depth(image, dark_is_product(tmp_path / "free.onnx", "side")))
    np.testing.assert_allclose(free[:, :40], near[:, :40])
    assert _input_size([1, 3, "height", "width"], image) == (784, 518)
    with pytest.raises(ConfigError, match=r"depth\.onnx=.*no such file"):
        estimate_depth(image, str(tmp_path / "gone.onnx"))
