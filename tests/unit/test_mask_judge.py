"""The network that judges masks of large pictures, and the composed photographs that it learns from."""

from argparse import Namespace
from dataclasses import replace
from importlib.resources import files

import cv2
import numpy as np
import pytest
import torch

from packshot.imaging.mask_doubt import LARGE, iou, measure_signs, probability_right
from packshot.imaging.mask_judge import (
    LOOK,
    PLANES,
    RIGHT,
    MaskJudge,
    agreement,
    fill,
    judge,
    load_mask_judge,
    look_at,
    opinion_of,
    planes_of,
    put_back,
    regrown,
    square_of,
)
from packshot.imaging.masks import seek
from tools import composites
from tools.composites import GROUNDS, Cutout, Setting
from tools.fit_mask_judge import CHANGES, fit, study, target_of
from tools.small_network import as_text

CALM = Setting(shadow=0.3, mirror=0.0, vignette=0.0, noise=1.5, quality=90, grey=False)
SHAPE = (480, 480)


def bottle(rng):
    return composites.drawn_package(rng, (180.0, 60.0, 50.0))


def photograph(ground="wall", seed=3):
    rng = np.random.default_rng(seed)
    return composites.compose(bottle(rng), GROUNDS[ground](rng, SHAPE), ground, CALM, rng, 0.7)


@pytest.fixture(scope="module")
def findings():
    """Found masks of bottles before four grounds, with the truth at their size."""
    found = []
    for seed, ground in enumerate(("white", "wall", "sweep", "wood")):
        taken = photograph(ground, seed)
        finding = seek(taken.rgb_HW3, "mini").finding
        assert finding is not None
        size = finding.mask_HW.shape[::-1]
        found.append((finding, cv2.resize(taken.alpha_HW, size, interpolation=cv2.INTER_AREA) >= 0.5))
    return found


