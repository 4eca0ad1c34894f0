"""Schedule, targets, weights, keyed randomness: against diffusers or the formula of the paper."""

import pytest
import torch
from diffusers import DDPMScheduler

from packshot.diffusion import schedule
from packshot.diffusion.conditions import CONDITIONS
from packshot.diffusion.keyed import SampleKey, permutation

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}
T = torch.tensor([0, 1, 17, 500, 999])


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


def test_min_snr_weights_follow_the_paper():
    alphas = schedule.alphas_cumprod(SDXL)
    ratio = alphas[T] / (1 - alphas[T])
    expected = torch.minimum(ratio, torch.tensor(5.0))
    torch.testing.assert_close(schedule.min_snr_weight(T, alphas, 5.0, "epsilon"), expected / ratio)
    torch.testing.assert_close(schedule.min_snr_weight(T, alphas, 5.0, "v_prediction"), expected / (ratio + 1))


def test_debiased_weights_follow_the_paper_and_v_counts_like_epsilon():
    alphas = schedule.alphas_cumprod(SDXL)
    ratio = alphas[T] / (1 - alphas[T])
    epsilon = schedule.debiased_weight(T, alphas, 1000.0, "epsilon")
    torch.testing.assert_close(epsilon, 1 / ratio.clamp(max=1000).sqrt())
    # v = a eps - s x0, so an error of v is one of eps divided by a (Salimans & Ho 2022)
    torch.testing.assert_close(schedule.debiased_weight(T, alphas, 1000.0, "v_prediction"), epsilon * alphas[T])


def test_zero_terminal_snr_equals_diffusers_and_no_v_weight_is_nan():
    theirs = DDPMScheduler(**SDXL, rescale_betas_zero_snr=True)
    ours = schedule.rescale_zero_terminal_snr(schedule.alphas_cumprod(SDXL))
    torch.testing.assert_close(ours, theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
    assert ours[-1] == 0
    for weight in (schedule.min_snr_weight, schedule.debiased_weight):
        assert torch.isfinite(weight(torch.arange(1000), ours, 5.0, "v_prediction")).all()


@pytest.mark.parametrize("kind", schedule.TIMESTEPS)
def test_timesteps_stay_in_range_and_are_distributed_as_they_say(kind):
    g = torch.Generator().manual_seed(0)
    drawn = torch.tensor([int(schedule.TIMESTEPS[kind](g, 100, 900)) for _ in range(4000)])
    assert drawn.min() >= 100
    assert drawn.max() <= 899
    share = (drawn - 100) / 800
    expected = {"uniform": 0.5, "logit_normal": 0.5, "cubic": 0.75}[kind]  # means; E[1 - u^3] = 3/4
    assert abs(float(share.mean()) - expected) < 0.02
    spread = {"uniform": 12**-0.5, "logit_normal": 0.2083, "cubic": (1 / 7 - 1 / 16) ** 0.5}[kind]
    assert abs(float(share.std()) - spread) < 0.01


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


def test_control_maps_mark_the_unknown_and_ignore_the_old_background():
    import numpy as np

    generator = np.random.default_rng(0)
    mask = np.zeros((32, 32), np.float32)
    mask[8:24, 8:24] = 1
    first, second = (generator.random((32, 32, 3)).astype(np.float32) for _ in range(2))
    second[8:24, 8:24] = first[8:24, 8:24]
    inpaint = CONDITIONS["inpaint"](first, mask)
    assert (inpaint[mask == 0] == -1).all()
    assert np.array_equal(inpaint[mask == 1], first[mask == 1])
    for condition in CONDITIONS.values():
        assert np.array_equal(condition(first, mask), condition(second, mask))
    canny = CONDITIONS["canny"](first, mask)
    assert canny.min() >= 0
    assert canny.max() == 1
