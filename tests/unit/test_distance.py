"""CMMD: a case by hand, and what a distance between sets has to do."""

import math

import numpy as np
import pytest

from packshot.errors import PackshotError
from packshot.evaluate.distance import cmmd


def cloud(count, shift=0.0, seed=0):
    """Vectors around one direction, moved towards another by ``shift``."""
    vectors = np.random.default_rng(seed).normal(0, 0.1, (count, 16))
    vectors[:, 0] += 1
    vectors[:, 1] += shift
    return vectors


def test_two_orthogonal_vectors_against_one_by_hand():
    """|x - y|² is 0 or 2, so the kernel is 1 or k = exp(-2/200): mean of the first set (1 + k)/2, of the second 1,
    between them (1 + k)/2."""
    k = math.exp(-2 / 200)
    expected = 1000 * ((1 + k) / 2 + 1 - 2 * (1 + k) / 2)
    assert cmmd(np.eye(2), np.array([[1.0, 0.0]])) == pytest.approx(expected, rel=1e-9)
    assert expected == pytest.approx(4.975, abs=1e-3)


def test_the_kernel_width_is_the_one_that_was_asked_for():
    k = math.exp(-2 / 2)
    assert cmmd(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]), sigma=1) == pytest.approx(1000 * (2 - 2 * k), rel=1e-9)


def test_the_same_set_in_any_order_is_at_zero():
    vectors = cloud(50)
    assert cmmd(vectors, vectors[::-1]) == pytest.approx(0, abs=1e-9)


def test_it_is_symmetric_for_sets_of_unequal_size():
    a, b = cloud(40), cloud(25, shift=0.5, seed=1)
    assert cmmd(a, b) == pytest.approx(cmmd(b, a), rel=1e-9)
    assert cmmd(a, b) > 0


def test_distance_grows_with_the_shift_between_two_sources():
    distances = [cmmd(cloud(200), cloud(200, shift, seed=1)) for shift in (0.0, 0.1, 0.3, 1.0)]
    assert distances == sorted(distances)
    assert distances[0] < 0.05 * distances[2]


def test_only_the_direction_of_an_embedding_counts():
    a, b = cloud(20), cloud(20, shift=1.0, seed=1)
    assert cmmd(a * np.linspace(0.1, 9, 20)[:, None], b) == pytest.approx(cmmd(a, b), rel=1e-9)


def test_single_precision_is_not_subtracted_away():
    a, b = cloud(64), cloud(64, shift=0.02, seed=1)
    assert cmmd(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(cmmd(a, b), rel=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((0, 4)), np.ones((2, 4)), "cannot be compared"),
        (np.ones((2, 3)), np.ones((2, 4)), "cannot be compared"),
        (np.ones(4), np.ones((2, 4)), "cannot be compared"),
        (np.ones((2, 4)), np.array([[1.0, 0, 0, 0], [0, 0, 0, 0]]), "Embedding 1 of the second set"),
        (np.array([[np.nan, 1.0]]), np.ones((2, 2)), "Embedding 0 of the first set"),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b, message):
    with pytest.raises(PackshotError, match=message):
        cmmd(a, b)
