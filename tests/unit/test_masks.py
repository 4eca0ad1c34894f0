"""Finding the product: which method is asked, what it finds, and what is refused."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from onnx_fixtures import dark_is_product
from PIL import Image, ImageDraw

from packshot.config.compose import compose
from packshot.config.schema import MatteConfig
from packshot.dataset.rows import load_rows
from packshot.errors import ConfigError
from packshot.imaging.decode import decode_image
from packshot.imaging.depth import estimate_depth, input_size
from packshot.imaging.mask_doubt import Finding, doubts, evidence, in_pieces, plausible_area
from packshot.imaging.mask_networks import load_network, seen_by_onnx
from packshot.imaging.masks import DoubtfulMaskError, MaskFileError, NoProductError, find_mask
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
    mask = find_mask(image, MatteConfig(model="grabcut"))
    assert mask.method == "grabcut"
    assert mask.alpha_HW.shape == truth.shape
    assert mask.alpha_HW.dtype == np.float32
    assert 0 <= mask.alpha_HW.min() <= mask.alpha_HW.max() <= 1
    assert iou(mask.alpha_HW > 0.5, truth) > 0.95


def test_grabcut_finds_the_cup_on_a_wooden_table():
    """With its saucer and spoon."""
    mask = find_mask(decode_image(COFFEE, "coffee.png"), MatteConfig(model="grabcut"), name="coffee.png")
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


def test_the_default_keeps_the_saucer():
    """Cup, saucer and spoon are one product; the deep shadow between saucer and frame is none of it."""
    mask = find_mask(decode_image(COFFEE, "coffee.png"), MatteConfig(), name="coffee.png")
    assert mask.method == "network"
    assert mask.reasons == ()
    for x, y in ((290, 160), (130, 220), (365, 290), (290, 25)):
        assert mask.alpha_HW[y, x] > 0.95
    assert mask.alpha_HW[398:, :].max() < 0.05
    assert mask.alpha_HW[370:, 100:180].max() < 0.05


def test_the_default_is_better_than_colours_alone():
    """By default the family's network guides GrabCut, which colours alone mislead in scenes."""
    rows = load_rows("set", "data/rendered/showcase", pictures=("image", "mask"))
    scores = {"grabcut": [], "auto": []}
    for row in (rows.read(index, ("image", "mask")) for index in range(0, len(rows), 6)):
        for model, found in scores.items():
            mask = find_mask(row["image"], MatteConfig(model=model, min_confidence=0.0))
            assert mask.method == ("network" if model == "auto" else "grabcut")
            assert mask.alpha_HW.shape == row["image"].size[::-1]
            found.append(iou(mask.alpha_HW >= 0.5, np.asarray(row["mask"]) >= 128))
    assert np.mean(scores["auto"]) > np.mean(scores["grabcut"])


def test_a_network_that_is_not_there_is_refused():
    image, _ = product("white", "navy")
    for ask in (lambda matte: find_mask(image, matte), lambda matte: load_network(matte.model)):
        with pytest.raises(ConfigError, match=r"matte\.model=nowhere: no such file"):
            ask(MatteConfig(model="nowhere"))


@pytest.mark.parametrize(("old", "instead"), [("matte.onnx=a.onnx", "<file.onnx>"), ("matte.network=a", "mini")])
def test_old_keys_of_masks_are_refused_with_the_new_one(old, instead):
    with pytest.raises(ConfigError, match=rf"matte\.model[\s\S]*matte\.model={instead}"):
        compose("generate", ["product=a.png", old])


# --- doubts


