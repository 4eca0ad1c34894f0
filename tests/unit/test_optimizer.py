"""Optimizers resume bit for bit, learn, and take their rates from closed forms."""

import io
import math

import pytest
import torch
from torch import nn

from packshot.config.compose import compose
from packshot.config.schema import LRSchedule, OptimConfig, OptimizerKind, TrainConfig
from packshot.core.errors import ConfigError
from packshot.train.optimizer import (
    build_optimizer,
    evaluation_mode,
    learning_rate,
    schedule,
    set_learning_rate,
    training_mode,
)

RATES = {OptimizerKind.prodigy: 1.0, OptimizerKind.adafactor: 0.05}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 96), nn.Tanh(), nn.Linear(96, 64))  # 6144 weights: eight bits come in at 4096


def loss(model, step):
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
    return (model(x) - x.repeat(1, 4)).square().mean()


def train(model, optimizer, steps):
    for step in steps:
        training_mode(optimizer)
        set_learning_rate(optimizer, step, TrainConfig(max_steps=300, lr_schedule=LRSchedule.constant))
        loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    evaluation_mode(optimizer)


def build(kind, model):
    return build_optimizer(dict(model.named_parameters()), OptimConfig(kind=kind), RATES.get(kind, 3e-3))


@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_a_stored_and_restored_optimizer_goes_on_bit_for_bit(kind):
    whole, first = network(), network()
    optimizer = build(kind, whole)
    for steps in (range(4), range(4, 8)):  # both runs stop to evaluate after four
        train(whole, optimizer, steps)
    optimizer = build(kind, first)
    train(first, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    second = network()
    second.load_state_dict(stored["model"])
    optimizer = build(kind, second)
    optimizer.load_state_dict(stored["optimizer"])
    train(second, optimizer, range(4, 8))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_every_optimizer_learns(kind):
    model = network()
    before = loss(model, 1000).item()
    train(model, build(kind, model), range(150))
    assert loss(model, 1000).item() < 0.7 * before


def test_eight_bit_moments_are_eight_bit():
    model = network()
    optimizer = build(OptimizerKind.adam8bit, model)
    train(model, optimizer, range(2))
    assert optimizer.state[model[2].weight]["state1"].dtype == torch.uint8


def test_groups_have_rates_of_their_own_all_the_way():
    model = network()
    config = OptimConfig(groups=[r"^2\.=1e-2"])
    optimizer = build_optimizer(dict(model.named_parameters()), config, 1e-3)
    train_config = TrainConfig(max_steps=10, lr_schedule=LRSchedule.linear)
    assert set_learning_rate(optimizer, 5, train_config) == pytest.approx(5e-4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 5e-3])
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]


@pytest.mark.parametrize("pattern", ["nothing_like_it=1e-3", "0.weight", "([=1e-3"])
def test_a_group_that_matches_nothing_is_refused(pattern):
    with pytest.raises(ConfigError, match=r"optim\.groups"):
        build_optimizer(dict(network().named_parameters()), OptimConfig(groups=[pattern]), 1e-3)


def test_schedules_pass_through_known_points():
    def at(done, kind, **settings):
        config = TrainConfig(max_steps=1000, learning_rate=2.0, lr_schedule=kind, **settings)
        return learning_rate(round(done * 1000), config) / 2.0

    assert at(0.5, LRSchedule.polynomial, lr_power=2.0) == pytest.approx(0.25)
    assert [at(d, LRSchedule.wsd, lr_decay_share=0.2) for d in (0.0, 0.79, 0.9, 1.0)] == pytest.approx([1, 1, 0.5, 0])
    restarts = [at(d, LRSchedule.cosine_restarts, lr_cycles=2) for d in (0.0, 0.25, 0.499, 0.5)]
    assert restarts == pytest.approx([1, 0.5, 0, 1], abs=1e-4)
    assert at(1.0, LRSchedule.cosine, lr_min_ratio=0.1) == pytest.approx(0.1)
    assert at(0.5, LRSchedule.linear, lr_min_ratio=0.1) == pytest.approx(0.55)


@pytest.mark.parametrize("kind", list(LRSchedule))
def test_every_schedule_starts_with_its_warm_up_and_stays_within_the_peak(kind):
    config = TrainConfig(max_steps=100, warmup_steps=10, lr_schedule=kind)
    shares = [schedule(step, config) for step in range(101)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert all(0 <= share <= 1 and math.isfinite(share) for share in shares)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optim=schedule_free"], "train.lr_schedule=constant"),
        (["optim=prodigy", "train.learning_rate=1e-4"], "train.learning_rate=1"),
    ],
)
def test_settings_that_an_optimizer_cannot_work_with_are_refused(overrides, says):
    with pytest.raises(ConfigError, match=says):
        compose("train_lora", overrides)