def without_lower_half(mask_HW):
    rows = np.flatnonzero(mask_HW.any(axis=1))
    upper = mask_HW.copy()
    upper[(rows[0] + rows[-1]) // 2 :] = False
    return upper


def judged(finding, mask_HW):
    likely = judge(replace(finding, mask_HW=mask_HW))
    assert likely is not None
    return likely


# ---- the judge ----


def test_true_masks_are_likelier_than_upper_halves(findings):
    true = [judged(finding, truth_HW) for finding, truth_HW in findings]
    halves = [judged(finding, without_lower_half(truth_HW)) for finding, truth_HW in findings]
    assert min(true) > max(halves)
    assert max(halves) < 0.3


def test_true_masks_are_likelier_than_ones_with_ground(findings):
    for finding, truth_HW in findings:
        leaking = cv2.dilate(truth_HW.astype(np.uint8), np.ones((41, 41))) > 0
        assert judged(finding, leaking) < 0.3 < judged(finding, truth_HW)


def test_a_mirrored_picture_has_the_same_probability(findings):
    finding, truth_HW = findings[1]
    turned = replace(
        finding,
        rgb_HWC=np.ascontiguousarray(finding.rgb_HWC[:, ::-1]),
        mask_HW=truth_HW[:, ::-1],
        network_HW=np.ascontiguousarray(finding.network_HW[:, ::-1]),
        spread_HW=np.ascontiguousarray(finding.spread_HW[:, ::-1]),
        salient_HW=finding.salient_HW[:, ::-1],
        ground=None,
    )
    straight = judge(replace(finding, mask_HW=truth_HW, ground=None))
    assert judge(turned) == pytest.approx(straight, abs=0.1)  # GrabCut is not quite the same mirrored


def test_what_is_judged_has_fixed_planes(findings):
    look = look_at(findings[0][0])
    assert look is not None
    planes = planes_of(look)
    assert planes.shape == (PLANES, LOOK, LOOK)
    assert np.isfinite(planes).all()
    left, top, side = square_of(findings[0][0])
    rows, columns = np.nonzero(findings[0][0].mask_HW)
    assert left < columns.min()
    assert columns.max() < left + side
    assert top < rows.min()
    assert rows.max() < top + side


def test_nothing_is_judged_without_a_network(findings):
    finding, _ = findings[0]
    assert judge(replace(finding, network_HW=None)) is None
    assert judge(replace(finding, mask_HW=np.zeros_like(finding.mask_HW))) is None


def test_small_pictures_are_judged_by_their_traits(findings):
    """The judge learned at 400 px; at 128 px other things tell."""
    finding, _ = findings[0]
    assert max(finding.mask_HW.shape) >= LARGE
    assert probability_right(finding) == judge(finding)
    size = (128, 128)
    small = replace(
        finding,
        rgb_HWC=cv2.resize(finding.rgb_HWC, size),
        mask_HW=cv2.resize(finding.mask_HW.astype(np.uint8), size) > 0,
        network_HW=cv2.resize(finding.network_HW, size),
        spread_HW=cv2.resize(finding.spread_HW, size),
        salient_HW=cv2.resize(finding.salient_HW.astype(np.uint8), size) > 0,
        ground=None,
    )
    assert probability_right(small) != judge(small)


def test_a_mask_without_its_lower_half_is_doubted(findings):
    for finding, truth_HW in findings:
        signs = measure_signs(replace(finding, mask_HW=without_lower_half(truth_HW)))
        assert not signs["probability_right"].passed


def test_other_ways_that_agree_are_seen_as_agreeing(findings):
    """Each number is of its own plane: one way at a time is replaced by the mask itself, or by nothing."""
    look = look_at(findings[0][0])
    assert look is not None
    for number, name in enumerate(("network_HW", "salient_HW", "regrown_HW")):
        same = replace(look, **{name: look.mask_HW})
        none = replace(look, **{name: np.zeros_like(look.mask_HW)})
        agreeing, lacking = agreement(torch.from_numpy(np.stack([planes_of(same), planes_of(none)])))
        assert agreeing[number] < -4 < -0.1 < lacking[number]
        others = [index for index in range(3) if index != number]
        assert torch.equal(agreeing[others], lacking[others])
    full_HW, none_HW = np.full_like(look.mask_HW, 255), np.zeros_like(look.mask_HW)
    unsure = replace(look, spread_HW=full_HW, edges_HW=full_HW, known=True)
    sure = replace(look, spread_HW=none_HW, edges_HW=none_HW, known=True)
    loud, quiet = agreement(torch.from_numpy(np.stack([planes_of(unsure), planes_of(sure)])))
    assert loud[4] > quiet[4] == 0
    assert loud[6] > quiet[6] == 0
    assert loud[7] == 1


def test_colours_grow_back_what_a_mask_lacks():
    picture = np.full((LOOK, LOOK, 3), 230, np.uint8)
    picture[30:90, 40:70] = (40, 60, 120)
    mask = np.zeros((LOOK, LOOK), bool)
    mask[30:84, 40:70] = True
    whole = np.zeros_like(mask)
    whole[30:90, 40:70] = True
    assert iou(regrown(picture, mask), whole) > iou(mask, whole)


def test_weights_survive_their_text():
    shipped = load_mask_judge()
    again = MaskJudge()
    fill(again, as_text(shipped))
    planes = torch.rand(1, PLANES, LOOK, LOOK)
    with torch.inference_mode():
        assert torch.allclose(shipped(planes)[1], again(planes)[1], atol=1e-3)
    assert len(files("packshot.imaging").joinpath("mask_judge.json").read_text()) <= 130_000


# ---- composed photographs ----


def test_a_composed_photograph_shows_its_product():
    plain = np.full((*SHAPE, 3), 200, np.float32)
    nothing = Setting(shadow=0, mirror=0, vignette=0, noise=0, quality=0, grey=False)
    rng = np.random.default_rng(0)
    taken = composites.compose(bottle(rng), plain, "grey", nothing, rng, 0.6)
    differs = np.abs(taken.rgb_HW3.astype(int) - 200).max(axis=2) > 3
    assert iou(differs, taken.alpha_HW > 0.05) > 0.98
    assert 0.55 < np.ptp(np.flatnonzero((taken.alpha_HW >= 0.5).any(axis=1))) / SHAPE[0] < 0.65


def test_shadow_and_mirror_image_lie_outside_of_the_truth():
    plain = np.full((*SHAPE, 3), 200, np.float32)
    loud = Setting(shadow=0.6, mirror=0.5, vignette=0, noise=0, quality=0, grey=False)
    taken = composites.compose(bottle(np.random.default_rng(0)), plain, "grey", loud, np.random.default_rng(1), 0.6)
    outside = taken.alpha_HW == 0
    assert (np.abs(taken.rgb_HW3[outside].astype(int) - 200).max(axis=1) > 20).sum() > 500


@pytest.mark.parametrize("name", GROUNDS)
def test_every_ground_fills_its_picture(name):
    ground = GROUNDS[name](np.random.default_rng(5), (300, 260))
    assert ground.shape == (300, 260, 3)
    assert ground.dtype == np.float32
    assert 0 <= ground.mean() <= 255


def test_a_product_takes_on_another_colour():
    red = Cutout("red", np.full((20, 20, 3), (200, 20, 20), np.uint8), np.ones((20, 20), np.float32))
    moved = composites.in_colour(red, (20, 20, 200), 1.0)
    assert np.abs(moved.rgb_HW3.mean(axis=(0, 1)) - (20, 20, 200)).max() < 2


# ---- what is learned ----


@pytest.mark.parametrize("change", CHANGES)
def test_changed_masks_stay_in_the_picture(change):
    taken = photograph()
    mask = taken.alpha_HW >= 0.5
    changed = change(taken.rgb_HW3, mask, np.random.default_rng(2))
    assert changed.shape == mask.shape
    assert changed.dtype == bool


def test_targets_are_soft_near_the_limit():
    assert target_of(0.8) == 0
    assert target_of(0.9) == pytest.approx(0.5)
    assert target_of(0.97) == 1


def test_training_writes_whole_weights(tmp_path, capsys):
    """Four photographs are too few to judge masks by; what is written can be read, and the held-out one is told."""
    studied = []
    for seed in range(4):
        one = study("packages", photograph("wall", seed), seed == 0, np.random.default_rng(seed))
        assert one is not None
        studied.append(one)
    fit(studied, Namespace(steps=6, seed=0, out=tmp_path / "weights.json", state=None))
    fill(MaskJudge(), (tmp_path / "weights.json").read_text())
    assert "3 found masks, 9 variants, 1 held out" in capsys.readouterr().out


@pytest.mark.parametrize("square", [(-20, -30, 90), (30, 10, 40), (70, 50, 80), (-10, -10, 200)])
def test_what_a_square_shows_returns_to_its_place(square):
    """Squares may lie beyond the frame on any side."""
    whole_HW = put_back(np.ones((56, 56), np.float32), square, (100, 120))
    left, top, side = square
    expected_HW = np.zeros((100, 120), np.float32)
    expected_HW[max(0, top) : top + side, max(0, left) : left + side] = 1
    np.testing.assert_allclose(whole_HW, expected_HW)


def test_the_judge_finds_the_half_that_a_mask_lacks(findings):
    for finding, truth_HW in findings:
        upper_HW = without_lower_half(truth_HW)
        wrong_HW = opinion_of(replace(finding, mask_HW=upper_HW)).wrong_HW
        assert wrong_HW[truth_HW & ~upper_HW].mean() > 0.5
        assert wrong_HW[upper_HW].mean() < 0.1


def test_a_correction_is_believed_no_more_than_the_mask_before(findings):
    finding, _ = findings[0]
    assert probability_right(replace(finding, right_before=0.25)) == 0.25


def test_a_wrong_mask_is_corrected(monkeypatch):
    taken = photograph("clutter", 11)

    def overlap():
        mask_HW = seek(taken.rgb_HW3, "mini").finding.mask_HW
        truth_HW = cv2.resize(taken.alpha_HW, mask_HW.shape[::-1], interpolation=cv2.INTER_AREA) >= 0.5
        return iou(mask_HW, truth_HW)

    corrected = overlap()
    monkeypatch.setattr("packshot.imaging.mask_judge.opinion_of", lambda found: None)
    assert overlap() < RIGHT < corrected
