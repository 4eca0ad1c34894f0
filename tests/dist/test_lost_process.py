"""A process that is killed does not leave the others waiting."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HELDOUT = "data/rendered/heldout"


def start(rank, port, out):
    env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    keys = [f"data.train={HELDOUT}", f"data.validation={HELDOUT}", f"run.dir={out}", "tracking=none"]
    keys += ["train.max_steps=1000", "train.validation_steps=0", "train.batch_size=1", "train.process_timeout=30"]
    return subprocess.Popen(
        [sys.executable, "train_lora.py", *keys], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_process_stops_the_other_with_a_reason(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "run"
    processes = [start(rank, port, out) for rank in range(2)]
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), processes[0].stderr.read()
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGKILL)
    _, stderr = processes[0].communicate(timeout=120)
    assert processes[0].returncode == 1
    assert "has lost another process" in stderr
    assert "run.resume=true" in stderr
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] < 1000
