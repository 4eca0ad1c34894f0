"""One geometry for everything (joint transform, products never cut or stretched, time_ids in SDXL's order)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from packshot.dataset import buckets
from packshot.imaging.framing import apply, location_tokens, plan, product_box

SIDES = st.integers(16, 400)


@st.composite
def pictures(draw):
    height, width = draw(SIDES), draw(SIDES)
    top, left = draw(st.integers(0, height - 2)), draw(st.integers(0, width - 2))
    box = (top, left, draw(st.integers(top + 1, height)), draw(st.integers(left + 1, width)))
    return (height, width), box


@given(pictures(), st.sampled_from([(64, 64), (96, 64), (128, 128)]))
def test_a_product_is_never_cut(picture, target):
    size, box = picture
    geometry = plan(size, target, box)
    for axis in (0, 1):
        scale = geometry.resized[axis] / size[axis]
        assert box[axis] * scale - geometry.crop[axis] >= -1.01
        assert box[axis + 2] * scale - geometry.crop[axis] <= target[axis] + 1.01
    # not stretched: both axes scale alike, up to rounding to whole pixels
    assert abs(geometry.resized[0] * size[1] - geometry.resized[1] * size[0]) <= max(size)


@given(pictures(), st.sampled_from([(64, 64), (96, 64)]))
def test_image_and_mask_stay_aligned(picture, target):
    size, box = picture
    geometry = plan(size, target, box)
    rows, columns = np.meshgrid(np.arange(size[0]), np.arange(size[1]), indexing="ij")
    coordinates = np.stack([rows, columns], axis=-1).astype(np.float32)
    seen = apply(geometry, coordinates, hard=True)
    mask = np.zeros(size, np.uint8)
    mask[box[0] : box[2], box[1] : box[3]] = 255
    hard = apply(geometry, mask, hard=True, pad="constant")
    inside = (seen[..., 0] >= box[0]) & (seen[..., 0] < box[2]) & (seen[..., 1] >= box[1]) & (seen[..., 1] < box[3])
    real = apply(geometry, np.ones(size, np.uint8), hard=True, pad="constant") == 1
    assert np.array_equal(hard[real] == 255, inside[real])
    assert seen.shape[:2] == target


def test_time_ids_are_original_crop_target_height_first():
    geometry = plan((400, 600), (128, 128))
    assert geometry.resized == (128, 192)
    assert geometry.time_ids() == (400, 600, 0, 32, 128, 128)


def test_the_crop_moves_to_the_product():
    assert plan((100, 200), (100, 100), (10, 120, 90, 200)).crop == (0, 100)
    assert plan((100, 200), (100, 100), (10, 0, 90, 60)).crop == (0, 0)


def test_a_product_that_fills_the_picture_is_letterboxed():
    geometry = plan((100, 200), (64, 64), (0, 0, 100, 200))
    assert geometry.resized == (32, 64)
    assert apply(geometry, np.full((100, 200, 3), 9, np.uint8)).shape == (64, 64, 3)
    assert apply(geometry, np.full((100, 200), 255, np.uint8), pad="constant")[0].max() == 0


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match="geometry"):
        apply(plan((10, 10), (8, 8)), np.zeros((9, 10)))


def test_product_box():
    mask = Image.new("L", (20, 10))
    assert product_box(mask) is None
    mask.paste(255, (4, 2, 9, 7))
    assert product_box(mask) == (2, 4, 7, 9)


def test_the_product_box_is_written_in_thousandths():
    mask = Image.new("L", (200, 100))
    mask.paste(255, (50, 25, 101, 76))
    assert location_tokens(mask) == "<loc_250><loc_250><loc_500><loc_750>"
    assert location_tokens(Image.new("L", (200, 100))) == ""


@pytest.mark.parametrize("resolution", [512, 576, 704, 832, 960, 1024, 1088, 1120, 1216])
def test_every_side_of_every_bucket_is_one_the_network_takes(resolution):
    found = buckets.shapes(resolution, buckets.bucket_step(resolution, 32))
    assert all(side % 32 == 0 for shape in found for side in shape)
    assert (resolution, resolution) in found


def test_bucket_steps_are_sdxls_at_1024():
    """A resolution between two cells is refused."""
    assert buckets.bucket_step(1024, 32) == 64
    assert buckets.bucket_step(128, 32) == 32
    with pytest.raises(ValueError, match="1000 is not a multiple of 32"):
        buckets.bucket_step(1000, 32)
