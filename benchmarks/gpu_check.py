"""What a GPU does with the real shapes: every trainer, encoding, generation and a captioner, on random weights.

    make gpu-check                                              # one GPU, less than 8 minutes; writes docs/gpu.md
    python -m benchmarks.gpu_check --family mini --out FILE     # the same pieces on the mini shapes, also on a CPU

Writes pipeline folders of SDXL's and Florence-2-large's shapes with random weights (8.5 GB, no download), then runs
each piece as a process of its own: the three training scripts beside what ``mode=plan`` counts, a loop written as the
public example scripts are, the filling of the cache, two processes against one, a photograph of 12 MP, a captioner. A
piece that fails or runs out of time is reported with its reason, and the others still run. Ends with 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, Florence2Config, Florence2ForConditionalGeneration

from benchmarks.fullsize import write_base
from benchmarks.sets import ROOT, spread, write_set
from packshot.caption.models.shapes import published_florence
from packshot.config.gpus import find_gpu
from packshot.dataset.rows import load_rows
from packshot.runs.files import replacing_file, replacing_folder, resolve
from packshot.runs.folder import log

SECONDS = 460.0  # for everything, so that the whole stays below 8 minutes
GIB = 2**30
Figures: TypeAlias = dict[str, float | str]


@dataclass(frozen=True)
class Family:
    """Shapes and lengths of a check.

    resolution: px. batch: samples per step where no preset decides. steps: of each training. pictures: that are
    encoded. photo: width and height of the photograph. precision: of training.
    """

    name: str
    resolution: int
    batch: int
    steps: int
    pictures: int
    photo: tuple[int, int]
    precision: str


FAMILIES = {
    "sdxl": Family("sdxl", 1024, 4, 12, 32, (4000, 3000), "bf16"),
    "mini": Family("mini", 128, 2, 3, 4, (640, 480), "no"),
}


@dataclass(frozen=True)
class Check:
    """Where a check has its inputs and writes. photo: the product photograph."""

    family: Family
    folder: Path
    photo: Path

    @property
    def base(self) -> Path:
        """The pipeline folder with random weights."""
        return self.folder / "base"

    @property
    def captioner(self) -> Path:
        """The Florence-2 folder with random weights."""
        return self.folder / "florence2"

    @property
    def data(self) -> Path:
        """The dataset, whose pictures training enlarges."""
        return self.folder / "data"

    def preset(self, script: str) -> list[str]:
        """The shipped preset of a training script for one GPU; on the mini shapes only a small batch."""
        if self.family.name == "sdxl":
            return [f"experiment={script.removeprefix('train_')}_sdxl"]
        return [f"train.batch_size={self.family.batch}", "train.gradient_checkpointing=true"]

    def overrides(self, run: str) -> list[str]:
        """Keys that all trainings of this check share."""
        family = self.family
        return [
            f"model={family.name}",
            f"model.base={self.base}",
            "model.vae=null",
            "model.image_encoder=null",
            f"model.resolution={family.resolution}",
            f"data.train={self.data}",
            f"data.validation={self.data}",
            f"data.cache_dir={self.folder / 'cache'}",
            "tracking=none",
            f"run.dir={self.folder / run}",
            f"train.max_steps={family.steps}",
            f"train.checkpointing_steps={family.steps}",
            "train.validation_steps=0",
            "train.warmup_steps=0",
            "train.log_steps=1",
            f"train.mixed_precision={family.precision}",
        ]


# ---- inputs ----


def write_captioner(folder: Path, family: Family, device: torch.device) -> None:
    """A Florence-2 folder of the published large shapes, or of mini's, with random weights and mini's processor."""
    shipped = resolve("data/models/florence2")
    config = Florence2Config.from_pretrained(shipped)
    assert config.text_config is not None
    if family.name == "sdxl":
        token = config.image_token_id
        config = published_florence("large", config.text_config.to_dict())
        config.image_token_id = token
    with replacing_folder(folder) as temporary:
        AutoProcessor.from_pretrained(shipped).save_pretrained(temporary)
        torch.manual_seed(0)
        with device:
            model = Florence2ForConditionalGeneration(config)
        model.save_pretrained(temporary)
        shutil.copy(shipped / "generation_config.json", temporary)


def write_data(check: Check) -> None:
    """A product set of shipped renders."""
    rows = load_rows("train", "data/rendered/train")
    write_set(check.data, rows, spread(rows, check.family.pictures))


def write_photo(path: Path, size: tuple[int, int]) -> None:
    """A shipped product, enlarged, as a cut-out whose transparency is the mask."""
    with Image.open(resolve("data/products/perfume.png")) as product:
        photo = product.convert("RGBA").resize(size, Image.Resampling.BICUBIC)
    mask_HW = np.zeros((size[1], size[0]), np.uint8)
    mask_HW[size[1] // 4 : -size[1] // 4, size[0] // 3 : -size[0] // 3] = 255
    photo.putalpha(Image.fromarray(mask_HW))
    photo.save(path, compress_level=1)


def prepare(check: Check) -> None:
    """Write everything that the pieces read."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_base(check.base, check.family.name, device)
    write_captioner(check.captioner, check.family, device)
    write_data(check)
    if not check.photo.exists():
        write_photo(check.photo, check.family.photo)


