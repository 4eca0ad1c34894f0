"""The loop and its state, on a task small enough to run hundreds of steps."""

import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from packshot.config.schema import CaptionVLM, LRSchedule, OptimConfig, OptimizerKind, TrainConfig
from packshot.engine import checkpoints
from packshot.engine.batches import RankBatches, SampleOrder, Stream, ahead, batches
from packshot.engine.checkpoints import TrainState
from packshot.engine.loop import fit, loader_processes, validate
from packshot.engine.optimizers import learning_rate
from packshot.engine.processes import Session, make_accelerator
from packshot.engine.step import Taken, refuse_step
from packshot.engine.task import Task, Validated
from packshot.errors import ConfigError, Interrupted, PackshotError
from packshot.runs.cores import cores
from packshot.runs.folder import Run, log, read_metrics
from packshot.runs.tracking import NullTracker
from packshot.train.card import last_figures


class Regression(Task):
    """A linear model that learns to denoise: random draws keyed by sample, as the real tasks do it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.linear = nn.Linear(4, 4)

    def collate(self, samples, keys):
        noise = torch.stack([torch.randn(4, generator=key.generator("noise")) for key in keys])
        return {"x": torch.stack([s["x"] for s in samples]), "noise": noise}

    def forward(self, batch):
        return (self.linear(self.frozen(batch["x"] + batch["noise"])) - batch["x"]).square().mean(dim=1)

    def validate(self, folder, accelerator):
        return Validated({"validation_loss": float(self.linear.weight.sum())})


ROWS = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(i))} for i in range(7)]
IDS = [f"s{i}" for i in range(7)]


class Samples(list):
    """Rows with ids, as a dataset has them."""

    ids = IDS

    def fingerprint(self):
        return f"{len(self)} rows"


def process(rank=0, world=1):
    """One of several processes."""
    return SimpleNamespace(process_index=rank, num_processes=world)


def run_fit(path, task=None, rows=ROWS, resumed=False, kind=OptimizerKind.adamw, **settings):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    path.mkdir(exist_ok=True)
    config = CaptionVLM(optim=OptimConfig(kind=kind))
    defaults = {"max_steps": 12, "batch_size": 3, "checkpointing_steps": 4, "validation_steps": 0, "ema_decay": 0.9}
    config.train = TrainConfig(**{**defaults, "learning_rate": 1e-2, **settings})
    task = task or Regression()
    session = Session(make_accelerator(config.train), path, Run(path, resumed), NullTracker())
    return task, fit(task, Samples(rows), config, session)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", [LRSchedule.constant, LRSchedule.linear, LRSchedule.cosine])
def test_learning_rate_is_the_closed_form_in_optimizer_steps(tmp_path, accumulation, kind):
    run_fit(tmp_path, max_steps=10, warmup_steps=3, gradient_accumulation_steps=accumulation, lr_schedule=kind)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shapes = {
        LRSchedule.constant: lambda d: 1.0,
        LRSchedule.linear: lambda d: 1 - d,
        LRSchedule.cosine: lambda d: (1 + math.cos(math.pi * d)) / 2,
    }
    expected = [1e-2 * (s + 1) / 3 if s < 3 else 1e-2 * shapes[kind]((s - 3) / 7) for s in range(10)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(expected)


def test_learning_rate_ends_where_the_schedule_says():
    config = TrainConfig(max_steps=100, learning_rate=1.0)
    assert learning_rate(0, config) == 1.0
    assert learning_rate(99, config) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))


def test_accumulated_gradient_is_the_mean_over_all_samples(tmp_path):
    whole, _ = run_fit(tmp_path / "a", max_steps=5, batch_size=6)
    parts, _ = run_fit(tmp_path / "b", max_steps=5, batch_size=2, gradient_accumulation_steps=3)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_every_sample_comes_once_an_epoch():
    """For any batch size and number of processes, in the same order."""
    seen = {}
    for world, size in ((1, 3), (2, 4), (3, 1)):
        streams = [
            batches(
                Stream(Samples(ROWS), 0),
                lambda s, k: {"epochs": [key.epoch for key in k]},
                RankBatches(SampleOrder([0] * 7, 0, size * world), 0, size, process(rank, world)),
                0,
            )
            for rank in range(world)
        ]
        order = []
        while len(order) < 21:
            for stream in streams:
                batch = next(stream)
                order += list(zip(batch["epochs"], batch["ids"], strict=True))
        seen[world] = order[:21]
    assert seen[1] == seen[2] == seen[3]
    for epoch in range(3):
        assert sorted(i for e, i in seen[1] if e == epoch) == IDS


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    size=st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_steps_hold_one_bucket_and_drop_no_sample(groups, size, seed):
    """Steps continue over the ends of epochs, and any number of processes cuts the same ones."""
    order = SampleOrder(groups, seed, size)
    taken = []
    while len(taken) < 6 * len(groups) + 4 * size:
        places = order.step(len(taken) // size)
        assert len(places) == size
        assert len({groups[index] for index, _ in places}) == 1
        taken += places
    assert len(set(taken)) == len(taken)  # once an epoch
    counts = Counter(index for index, _ in taken)
    for group in set(groups):
        members = [counts[index] for index, other in enumerate(groups) if other == group]
        assert max(members) - min(members) <= 1  # no member of a bucket is ahead of another by more than one epoch
    # however many processes share a step, they cut the same one
    step = len(taken) // size // 2
    for world in (1, 2, 4):
        if size % world == 0:
            shares = [
                next(iter(RankBatches(order, step, size // world, process(rank, world)))) for rank in range(world)
            ]
            assert [place for share in shares for place in share] == order.step(step)


def loaders():
    return [thread for thread in threading.enumerate() if thread.name == "batches ahead"]


@pytest.mark.parametrize("waits", [False, True])
def test_closing_the_batches_ends_their_thread(waits):
    prepared = []
    items = ahead(prepared.append(number) or number for number in count())
    assert next(items) == 0
    assert loaders()
    while waits and len(prepared) < 4:  # two lie ready, and one waits for room
        time.sleep(0.01)
    items.close()
    assert not loaders()


def test_training_leaves_no_thread_behind(tmp_path):
    run_fit(tmp_path, max_steps=2)
    assert not loaders()


def test_errors_of_the_loading_thread_reach_the_loop():
    def source():
        yield 1
        raise ValueError("sample 7 is broken")

    items = ahead(source())
    assert next(items) == 1
    with pytest.raises(ValueError, match="sample 7"):
        next(items)


def test_loader_processes_change_nothing():
    def first_batches(num_workers):
        stream = batches(
            Stream(Samples(ROWS), 0),
            Regression().collate,
            RankBatches(SampleOrder([0] * 7, 0, 3), 0, 3, process()),
            num_workers,
        )
        return [next(stream) for _ in range(4)]

    for a, b in zip(first_batches(0), first_batches(2), strict=True):
        assert a["ids"] == b["ids"]
        assert torch.equal(a["noise"], b["noise"])


def test_no_more_loaders_start_than_a_process_has_cores(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert (cores(), loader_processes(6), loader_processes(0)) == (6, 6, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert not caplog.records
    assert loader_processes(4) == 2
    assert "data.num_workers=4" in caplog.text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert loader_processes(4) == 1


def test_resume_is_bit_exact_with_accumulation_and_ema(tmp_path):
    settings = {"gradient_accumulation_steps": 2}
    unbroken, ema = run_fit(tmp_path / "a", **settings)

    class Killed(Exception):
        pass

    class Dying(Regression):
        calls = 0

        def forward(self, batch):
            Dying.calls += 1
            if Dying.calls > 13:
                raise Killed
            return super().forward(batch)

    with pytest.raises(Killed):
        run_fit(tmp_path / "b", Dying(), **settings)
    resumed, ema_resumed = run_fit(tmp_path / "b", **settings)
    for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert ema.updates == ema_resumed.updates == 12
    assert all(torch.equal(ema.shadow[name], ema_resumed.shadow[name]) for name in ema.shadow)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    constant = {"lr_schedule": LRSchedule.constant}
    unbroken, _ = run_fit(tmp_path / "a", **constant)
    run_fit(tmp_path / "b", max_steps=8, **constant)
    folder = tmp_path / "b" / "checkpoints"
    newest = folder / "8" / "trainable.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    (folder / ".99.1.tmp").mkdir()
    assert checkpoints.newest_whole(folder).name == "4"
    resumed, _ = run_fit(tmp_path / "b", **constant)
    for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_damaged_checkpoints_never_cost_good_ones(tmp_path):
    """Damaged ones were counted among the newest, so that new ones were deleted as soon as they were written."""
    settings = {"checkpointing_steps": 2, "checkpoints_total_limit": 2, "lr_schedule": LRSchedule.constant}
    unbroken, _ = run_fit(tmp_path / "a", max_steps=14, **settings)
    run_fit(tmp_path / "b", max_steps=12, **settings)
    folder = tmp_path / "b" / "checkpoints"
    for step in ("10", "12"):
        (folder / step / "optimizer.pt").write_bytes(b"")

    class Killed(Exception):
        pass

    class Dying(Regression):
        calls = count(1)

        def forward(self, batch):
            if next(self.calls) > 5:
                raise Killed
            return super().forward(batch)

    with pytest.raises(Killed):
        run_fit(tmp_path / "b", Dying(), max_steps=14, **settings)
    assert {path.name for path in checkpoints.in_folder(folder)} == {"2", "4"}
    aside = sorted(path.name.partition("-")[0] for path in folder.iterdir() if "damaged" in path.name)
    assert aside == ["10.damaged", "12.damaged"]
    resumed, _ = run_fit(tmp_path / "b", max_steps=14, **settings)
    assert {path.name for path in checkpoints.in_folder(folder)} == {"12", "14"}
    for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_checkpoint_just_written_is_never_pruned(tmp_path):
    """Even if folders with later numbers exist."""
    for step in (2, 50, 60):
        (tmp_path / str(step)).mkdir()
    checkpoints.prune(tmp_path, 1, protected={2})
    assert {path.name for path in tmp_path.iterdir()} == {"2", "60"}


class Signalled(Regression):
    """Sends a signal to its own process during a step."""

    def __init__(self, number, step):
        super().__init__()
        self.number, self.step = number, step
        self.calls = count(1)

    def forward(self, batch):
        if next(self.calls) == self.step:
            os.kill(os.getpid(), self.number)
        return super().forward(batch)


@pytest.mark.parametrize("kind", [OptimizerKind.adamw, OptimizerKind.schedule_free], ids=str)
def test_sigterm_writes_a_checkpoint_and_the_resume_is_exact(tmp_path, kind):
    """Also with an optimizer that holds other weights while it trains."""
    settings = {"checkpointing_steps": 100, "lr_schedule": LRSchedule.constant, "ema_decay": 0.0, "kind": kind}
    handler = signal.getsignal(signal.SIGTERM)
    unbroken, _ = run_fit(tmp_path / "a", **settings)
    with pytest.raises(Interrupted, match="SIGTERM stopped the run after step 5") as caught:
        run_fit(tmp_path / "b", Signalled(signal.SIGTERM, 5), **settings)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    assert [path.name for path in (tmp_path / "b" / "checkpoints").iterdir()] == ["5"]
    resumed, _ = run_fit(tmp_path / "b", **settings)
    for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sigusr1_writes_a_checkpoint_and_the_run_continues(tmp_path):
    settings = {"checkpointing_steps": 100, "checkpoints_total_limit": 9}
    unbroken, _ = run_fit(tmp_path / "a", **settings)
    task, _ = run_fit(tmp_path / "b", Signalled(signal.SIGUSR1, 3), **settings)
    assert {path.name for path in (tmp_path / "b" / "checkpoints").iterdir()} == {"3", "12"}
    assert torch.equal(unbroken.linear.weight, task.linear.weight)


def test_sigterm_to_a_loader_process_costs_no_batch():
    """A scheduler sends the signal to every process of a job; the loop needs its batch for the checkpoint."""
    order = RankBatches(SampleOrder([0] * 7, 0, 3), 0, 3, process())
    stream = batches(Stream(Samples(ROWS), 0), Regression().collate, order, 1)
    first = [next(stream)["ids"]]
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    first += [next(stream)["ids"] for _ in range(5)]
    assert all(len(ids) == 3 for ids in first)
    assert worker.is_alive()
    stream.close()


def test_a_resumed_run_without_a_whole_checkpoint_says_so(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    run_fit(tmp_path, max_steps=4)
    (tmp_path / "checkpoints" / "4" / "state.json").unlink()
    run_fit(tmp_path, max_steps=4, resumed=True)
    assert f"starting at step 0: {tmp_path / 'checkpoints'} has no whole checkpoint" in caplog.text


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    run_fit(tmp_path, max_steps=4)

    class Larger(Regression):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(4, 4)

    with pytest.raises(PackshotError, match="other parameters"):
        run_fit(tmp_path, Larger(), max_steps=4)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run_fit(tmp_path, checkpoints_total_limit=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["12"]


def test_a_non_finite_gradient_stops_and_names_samples(tmp_path):
    rows = [dict(row) for row in ROWS]
    rows[4] = {"x": torch.full((4,), float("nan"))}
    with pytest.raises(PackshotError, match="s4") as caught:
        run_fit(tmp_path, rows=rows)
    assert "not finite" in str(caught.value)


class Lost(Regression):
    """Its loss is infinite for a sample whose gradient is as good as any."""

    def forward(self, batch):
        return super().forward(batch) + torch.where(batch["x"][:, 0] == ROWS[4]["x"][0], math.inf, 0.0)


def test_a_non_finite_loss_stops_despite_a_finite_gradient(tmp_path):
    with pytest.raises(PackshotError, match=r"the loss at step \d+ is not finite; samples .*s4"):
        run_fit(tmp_path, task=Lost())


def test_a_non_finite_loss_stops_an_fp16_run():
    """The scaler may skip a step whose gradient overflows, but would skip a lost loss until the end of the run."""
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    fp16, plain = (SimpleNamespace(scaler=scaler, num_processes=1) for scaler in (scaler, None))
    good, bad = torch.tensor(True), torch.tensor(False)
    refuse_step([Taken(["a"], good), Taken(["b"], good)], 7, fp16)  # its scale was too high
    with pytest.raises(PackshotError, match="loss at step 7 is not finite; samples a, b\\."):
        refuse_step([Taken(["a", "b"], bad), Taken(["c"], good)], 7, fp16)  # not in the last batch of the step
    with pytest.raises(PackshotError, match="gradient at step 7 is not finite; samples a, c\\."):
        refuse_step([Taken(["a"], good), Taken(["c"], good)], 7, plain)
    scaler.update(2.0**-20)  # halved and halved again
    with pytest.raises(PackshotError, match="gradient at step 7"):
        refuse_step([Taken(["a"], good)], 7, fp16)


def test_a_run_cannot_end_before_its_checkpoint(tmp_path):
    run_fit(tmp_path, lr_schedule=LRSchedule.constant)
    with pytest.raises(ConfigError, match=r"max_steps=6, but .*12 is of step 12"):
        run_fit(tmp_path, lr_schedule=LRSchedule.constant, max_steps=6)


def test_the_environment_does_not_change_the_accumulation(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    assert make_accelerator(TrainConfig(gradient_accumulation_steps=2)).gradient_accumulation_steps == 2


def test_a_truncated_metrics_line_costs_no_other(tmp_path):
    run = Run(tmp_path, True)
    run.metrics({"step": 1, "loss": 3.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    run.metrics({"step": 3, "loss": 1.0})
    run.metrics({"step": 9, "loss": 0.0})
    assert last_figures(tmp_path, 3) == {"loss": 1.0}
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3, 9]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_validation_time_does_not_count_as_training(tmp_path, monkeypatch):
    """The speed in the metrics leaves out the time of validations."""
    clock = SimpleNamespace(now=0.0)

    def monotonic():
        clock.now += 0.01
        return clock.now

    class Slow(Regression):
        def validate(self, folder, accelerator):
            clock.now += 1000
            return super().validate(folder, accelerator)

    monkeypatch.setattr("packshot.engine.meter.time", SimpleNamespace(time=time.time, monotonic=monotonic))
    run_fit(tmp_path, Slow(), validation_steps=1, log_steps=4, checkpointing_steps=0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    assert len(speeds) == 3
    assert min(speeds) > 1  # 12 pictures in some hundredths of a second, not in thousands


def test_validation_puts_the_weights_back_even_when_it_fails(tmp_path):
    task, ema = run_fit(tmp_path)
    before = {name: p.clone() for name, p in task.named_parameters()}

    def fail(folder, accelerator):
        assert torch.equal(task.linear.weight, ema.shadow["linear.weight"]) is False
        assert not torch.equal(task.linear.weight, before["linear.weight"])
        raise RuntimeError("out of memory")

    task.validate = fail
    with pytest.raises(RuntimeError):
        validate(TrainState(task, None, ema), Session(make_accelerator(TrainConfig()), tmp_path, None, None))
    assert all(torch.equal(before[name], p) for name, p in task.named_parameters())
    assert task.training


def test_checkpoints_hold_only_what_is_trained(tmp_path):
    from safetensors.torch import load_file

    run_fit(tmp_path)
    saved = load_file(tmp_path / "checkpoints" / "12" / "trainable.safetensors")
    assert set(saved) == {"linear.weight", "linear.bias"}


def test_a_checkpoint_of_another_batch_size_is_refused(tmp_path):
    constant = {"lr_schedule": LRSchedule.constant}
    run_fit(tmp_path, max_steps=4, batch_size=6, **constant)
    with pytest.raises(PackshotError, match=r"samples per optimizer step: 6 \(1 processes x 1 .* x 6\) -> 3 \("):
        run_fit(tmp_path, max_steps=8, batch_size=3, **constant)
    run_fit(tmp_path, max_steps=8, batch_size=3, gradient_accumulation_steps=2, **constant)  # as many in every step
