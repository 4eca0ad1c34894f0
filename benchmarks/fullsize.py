"""Does training work at SDXL's real size? Two LoRA steps with a kill between them, on random weights, on a CPU.

    python -m benchmarks.fullsize                 # 24 GiB of memory, 8 GB of disk, Linux
    python -m benchmarks.fullsize --family mini   # the same road in minutes

Writes a pipeline folder of SDXL's shapes (no download, no real weights), then runs the real script as processes of
their own: mode=plan; two steps, killed within the second; the resumed run to its export; with --unbroken the same steps
once more without a kill, which must give the same bits; and stock diffusers reading the export. Prints as Markdown what
was measured next to what mode=plan had estimated. Ends with 1 when something does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil

from benchmarks.original_layout import checkpoint
from benchmarks.sets import BASE, ROOT, spread, write_set
from packshot.base.load import load_parts
from packshot.base.shapes import meta_parts
from packshot.config.schema import ModelConfig
from packshot.dataset.rows import load_rows
from packshot.runs.files import replacing_file, replacing_folder

FAMILIES = {"sdxl": ModelConfig(base="published shapes"), "mini": ModelConfig(base=str(BASE))}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder")
SAMPLES = 4
STEPS = 2
SAMPLE_SECONDS = 0.25
GIB = 2**30
LORA_FILE = "pytorch_lora_weights.safetensors"


# ---- a base with random weights ----


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New modules have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def write_base(folder: Path, family: str, device: torch.device | None = None) -> None:
    """A StableDiffusionXLPipeline folder of a family's shapes, fp16, one part in memory at a time.

    device: where the weights are drawn; default: the CPU.
    """
    if folder.exists():
        return
    shapes = meta_parts(FAMILIES[family])
    with replacing_folder(folder) as temporary:
        for name in ("tokenizer", "tokenizer_2", "scheduler"):
            shutil.copytree(BASE / name, temporary / name)
        shutil.copy(BASE / "model_index.json", temporary)
        side = shapes.image_encoder.config.image_size
        CLIPImageProcessorPil(size=side, crop_size=side).save_pretrained(temporary / "feature_extractor")
        for number, name in enumerate(PARTS):
            meta: Any = getattr(shapes, name)
            # diffusers and transformers build from a config in two ways; both draw in half precision on a CPU
            make = getattr(type(meta), "from_config", type(meta))
            torch.manual_seed(number)
            with default_dtype(torch.float16), device or torch.device("cpu"):
                make(meta.config).save_pretrained(temporary / name)
            print(f"{name}: {sum(p.numel() for p in meta.parameters()):,} parameters", file=sys.stderr)


def write_one_file(base: Path) -> Path:
    """The same base as one fp16 checkpoint in the published layout."""
    file = base.with_suffix(".safetensors")
    if not file.exists():
        parts = load_parts(ModelConfig(base=str(base)), torch.float16)
        with replacing_file(file) as temporary:
            save_file(checkpoint(parts), temporary)
    return file


# ---- processes and their memory ----


@dataclass
class Measured:
    """A process that has ended.

    peak_gib: most resident memory, with the files that it maps (the kernel takes those back when it needs room).
    memory: (time.time(), its own memory in GiB, without them). cpu: (time.time(), CPU seconds of all threads).
    """

    seconds: float = 0.0
    peak_gib: float = 0.0
    memory: list[tuple[float, float]] = field(default_factory=list)
    cpu: list[tuple[float, float]] = field(default_factory=list)

    def at(self, moment: float) -> float:
        """Own memory at a moment, GiB."""
        return max(sample for sample in self.memory if sample[0] <= moment)[1]

    def worked(self, first: float, last: float) -> float:
        """CPU seconds between two moments: on a machine with other work they say more than the clock."""
        begun, ended = (max(sample for sample in self.cpu if sample[0] <= moment)[1] for moment in (first, last))
        return ended - begun

    def most(self, first: float = 0.0, last: float = float("inf")) -> float:
        """Most own memory between two moments, GiB."""
        return max(gib for taken, gib in self.memory if first <= taken <= last)


def memory_of(pid: int) -> dict[str, float]:
    """What /proc has on a process, GiB: ``RssAnon`` (its own memory), ``VmHWM`` (most resident); empty once gone.

    The peak that wait4 reports would include that of the parent, which the child is for a moment.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split()[:2] for line in lines if line.startswith(("RssAnon", "VmHWM")))
    return {name.rstrip(":"): int(kib) / 2**20 for name, kib in pairs}


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process so far; it must be there."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def watch(name: str, command: list[str], logs: Path, kill_at: Path | None = None) -> Measured:
    """Run a process to its end, or until the path ``kill_at`` comes into being: then kill it as the kernel would."""
    logs.mkdir(parents=True, exist_ok=True)
    measured, started = Measured(), time.time()
    with (logs / f"{name}.txt").open("w") as said:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        killed = False
        while process.poll() is None:
            now = memory_of(process.pid)
            if now:
                measured.memory.append((time.time(), now["RssAnon"]))
                measured.cpu.append((time.time(), cpu_seconds(process.pid)))
                measured.peak_gib = max(measured.peak_gib, now["VmHWM"])
            if kill_at and kill_at.exists() and not killed:
                process.send_signal(signal.SIGKILL)
                killed = True
            time.sleep(SAMPLE_SECONDS)
    measured.seconds = time.time() - started
    # a process that the kernel has killed for want of memory has the same code as one that was killed here
    if process.returncode != (-signal.SIGKILL if killed else 0) or bool(kill_at) != killed:
        raise SystemExit(f"{name} ended with {process.returncode}; see {logs / name}.txt\n{' '.join(command)}")
    print(f"{name}: {measured.seconds:.0f} s, {measured.peak_gib:.2f} GiB", file=sys.stderr)
    return measured


