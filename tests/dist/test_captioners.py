"""Captioners on two gloo processes: the same gradient steps, and a bulk run shared between them."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from caption_fixtures import CAPTIONS, SAVES, trained_run, write_dataset
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


def launch(processes, *overrides):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    done = subprocess.run(
        [*command, "caption_vlm.py", "tracking=none", *overrides],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kind", SAVES)
def test_two_processes_train_a_captioner_as_one_does(kind, tmp_path):
    SAVES[kind](tmp_path / "base")
    write_dataset(tmp_path / "data")
    common = (
        f"captioner={kind}", f"model.{kind}={tmp_path / 'base'}", f"data.train={tmp_path / 'data'}",
        f"data.validation={tmp_path / 'data'}", "captioner.tuning=full", "train.max_steps=4",
        "train.learning_rate=1e-3", "train.validation_steps=0", "train.checkpointing_steps=4",
    )  # fmt: skip
    launch(1, f"run.dir={tmp_path / 'one'}", "train.batch_size=2", *common)
    launch(2, f"run.dir={tmp_path / 'two'}", "train.batch_size=1", *common)
    one, two = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("one", "two"))
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert one.keys() == two.keys()
    a, b, start = (torch.cat([weights[name].flatten() for name in sorted(one)]) for weights in (one, two, before))
    assert (a - b).norm() <= 0.01 * (a - start).norm(), "the difference is small beside what was learned"


def test_two_processes_share_the_shards_of_a_dataset(tmp_path):
    run = trained_run()
    write_dataset(tmp_path / "data", shards=(2, 2, 1), captions=False)
    launch(
        2, "task=caption", f"data.input={tmp_path / 'data'}", f"run.dir={tmp_path / 'out'}",
        f"model.florence2={run.parent / 'base'}", f"captioner.adapter={run / 'export'}",
    )  # fmt: skip
    shards = sorted((tmp_path / "out").glob("part-*.parquet"))
    assert [pq.read_table(shard).column("text").to_pylist() for shard in shards] == [CAPTIONS, CAPTIONS, CAPTIONS[:1]]
    assert (tmp_path / "out" / "captions.json").exists()
