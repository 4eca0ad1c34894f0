"""The audit of rendered sets tells what is planted in it."""

import numpy as np
import pytest

from packshot.errors import PackshotError
from packshot.imaging.color import to_lab
from packshot.make_dataset import audit


def test_association_of_copies_and_of_chance():
    """It is one for a copied column and about zero for independent ones."""
    rng = np.random.default_rng(0)
    letters = [str(letter) for letter in rng.integers(0, 8, 2000)]
    others = [str(letter) for letter in rng.integers(0, 8, 2000)]
    assert audit.cramers_v(list(zip(letters, letters, strict=True))) > 0.99
    assert audit.cramers_v(list(zip(letters, others, strict=True))) < 0.06
    assert audit.cramers_v([("a", "b")] * 10) == 0


def test_layers_that_belong_together_give_the_photograph():
    rng = np.random.default_rng(1)
    plate = rng.integers(80, 200, (12, 12, 3), dtype=np.uint8)
    shadow = np.full((12, 12), 255, np.uint8)
    shadow[8:] = 128
    cutout = np.zeros((12, 12, 4), np.uint8)
    cutout[3:8, 4:8] = (200, 30, 40, 255)
    image = audit.recomposed(plate, shadow, cutout)
    np.testing.assert_array_equal(image[:3], plate[:3])
    np.testing.assert_array_equal(image[3:8, 4:8], cutout[3:8, 4:8, :3])
    assert abs(image[9].mean() / plate[9].mean() - 0.5) < 0.02
    assert audit.mask_iou(cutout[..., 3], cutout) == 1
    assert audit.mask_iou(np.roll(cutout[..., 3], 1, axis=1), cutout) == pytest.approx(3 / 5)


def test_thumbnails_differ_by_their_colour_difference():
    """Each thumbnail has one colour."""
    grey, red = (np.full((16, 16, 3), color, np.uint8) for color in ((128,) * 3, (128, 0, 0)))
    a, b = (to_lab(pixels).ravel()[None] for pixels in (grey, red))
    assert audit.distances(a, a) == pytest.approx(0)
    assert audit.distances(a, b)[0, 0] == pytest.approx(np.linalg.norm(to_lab(grey)[0, 0] - to_lab(red)[0, 0]))


def test_a_set_without_layers_is_refused(tmp_path):
    with pytest.raises(PackshotError, match="no such"):
        audit.report([str(tmp_path / "gone")])
