"""A signal to one of two processes stops both at the same step, with a checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("signal_worker.py")


def launch(folder, signalled, resume):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(WORKER)]
    arguments = [str(folder), str(signalled).lower(), str(resume).lower()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path):
    """The resumed run ends with the weights of an unbroken one, bit for bit."""
    launch(tmp_path / "a", signalled=False, resume=False)
    launch(tmp_path / "b", signalled=True, resume=False)
    for rank in range(2):
        assert "after step 3" in (tmp_path / "b" / f"interrupted-{rank}").read_text()
    assert [path.name for path in (tmp_path / "b" / "checkpoints").iterdir() if path.is_dir()] == ["3"]
    launch(tmp_path / "b", signalled=False, resume=True)
    whole, resumed = (load_file(tmp_path / name / "checkpoints" / "8" / "trainable.safetensors") for name in "ab")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