# ---- the proof ----


@dataclass(frozen=True)
class Proof:
    """What is run, and where."""

    family: str
    folder: Path
    resolution: int
    precision: str
    one_file: bool

    def command(self, run: str, *more: str) -> list[str]:
        """The real script with this proof's settings."""
        return [
            *(
                "train_lora.py",
                "model=sdxl",
                f"model.base={self.weights}",
                f"model.config={self.base}",
                "model.vae=null",
                "model.image_encoder=null",
            ),
            *(f"model.resolution={self.resolution}", f"data.train={self.data}", f"data.validation={self.data}"),
            *(f"data.cache_dir={self.folder / 'cache'}", "tracking=none", f"run.dir={self.folder / run}"),
            *(f"train.max_steps={STEPS}", "train.batch_size=1", "train.checkpointing_steps=1"),
            *("train.gradient_checkpointing=true", f"train.mixed_precision={self.precision}"),
            *("train.validation_steps=0", "train.log_steps=1", *more),
        ]

    @property
    def base(self) -> Path:
        return self.folder.parent / f"{self.family}-random"

    @property
    def weights(self) -> Path:
        """What ``model.base`` names: the folder, or the checkpoint in one file."""
        return self.base.with_suffix(".safetensors") if self.one_file else self.base

    @property
    def data(self) -> Path:
        return self.folder / "data"


