"""Every sampler that generation offers holds the product: one test for all of them."""

import json
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from serving_fixtures import product_pair

from packshot.base.schedulers import make_scheduler
from packshot.config.compose import compose
from packshot.config.schedulers import SCHEDULERS, UNUSABLE
from packshot.config.schema import GenerateSettings
from packshot.diffusion.hold_product import INPUT_SCALES, first_latents, hold_product
from packshot.errors import ConfigError
from packshot.generate import Packshot


def base(**changes):
    with open("data/models/sdxl/scheduler/scheduler_config.json") as file:
        return diffusers.EulerDiscreteScheduler.from_config({**json.load(file), **changes})


class Stock:
    """What a stock pipeline does; the network answers with noise. seen: what it was shown at each step."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.seen = []

    def draw(self, latents, callback, steps):
        self.scheduler.set_timesteps(steps)
        latents = latents * self.scheduler.init_noise_sigma
        generator = torch.Generator().manual_seed(7)
        for step, timestep in enumerate(self.scheduler.timesteps):
            self.seen.append(self.scheduler.scale_model_input(latents, timestep).clone())
            answer = torch.randn(latents.shape, generator=generator)
            takes = self.scheduler.step.__code__.co_varnames
            extra = {"generator": generator} if "generator" in takes else {}
            latents = self.scheduler.step(answer, timestep, latents, **extra).prev_sample
            latents = callback(self, step, timestep, {"latents": latents})["latents"]
        return latents


def expected(scheduler, shown, known, noise, step):
    """What the network has to see of held cells at a step."""
    if shown == "clean":
        return known
    state = scheduler.add_noise(known, noise, scheduler.timesteps[step : step + 1])
    return state / INPUT_SCALES[type(scheduler).__name__](scheduler, step)


@pytest.mark.parametrize("shown", ["clean", "noised"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_held_cells_have_the_products_own_noise(name, prediction, spacing, shown):
    """Where the noise alone begins, the first step of ``noised`` shows no product; the last state is exact."""
    scheduler = make_scheduler(name, base(prediction_type=prediction, timestep_spacing=spacing))
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(1, 4, 6, 6, generator=generator)
    noise = torch.randn(1, 4, 6, 6, generator=generator)
    held = torch.zeros(1, 6, 6)
    held[:, 2:4, 1:5] = 1
    inside = held[0].bool()
    stock = Stock(scheduler)
    start = first_latents(known, noise, held, shown, scheduler, 6)
    result = stock.draw(start, hold_product(known, noise, held, shown), 6)
    assert len(stock.seen) == len(scheduler.timesteps) == 6
    for step, seen in enumerate(stock.seen):
        if step or shown == "clean":
            wanted = expected(scheduler, shown, known, noise, step)
            torch.testing.assert_close(seen[..., inside], wanted[..., inside], rtol=1e-5, atol=1e-5)
    assert torch.equal(result[..., inside], known[..., inside])


def leave_alone(pipe, step, timestep, tensors):
    return tensors


@pytest.mark.parametrize("name", SCHEDULERS)
def test_free_cells_are_drawn_as_without_a_hold(name):
    """What a sampler remembers of held cells does not leak into others."""
    generator = torch.Generator().manual_seed(0)
    known, noise = torch.randn(2, 1, 4, 6, 6, generator=generator)
    held = torch.zeros(1, 6, 6)
    held[:, 2:4, 1:5] = 1
    free = ~held[0].bool()
    drawn = Stock(make_scheduler(name, base())).draw(noise, hold_product(known, noise, held, "noised"), 6)
    alone = Stock(make_scheduler(name, base())).draw(noise, leave_alone, 6)
    assert torch.equal(drawn[..., free], alone[..., free])
    assert not torch.equal(drawn[..., ~free], alone[..., ~free])


def test_unipcs_corrector_drops_the_hold_between_two_views():
    """UniPC goes on from its own corrected state instead of the one that the hold wrote. The hold writes again after
    the step, so neither the network nor the result ever shows that state."""
    known, noise = torch.randn(2, 1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    scheduler = make_scheduler("unipc", base())
    hold = hold_product(known, noise, torch.ones(1, 6, 6), "noised")
    written = []
    gone_on_from = []

    def watch(pipe, step, timestep, tensors):
        gone_on_from.append(scheduler.last_sample.clone())
        tensors = hold(pipe, step, timestep, tensors)
        written.append(tensors["latents"].clone())
        return tensors

    stock = Stock(scheduler)
    stock.draw(noise, watch, 6)
    for step in range(1, 6):
        assert torch.equal(stock.seen[step], written[step - 1])
        assert not torch.allclose(gone_on_from[step], written[step - 1], atol=0.1)
    assert torch.equal(written[-1], known)


@pytest.mark.parametrize("name", UNUSABLE)
def test_samplers_that_cannot_hold_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"scheduler={name} cannot hold a product"):
        compose("generate", [f"scheduler={name}"])


def test_unknown_samplers_and_too_many_steps_are_refused():
    with pytest.raises(ConfigError, match="scheduler=eular is not known"):
        compose("generate", ["scheduler=eular"])
    with pytest.raises(ConfigError, match="at most 50 steps, num_inference_steps=51"):
        compose("generate", ["scheduler=lcm", "num_inference_steps=51"])


FEW_STEPS = ("lcm", "lightning", "hyper")


@pytest.mark.parametrize("name", FEW_STEPS)
def test_presets_for_few_steps_begin_at_pure_noise(name):
    """Also over a base that spaces its steps from below, as SDXL does, and begins beside pure noise."""
    config = compose("generate", [f"preset={name}"])
    assert config.guidance_scale == 1
    assert config.num_inference_steps <= 8
    leading = base(timestep_spacing="leading", steps_offset=1)
    leading.set_timesteps(config.num_inference_steps)
    assert leading.timesteps[0] < 900
    scheduler = make_scheduler(config.scheduler, leading)
    scheduler.set_timesteps(config.num_inference_steps)
    assert scheduler.timesteps[0] == 999
    assert len(scheduler.timesteps) == config.num_inference_steps


def test_without_guidance_the_network_sees_each_step_once():
    config = compose("generate", ["preset=lightning"])
    tool = Packshot.load().set_product(*product_pair())
    batches = []
    tool.models.pipe.unet.register_forward_pre_hook(lambda module, given: batches.append(len(given[0])))
    settings = GenerateSettings(
        num_inference_steps=config.num_inference_steps, guidance_scale=1, scheduler=config.scheduler
    )
    tool.generate("a table", 1, settings=settings)
    assert batches == [1] * 4


def test_samplers_draw_and_leave_the_base_as_it_was():
    tool = Packshot.load().set_product(*product_pair())
    settings = GenerateSettings(num_inference_steps=3, guidance_scale=2.0)
    [before] = tool.generate("a table", 1, settings=settings)
    pictures = {before.png}
    for name in SCHEDULERS:
        [result] = tool.generate("a table", 1, settings=replace(settings, scheduler=name))
        assert result.certificate["core"]["max_abs_diff"] == 0
        assert result.certificate["request"]["scheduler"] == name
        assert np.isfinite(np.asarray(result.layers["raw"])).all()
        pictures.add(result.png)
    # Euler is the base's own, and DDIM takes the same steps in other words, with either spacing
    assert len(pictures) >= len(SCHEDULERS) - 2
    [after] = tool.generate("a table", 1, settings=settings)
    assert after.png == before.png