# ---- pieces: each runs in a process of its own and returns its figures ----


def steady(run: Path, samples: int) -> Figures:
    """Speed and memory of the later half of a training's steps, from its metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    later = lines[len(lines) // 2 :]
    rate = statistics.median(line["images_per_second"] for line in later)
    return {
        "images_per_second": rate,
        "seconds_per_step": samples / rate,
        "data_wait_share": statistics.median(line["data_wait_share"] for line in later),
        "peak_memory_gib": max(line["peak_memory_gib"] for line in lines),
        "loss": lines[-1]["loss"],
    }


def trainer(script: str) -> Callable[[Check], Figures]:
    """A piece: the training script itself, and what ``mode=plan`` counts for it."""

    def piece(check: Check) -> Figures:
        from packshot.config.compose import compose
        from packshot.train.plan import make_plan
        from packshot.train.run import train

        overrides = [*check.preset(script), *check.overrides(script), "train.gradient_accumulation_steps=1"]
        config = compose(script, overrides)
        batch = config.train.batch_size
        planned = make_plan(config, check.family.pictures)
        train(config)
        figures = steady(check.folder / script, batch)
        figures["planned_gib"] = planned.total_gib
        figures["tflop_per_step"] = planned.tflop_per_step
        figures["batch"] = batch
        gpu = find_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        if gpu:
            achieved = planned.tflop_per_step / float(figures["seconds_per_step"])
            figures["utilisation"] = achieved / gpu.tflops
        return figures

    return piece


def reference(check: Check) -> Figures:
    """A LoRA by a loop that works as the public example scripts do: decode, encode and step, one after the other."""
    from benchmarks import children
    from packshot.config.compose import compose

    family = check.family
    shape = children.Shape(str(check.base), str(check.data), family.resolution, family.precision, checkpointing=True)
    batch = compose("train_lora", check.preset("train_lora")).train.batch_size
    moments = []
    for _ in children.reference("lora", family.steps, batch, shape):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        moments.append(time.monotonic())
    half = len(moments) // 2
    rate = (len(moments) - 1 - half) * batch / (moments[-1] - moments[half])
    return {"images_per_second": rate, "peak_memory_gib": peak_memory()}


def encoding(check: Check) -> Figures:
    """Pictures per second, captions included, while a cache is filled; and of the VAE alone on a picture in memory."""
    from accelerate import Accelerator

    from packshot.base.load import load_parts
    from packshot.config.compose import compose
    from packshot.methods import build_method
    from packshot.train.encode import Encoder
    from packshot.train.examples import Examples

    config = compose("train_lora", check.overrides("encoding"))
    parts = load_parts(config.model)
    method = build_method(parts, config)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    parts.to(accelerator.device, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    rows = load_rows("data", str(check.data), pictures=("image", "mask"))
    with tempfile.TemporaryDirectory(dir=check.folder) as cache:
        examples = Examples(rows, Encoder(parts, method, config.model.resolution, config.data), Path(cache))
        seen = examples.seen(0)
        # Not measured: loading the encoders, hashing their files, choosing kernels at the first pass.
        examples.encoder.latents([seen])
        examples.encoder.text([seen["text"]])
        log.info("encoders %s", examples.encoder.identity)
        started = time.monotonic()
        examples.fill(accelerator)
        filling = time.monotonic() - started
        started = time.monotonic()
        for _ in range(len(examples)):
            examples.encoder.latents([seen])
        alone = time.monotonic() - started
    return {
        "pictures_per_second": len(examples) / filling,
        "encoder_pictures_per_second": len(examples) / alone,
        "share_of_encoder": alone / filling,
        "peak_memory_gib": peak_memory(),
    }


def generation(check: Check) -> Figures:
    """A scene around the photograph, from its file to the finished picture and its certificate."""
    from packshot.config.compose import compose
    from packshot.generate.run import generate

    overrides = [
        f"model={check.family.name}",
        f"model.base={check.base}",
        "model.vae=null",
        "model.image_encoder=null",
        f"model.resolution={check.family.resolution}",
        "tracking=none",
        f"run.dir={check.folder / 'generation'}",
        f"product={check.photo}",
        "num_images=1",
        "num_inference_steps=10",
        "layers=false",
    ]
    started = time.monotonic()
    generate(compose("generate", overrides))
    width, height = check.family.photo
    return {
        "megapixels": width * height / 1e6,
        "seconds_with_loading": time.monotonic() - started,
        "peak_memory_gib": peak_memory(),
    }


def captioner(check: Check) -> Figures:
    """Training and captioning by Florence-2."""
    from packshot.caption.models.load import load_captioner
    from packshot.caption.run import run
    from packshot.config.compose import compose

    common = [
        f"model.florence2={check.captioner}",
        "captioner=florence2",
        "tracking=none",
        f"train.mixed_precision={check.family.precision}",
    ]
    training = [
        f"data.train={check.data}",
        f"data.validation={check.data}",
        f"run.dir={check.folder / 'captioner'}",
        f"train.max_steps={check.family.steps}",
        f"train.batch_size={check.family.batch}",
        "train.validation_steps=0",
    ]
    config = compose("caption_vlm", ["task=train", *common, *training])
    run(config)
    figures = steady(check.folder / "captioner", check.family.batch)
    rows = load_rows("data", str(check.data), pictures=("image", "mask"))
    samples = [rows.read(index, ("image", "mask")) for index in range(len(rows))]
    model = load_captioner(config.model, replace(config.captioner, batch_size=len(samples)))
    started = time.monotonic()
    # to their full length: a network that has learnt nothing does not end a caption
    model.caption([sample["image"] for sample in samples], [sample["mask"] for sample in samples])
    figures["captions_per_second"] = len(samples) / (time.monotonic() - started)
    return figures


def two_ranks(check: Check) -> Figures:
    """Two processes with half of the batch each against one process, on mini's shipped weights in fp32."""
    files = []
    devices = torch.cuda.device_count()
    if torch.cuda.is_available() and devices < 2:
        return {"skipped": "this machine has one GPU"}
    for count in (1, 2):
        folder = check.folder / f"ranks-{count}"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"),
            *("train_lora.py", "tracking=none", f"run.dir={folder}", "train.mixed_precision=no"),
            *(f"data.cache_dir={check.folder / 'ranks-cache'}", f"train.batch_size={4 // count}", "train.max_steps=10"),
            *("data.train=data/rendered/heldout", "train.validation_steps=0", "train.checkpointing_steps=10"),
        ]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        files.append(load_file(folder / "checkpoints" / "10" / "trainable.safetensors"))
    one, two = files
    squares = {name: (one[name] - two[name]).square().sum() for name in one}
    norms = [tensor.square().sum() for tensor in one.values()]
    return {"relative_difference": float((sum(squares.values()) / sum(norms)) ** 0.5)}


