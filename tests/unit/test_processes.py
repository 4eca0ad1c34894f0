"""What a launcher asked for, what a run uses, and what it announces."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_loop import run_fit

from packshot.cli import STAGES, Stage, run_stage
from packshot.config.compose import compose
from packshot.config.schema import LRSchedule, MixedPrecision, TrainConfig
from packshot.engine.processes import (
    UNSUPPORTED,
    Session,
    announce,
    make_accelerator,
    missing_processes,
    refuse_launcher,
    resolve_precision,
    start,
)
from packshot.engine.sharding import SWITCH, Sharding, blocks_of, read_sharding
from packshot.errors import ConfigError, Interrupted
from packshot.runs.folder import Run, log
from packshot.runs.tracking import NullTracker

LAUNCHER = ("ACCELERATE_MIXED_PRECISION", "WORLD_SIZE", "MASTER_ADDR", "SLURM_NTASKS", SWITCH, *UNSUPPORTED)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """An environment that no launcher has touched."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


# ---- precision ----


@pytest.mark.parametrize(
    ("launcher", "cuda", "expected"),
    [(None, False, "no"), (None, True, "bf16"), ("fp16", True, "fp16"), ("no", True, "no"), ("bf16", False, "bf16")],
)
def test_auto_is_the_launchers_precision_else_the_devices(monkeypatch, launcher, cuda, expected):
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: cuda)
    assert resolve_precision(MixedPrecision.auto) is MixedPrecision[expected]


def test_a_precision_that_is_asked_for_overrides_the_launcher(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train = TrainConfig(mixed_precision=MixedPrecision.no)
    assert make_accelerator(train).mixed_precision == "no"
    assert train.mixed_precision is MixedPrecision.no


def test_a_precision_that_only_the_launcher_has_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ConfigError, match="mixed precision fp8") as caught:
        resolve_precision(MixedPrecision.auto)
    assert "train.mixed_precision=bf16" in caught.value.hint


def test_the_launchers_precision_must_fit_the_other_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    overrides = ["train.fused_backward=true", "train.max_grad_norm=0", f"run.dir={tmp_path / 'run'}", "tracking=none"]
    config = compose("train_controlnet", overrides)
    with pytest.raises(ConfigError, match=r"fused_backward=true with train\.mixed_precision=fp16"):
        start("train_controlnet", config, config.train)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_from_before_auto_is_resumed(tmp_path):
    """Its config names the precision; auto is replaced by the one in use before the two are compared."""
    constant = {"lr_schedule": LRSchedule.constant}
    unbroken, _ = run_fit(tmp_path / "a", max_steps=8, **constant)
    run_fit(tmp_path / "b", max_steps=4, mixed_precision=MixedPrecision.no, **constant)
    resumed, _ = run_fit(tmp_path / "b", max_steps=8, **constant)
    assert torch.equal(unbroken.linear.weight, resumed.linear.weight)


# ---- launchers ----


@pytest.mark.parametrize("variable", list(UNSUPPORTED))
def test_an_unsupported_distributed_type_is_refused(monkeypatch, variable):
    refuse_launcher()
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=UNSUPPORTED[variable]) as caught:
        refuse_launcher()
    assert "--multi_gpu" in caught.value.hint


def ask_for_fsdp(monkeypatch, **settings):
    monkeypatch.setenv(SWITCH, "true")
    for name, value in {"FSDP_VERSION": "2", **settings}.items():
        monkeypatch.setenv(name, value)


