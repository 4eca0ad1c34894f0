"""On a device that is not the CPU no tensor is left behind, and every process of a run has its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from packshot.caption.models.load import own_device


@pytest.mark.parametrize("what", ["generate", "train", "caption"])
def test_nothing_is_computed_from_tensors_of_two_devices(what):
    program = Path(__file__).with_name("elsewhere.py")
    done = subprocess.run([sys.executable, str(program), what], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_every_process_captions_on_its_own_gpu(monkeypatch):
    assert torch.cuda.is_available() or own_device() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_device() == "cuda:0"
    for rank, device in (("3", "cuda:3"), ("5", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert own_device() == device