def bottle(ground, body, size=384):
    """A bottle with a dark cap and a label on a studio's ground, and where it is."""
    image, truth = Image.new("RGB", (size, size), ground), Image.new("L", (size, size))
    parts = (((150, 90, 234, 330), body), ((168, 50, 216, 92), (40, 40, 46)), ((152, 180, 232, 250), (200, 60, 50)))
    for box, color in parts:
        ImageDraw.Draw(image).rounded_rectangle(box, 8, fill=color)
        ImageDraw.Draw(truth).rounded_rectangle(box, 8, fill=255)
    pixels = np.asarray(image) + np.random.default_rng(1).normal(0, 1.5, (size, size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), np.asarray(truth) > 0


@pytest.mark.parametrize("ground", [(250, 250, 250), (200, 200, 202), (235, 220, 200)], ids=["white", "grey", "cream"])
@pytest.mark.parametrize("body", [(30, 80, 160), (238, 238, 240), (252, 252, 252)], ids=["blue", "pale", "white"])
def test_a_bottle_is_whole_or_in_doubt(ground, body):
    """A cap or a label alone is never accepted for the bottle."""
    image, truth = bottle(ground, body)
    try:
        mask = find_mask(image, MatteConfig())
    except NoProductError:
        return
    assert mask.reasons or iou(mask.alpha_HW >= 0.5, truth) > 0.9


@pytest.mark.parametrize("kept", ["cap", "label"])
def test_a_part_of_a_bottle_is_incomplete(kept):
    image, _ = bottle((250, 250, 250), (210, 214, 220))
    part = np.zeros((384, 384), bool)
    part[(slice(50, 92), slice(168, 216)) if kept == "cap" else (slice(180, 250), slice(152, 232))] = True
    found = Finding(np.asarray(image), part, None, part, 1.0, np.zeros_like(part))
    assert "mask_incomplete" in doubts(found)


def test_a_whole_coloured_bottle_is_accepted():
    image, truth = bottle((235, 235, 235), (30, 80, 160))
    mask = find_mask(image, MatteConfig())
    assert iou(mask.alpha_HW >= 0.5, truth) > 0.95
    assert mask.reasons == ()


def test_a_soft_shadow_and_noise_are_no_edges_outside():
    """They are in every studio photograph; a cap without its bottle leaves a sharp line."""
    image, truth = bottle((250, 250, 250), (30, 80, 160))
    shadow = np.zeros((384, 384), np.float32)
    cv2.ellipse(shadow, (200, 330), (90, 20), 0, 0, 360, 1, -1)
    dark = cv2.GaussianBlur(shadow, (0, 0), 10)[..., None] * 0.5 * ~truth[..., None]
    noise = np.random.default_rng(2).normal(0, 1.5, (384, 384, 3))
    picture = (np.asarray(image) * (1 - dark) + noise).clip(0, 255).astype(np.uint8)
    found = Finding(picture, truth, None, truth, 1.0, np.zeros_like(truth))
    assert "mask_incomplete" not in doubts(found)


def test_strict_refuses_a_mask_in_doubt():
    image = Image.new("RGB", (64, 64), "white")
    inverted = Image.new("L", (64, 64), 255)
    ImageDraw.Draw(inverted).rectangle((20, 20, 40, 40), fill=0)
    assert find_mask(image, MatteConfig(), inverted).reasons == ("mask_inverted",)
    with pytest.raises(DoubtfulMaskError, match="in doubt: mask_inverted"):
        find_mask(image, MatteConfig(strict=True), inverted)
    turned = find_mask(image, MatteConfig(invert=True), inverted)
    assert turned.reasons == ()
    assert turned.alpha_HW[30, 30] == 1
    assert turned.alpha_HW[0, 0] == 0


def test_a_mask_along_the_frame_is_in_doubt():
    mask = np.zeros((60, 60), bool)
    mask[20:, 20:40] = True
    found = Finding(np.zeros((60, 60, 3), np.uint8), mask, None, mask, 1.0, np.zeros_like(mask))
    assert "mask_touches_frame" in doubts(found)


def test_evidence_falls_with_the_frame_that_a_mask_touches():
    """A mask that runs along half of the frame has no evidence by its border; one inside has all of it."""
    image, truth = product("white", "navy")
    inside = evidence(np.asarray(image), truth.astype(np.float32), truth, truth)
    assert inside["border"] == 1
    along = truth.copy()
    along[:, :3] = along[:, -3:] = along[:3] = True
    assert evidence(np.asarray(image), along.astype(np.float32), along, along)["border"] < 0.2


def test_each_evidence_falls_with_its_own_flaw():
    """Contrast without a salient product, agreement with a speckled result, two equal pieces against twenty."""
    image, truth = product("white", "navy")
    pixels = np.asarray(image)
    good = evidence(pixels, truth.astype(np.float32), truth, truth)
    assert min(good["contrast"], good["compact"], good["single"], good["start"]) == 1
    assert evidence(pixels, np.full(truth.shape, 0.5, np.float32), truth, truth)["contrast"] == 0
    speckle = truth & (np.indices(truth.shape).sum(0) % 3 == 0)
    assert evidence(pixels, truth.astype(np.float32), speckle, truth)["compact"] == 0
    halves = truth.copy()
    halves[:, truth.any(axis=0).nonzero()[0].mean().astype(int)] = False
    assert evidence(pixels, truth.astype(np.float32), halves, halves)["single"] == 1
    many = np.zeros_like(truth)
    many[4:-4:8, 4:-4:8] = True
    assert evidence(pixels, truth.astype(np.float32), many, many)["single"] == 0


def test_a_product_of_three_pieces_is_a_product():
    """Three bottles of one height next to each other are found, all of them."""
    image = Image.new("RGB", (420, 300), (238, 238, 238))
    truth = Image.new("L", image.size)
    for left, color in ((60, (30, 80, 160)), (180, (170, 40, 50)), (300, (40, 120, 70))):
        ImageDraw.Draw(image).rounded_rectangle((left, 70, left + 60, 250), 8, fill=color)
        ImageDraw.Draw(truth).rounded_rectangle((left, 70, left + 60, 250), 8, fill=255)
    pixels = np.asarray(image) + np.random.default_rng(1).normal(0, 1.5, (300, 420, 3))
    mask = find_mask(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), MatteConfig())
    assert iou(mask.alpha_HW >= 0.5, np.asarray(truth) > 0) > 0.95


