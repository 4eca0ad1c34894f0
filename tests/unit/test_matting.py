"""The segmentation network: what it is taught with, what it finds, and what is no such network."""

import random

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from packshot.errors import ConfigError
from packshot.imaging.matting_network import alpha_logits, input_side, load_matting, predict_alpha
from packshot.scene import Scene
from tools.mini.data import Render, read_renders
from tools.mini.matting import build_matting, matting_loss, measure_matting
from tools.mini.matting_samples import SIDE, Material, draw, place, placed_product, read_cutouts, wire


def scene(seed: int = 0) -> Render:
    """A red block before green noise."""
    rng = np.random.default_rng(seed)
    plate = np.stack(
        [rng.integers(0, 40, (SIDE, SIDE)), rng.integers(90, 200, (SIDE, SIDE)), rng.integers(0, 40, (SIDE, SIDE))], -1
    )
    plate, image = plate.astype(np.uint8), plate.astype(np.uint8).copy()
    image[80:200, 100:160] = (220, 0, 0)
    cutout = np.zeros((SIDE, SIDE, 4), np.uint8)
    cutout[80:200, 100:160] = (220, 0, 0, 255)
    return Render("0", "p000", {}, Scene("a bed of sand"), image, plate, cutout)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    box=st.tuples(st.integers(0, 180), st.integers(0, 180), st.integers(16, 256), st.integers(16, 256)),
)
def test_the_window_keeps_the_product_whole(seed: int, box: tuple[int, int, int, int]) -> None:
    top, left, height, width = box
    alpha = np.zeros((SIDE, SIDE), np.float32)
    alpha[top : top + height, left : left + width] = 1
    matrix = place(alpha, random.Random(seed))
    bottom, right = min(top + height, SIDE), min(left + width, SIDE)
    corners = np.array([[x - 0.5, y - 0.5, 1] for x in (left, right) for y in (top, bottom)]) @ matrix.T
    assert corners.min() >= -0.501
    assert corners.max() <= SIDE - 0.499


def test_a_sample_shows_the_product_where_its_alpha_is() -> None:
    rng = random.Random(0)
    shares = []
    for _ in range(60):
        image, alpha = draw(Material([scene(0)], []), rng)
        assert image.shape == (SIDE, SIDE, 3)
        assert image.dtype == np.uint8
        assert 0 <= alpha.min() <= alpha.max() <= 1
        if alpha.any():
            inside, outside = image[alpha > 0.95].std(0).mean(), image[alpha < 0.05].std(0).mean()
            shares.append(inside < outside or outside < 20)  # one colour inside, noise or a plain ground outside
    assert len(shares) < 60  # some have no product
    assert np.mean(shares) > 0.9


def test_samples_follow_from_the_seed() -> None:
    first, second = (draw(Material([scene(0), scene(1)], []), random.Random(7)) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])


def test_wires_are_thin_and_inside_the_picture() -> None:
    for seed in range(20):
        alpha = wire(random.Random(seed))[..., 3]
        border = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
        assert not border.any()
        assert 0.002 < (alpha > 127).mean() < 0.25


def test_a_placed_product_keeps_its_colour_at_its_soft_edge() -> None:
    """Black from outside the cut-out must not leak into the edge when the cut-out is scaled."""
    material = Material([], [scene(0).cutout])
    products = [placed_product(material, random.Random(seed)) for seed in range(40)]
    blocks = []
    for product in products:
        soft = (product.alpha > 0.2) & (product.alpha < 0.8)
        if soft.sum() < 0.1 * (product.alpha > 0.99).sum():  # the others are wires, which are nearly all edge
            blocks.append(product)
    assert len(blocks) > 25
    for product in blocks:
        edge = (product.alpha > 0.2) & (product.alpha < 0.8)
        inside = product.alpha > 0.99
        assert np.abs(product.color[edge].mean(0) - product.color[inside].mean(0)).max() < 12


def test_cutouts_without_an_outline_are_refused(tmp_path) -> None:
    assert read_cutouts(None) == []
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    with pytest.raises(ConfigError, match=r"photo\.png: alpha shows no outline"):
        read_cutouts(tmp_path)
    with pytest.raises(ConfigError, match="there is no such folder"):
        read_cutouts(tmp_path / "nowhere")


def test_the_network_learns_a_product_it_sees_often() -> None:
    torch.manual_seed(0)
    network, scenes = build_matting(), [scene(i) for i in range(4)]
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    samples = [(one.image, one.alpha) for one in scenes]
    before = measure_matting(network.eval(), samples)["iou"]
    pixels = torch.from_numpy(np.stack([one.image for one in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
    alpha = torch.from_numpy(np.stack([one.alpha for one in scenes]))[:, None]
    for _ in range(20):
        optimizer.zero_grad()
        matting_loss(alpha_logits(network.train(), pixels), alpha).backward()
        optimizer.step()
    assert measure_matting(network.eval(), samples)["iou"] > max(0.8, before)


def test_the_shipped_network_finds_held_out_products() -> None:
    scenes = list(read_renders("set", "data/rendered/heldout"))[::16]
    network = load_matting("data/models/matting")
    iou = []
    for one in scenes:
        guess = predict_alpha(network, cv2.resize(one.image, (200, 160)))  # any size, any shape
        assert guess.shape == (input_side(network),) * 2
        alpha = cv2.resize(one.alpha, guess.shape, interpolation=cv2.INTER_AREA)
        a, b = guess >= 0.5, alpha >= 0.5
        iou.append((a & b).sum() / (a | b).sum())
    assert np.mean(iou) > 0.5  # the weights are young; see docs/log.md


def test_what_is_no_segmentation_network_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"matte\.model=.*nowhere: no such file or folder"):
        load_matting(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"matte\.model: .* cannot be loaded"):
        load_matting(str(tmp_path))
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    UNet2DModel(in_channels=3, out_channels=4, norm_num_groups=4, **blocks).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"3 input and 4 output channels\.\n  It needs a square"):
        load_matting(str(tmp_path / "other"))