def test_the_launchers_fsdp_settings_are_read_once(monkeypatch):
    """The switch is taken away: accelerate and transformers would act on it."""
    config = compose("train_lora", [])
    assert read_sharding(config) is None
    ask_for_fsdp(
        monkeypatch,
        FSDP_RESHARD_AFTER_FORWARD="false",
        FSDP_TRANSFORMER_CLS_TO_WRAP="A, B",
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
    )
    found = read_sharding(config)
    assert found == Sharding(reshard=False, blocks=("A", "B"))
    assert "without effect here: FSDP_STATE_DICT_TYPE" in found.words()
    assert read_sharding(config) is None


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"FSDP_VERSION": "1"}, "version 1 of FSDP", "fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS=true", "fsdp_offload_params: false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "ACTIVATION_CHECK", "train.gradient_checkpointing=true"),
        ({"FSDP_IGNORED_MODULES": "unet"}, "FSDP_IGNORED_MODULES=unet", "everything is sharded"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "SIZE_BASED_WRAP is not known", "TRANSFORMER_BASED_WRAP"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "4"}, "RESHARD_AFTER_FORWARD=4", "fsdp_reshard_after_forward: true"),
    ],
)
def test_fsdp_settings_that_are_not_followed_are_refused(monkeypatch, settings, message, hint):
    ask_for_fsdp(monkeypatch, **settings)
    with pytest.raises(ConfigError, match=message) as caught:
        read_sharding(compose("train_lora", []))
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("keys", "remedy"),
    [
        (["model.quantization=nf4"], "model.quantization=none"),
        (["train.mixed_precision=fp16"], "train.mixed_precision=bf16"),
        (["train.compile=true"], "train.compile=false"),
        (["data.cache=false"], "data.cache=true"),
        (["optim=adam8bit"], "optim=adamw or optim=lion"),
    ],
)
def test_settings_that_shards_cannot_have_are_refused(monkeypatch, keys, remedy):
    ask_for_fsdp(monkeypatch)
    with pytest.raises(ConfigError, match="does not go with sharded training") as caught:
        read_sharding(compose("train_lora", keys))
    assert f"Set {remedy}," in caught.value.hint


def test_networks_name_the_blocks_gathered_one_at_a_time():
    class Block(torch.nn.Linear):
        pass

    class Network(torch.nn.Sequential):
        _no_split_modules = ("Block",)

    network = torch.nn.Sequential(Network(Block(2, 2), torch.nn.Linear(2, 2)))
    assert blocks_of(network, Sharding()) == [network[0][0]]
    assert blocks_of(network, Sharding(whole=True)) == []
    assert blocks_of(network, Sharding(blocks=("Linear",))) == [network[0][1]]
    with pytest.raises(ConfigError, match="names Missing"):
        blocks_of(network, Sharding(blocks=("Missing", "Block")))


def test_one_process_has_nothing_to_shard(tmp_path, capsys):
    config = compose("train_lora", [f"run.dir={tmp_path / 'run'}", "tracking=none"])
    session = start("train_lora", config, config.train, sharding=Sharding())
    assert session.sharding is None
    assert "one process: nothing is sharded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "8"}, "8 tasks"),
        ({"SLURM_NTASKS": "8", "WORLD_SIZE": "1", "MASTER_ADDR": "a"}, None),
        ({"MASTER_ADDR": "127.0.0.1"}, "started one"),
    ],
    ids=["none", "one_task", "lone_tasks", "torchrun", "accelerate"],
)
def test_a_launcher_that_started_too_few_processes_is_named(monkeypatch, environment, named):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    message = missing_processes(1)
    if named is None:
        assert message is None
    else:
        assert named in message
        assert "torchrun --nproc_per_node N" in message


def test_accelerate_launch_on_a_cpu_is_caught(tmp_path):
    """It starts one process of the two that it was asked for."""
    script = tmp_path / "script.py"
    script.write_text("from packshot.engine.processes import missing_processes\nprint(missing_processes(1))\n")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "asked for several processes" in done.stdout


def test_a_script_that_sigterm_stopped_exits_with_143(monkeypatch, capsys):
    """The exit code of a process that the signal ended, which schedulers know."""

    def stop(config):
        raise Interrupted("SIGTERM stopped the run after step 5.", "run.resume=true continues from its checkpoint.")

    monkeypatch.setitem(sys.modules, "work", SimpleNamespace(stop=stop))
    monkeypatch.setitem(STAGES, "train_lora", Stage("", "work:stop"))
    with pytest.raises(SystemExit) as ended:
        run_stage("train_lora", [])
    assert ended.value.code == 143
    assert "run.resume=true continues" in capsys.readouterr().err


# ---- the announcement ----


def test_processes_batch_device_and_precision_are_announced(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    log.setLevel("INFO")
    train = TrainConfig(batch_size=3, gradient_accumulation_steps=2)
    session = Session(make_accelerator(train), tmp_path, Run(tmp_path, False), NullTracker())
    announce(session, train)
    assert "1 process on cpu, mixed precision no; 6 samples per optimizer step (1 x 2 micro-steps x 3)" in caplog.text
    monkeypatch.setenv("SLURM_NTASKS", "4")
    announce(replace(session), train)
    assert "4 tasks" in caplog.text
