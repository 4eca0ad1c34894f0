"""Two gloo processes: one run folder, and the same result as one process on the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("worker.py")


def launch(processes, script, folder, *overrides):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(WORKER), script, str(folder), *overrides], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same_result(folder):
    first, second = (load_file(folder / name / "gradients.safetensors") for name in ("one", "two"))
    assert len(first) > 10
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)
    first, second = (load_file(folder / name / "weights.safetensors") for name in ("one", "two"))
    a, b = (torch.cat([weights[name].flatten() for name in sorted(weights)]) for weights in (first, second))
    assert (a - b).norm() / a.norm() <= 1e-4


@pytest.mark.parametrize(
    ("script", "keys"),
    [
        ("train_lora", ["objective.product_conditioning=channels", "data.flip=true"]),
        ("train_ip_adapter", ["method.reference=place", "method.image_dropout=0.3"]),
        ("train_controlnet", ["method.condition=depth", "method.mask_jitter=4"]),
    ],
    ids=["channels", "reference", "jitter"],
)
def test_draws_of_a_method_do_not_depend_on_the_processes(script, keys, tmp_path):
    for processes, size, name in ((2, 2, "two"), (1, 4, "one")):
        steps = ["train.max_steps=2", "train.validation_steps=0", f"train.batch_size={size}"]
        launch(processes, script, tmp_path / name, *steps, *keys)
    assert_same_result(tmp_path)


def test_the_number_of_processes_does_not_change_the_result(tmp_path):
    common = (
        "train.max_steps=10",
        "train.validation_steps=10",
        "train.validation_samples=2",
        "train.validate_first=true",
    )
    launch(2, "train_lora", tmp_path / "two", "train.batch_size=2", *common)
    launch(1, "train_lora", tmp_path / "one", "train.batch_size=4", *common)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "one", "two"]
    assert_same_result(tmp_path)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [line["step"] for line in two] == [0, *range(1, 11), 10]
    # every process does its share of the validation, into the one run folder
    written = [path.name for path in sorted((tmp_path / "two" / "samples" / "10").iterdir())]
    assert written == ["000.png", "001.png", "grid.png", "table.json"]
    # before the first step the weights are equal: so are pictures and what is measured in them
    for name in ("extension", "extension_rate", "product_loss"):
        assert one[0][name] == pytest.approx(two[0][name], abs=0.01)
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "validation_loss", "learning_rate"):
            assert (name in a) == (name in b)
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-4)


def test_an_existing_folder_is_refused_by_every_process(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [*command, "train_lora.py", f"run.dir={tmp_path}", "tracking=none"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    assert "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
