"""Marking the product in the picture."""

import numpy as np
import pytest
from caption_fixtures import picture
from PIL import Image

from packshot.caption.target import GREY, RED, mark
from packshot.config.compose import compose
from packshot.config.schema import ProductTarget
from packshot.errors import ConfigError


def product(size=200):
    mask = Image.new("L", (size, size))
    mask.paste(255, (60, 60, 140, 140))
    return mask


def marked(target):
    return np.asarray(mark([picture(0, 200)], [product()], target)[0])


def test_the_product_is_covered_and_nothing_else():
    pixels, inside = marked(ProductTarget.mask), np.asarray(product()) > 127
    assert (pixels[inside] == GREY).all()
    assert np.array_equal(pixels[~inside], np.asarray(picture(0, 200))[~inside])


def test_the_outline_leaves_the_product_whole():
    pixels, inside = marked(ProductTarget.outline), np.asarray(product()) > 127
    assert np.array_equal(pixels[inside], np.asarray(picture(0, 200))[inside])
    red = (pixels == RED).all(axis=-1)
    assert red[58:60, 100].all()
    assert red[140:142, 100].all()
    assert not red[:57].any()
    assert not red[143:].any()


@pytest.mark.parametrize("target", [ProductTarget.none, ProductTarget.box])
def test_the_picture_stays_where_it_is_not_marked(target):
    image = picture(0)
    assert mark([image], [Image.new("L", (32, 32), 255)], target) == [image]
    assert mark([image], [None], ProductTarget.mask) == [image]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["captioner=llama32_vision", "captioner.product=box"], "only Florence-2 has tokens for places"),
        (["captioner.quantization=int8"], "cannot be trained over eight bits"),
        (["captioner.quantization=nf4"], "captioner.quantization=nf4 with captioner.tuning=full"),
        (["captioner.dtype=bfloat16"], "captioner.dtype=bfloat16 with captioner.tuning=full"),
    ],
)
def test_settings_that_cannot_work_are_refused_first(overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        compose("caption_vlm", overrides)


def test_a_lora_may_stand_over_small_weights():
    config = compose(
        "caption_vlm",
        ["captioner=llama32_vision", "captioner.quantization=nf4", "captioner.dtype=bfloat16"],
    )
    assert str(config.captioner.tuning) == "language_lora"
