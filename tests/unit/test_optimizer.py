"""Optimizers resume bit for bit, learn, and take their rates from closed forms."""

import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from test_loop import ROWS, Regression, Samples
from torch import nn

from packshot.config.compose import compose
from packshot.config.optimizers import OPTIMIZERS
from packshot.config.schema import CaptionVLM, LRSchedule, OptimConfig, OptimizerKind, TrainConfig
from packshot.engine.loop import fit
from packshot.engine.optimizers import (
    build_optimizer,
    evaluation_mode,
    learning_rate,
    load_optimizer,
    schedule,
    set_learning_rate,
    training_mode,
)
from packshot.engine.processes import Session, make_accelerator
from packshot.engine.task import Validated
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
    load_optimizer(optimizer, stored["optimizer"])
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


def test_schedule_free_validates_and_saves_the_average(tmp_path):
    """Not the point at which it takes gradients."""

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
def test_a_matrix_of_zeros_moves_at_the_learning_rate(kind):
    """As a LoRA's second matrix: Adafactor as published would give it a thousandth of the step."""
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
    with pytest.raises(PackshotError, match=r"holds other parameters: 4 \(\w+\); this run has 4 \(\w+\)"):
        load_optimizer(fresh, optimizer.state_dict())
    assert not fresh.state


def test_a_state_of_other_groups_is_refused():
    """Either group would fit in the other's place."""

    def built(*groups):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        return build_optimizer(dict(model.named_parameters()), OptimConfig(groups=list(groups)), 1e-3)

    for mine, theirs in ((["^0=1e-2"], ["^1=1e-2"]), ([], ["^1=1e-2"]), (["^1=1e-2"], [])):
        with pytest.raises(PackshotError, match="holds other parameters"):
            load_optimizer(built(*mine), built(*theirs).state_dict())
    load_optimizer(built("^0=1e-2"), built("^0=1e-2").state_dict())


def test_a_small_rate_for_prodigy_gives_a_warning(monkeypatch):
    warnings = []
    monkeypatch.setattr(log, "warning", lambda text, *values: warnings.append(text % values))
    for rate in (1.0, 0.1):
        build_optimizer({"a": nn.Parameter(torch.ones(2))}, OptimConfig(kind=OptimizerKind.prodigy), rate)
    assert len(warnings) == 1
    assert "train.learning_rate=1; 0.1 shrinks" in warnings[0]


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
def test_every_schedule_warms_up_and_stays_below_its_peak(kind):
    config = TrainConfig(max_steps=100, warmup_steps=10, lr_schedule=kind)
    shares = [schedule(step, config) for step in range(101)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert all(0 <= share <= 1 and math.isfinite(share) for share in shares)


@pytest.mark.parametrize(
    ("overrides", "message"),
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
def test_settings_an_optimizer_cannot_use_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose("train_lora", overrides)


# ---- a row of one's own ----


def run_with_momentum(conf, *runs):
    """train_lora.py where tests/unit/dummy_optimizer.py has registered the optimizer ``momentum``; overrides by run."""
    program = Path(__file__).with_name("dummy_optimizer.py")
    common = "optim=momentum tracking=none data.train=data/rendered/heldout data.validation=data/rendered/heldout"
    common += " train.batch_size=2 train.lr_schedule=constant train.validation_steps=0 train.learning_rate=0.1"
    common += f" train.checkpointing_steps=2 data.cache_dir={conf.parent / 'cache'}"
    command = [sys.executable, str(program), str(conf), *(f"{common} {run}" for run in runs)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def conf(tmp_path, root):
    """A copy of conf/ that also has ``optim=momentum``."""
    shutil.copytree(root / "conf", tmp_path / "conf")
    (tmp_path / "conf" / "optim" / "momentum.yaml").write_text("kind: momentum\n")
    return tmp_path / "conf"


def test_a_new_row_and_its_yaml_make_an_optimizer(conf, tmp_path):
    """The row reaches the enum, the plan and the loop; a resumed run ends with the weights of an unbroken one."""

    def weights(name):
        return load_file(tmp_path / name / "export" / "pytorch_lora_weights.safetensors")

    done = run_with_momentum(
        conf,
        f"run.dir={tmp_path / 'plan'} mode=plan",
        f"run.dir={tmp_path / 'whole'} train.max_steps=4",
        f"run.dir={tmp_path / 'parts'} train.max_steps=2",
        f"run.dir={tmp_path / 'parts'} train.max_steps=4 run.resume=true",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert plan["optimizer_gib"] == pytest.approx(plan["trained_parameters"] * 4 / 2**30)
    state = torch.load(tmp_path / "parts" / "checkpoints" / "4" / "optimizer.pt")["state"]
    assert all("momentum_buffer" in entry for entry in state.values())
    assert "resuming at step 2" in (tmp_path / "parts" / "log.txt").read_text()
    whole, resumed = weights("whole"), weights("parts")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert any(bool(tensor.any()) for name, tensor in whole.items() if "lora_B" in name)


def test_a_new_row_is_checked_like_the_others(conf):
    done = run_with_momentum(conf, "optim.eps=1e-3")
    assert done.returncode == 2
    assert "optim.eps=0.001 with optim=momentum" in done.stderr


def test_every_row_has_its_yaml_and_says_what_it_reads(root):
    assert set(OPTIMIZERS) == {path.stem for path in (root / "conf" / "optim").glob("*.yaml")}
    keys = {field.name for field in dataclasses.fields(OptimConfig)} - {"kind", "groups"}
    for row in OPTIMIZERS.values():
        assert set(row.reads) <= keys
        low, high = row.usual_rates
        assert 0 < low <= high <= 1


@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_the_planned_state_is_the_state_it_keeps(kind):
    """Counted on a matrix large enough for eight-bit moments; Adafactor keeps a row and a column."""
    weight = nn.Parameter(torch.ones(256, 256))
    optimizer = build_optimizer({"weight": weight}, OptimConfig(kind=kind), RATES.get(kind, 1e-3))
    training_mode(optimizer)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    tensors = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / weight.numel()
    assert kept == pytest.approx(OPTIMIZERS[kind.name].state_bytes, abs=0.1)


def test_rows_import_no_torch():
    """The schema reads the rows, and ``--help`` reads the schema."""
    program = "import sys, packshot.config.schema; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
