"""``make gpu-check``: without a GPU it ends with one sentence; its pieces run on the mini shapes."""

import os
import subprocess
import sys

import pytest
import torch

ALL = ["train_lora", "train_ip_adapter", "train_controlnet", "reference", "encoding", "generation", "captioner"]


def gpu_check(*arguments):
    command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure this GPU")
def test_without_a_gpu_it_ends_with_a_sentence(tmp_path):
    out = tmp_path / "gpu.md"
    done = gpu_check("--out", str(out))
    assert done.returncode == 0
    assert done.stdout.startswith("There is no GPU here")
    assert not out.exists()


def run_pieces(tmp_path, pieces):
    out = tmp_path / "gpu.md"
    done = gpu_check("--family", "mini", "--pieces", *pieces, "--folder", str(tmp_path), "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return out.read_text()


@pytest.mark.slow
def test_trainer_and_reference_loop_are_compared(tmp_path):
    written = run_pieces(tmp_path, ["train_lora", "reference"])
    assert "times the pictures per second of the reference loop" in written
    assert "| train_lora | tflop per step |" in written


@pytest.mark.slow
def test_a_failed_piece_is_reported_and_the_others_run(tmp_path):
    """The photograph is a folder without pictures: generation fails, encoding does not."""
    (tmp_path / "photo.png").mkdir()
    out = tmp_path / "gpu.md"
    folder = tmp_path / "inputs"
    done = gpu_check(
        "--family", "mini", "--pieces", "generation", "encoding", "--folder", str(folder), "--out", str(out),
        "--photo", str(tmp_path / "photo.png"),
    )  # fmt: skip
    assert done.returncode == 1
    assert "| generation | failed |" in out.read_text()
    assert "| encoding | share of encoder |" in out.read_text()


@pytest.mark.slow
def test_every_piece_runs_on_mini(tmp_path):
    written = run_pieces(tmp_path, [*ALL, "two_ranks"])
    assert "failed" not in written
    for piece in ALL:
        assert f"| {piece} |" in written
