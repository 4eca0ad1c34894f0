"""The background at the photograph's size: tiles without seams around a product that is held, and upscalers."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from onnx_fixtures import twice_as_large
from PIL import Image
from serving_fixtures import product_pair

from packshot.config.background import BackgroundConfig, Refine
from packshot.config.compose import compose
from packshot.config.schema import GenerateSettings
from packshot.diffusion.tiles import OVERLAP, plan_tiles, tile_weight, tiled
from packshot.errors import ConfigError
from packshot.generate import Packshot, run
from packshot.generate.canvas import Frame, Working
from packshot.generate.product import core_of
from packshot.generate.refine import Drawing, enlarged
from packshot.imaging.focus import edge_blur, narrow_edges
from packshot.imaging.upscale import upscale

SETTINGS = GenerateSettings(
    num_inference_steps=4, guidance_scale=2.0, background=BackgroundConfig(refine=Refine.tiled, refine_strength=0.5)
)


@pytest.fixture(scope="module")
def tool():
    photo, mask = product_pair()
    size = (320, round(320 * photo.height / photo.width))
    photo = photo.resize(size)
    return Packshot.load().set_product(photo, mask.resize(size))


@pytest.fixture(scope="module")
def refined(tool):
    [result] = tool.generate("an object on a table", 1, settings=SETTINGS)
    return result


def test_tiles_cover_a_picture_and_overlap():
    for height, width, tile in ((16, 40, 16), (50, 33, 16), (7, 9, 16), (17, 16, 16)):
        boxes = plan_tiles(height, width, tile)
        covered = np.zeros((height, width), int)
        for rows, columns in boxes:
            covered[rows, columns] += 1
            assert rows.stop - rows.start == min(tile, height)
        assert covered.min() >= 1
        starts = sorted({columns.start for _, columns in boxes})
        assert max(np.diff(starts), default=0) <= tile * (1 - OVERLAP)


def test_blended_tiles_leave_no_seams():
    """A network that answers each tile with its own constant is the worst case: the answer has no edge anywhere."""

    class Constant(torch.nn.Module):
        calls = 0

        def forward(self, sample, *arguments, **named):
            self.calls += 1
            return (torch.full_like(sample, float(self.calls % 2)),)

    network = Constant()
    with tiled(network, 16) as boxes:
        [answer] = network(torch.zeros(1, 4, 16, 64))
    columns = answer[0, 0, 8].numpy()
    assert len(boxes) == network.calls > 4
    assert np.ptp(columns) > 0.5
    assert np.abs(np.diff(columns)).max() < 0.25
    assert network(torch.zeros(1, 4, 16, 64))[0].unique().numel() == 1  # whole again


def test_tile_weights_favour_the_middle():
    weight = tile_weight(16, 16)
    assert weight.min() > 0
    assert weight[8, 8] == weight.max()
    assert weight[0, 0] < 0.01 * weight[8, 8]


def test_a_second_pass_keeps_the_core_and_is_certified(tool, refined):
    assert refined.certificate["core"]["max_abs_diff"] == 0
    core = core_of(np.asarray(refined.layers["mask"]))
    assert (np.asarray(refined.image) == tool.product.rgb_HW3)[core].all()
    report = refined.certificate["refined"]
    assert report["applied"]
    assert report["tiles"] > 1
    assert report["size"] == refined.certificate["working_size"]
    assert max(report["size"]) <= 2 * tool.models.resolution
    assert report["sharpness_after"] != report["sharpness_before"]
    assert report["sharpness_product"] > 0
    assert report["edge_blur_after"] < report["edge_blur_before"]
    assert report["edge_blur_product"] < report["edge_blur_after"]


def test_a_second_pass_begins_without_the_product():
    """Cells on its edge keep what they begin with, and would show its colour outside of its outline."""
    held = np.zeros((6, 8), bool)
    held[2:4, 3:6] = True
    inside = held.repeat(8, axis=0).repeat(8, axis=1)
    grey, red = np.float32([0.6, 0.6, 0.6]), np.float32([0.9, 0, 0])
    picture = np.where(inside[..., None], red, grey)
    frame = Frame(48, 64, 0, 0, 48, 64)
    small = Working(frame, (picture * 255).astype(np.uint8), inside, inside.astype(np.float32), held)
    twice = np.kron(small.keep_HW, np.ones((2, 2), bool))
    large = Working(Frame(96, 128, 0, 0, 96, 128), np.zeros((96, 128, 3), np.uint8), twice, twice * 1.0, held)
    start = enlarged(Drawing(small, picture, {}), large)
    assert start.shape == (96, 128, 3)
    np.testing.assert_allclose(start, np.broadcast_to(grey, start.shape), atol=1e-5)


def boxes(sigma, contrast=1.0, noise=0.0):
    """A picture of steps, blurred by ``sigma`` px."""
    draw = np.random.default_rng(0)
    picture = np.full((400, 400, 3), 120, np.uint8)
    for _ in range(40):
        left, top = map(int, draw.integers(-50, 350, 2))
        width, height = map(int, draw.integers(50, 150, 2))
        cv2.rectangle(picture, (left, top, width, height), draw.integers(0, 256, 3).tolist(), -1)
    blurred = cv2.GaussianBlur(picture, (0, 0), sigma).astype(np.float64)
    return np.clip(110 + contrast * (blurred - 110) + draw.normal(0, noise, picture.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("sigma", [1.5, 3.0, 6.0])
@pytest.mark.parametrize("look", [{}, {"contrast": 0.3}, {"noise": 3.0}])
def test_the_blur_of_edges_is_found_in_pixels(sigma, look):
    """Whatever their contrast, and with noise; the measure of detail changes with both."""
    whole = np.full((400, 400), 255, np.uint8)
    assert edge_blur(boxes(sigma, **look), whole) == pytest.approx(sigma, rel=0.25)


def test_only_edges_of_the_area_count():
    picture = boxes(4.0)
    picture[:, :100] = boxes(0.7)[:, :100]
    area = np.full((400, 400), 255, np.uint8)
    area[:, :100] = 0
    assert edge_blur(picture, area) == pytest.approx(4, rel=0.25)
    assert 0 < (edge_blur(picture, 255 - area) or 0) < 1.5
    assert edge_blur(np.full_like(picture, 90), area) is None


def test_edges_are_narrowed_without_halos_or_grain():
    """Towards what is aimed at; no value goes beyond its surroundings, and a noisy wall stays as it is."""
    picture = boxes(3.0)
    product = np.zeros((400, 400), np.uint8)
    product[150:250, 150:250] = 255
    sharp = narrow_edges(picture, product, 3.0, 1.5)
    outside = np.where(cv2.dilate(product, np.ones((81, 81))) == 0, np.uint8(255), np.uint8(0))
    assert edge_blur(sharp, outside) < 2.2
    window = np.ones((25, 25), np.uint8)  # the rounds reach 12 px
    assert (sharp <= cv2.dilate(picture, window)).all()
    assert (sharp >= cv2.erode(picture, window)).all()
    near = cv2.dilate(product, np.ones((5, 5))) > 0
    assert (sharp[near] == picture[near]).all()
    noise = np.random.default_rng(0).normal(120, 2, (400, 400, 3))
    wall = np.clip(cv2.GaussianBlur(noise, (0, 0), 0.8), 0, 255).astype(np.uint8)
    assert np.std(narrow_edges(wall, product, 3.0, 1.0)) < 1.1 * np.std(wall)


def test_a_background_is_brought_near_the_products_sharpness(tool, refined):
    """By default; not at all where the scene asks for a shallow depth of field."""
    report = refined.certificate["refined"]
    assert report["sharpened"]
    assert report["edge_blur_after"] < report["edge_blur_drawn"]
    [soft] = tool.generate("a table, shallow depth of field", 1, settings=SETTINGS)
    assert soft.certificate["refined"]["not_sharpened"] == "a shallow depth of field is asked for"
    assert soft.certificate["refined"]["edge_blur_after"] == soft.certificate["refined"]["edge_blur_drawn"]


def test_borders_of_tiles_have_no_larger_steps_than_elsewhere(tool, refined):
    """Mean absolute step between neighbours in the background, in columns and rows where tiles begin or end."""
    raw = np.asarray(refined.layers["raw"]).astype(float)
    mask = np.asarray(refined.layers["mask"].resize(raw.shape[1::-1]))
    product = cv2.dilate(mask, np.ones((9, 9), np.uint8)) > 0
    raw[product] = np.nan
    height, width = raw.shape[:2]
    cell = tool.models.pipe.vae_scale_factor
    boxes = plan_tiles(height // cell, width // cell, tool.models.resolution // cell)
    for axis, sides in ((1, [columns for _, columns in boxes]), (0, [rows for rows, _ in boxes])):
        steps = np.nanmean(np.abs(np.diff(raw, axis=axis)), axis=(1 - axis, 2))
        borders = {edge * cell for side in sides for edge in (side.start, side.stop)}
        inner = [border for border in borders if 0 < border < raw.shape[axis]]
        # borders of cells may step a little anywhere: they are compared with each other
        others = [at for at in range(cell, raw.shape[axis], cell) if at not in inner]
        assert inner
        assert steps[[at - 1 for at in inner]].mean() < 1.5 * steps[[at - 1 for at in others]].mean() + 0.5


def test_the_same_seed_refines_to_the_same_bytes(tool, refined):
    [again] = tool.generate("an object on a table", 1, settings=SETTINGS)
    assert again.png == refined.png
    [plain] = tool.generate("an object on a table", 1, settings=replace(SETTINGS, background=BackgroundConfig()))
    assert plain.certificate["refined"]["applied"] is False
    assert plain.png != refined.png


def test_a_small_picture_is_not_drawn_twice(caplog):
    photo, mask = product_pair()
    small = Packshot.load().set_product(photo.resize((64, 64)), mask.resize((64, 64)))
    [result] = small.generate("a table", 1, settings=SETTINGS)
    assert result.certificate["refined"]["reason"] == "drawn at that size already"


def test_an_upscaler_enlarges_the_drawing(tool, tmp_path):
    network = twice_as_large(tmp_path / "twice.onnx")
    picture = np.random.default_rng(0).random((5, 7, 3)).astype(np.float32)
    larger = upscale(picture, network)
    np.testing.assert_allclose(larger, picture.repeat(2, axis=0).repeat(2, axis=1), atol=1e-6)
    background = BackgroundConfig(refine=Refine.upscale, upscaler=network)
    [result] = tool.generate("a table", 1, settings=replace(SETTINGS, background=background))
    report = result.certificate["refined"]
    assert (report["kind"], report["factor"]) == ("upscale", 2)
    assert result.certificate["core"]["max_abs_diff"] == 0
    [plain] = tool.generate("a table", 1, settings=replace(SETTINGS, background=BackgroundConfig()))
    assert result.layers["raw"].width == 2 * plain.layers["raw"].width


def test_a_network_that_does_not_enlarge_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="enlarged by a whole factor"):
        upscale(np.zeros((8, 8, 3), np.float32), twice_as_large(tmp_path / "once.onnx", factor=1))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["background.refine=upscale"], "needs a network that enlarges pictures"),
        (["background.upscaler=a.onnx"], "has no effect with background.refine=none"),
        (["background.refine_max_side=900"], "has no effect with background.refine=none"),
        (["background.refine=tiled", "background.color=[1,2,3]"], "nothing is drawn"),
        (["background.refine=tiled", "num_inference_steps=2", "background.refine_strength=0.3"], "less than one step"),
        (["background.refine=sharp"], "Allowed are none, tiled, upscale"),
    ],
)
def test_keys_without_sense_are_refused(keys, message):
    with pytest.raises(ConfigError) as error:
        compose("generate", keys)
    assert message in str(error.value) + error.value.hint


def test_pictures_of_results_have_the_photographs_size(tool, refined):
    assert refined.image.size == Image.fromarray(tool.product.rgb_HW3).size


def test_an_upscaler_that_is_none_is_refused_before_models_load(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_models", lambda *_: pytest.fail("models were loaded"))
    file = tmp_path / "enlarge.onnx"
    file.write_text("not a network")
    config = compose(
        "generate",
        ["product=data/products/serum.png", "prompt=a table", "background.refine=upscale"]
        + [f"background.upscaler={file}", f"run.dir={tmp_path / 'run'}"],
    )
    with pytest.raises(ConfigError, match=r"background\.upscaler=.* cannot be loaded"):
        run.generate(config)
    assert not (tmp_path / "run").exists()