def steps(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, with ``seconds`` and ``began`` of each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["seconds"] = 1 / line["images_per_second"]
        line["began"] = line["time"] - line["seconds"]
    return lines


def size(path: Path) -> int:
    """Bytes of a file or of all files below a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def flattened(value: Any) -> Iterator[Any]:
    """The tensors and numbers of nested dicts and lists, in order."""
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from flattened(item)
    else:
        yield value


def same_bits(first: Path, second: Path) -> bool:
    """Whether two runs have the same weights, optimizer state and export."""
    last = f"checkpoints/{STEPS}"
    states = [torch.load(run / last / "optimizer.pt", weights_only=True) for run in (first, second)]
    pairs = zip(*map(flattened, states), strict=True)
    if not all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs):
        return False
    files = (f"{last}/trainable.safetensors", f"export/{LORA_FILE}")
    tensors = [(load_file(first / name), load_file(second / name)) for name in files]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in tensors)


@torch.no_grad()
def check_export(base: Path, export: Path, resolution: int) -> dict[str, Any]:
    """Stock diffusers loads the export into the random UNet: every tensor arrives, and the prediction changes."""
    unet: Any = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32)
    generator, config = torch.Generator().manual_seed(0), unet.config
    latents = torch.randn(1, config.in_channels, resolution // 8, resolution // 8, generator=generator)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    conditioning = {
        "encoder_hidden_states": torch.randn(1, 77, config.cross_attention_dim, generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(1, pooled, generator=generator),
            "time_ids": torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]], dtype=torch.float32),
        },
    }
    before = unet(latents, 500, **conditioning).sample
    unet.load_lora_adapter(str(export), prefix="unet", weight_name=LORA_FILE)
    after = unet(latents, 500, **conditioning).sample
    file = {key.removeprefix("unet."): value for key, value in load_file(export / LORA_FILE).items()}
    loaded = get_peft_model_state_dict(unet, adapter_name="default_0")
    return {
        "tensors": len(file),
        "missing": sorted(set(file) - set(loaded)),
        "unexpected": sorted(set(loaded) - set(file)),
        "different": sorted(key for key in set(file) & set(loaded) if not torch.equal(file[key], loaded[key])),
        "finite": bool(torch.isfinite(after).all()),
        "change": float((after - before).norm() / before.norm()),
    }


def prove(proof: Proof, unbroken: bool) -> dict[str, Any]:
    """Every stage; what each of them measured."""
    folder, logs = proof.folder, proof.folder / "logs"
    killed, export = folder / "run", folder / "run" / "export"
    checkpoint = killed / "checkpoints"
    done = {
        "mode=plan": watch("plan", proof.command("plan", "mode=plan"), logs),
        "train, killed in step 2": watch("killed", proof.command("run"), logs, kill_at=checkpoint / "1"),
        "resume to step 2, export": watch("resumed", proof.command("run", "run.resume=true"), logs),
    }
    if unbroken:
        done["the same without a kill"] = watch("unbroken", proof.command("unbroken"), logs)
    command = ["-m", "benchmarks.fullsize", "--check-export", str(export), "--base", str(proof.base)]
    done["stock diffusers reads it"] = watch("export", [*command, "--resolution", str(proof.resolution)], logs)
    return {
        "processes": done,
        "plan": json.loads((folder / "plan" / "plan.json").read_text()),
        "steps": steps(killed),
        "trainable": size(checkpoint / str(STEPS) / "trainable.safetensors"),
        "optimizer": size(checkpoint / str(STEPS) / "optimizer.pt"),
        "checkpoint": size(checkpoint / str(STEPS)),
        "cache": size(folder / "cache"),
        "export": size(export / LORA_FILE),
        "read": json.loads((export.parent / "stock.json").read_text()),
        "same": same_bits(killed, folder / "unbroken") if unbroken else None,
    }


def failures(found: dict[str, Any]) -> list[str]:
    """What does not hold."""
    read = found["read"]
    wrong = [f"{name} keys: {read[name][:3]}" for name in ("missing", "unexpected", "different") if read[name]]
    if not read["finite"] or not read["change"] > 0:
        wrong.append(f"the loaded export changes the prediction by {read['change']}, finite: {read['finite']}")
    if found["same"] is False:
        wrong.append("the resumed run and the unbroken one differ")
    return wrong


def report(proof: Proof, found: dict[str, Any]) -> str:
    """Markdown: planned and measured, then the processes."""
    plan, first, last = found["plan"], *found["steps"]
    begun, resumed = (found["processes"][name] for name in ("train, killed in step 2", "resume to step 2, export"))
    pairs = ((begun, first), (resumed, last))
    before = [process.at(step["began"]) for process, step in pairs]
    most = [process.most(step["began"], step["time"]) for process, step in pairs]
    libraries = found["processes"]["mode=plan"].most()
    weights = plan["frozen_weights_gib"] + plan["trained_weights_gib"]
    working = plan["gradients_gib"] + plan["optimizer_gib"] + plan["activations_gib"]
    worked = [process.worked(step["began"], step["time"]) for process, step in pairs]
    speed = [plan["tflop_per_step"] / seconds for seconds in (first["seconds"], last["seconds"], *worked)]
    lines = [
        "| per process | mode=plan | measured |\n|---|---|---|",
        f"| frozen weights and trained ones, GiB | {weights:.3f} | {before[0]:.3f} own memory when step 1 begins, "
        f"Python, libraries (about {libraries:.2f}) and the VAE among it |",
        f"| trained weights, GiB | {plan['trained_weights_gib']:.3f} | {found['trainable'] / GIB:.3f} "
        "(`trainable.safetensors`) |",
        f"| optimizer, GiB | {plan['optimizer_gib']:.3f} | {found['optimizer'] / GIB:.3f} (`optimizer.pt`) |",
        f"| gradients, GiB | {plan['gradients_gib']:.3f} | as the trained weights |",
        f"| VAE, GiB | {plan['vae_gib']:.3f} | not asked |",
        f"| activations, GiB | {plan['activations_gib']:.3f} | see the next row |",
        f"| gradients, optimizer and activations, GiB | {working:.3f} | "
        f"{most[0] - before[0]:.3f} and {most[1] - before[1]:.3f} rise within steps 1 and 2 |",
        f"| total, GiB | {plan['total_gib']:.3f} | {most[0]:.3f} and {most[1]:.3f} most own memory in steps 1 and 2 |",
        f"| TFLOP per step | {plan['tflop_per_step']:.3f} | {speed[0]:.3f} and {speed[1]:.3f} TFLOP/s by the clock, "
        f"{speed[2]:.3f} and {speed[3]:.3f} per CPU second |",
        f"| seconds per step | | {first['seconds']:.1f} and {last['seconds']:.1f} (the second after the resume); "
        f"CPU seconds {worked[0]:.1f} and {worked[1]:.1f} |",
        f"| cache, MiB | {plan['cache_gib'] * 1024:.2f} | {found['cache'] / 2**20:.2f} |",
        f"| loss | | {first['loss']:.6f} and {last['loss']:.6f} |\n",
        "| process | wall, s | most own memory, GiB | with mapped files, GiB |\n|---|---|---|---|",
        *(
            f"| {name} | {m.seconds:.0f} | {m.most():.2f} | {m.peak_gib:.2f} |"
            for name, m in found["processes"].items()
        ),
    ]
    read = found["read"]
    same = {None: "not compared", True: "the same bits: weights, optimizer, export", False: "DIFFERENT"}[found["same"]]
    cores, ram = os.cpu_count(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    kind = "one fp16 file" if proof.one_file else "a folder"
    facts = [
        f"\n{proof.family} shapes, {kind}, {proof.resolution} px, batch 1, precision {proof.precision}, {cores} cores, "
        f"{ram:.0f} GiB, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}.",
        f"- checkpoint {found['checkpoint'] / 2**20:.1f} MiB, export {found['export'] / 2**20:.1f} MiB",
        f"- resumed against unbroken: {same}",
        f"- stock diffusers: {read['tensors']} tensors, {len(read['missing'])} missing, {len(read['unexpected'])} "
        f"unexpected, {len(read['different'])} different; the prediction changes by {read['change']:.2e} of its norm",
    ]
    return "\n".join([*lines, *facts]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="sdxl")
    parser.add_argument("--resolution", type=int, default=256, help="px")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--one-file", action="store_true", help="the base is one fp16 checkpoint, as people have it")
    parser.add_argument("--unbroken", action="store_true", help="also without a kill, and compare: twice the time")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "proofs", help="folder; its last run goes")
    parser.add_argument("--check-export", type=Path, help="only that stage, for an export folder and --base")
    parser.add_argument("--base", type=Path)
    args = parser.parse_args()
    if args.check_export:
        read = check_export(args.base, args.check_export, args.resolution)
        (args.check_export.parent / "stock.json").write_text(json.dumps(read, indent=2) + "\n")
        return
    folder = args.out.resolve() / f"fullsize-{args.family}-{args.resolution}-{args.precision}"
    shutil.rmtree(folder, ignore_errors=True)
    proof = Proof(args.family, folder, args.resolution, args.precision, args.one_file)
    write_base(proof.base, args.family)
    if args.one_file:
        write_one_file(proof.base)
    rows = load_rows("train", "data/rendered/train")
    write_set(proof.data, rows, spread(rows, SAMPLES))
    found = prove(proof, args.unbroken)
    wrong = failures(found)
    said = report(proof, found) + "".join(f"- FAILED: {line}\n" for line in wrong)
    with replacing_file(folder / "report.md") as file:
        file.write_text(said)
    print(said)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