def test_the_frame_of_glasses_is_a_product():
    """All of it is thinner than what cleaning takes for speckle."""
    image = Image.new("RGB", (256, 256), (235, 235, 235))
    pen = ImageDraw.Draw(image)
    for left in (40, 136):
        pen.ellipse((left, 100, left + 80, 160), outline=(20, 20, 20), width=2)
    pen.line((120, 126, 136, 126), fill=(20, 20, 20), width=2)
    drawn = np.asarray(image)[..., 0] < 128
    mask = find_mask(image, MatteConfig(model="grabcut"))
    assert (mask.alpha_HW >= 0.5)[drawn].mean() > 0.9


def test_a_plausible_area_is_neither_speck_nor_picture():
    assert [plausible_area(share) for share in (0.001, 0.3, 0.99)] == [0, 1, 0]


def test_glass_keeps_its_alpha():
    """Large clear areas make a cut-out, although its alpha never gets near full."""
    alpha = np.zeros((100, 100), np.uint8)
    alpha[20:80, 30:70] = 90
    image = Image.merge("RGBA", [*Image.new("RGB", (100, 100), "skyblue").split(), Image.fromarray(alpha)])
    mask = find_mask(image, MatteConfig())
    assert mask.method == "alpha"
    assert np.array_equal(mask.to_image(), alpha)


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
    confidence = find_mask(image, MatteConfig(model="grabcut")).confidence
    assert confidence < 0.99
    with pytest.raises(NoProductError):
        find_mask(image, MatteConfig(model="grabcut", min_confidence=confidence + 0.01))


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
    assert mask.method == "network"
    assert iou(mask.alpha_HW > 0.5, truth) > 0.95


# --- ONNX


def test_an_onnx_network_is_used_at_its_own_size(tmp_path):
    """With the normalisation of IS-Net."""
    path = dark_is_product(tmp_path / "dark.onnx", 64)
    image, truth = product("white", "black", noise=0)
    mask = find_mask(image, MatteConfig(model=path))
    assert mask.method == "onnx"
    assert mask.confidence > 0.9
    assert iou(mask.alpha_HW > 0.5, truth) > 0.93
    # A product of value 64 is (64 - 128) / 256 = -0.25, so exactly 0.5: that normalisation and no other.
    image, truth = product("white", (64, 64, 64), noise=0)
    found = find_mask(image, MatteConfig(model=path, min_confidence=0.0)).alpha_HW
    np.testing.assert_allclose(np.median(found[truth]), 0.5, atol=1e-6)


def test_the_inside_of_a_soft_matte_is_product(tmp_path):
    """A sigmoid ends below 1 inside a product."""
    path = dark_is_product(tmp_path / "dark.onnx", 64)
    # 4 and 124 are 0.97 and 0.03 to this network: as sure as a sigmoid gets
    image, truth = product((124, 124, 124), (4, 4, 4), noise=0)
    mask = find_mask(image, MatteConfig(model=path))
    inner = cv2.erode(truth.astype(np.uint8), np.ones((17, 17), np.uint8)) > 0
    outer = cv2.dilate(truth.astype(np.uint8), np.ones((17, 17), np.uint8)) == 0
    assert (np.asarray(mask.to_image())[inner] == 255).all()
    assert (np.asarray(mask.to_image())[outer] == 0).all()
    assert np.isin(np.asarray(mask.to_image()), (0, 255), invert=True).any(), "the edge stays soft"