PIECES: dict[str, Callable[[Check], Figures]] = {
    "train_lora": trainer("train_lora"),
    "train_ip_adapter": trainer("train_ip_adapter"),
    "train_controlnet": trainer("train_controlnet"),
    "reference": reference,
    "encoding": encoding,
    "generation": generation,
    "captioner": captioner,
    "two_ranks": two_ranks,
}


def peak_memory() -> float:
    """Most memory that tensors of this process had on the GPU; 0 without one, GiB."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


# ---- the whole ----


def run_piece(name: str, check: Check, seconds: float) -> Figures:
    """The figures of a piece, from a process of its own; or under ``failed`` why there are none."""
    out = check.folder / f"{name}.json"
    messages = check.folder / f"{name}.txt"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--piece", name, "--family", check.family.name]
    command += ["--folder", str(check.folder), "--photo", str(check.photo), "--out", str(out)]
    if seconds < 5:
        return {"failed": "no time was left"}
    with messages.open("w") as output:
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"failed": f"not finished after {seconds:.0f} s, when the time was up"}
    if done.returncode:
        last = messages.read_text().strip().splitlines()[-3:]
        return {"failed": " / ".join(last)[-400:]}
    return json.loads(out.read_text())


def table(found: dict[str, Figures]) -> list[str]:
    """Markdown: a row for each figure of each piece."""
    lines = ["| piece | figure | value |", "|---|---|---|"]
    for piece, figures in found.items():
        for name, value in figures.items():
            text = value if isinstance(value, str) else f"{value:.4g}"
            lines.append(f"| {piece} | {name.replace('_', ' ')} | {text} |")
    return lines


def verdicts(found: dict[str, Figures]) -> list[str]:
    """The comparisons that the check is made for, one sentence each."""
    sentences = []
    for script in ("train_lora", "train_ip_adapter", "train_controlnet"):
        figures = found.get(script, {})
        planned = figures.get("planned_gib")
        peak = figures.get("peak_memory_gib")
        # On a CPU the peak is that of the process, with Python and its libraries.
        if torch.cuda.is_available() and isinstance(planned, float) and isinstance(peak, float):
            sentences.append(f"{script}: planned {planned:.2f} GiB, peak {peak:.2f} GiB, ratio {planned / peak:.3f}.")
    ours = found.get("train_lora", {}).get("images_per_second")
    theirs = found.get("reference", {}).get("images_per_second")
    if isinstance(ours, float) and isinstance(theirs, float):
        sentences.append(f"LoRA: {ours / theirs:.2f} times the pictures per second of the reference loop.")
    return sentences


def write_report(path: Path, check: Check, found: dict[str, Figures], seconds: float) -> None:
    """``docs/gpu.md``, or what ``--out`` names."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    sizes = ", ".join(f"{name} {value}" for name, value in asdict(check.family).items())
    lines = [
        "# What a GPU does with the real shapes",
        "`make gpu-check` wrote this page; weights and data are random or rendered, so only speed and memory count.",
        "",
        f"{device}; torch {torch.__version__}, CUDA {torch.version.cuda}; {time.strftime('%Y-%m-%d')}; "
        f"{seconds:.0f} s in all.",
        "",
        f"Settings: {sizes}. Trainings recompute activations. Utilisation is the TFLOP of `mode=plan` over the time of "
        "a step and the peak of the data sheet (`config/gpus.py`).",
        "",
        *(f"- {sentence}" for sentence in verdicts(found)),
        "",
        *table(found),
    ]
    with replacing_file(path) as file:
        file.write_text("\n".join(lines) + "\n")


