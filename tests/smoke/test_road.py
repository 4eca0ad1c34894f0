"""The road in miniature, by real processes: train, kill -9, resume, train the other two, generate with all three."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

COFFEE = "data/products/coffee.png"
HELDOUT = "data/rendered/heldout"
COMMON = (
    f"data.train={HELDOUT}", "tracking=none", "train.batch_size=2", "train.validation_steps=0",
    "train.checkpointing_steps=1", "data.flip=true",
)  # fmt: skip


def run(script, *overrides, code=0):
    done = subprocess.run([sys.executable, f"{script}.py", *overrides], capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("road")


@pytest.fixture(scope="module")
def exports(folder):
    """One short training of each method."""
    os.chdir(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    for script in ("train_lora", "train_controlnet", "train_ip_adapter"):
        run(script, *COMMON, "train.max_steps=4", f"run.dir={folder / script}")
    return {script: folder / script / "export" for script in ("train_lora", "train_controlnet", "train_ip_adapter")}


def test_a_killed_run_resumes_to_the_same_weights(exports, folder):
    killed = folder / "killed"
    arguments = (*COMMON, "train.max_steps=4", f"run.dir={killed}")
    process = subprocess.Popen(
        [sys.executable, "train_lora.py", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (killed / "checkpoints" / "2").exists():
        assert process.poll() is None or (killed / "checkpoints" / "4").exists()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run("train_lora", *arguments, code=2)
    run("train_lora", *arguments, "run.resume=true")
    # weights, not file bytes: safetensors writes the entries of its metadata in no fixed order
    name = "pytorch_lora_weights.safetensors"
    resumed, unbroken = load_file(killed / "export" / name), load_file(exports["train_lora"] / name)
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[key], unbroken[key]) for key in unbroken)


def test_generate_with_all_three_keeps_the_product_to_the_byte(exports, folder):
    out = folder / "packshots"
    run(
        "generate", f"product={COFFEE}", f"run.dir={out}",
        "scene.surface=a white marble table", "scene.background=a pink wall", "num_images=1", "num_inference_steps=3",
        f"adapters.lora={exports['train_lora']}", f"adapters.controlnets=[{exports['train_controlnet']}]",
        f"adapters.ip_adapter={exports['train_ip_adapter']}", f"reference={COFFEE}",
    )  # fmt: skip
    certificate = json.loads((out / "coffee-0.json").read_text())
    assert certificate["core"]["max_abs_diff"] == 0
    # what the certificate says, seen without our code
    before, after = (np.asarray(Image.open(path).convert("RGB")) for path in (COFFEE, out / "coffee-0.png"))
    alpha = np.asarray(Image.open(out / "layers" / "coffee-0-mask.png").convert("L"))
    import cv2

    core = cv2.erode((alpha == 255).astype(np.uint8), np.ones((3, 3), np.uint8)) == 1
    assert core.sum() > 1000
    assert np.array_equal(before[core], after[core])
    assert not np.array_equal(before[alpha == 0], after[alpha == 0])
    assert (out / "report.html").stat().st_size > 1000
    assert list((out / "layers").iterdir())


STOCK = """
import sys, torch
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline
base, lora, controlnet, ip_adapter = sys.argv[1:]
pipe = StableDiffusionXLControlNetPipeline.from_pretrained(
    base, controlnet=ControlNetModel.from_pretrained(controlnet), torch_dtype=torch.float32)
pipe.load_lora_weights(lora)
pipe.load_ip_adapter(ip_adapter, subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None)
from PIL import Image
from safetensors.torch import load_file
image = pipe("a white table", image=Image.new("RGB", (128, 128)), ip_adapter_image=Image.new("RGB", (64, 64)),
             num_inference_steps=2, height=128, width=128).images[0]
assert image.size == (128, 128)
assert "packshot" not in sys.modules
"""


def test_stock_diffusers_loads_the_three_exports(exports, root):
    folders = [str(exports[name]) for name in ("train_lora", "train_controlnet", "train_ip_adapter")]
    command = [sys.executable, "-c", STOCK, str(root / "data/models/sdxl"), *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_wandb_offline_writes_a_real_run(folder):
    out = folder / "tracked"
    run(
        "train_lora", f"data.train={HELDOUT}", "tracking=wandb", "train.batch_size=1", "train.validation_steps=1",
        "train.validation_samples=1", "train.max_steps=1", f"run.dir={out}",
    )  # fmt: skip
    runs = list((out / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1
    assert runs[0].stat().st_size > 1000