def test_an_unsure_network_is_not_believed(tmp_path):
    image, _ = product("white", (90, 90, 90), noise=0)  # 0.3 where the product is
    with pytest.raises(NoProductError, match=r"confidence 0\.00"):
        find_mask(image, MatteConfig(model=dark_is_product(tmp_path / "dark.onnx", 32)))


def test_a_public_network_is_read_from_its_folder(tmp_path, monkeypatch):
    """A file that lies in the folder of rembg is used, and nothing is fetched."""
    monkeypatch.setenv("REMBG_HOME", str(tmp_path))
    folder = tmp_path / "models" / "isnet-general-use"
    folder.mkdir(parents=True)
    path = dark_is_product(folder / "isnet-general-use.onnx", 64)
    image, truth = product("white", "black", noise=0)
    mask = find_mask(image, MatteConfig(model="isnet-general-use"))
    assert iou(mask.alpha_HW > 0.5, truth) > 0.93
    np.testing.assert_array_equal(mask.alpha_HW, find_mask(image, MatteConfig(model=path)).alpha_HW)


def test_birefnets_logits_become_alpha(tmp_path, monkeypatch):
    """BiRefNet ends without a sigmoid and reads pixels as ImageNet's networks do."""
    monkeypatch.setenv("REMBG_HOME", str(tmp_path))
    folder = tmp_path / "models" / "birefnet-general"
    folder.mkdir(parents=True)
    dark_is_product(folder / "birefnet-general.onnx", 64)
    image, _ = product("white", "black", noise=0)
    seen_HW = seen_by_onnx(image, "birefnet-general")
    # black is -2.1179, -2.0357 and -1.8044 in its three channels, and the test's network answers -2 times their mean
    np.testing.assert_allclose(seen_HW.max(), 1 / (1 + np.exp(-2 * (2.1179 + 2.0357 + 1.8044) / 3)), atol=1e-4)
    assert seen_HW.min() < 0.02


def test_a_public_network_that_cannot_be_fetched_is_named(tmp_path, monkeypatch):
    import pooch

    def no_network(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setenv("REMBG_HOME", str(tmp_path))
    monkeypatch.setattr(pooch, "retrieve", no_network)
    with pytest.raises(ConfigError, match=r"matte\.model=isnet-general-use: its file is not in .*cannot be fetched"):
        load_network("isnet-general-use")


def test_a_networks_mask_of_a_part_is_in_doubt(tmp_path):
    """The network sees the dark cap of a bottle only; its grey body stands out as well."""
    image = Image.new("RGB", (200, 260), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    draw.rectangle((70, 90, 130, 230), fill=(180, 130, 90))
    draw.rectangle((70, 30, 130, 90), fill=(0, 0, 0))
    mask = find_mask(image, MatteConfig(model=dark_is_product(tmp_path / "dark.onnx", 64)))
    assert "mask_incomplete" in mask.reasons or "mask_ways_disagree" in mask.reasons


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


def test_depth_has_the_pictures_size(tmp_path):
    """The test's network answers dark with near."""
    image = Image.new("RGB", (96, 64), "white")
    image.paste((0, 0, 0), (48, 0, 96, 64))
    near = np.asarray(estimate_depth(image, dark_is_product(tmp_path / "dark.onnx", 32)))
    assert near.shape == (64, 96)
    assert near[:, :40].max() == 0
    assert near[:, 56:].min() == 255
    free = np.asarray(estimate_depth(image, dark_is_product(tmp_path / "free.onnx", "side")))
    np.testing.assert_allclose(free[:, :40], near[:, :40])
    assert input_size([1, 3, "height", "width"], image) == (784, 518)
    with pytest.raises(ConfigError, match=r"depth\.onnx=.*no such file"):
        estimate_depth(image, str(tmp_path / "gone.onnx"))


def test_pieces_are_counted_without_specks():
    mask = np.zeros((100, 100), bool)
    mask[10:50, 10:50] = True
    mask[90, 90] = True
    assert not in_pieces(mask)
    mask[60:70, 10:20] = True
    assert in_pieces(mask)
    assert not in_pieces(np.zeros((100, 100), bool))
