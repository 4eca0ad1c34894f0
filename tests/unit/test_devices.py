"""On a device that is not the CPU no tensor is left behind, and every process of a run has its own."""

import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from packshot.base import quantize
from packshot.base.device import own_device
from packshot.config.schema import Quantization


@pytest.mark.slow
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


def test_layers_are_quantised_one_at_a_time_on_the_processs_gpu(monkeypatch):
    """The whole weights of a layer are gone before the next is taken: a model of 22 GB must not be there twice."""
    network = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
    whole = [weakref.ref(layer.weight) for layer in network]
    seen = []

    def take(linear, device):
        seen.append((device, sum(weight() is not None for weight in whole)))
        return torch.nn.Linear(4, 4, device="meta")

    monkeypatch.setattr(quantize, "own_device", lambda: "cuda:3")
    monkeypatch.setitem(quantize.QUANTIZERS, Quantization.nf4, take)
    biases = [layer.bias for layer in network]
    quantize.quantize(network, Quantization.nf4, "model.quantization", lambda name: True)
    assert seen == [("cuda:3", count) for count in (4, 3, 2, 1)]
    assert all(layer.bias is bias for layer, bias in zip(network, biases, strict=True))