def check_all(check: Check, pieces: list[str], out: Path) -> bool:
    """Run the pieces one after the other and write the report; returns whether all of them worked."""
    started = time.monotonic()
    prepare(check)
    found: dict[str, Figures] = {}
    print(f"inputs written in {time.monotonic() - started:.0f} s", file=sys.stderr)
    for name in pieces:
        begun = time.monotonic()
        found[name] = run_piece(name, check, SECONDS - (begun - started))
        print(f"{name}, {time.monotonic() - begun:.0f} s: {found[name]}", file=sys.stderr)
        write_report(out, check, found, time.monotonic() - started)
    print(out.read_text())
    return not any("failed" in figures for figures in found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="sdxl")
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu.md")
    parser.add_argument("--piece", choices=PIECES, help="only this one, in this process; --out takes its figures")
    parser.add_argument("--folder", type=Path, help="where the inputs lie; default: a temporary folder")
    parser.add_argument(
        "--photo", type=Path, help="product photograph for the generation; default: an enlarged product"
    )
    args = parser.parse_args()
    family = FAMILIES[args.family]
    if args.piece:
        figures = PIECES[args.piece](Check(family, args.folder, args.photo))
        args.out.write_text(json.dumps(figures) + "\n")
        return
    if args.family == "sdxl" and not torch.cuda.is_available():
        print("There is no GPU here: SDXL's shapes are only measured on one, and docs/gpu.md stays as it is.")
        return
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        check = Check(family, folder, args.photo or folder / "photo.png")
        sys.exit(not check_all(check, args.pieces, args.out.resolve()))


if __name__ == "__main__":
    main()
