"""FSDP2 on two gloo processes: the result of a single process, whole files, and the same bits after a kill.

What the runs have written is looked at, not their exit codes: gloo has been seen to abort while it is torn down.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from caption_fixtures import SAVES, write_dataset
from safetensors.torch import load_file

from packshot.runs.folder import read_metrics

ROOT = Path(__file__).resolve().parents[2]
HELDOUT = "data/rendered/heldout"
LAUNCHER = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def launch(processes, script, folder, *overrides, launcher=None):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(launcher or {})}
    keys = [f"run.dir={folder}", "tracking=none", "train.checkpointing_steps=2", *overrides]
    done = subprocess.run(
        [*command, f"{script}.py", *keys], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    return done.stdout + done.stderr


def weights(file):
    assert file.exists()
    tensors = load_file(file)
    return tensors, torch.cat([tensors[name].flatten().float() for name in sorted(tensors)])


def assert_close(one, two):
    (first, a), (second, b) = weights(one), weights(two)
    assert {name: tensor.shape for name, tensor in first.items()} == {n: t.shape for n, t in second.items()}
    assert (a - b).norm() <= 1e-4 * a.norm()


def assert_resumes(script, run, steps, *keys):
    """Without its last checkpoint the run ends with the same bytes again."""
    last = run / "checkpoints" / str(steps)
    before = {file.name: file.read_bytes() for file in last.iterdir()}
    shutil.rmtree(last)
    output = launch(2, script, run, "run.resume=true", *keys, launcher=LAUNCHER)
    assert f"resuming at step {steps - 2}" in output
    after = {file.name: file.read_bytes() for file in last.iterdir()}
    for name in before.keys() - {"state.json"}:
        assert before[name] == after[name], name


METHODS = {
    "lora": ("train_lora", "pytorch_lora_weights", ["train.ema_decay=0.9", "train.gradient_accumulation_steps=2"]),
    "text": ("train_lora", "pytorch_lora_weights", ["method.text_encoder=true", "method.kind=rslora"]),
    "ip_adapter": ("train_ip_adapter", "ip_adapter", ["train.gradient_checkpointing=true"]),
    "controlnet": ("train_controlnet", "diffusion_pytorch_model", ["optim=lion", "train.learning_rate=1e-5"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_shards_of_a_method_give_the_single_process_result(name, tmp_path):
    script, exported, keys = METHODS[name]
    common = [
        f"data.train={HELDOUT}", f"data.validation={HELDOUT}", f"data.cache_dir={tmp_path / 'cache'}",
        "train.max_steps=4", "train.validation_steps=4", "train.validation_samples=1", "train.warmup_steps=0", *keys,
    ]  # fmt: skip
    launch(1, script, tmp_path / "one", "train.batch_size=4", *common)
    sharded = [*common, "train.batch_size=2"]
    output = launch(2, script, tmp_path / "two", *sharded, launcher=LAUNCHER)
    assert "are sharded (FSDP2) block by block" in output
    one, two = (tmp_path / run for run in ("one", "two"))
    files = ["checkpoints/4/trainable.safetensors", f"export/{exported}.safetensors"]
    if name == "lora":
        files.append("checkpoints/4/ema.safetensors")
    for file in files:
        assert_close(one / file, two / file)
    for alone, shared in zip(read_metrics(one), read_metrics(two), strict=True):
        for figure in ("loss", "grad_norm", "validation_loss"):
            assert alone.get(figure, 0) == pytest.approx(shared.get(figure, 0), rel=1e-3)
    assert_resumes(script, two, 4, *sharded)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAVES)
def test_shards_of_a_captioner_give_the_single_process_result(kind, tmp_path):
    SAVES[kind](tmp_path / "base")
    write_dataset(tmp_path / "data")
    common = (
        f"captioner={kind}", f"model.{kind}={tmp_path / 'base'}", f"data.train={tmp_path / 'data'}",
        f"data.validation={tmp_path / 'data'}", "captioner.tuning=full", "train.max_steps=4",
        "train.learning_rate=1e-4", "train.validation_steps=2", "train.warmup_steps=0",
    )  # fmt: skip
    launch(1, "caption_vlm", tmp_path / "one", "train.batch_size=2", *common)
    launch(2, "caption_vlm", tmp_path / "two", "train.batch_size=1", *common, launcher=LAUNCHER)
    assert_close(tmp_path / "one" / "export" / "model.safetensors", tmp_path / "two" / "export" / "model.safetensors")
    assert_resumes("caption_vlm", tmp_path / "two", 4, "train.batch_size=1", *common)
