"""Optimizers resume bit for bit, learn, and take their rates from closed forms."""

import io
import math
from itertools import count

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from test_loop import ROWS, Regression, Samples
from torch import nn

from packshot.config.compose import compose
from packshot.config.schema import CaptionVLM, LRSchedule, OptimConfig, OptimizerKind, TrainConfig
from packshot.engine.loop import Validated, fit
from packshot.engine.optimizers import (
    build_optimizer,
    evaluation_mode,
    learning_rate,
    schedule,
    set_learning_rate,
    training_mode,
)
from packshot.engine.processes import Session, make_accelerator
from packshot.errors import ConfigError, PackshotError
from packshot.runs.folder import Run, log
from packshot.runs.tracking import NullTracker

RATES = {OptimizerKind.prodigy: 1.0}


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


def run_fit(path, kind, task=None):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    path.mkdir(exist_ok=True)
    config = CaptionVLM(optim=OptimConfig(kind=kind))
    config.train = TrainConfig(
        max_steps=10,
        batch_size=3,
        checkpointing_steps=4,
        validation_steps=3,
        learning_rate=RATES.get(kind, 1e-2),
        lr_schedule=LRSchedule.constant,
        warmup_steps=2,
    )
    task = task or Regression()
    fit(task, Samples(ROWS), config, Session(make_accelerator(config.train), path, Run(path, False), NullTracker()))
    return task


@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path, kind):
    class Killed(Exception):
        pass

    class Dying(Regression):
        def __init__(self):
            super().__init__()
            self.calls = count(1)

        def forward(self, batch):
            if next(self.calls) == 6:  # after the checkpoint at 4, between the validations at 3 and 6
                raise Killed
            return super().forward(batch)

    unbroken = run_fit(tmp_path / "a", kind)
    with pytest.raises(Killed):
        run_fit(tmp_path / "b", kind, Dying())
    resumed = run_fit(tmp_path / "b", kind)
    for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedule_free_validates_saves_and_returns_the_average_not_the_training_point(tmp_path):
    class Watched(Regression):
        def __init__(self):
            super().__init__()
            self.trained_at, self.validated_at = [], []

        def forward(self, batch):
            self.trained_at.append(self.linear.weight.detach().clone())
            return super().forward(batch)

        def validate(self, folder, accelerator):
            self.validated_at.append(self.linear.weight.detach().clone())
            return Validated({})

    task = run_fit(tmp_path, OptimizerKind.schedule_free, Watched())
    assert len(task.trained_at) == 10
    assert len(task.validated_at) == 4  # at 3, 6, 9 and 10
    for step, average in zip((3, 6, 9), task.validated_at, strict=False):  # forward pass `step` follows the validation
        assert not torch.equal(average, task.trained_at[step])
    assert not torch.load(tmp_path / "checkpoints" / "8" / "optimizer.pt")["param_groups"][0]["train_mode"]
    saved = load_file(tmp_path / "checkpoints" / "10" / "trainable.safetensors")
    assert torch.equal(saved["linear.weight"], task.validated_at[-1])
    assert torch.equal(saved["linear.weight"], task.linear.weight)


@pytest.mark.parametrize("kind", [kind for kind in OptimizerKind if kind is not OptimizerKind.prodigy])
def test_a_matrix_that_starts_at_zero_moves_at_the_learning_rate(kind):
    up = nn.Parameter(torch.zeros(64, 80))  # as a LoRA's second matrix
    optimizer = build_optimizer({"up": up}, OptimConfig(kind=kind), 1e-5)
    for step in range(20):
        training_mode(optimizer)
        set_learning_rate(optimizer, step, TrainConfig(max_steps=20, lr_schedule=LRSchedule.constant))
        up.grad = 1 + 0.1 * torch.randn(64, 80, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    evaluation_mode(optimizer)
    assert (up != 0).float().mean() > 0.99
    assert 5e-5 < up.abs().mean() < 3e-4  # 20 steps of 1e-5; half of it where an average is kept


@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_a_state_of_parameters_in_another_order_is_refused(kind):
    model, other = network(), network()
    optimizer = build(kind, model)
    train(model, optimizer, range(2))
    renamed = {f"other.{name}": parameter for name, parameter in other.named_parameters()}
    fresh = build_optimizer(renamed, OptimConfig(kind=kind), RATES.get(kind, 3e-3))
    with pytest.raises(PackshotError, match=r"of other parameters: 4 \(\w+\); this run has 4 \(\w+\)"):
        fresh.load_state_dict(optimizer.state_dict())
    assert not fresh.state


def test_a_state_of_other_groups_is_refused():
    def built(*groups):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))  # either group would fit in the other's place
        return build_optimizer(dict(model.named_parameters()), OptimConfig(groups=list(groups)), 1e-3)

    for mine, theirs in ((["^0=1e-2"], ["^1=1e-2"]), ([], ["^1=1e-2"]), (["^1=1e-2"], [])):
        with pytest.raises(PackshotError, match="of other parameters"):
            built(*mine).load_state_dict(built(*theirs).state_dict())
    built("^0=1e-2").load_state_dict(built("^0=1e-2").state_dict())


def test_prodigy_with_a_small_rate_is_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr(log, "warning", lambda text, *values: said.append(text % values))
    for rate in (1.0, 0.1):
        build_optimizer({"a": nn.Parameter(torch.ones(2))}, OptimConfig(kind=OptimizerKind.prodigy), rate)
    assert len(said) == 1
    assert "train.learning_rate=1; 0.1 shrinks" in said[0]


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
    # 13 of 23 cycles are 12.999… in floating point
    assert schedule(52, TrainConfig(max_steps=92, lr_schedule=LRSchedule.cosine_restarts, lr_cycles=23)) == 1
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
        (["optim=schedule_free", "train.lr_schedule=cosine"], "train.lr_schedule=constant"),
        (["optim=prodigy", "train.learning_rate=1e-4"], "train.learning_rate=1"),
        (["optim=prodigy", "optim.groups=['up=1e-5']"], "one step size"),
        (["optim=schedule_free", "train.ema_decay=0.9"], "train.ema_decay=0"),
        (["optim.groups=['up=-1']"], "from 0 to 1"),
        (["optim.groups=['up=nan']"], "from 0 to 1"),
        (["optim.groups=['=1e-5']"], "needs a pattern"),
        (["optim.groups=['up']"], "regex=learning rate"),
        (["optim.groups=['([=1e-5']"], "regex=learning rate"),
        (["optim.beta1=1"], "out of range"),
        (["optim.beta2=1"], "out of range"),
        (["optim=adafactor", "optim.beta1=0.8"], "optim.beta1=0.8 with optim=adafactor: .* would change nothing"),
        (["optim=adafactor", "optim.beta2=0.99"], "would change nothing"),
        (["optim=adafactor", "optim.eps=1e-6"], "would change nothing"),
        (["optim=lion", "optim.eps=1e-6"], "would change nothing"),
        (["optim.eps=0"], "out of range"),  # 0/0 wherever a gradient is zero
    ],
)
def test_settings_that_an_optimizer_cannot_work_with_are_refused(overrides, says):
    with pytest.raises(ConfigError, match=says):
        compose("train_lora", overrides)
