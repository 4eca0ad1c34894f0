"""Schedule, targets, weights, keyed randomness: against diffusers or the formula of the paper."""

import math
from dataclasses import replace
from math import erf

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from packshot.config.conditions import CONDITIONS
from packshot.config.schema import LossWeighting, TimestepSampling
from packshot.diffusion import schedule
from packshot.diffusion.latents import LatentScale
from packshot.engine.keyed_random import SampleKey, permutation
from packshot.imaging.control_maps import DEPTH_FLOOR, LIGHT_FLOOR, Control, View, keep_mask

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}
T = torch.tensor([0, 1, 17, 500, 999])
EVERY = torch.arange(1000)


def ratio_in_float64(zero_terminal=False):
    """The snr of SDXL's schedule by numpy, (1000,)."""
    betas = np.linspace(SDXL["beta_start"] ** 0.5, SDXL["beta_end"] ** 0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    if zero_terminal:  # algorithm 1 of arXiv 2305.08891: shift the last to zero, scale the first back
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2 / (1 - root**2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def tensors():
    g = torch.Generator().manual_seed(0)
    return torch.randn(5, 4, 8, 8, generator=g), torch.randn(5, 4, 8, 8, generator=g)


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_schedule_and_noising_equal_diffusers(kind, tensors):
    theirs = DDPMScheduler(**{**SDXL, "beta_schedule": kind})
    ours = schedule.alphas_cumprod({**SDXL, "beta_schedule": kind})
    torch.testing.assert_close(ours, theirs.alphas_cumprod, rtol=2e-5, atol=1e-7)
    latents, noise = tensors
    torch.testing.assert_close(
        schedule.add_noise(latents, noise, T, ours), theirs.add_noise(latents, noise, T), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        schedule.TARGETS["v_prediction"](latents, noise, T, ours),
        theirs.get_velocity(latents, noise, T),
        rtol=1e-4,
        atol=1e-5,
    )
    assert torch.equal(schedule.TARGETS["epsilon"](latents, noise, T, ours), noise)


def test_noising_stays_in_fp32_for_low_precision_latents(tensors):
    latents, noise = tensors
    noisy = schedule.add_noise(latents.bfloat16(), noise.bfloat16(), T, schedule.alphas_cumprod(SDXL))
    assert noisy.dtype == torch.float32
    # bf16 arithmetic would give sigma 0 at t=0 and return the latents themselves
    assert not torch.equal(noisy[0], latents.bfloat16()[0].float())


# weight of every step of SDXL from its snr and gamma, by the papers
EXPECTED_WEIGHTS = {
    ("none", "epsilon"): lambda r, gamma: np.ones_like(r),
    ("none", "v_prediction"): lambda r, gamma: np.ones_like(r),
    ("min_snr", "epsilon"): lambda r, gamma: np.minimum(r, gamma) / r,
    ("min_snr", "v_prediction"): lambda r, gamma: np.minimum(r, gamma) / (r + 1),
    ("debiased", "epsilon"): lambda r, gamma: 1 / np.sqrt(np.minimum(r, 1000)),
    ("debiased", "v_prediction"): lambda r, gamma: 1 / np.sqrt(np.minimum(r, 1000)) * r / (r + 1),
}


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize(("weighting", "prediction_type"), EXPECTED_WEIGHTS)
def test_loss_weights_follow_the_papers_at_every_step(weighting, prediction_type, gamma):
    weight = schedule.LOSS_WEIGHTS[weighting](EVERY, schedule.alphas_cumprod(SDXL), gamma, prediction_type)
    assert weight.dtype == torch.float32
    expected = EXPECTED_WEIGHTS[weighting, prediction_type](ratio_in_float64(), gamma)
    np.testing.assert_allclose(weight.numpy(), expected, rtol=2e-4)


def test_every_loss_weighting_of_the_config_is_known():
    assert list(schedule.LOSS_WEIGHTS) == [weighting.name for weighting in LossWeighting]
    assert list(schedule.TIMESTEPS) == [sampling.name for sampling in TimestepSampling]


@pytest.mark.parametrize("weighting", schedule.LOSS_WEIGHTS)
def test_loss_weights_are_finite_and_fp32_for_a_bf16_schedule(weighting):
    alphas = schedule.alphas_cumprod(SDXL).bfloat16()
    steps = EVERY[(alphas < 1)]  # bf16 rounds the first steps to 1
    for prediction_type in schedule.TARGETS:
        weight = schedule.LOSS_WEIGHTS[weighting](steps, alphas, 5.0, prediction_type)
        assert weight.dtype == torch.float32
        assert torch.isfinite(weight).all()


@pytest.mark.parametrize("weighting", ["min_snr", "debiased"])
def test_weighted_v_and_epsilon_losses_are_equal(weighting, tensors):
    """For the same prediction, written in both ways."""
    alphas = schedule.alphas_cumprod(SDXL)
    latents, noise = (tensor.double() for tensor in tensors)
    a = alphas.double()[T].view(-1, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    v_hat = torch.randn(latents.shape, generator=generator(1)).double()
    epsilon_hat = a.sqrt() * v_hat + (1 - a).sqrt() * noisy  # Salimans & Ho 2022, appendix D
    v = a.sqrt() * noise - (1 - a).sqrt() * latents
    weigh = schedule.LOSS_WEIGHTS[weighting]
    torch.testing.assert_close(
        weigh(T, alphas, 5.0, "v_prediction") * (v_hat - v).square().mean(dim=(1, 2, 3)),
        weigh(T, alphas, 5.0, "epsilon") * (epsilon_hat - noise).square().mean(dim=(1, 2, 3)),
        rtol=1e-3,
        atol=1e-7,
    )


def test_zero_terminal_snr_follows_algorithm_1_and_diffusers(tensors):
    before = schedule.alphas_cumprod(SDXL)
    ours = schedule.rescale_zero_terminal_snr(before)
    theirs = DDPMScheduler(**SDXL, rescale_betas_zero_snr=True)
    torch.testing.assert_close(ours, theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
    ratio = ratio_in_float64(zero_terminal=True)
    np.testing.assert_allclose(ours.numpy(), ratio / (1 + ratio), rtol=1e-4, atol=1e-7)
    assert ours.dtype == schedule.rescale_zero_terminal_snr(before.bfloat16()).dtype == torch.float32
    assert ours[0] == before[0]
    assert ours[-1] == 0
    assert (ours.diff() < 0).all()
    torch.testing.assert_close(schedule.rescale_zero_terminal_snr(ours), ours)
    latents, noise = tensors
    last = torch.full((5,), 999)
    assert torch.equal(schedule.add_noise(latents, noise, last, ours), noise)
    assert torch.equal(schedule.TARGETS["v_prediction"](latents, noise, last, ours), -latents)


@pytest.mark.parametrize("weighting", schedule.LOSS_WEIGHTS)
def test_no_v_weight_is_nan_under_zero_terminal_snr(weighting):
    alphas = schedule.rescale_zero_terminal_snr(schedule.alphas_cumprod(SDXL))
    weight = schedule.LOSS_WEIGHTS[weighting](EVERY, alphas, 5.0, "v_prediction")
    expected = EXPECTED_WEIGHTS[weighting, "v_prediction"](ratio_in_float64(zero_terminal=True)[:-1], 5.0)
    np.testing.assert_allclose(weight[:-1].numpy(), expected, rtol=1e-3)
    assert weight[-1] == (1 if weighting == "none" else 0)
    # what the config check keeps out (test_config.py)
    epsilon = schedule.LOSS_WEIGHTS[weighting](EVERY, alphas, 5.0, "epsilon")
    assert torch.isfinite(epsilon[-1]) == (weighting == "none")


@pytest.mark.parametrize("kind", schedule.TIMESTEPS)
def test_timesteps_stay_in_range_and_in_distribution(kind):
    g = torch.Generator().manual_seed(0)
    drawn = torch.tensor([int(schedule.TIMESTEPS[kind](g, 100, 900)) for _ in range(4000)])
    assert drawn.min() >= 100
    assert drawn.max() <= 899
    share = (drawn - 100) / 800
    expected = {"uniform": 0.5, "logit_normal": 0.5, "cubic": 0.75}[kind]  # means; E[1 - u^3] = 3/4
    assert abs(float(share.mean()) - expected) < 0.02
    spread = {"uniform": 12**-0.5, "logit_normal": 0.2083, "cubic": (1 / 7 - 1 / 16) ** 0.5}[kind]
    assert abs(float(share.std()) - spread) < 0.01


LOGIT = [(0.0, 1.0), (1.0, 0.5), (-0.7, 2.0)]


@pytest.mark.parametrize(
    ("sampling", "location", "scale"),
    [("uniform", 0.0, 1.0), ("cubic", 0.0, 1.0), *(("logit_normal", *p) for p in LOGIT)],
)
def test_timesteps_have_the_distribution_of_the_formula(sampling, location, scale):
    share = np.array([0.1, 0.25, 0.5, 0.75, 0.9])
    expected = {
        "uniform": share,
        "cubic": 1 - np.cbrt(1 - share),  # 1 - u^3 < q
        "logit_normal": [0.5 + 0.5 * erf((np.log(q / (1 - q)) - location) / scale / 2**0.5) for q in share],
    }[sampling]
    g = generator()
    drawn = np.array([int(schedule.draw_timestep(g, sampling, 1000, 0, None, location, scale)) for _ in range(4000)])
    assert np.abs((drawn[:, None] < share * 1000).mean(axis=0) - expected).max() < 0.025  # 3 sigma


@given(
    sampling=st.sampled_from(list(schedule.TIMESTEPS)),
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 4000),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    location=st.floats(-5, 5),
    scale=st.floats(0.05, 10),
)
@settings(max_examples=200, deadline=None)
def test_every_timestep_lies_between_its_ends(sampling, seed, steps, ends, location, scale):
    low, high = sorted(int(end * (steps - 1)) for end in ends)
    drawn = schedule.draw_timestep(generator(seed), sampling, steps, low, high, location, scale)
    assert drawn.dtype == torch.int64
    assert drawn.shape == ()
    assert low <= int(drawn) <= high


@given(seed=st.integers(0, 2**31), steps=st.integers(1, 4000))
@settings(max_examples=50, deadline=None)
def test_uniform_timesteps_are_plain_randint(seed, steps):
    """Over the whole schedule."""
    drawn = schedule.draw_timestep(generator(seed), "uniform", steps)
    assert torch.equal(drawn, torch.randint(0, steps, (), generator=generator(seed)))


@pytest.mark.parametrize("sampling", schedule.TIMESTEPS)
def test_both_ends_of_the_timestep_range_are_drawn(sampling):
    g = generator()
    assert {int(schedule.draw_timestep(g, sampling, 1000, 997, None)) for _ in range(300)} == {997, 998, 999}
    assert {int(schedule.draw_timestep(g, sampling, 1000, 0, 2)) for _ in range(300)} == {0, 1, 2}


def test_draws_at_the_end_of_their_interval_stay_in_range(monkeypatch):
    for draw, value in (("rand", 0.0), ("randn", 40.0), ("randn", -200.0)):
        monkeypatch.setattr(torch, draw, lambda *shape, generator, value=value: torch.tensor(value))
        sampling = "cubic" if draw == "rand" else "logit_normal"
        drawn = schedule.draw_timestep(generator(), sampling, 1000, 100, 900)
        assert int(drawn) == (900 if value >= 0 else 100)


@pytest.mark.parametrize("ends", [(-1, None), (5, 4), (0, 1000), (1000, None)])
def test_timestep_ranges_outside_the_schedule_are_refused(ends):
    with pytest.raises(ValueError, match="schedule"):
        schedule.draw_timestep(generator(), "uniform", 1000, *ends)


def test_offset_noise_shifts_each_channel_by_one_draw(tensors):
    noise = tensors[1][0]
    shift = torch.randn((4, 1, 1), generator=generator(3))
    assert torch.equal(schedule.offset_noise(noise, generator(3), 0.1), noise + 0.1 * shift)
    assert schedule.offset_noise(noise.bfloat16(), generator(3), 0.1).dtype == torch.float32
    g = generator(3)
    assert torch.equal(schedule.offset_noise(noise, g, 0.0), noise)
    assert torch.equal(g.get_state(), generator(3).get_state())  # nothing was drawn
    many = torch.randn(4000, 2, 2, generator=g)
    assert abs(float(schedule.offset_noise(many, g, 0.5).var()) - 1.25) < 0.05


def test_input_perturbation_adds_fresh_noise(tensors):
    noise = tensors[1][0]
    expected = noise + 0.1 * torch.randn(noise.shape, generator=generator(3))
    assert torch.equal(schedule.perturb_noise(noise, generator(3), 0.1), expected)
    assert schedule.perturb_noise(noise.bfloat16(), generator(3), 0.1).dtype == torch.float32
    g = generator(3)
    assert torch.equal(schedule.perturb_noise(noise, g, 0.0), noise)
    assert torch.equal(g.get_state(), generator(3).get_state())
    many = torch.randn(4, 64, 64, generator=g)
    assert abs(float(schedule.perturb_noise(many, g, 0.5).var()) - 1.25) < 0.05


@given(
    seed=st.integers(0, 2**31),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    weights=st.tuples(*[st.floats(0, 10, width=32)] * 3),
    width=st.integers(0, 4),
)
@settings(max_examples=60, deadline=None)
def test_the_ring_is_the_cells_around_the_product(seed, size, weights, width):
    """Every outer cell within its width."""
    alpha = torch.rand(1, *size, generator=generator(seed)) ** 3
    product, background, boundary = weights
    expected = product * alpha[0].numpy() + background * (1 - alpha[0].numpy())
    inside = np.argwhere(alpha[0].numpy() >= 0.5)
    for y, x in np.ndindex(*size):
        distance = np.abs(inside - (y, x)).max(axis=1).min() if len(inside) else np.inf
        if 0 < distance <= width:
            expected[y, x] *= boundary
    ours = schedule.boundary_weight(alpha, product, background, boundary, width)
    np.testing.assert_allclose(ours[0].numpy(), expected, rtol=1e-5, atol=1e-6)
    batch = schedule.boundary_weight(alpha[None].expand(2, -1, -1, -1), product, background, boundary, width)
    assert torch.equal(batch[1], ours)


def test_without_a_ring_weights_are_the_cells_shares():
    """In fp32."""
    alpha = torch.rand(1, 9, 7, generator=generator())
    plain = 0.5 * alpha + 2.0 * (1 - alpha)
    assert torch.equal(schedule.boundary_weight(alpha, 0.5, 2.0, 1.0, 2), plain)
    assert torch.equal(schedule.boundary_weight(alpha, 0.5, 2.0, 3.0, 0), plain)
    low = alpha.bfloat16()
    for boundary in (1.0, 3.0):
        ours = schedule.boundary_weight(low, 0.5, 2.0, boundary, 2)
        assert ours.dtype == torch.float32
        assert torch.equal(ours, schedule.boundary_weight(low.float(), 0.5, 2.0, boundary, 2))
    for share in (0.0, 1.0):  # no product, nothing but product
        cells = torch.full((1, 9, 7), share)
        assert torch.equal(
            schedule.boundary_weight(cells, 0.5, 2.0, 3.0, 2), torch.full((1, 9, 7), 0.5 if share else 2.0)
        )


def test_a_ring_outside_the_product_weighs_more():
    alpha = torch.zeros(1, 9, 9)
    alpha[:, 3:6, 3:6] = 1
    alpha[:, 3, 3] = 0.25
    plain = schedule.boundary_weight(alpha, 0.5, 2.0, 1.0, 2)
    torch.testing.assert_close(plain, 0.5 * alpha + 2.0 * (1 - alpha))
    ringed = schedule.boundary_weight(alpha, 0.5, 2.0, 3.0, 1)
    ratio = ringed / plain
    assert torch.equal(ratio[:, 4, 4], torch.ones(1))  # inside
    assert torch.equal(ratio[:, 2, 4], torch.full((1,), 3.0))  # one cell outside
    assert torch.equal(ratio[:, 3, 3], torch.full((1,), 3.0))  # mostly background: it counts as outside
    assert torch.equal(ratio[:, 0, 0], torch.ones(1))


def test_masked_mse_averages_over_the_mask(tensors):
    a, b = tensors
    weight = torch.zeros(5, 1, 8, 8)
    weight[:, :, :4] = 1
    torch.testing.assert_close(
        schedule.masked_mse(a, b, weight), (a - b).square()[:, :, :4].mean(dim=(1, 2, 3)), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(schedule.masked_mse(a, b), (a - b).square().mean(dim=(1, 2, 3)))
    # a sum of weights in bf16 would be off by up to 0.4 %
    weight = (torch.rand(5, 1, 8, 8, generator=generator()) + 0.5).bfloat16()
    ours = schedule.masked_mse(a.bfloat16(), b.bfloat16(), weight)
    error, weight_64 = (a.bfloat16().double() - b.bfloat16().double()).square().numpy(), weight.double().numpy()
    assert ours.dtype == torch.float32
    expected = (error.mean(axis=1) * weight_64[:, 0]).sum(axis=(1, 2)) / weight_64.sum(axis=(1, 2, 3))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5)
    assert torch.isfinite(schedule.masked_mse(a, b, torch.zeros(5, 1, 8, 8))).all()


def test_draws_depend_on_seed_epoch_sample_and_use_only():
    def draw(key, use):
        return torch.randn(4, generator=key.generator(use))

    key = SampleKey(0, 0, "a")
    assert torch.equal(draw(key, "noise"), draw(SampleKey(0, 0, "a"), "noise"))
    others = [SampleKey(1, 0, "a"), SampleKey(0, 1, "a"), SampleKey(0, 0, "b")]
    assert all(not torch.equal(draw(key, "noise"), draw(other, "noise")) for other in others)
    assert not torch.equal(draw(key, "noise"), draw(key, "timestep"))
    assert sorted(permutation(0, 3, 50).tolist()) == list(range(50))
    assert not torch.equal(permutation(0, 0, 50), permutation(0, 1, 50))


def square_view(seed=0, inside=None):
    """A product of noise in the middle of other noise, with a depth."""
    draws, mask = np.random.default_rng(seed), np.zeros((32, 32), np.float32)
    mask[8:24, 8:24] = 1
    image, near = draws.random((32, 32, 3)).astype(np.float32), draws.random((32, 32)).astype(np.float32)
    if inside is not None:
        image[mask == 1], near[mask == 1] = inside.image_HWC[mask == 1], inside.inputs["depth"][mask == 1]
    return View(image, mask, {"depth": near, "light": (1.0, 0.0)})


def test_control_maps_ignore_the_old_background():
    """What is unknown is marked."""
    first = square_view()
    second, mask = square_view(1, inside=first), first.mask_HW
    shown = {name: Control(name).draw(first) for name in CONDITIONS}
    assert (shown["inpaint"][mask == 0] == -1).all()
    assert np.array_equal(shown["inpaint"][mask == 1], first.image_HWC[mask == 1])
    for name in CONDITIONS:
        assert np.array_equal(shown[name], Control(name).draw(second))
        assert shown[name].shape == (32, 32, 3)
        assert shown[name].dtype == np.float32
        if name != "inpaint":
            assert shown[name].min() == 0
            assert shown[name].max() == 1
    # the product's inside is empty in its silhouette, and nowhere else
    assert not shown["silhouette"][11:21, 11:21].any()
    assert all(shown[name][11:21, 11:21].any() for name in ("canny", "softedge", "depth"))


def test_the_depth_map_is_the_products_relief():
    """Whatever the scale of the depth."""
    view = square_view()
    slope = np.tile(np.linspace(0.4, 0.6, 32, dtype=np.float32), (32, 1))
    relief = Control("depth").draw(replace(view, inputs={"depth": slope}))[16, 8:24, 0]
    assert relief[0] == pytest.approx(DEPTH_FLOOR)
    assert relief[-1] == pytest.approx(1)
    assert (np.diff(relief) >= 0).all()
    again = Control("depth").draw(replace(view, inputs={"depth": 0.1 + 0.5 * slope}))[16, 8:24, 0]
    np.testing.assert_allclose(relief, again, atol=1e-4)


@given(st.floats(0, 2 * math.pi), st.floats(0, 1))
def test_the_light_map_is_brightest_where_light_comes_from(angle, length):
    right, up = length * math.cos(angle), length * math.sin(angle)
    shown = Control("light").draw(replace(square_view(), inputs={"light": (right, up)}))[..., 0]
    ground = np.where(square_view().mask_HW == 1, np.nan, shown)
    middle = (1 + LIGHT_FLOOR) / 2
    # its corners are as far from the middle as the light is one-sided, whichever way it falls
    assert np.nanmax(ground) == pytest.approx(middle + length * (1 - middle), abs=1e-5)
    assert np.nanmin(ground) == pytest.approx(middle - length * (1 - middle), abs=1e-5)
    if length > 0.1 and abs(right) > 0.05:
        assert np.sign(np.nanmean(ground[:, 16:]) - np.nanmean(ground[:, :16])) == np.sign(right)
    if length > 0.1 and abs(up) > 0.05:
        assert np.sign(np.nanmean(ground[:16]) - np.nanmean(ground[16:])) == np.sign(up)


@pytest.mark.parametrize("condition", ["depth", "light"])
def test_a_map_without_its_input_is_refused(condition):
    with pytest.raises(ValueError, match=f"the {condition} condition needs {condition}"):
        Control(condition).draw(replace(square_view(), inputs={}))


@given(st.floats(-5, 5), st.floats(0, 6))
def test_a_keep_mask_grows_by_px_and_fades_around_its_outline(grow, feather):
    mask = square_view().mask_HW
    keep = keep_mask(mask, grow, feather)
    assert keep.min() >= 0
    assert keep.max() <= 1
    # along a line through the middle, its area is the product's width and grow at both ends
    assert keep[16].sum() == pytest.approx(16 + 2 * grow, abs=1.01)
    soft = (keep[16] > 0) & (keep[16] < 1)
    assert soft.sum() <= 2 * (feather + 1)
    assert feather or not soft.any()
    assert np.array_equal(keep_mask(mask), mask)


def test_masks_of_nothing_and_everything_stay():
    for mask in (np.zeros((8, 8), np.float32), np.ones((8, 8), np.float32)):
        assert np.array_equal(keep_mask(mask, 2, 3), mask)
        view = View(np.full((8, 8, 3), 0.5, np.float32), mask, {"depth": mask, "light": (0.0, 0.5)})
        assert all(np.isfinite(Control(name).draw(view)).all() for name in CONDITIONS)


# ---- latents ----


def test_latents_are_shifted_and_scaled_as_the_vae_says():
    g = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.5, 1.0, 2.0, 4.0]).view(-1, 1, 1)
    latents = torch.randn(3, 4, 8, 8, generator=g) * spread + 2 * spread
    odd = {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0, 4.0, 8.0], "latents_std": [0.5, 1.0, 2.0, 4.0]}
    scale = LatentScale.of(odd)
    scaled = scale.to_unet(latents)
    for channel, (mean, std) in enumerate(zip(odd["latents_mean"], odd["latents_std"], strict=True)):
        torch.testing.assert_close(scaled[:, channel], (latents[:, channel] - mean) / std * 0.5)
    torch.testing.assert_close(scale.to_vae(scaled), latents)
    torch.testing.assert_close(scale.to_unet(latents[0]), scaled[0])  # of one sample
    # with the factor alone nothing else is computed: the same bits
    for config in ({"scaling_factor": 0.13025}, {"scaling_factor": 0.13025, "latents_mean": None, "latents_std": None}):
        assert torch.equal(LatentScale.of(config).to_unet(latents), latents * 0.13025)
        assert torch.equal(LatentScale.of(config).to_vae(latents), latents / 0.13025)


def test_zero_terminal_snr_brings_guidance_back_to_scale():
    """Pipelines that take the argument are given it; the stock ControlNet pipeline has none."""
    from types import SimpleNamespace

    from diffusers import StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline

    from packshot.diffusion.sample import GUIDANCE_RESCALE, rescaled_guidance

    def pipeline(cls, zero_snr):
        pipe = cls.__new__(cls)
        object.__setattr__(pipe, "scheduler", SimpleNamespace(config={"rescale_betas_zero_snr": zero_snr}))
        return pipe

    assert rescaled_guidance(pipeline(StableDiffusionXLPipeline, True)) == {"guidance_rescale": GUIDANCE_RESCALE}
    assert rescaled_guidance(pipeline(StableDiffusionXLPipeline, False)) == {}
    assert rescaled_guidance(pipeline(StableDiffusionXLControlNetPipeline, True)) == {}
