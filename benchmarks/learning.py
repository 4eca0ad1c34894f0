"""Does training teach a look that the base has never seen? Trains on it, and on the same pictures without it.

    python -m benchmarks.learning --seeds 0 1 2

Makes the look from the shipped renders, trains `train_lora.py experiment=lora_mini` once per seed on 300 pictures with
the look and once without, draws the prompts of 64 held-out scenes with the base and with every LoRA through the stock
pipeline, and prints how far each set is from held-out pictures that have the look. What is finished is not done again:
delete outputs/proofs/learning to start anew. Ends with 1 when a margin that is written down here is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPVisionModelWithProjection

from benchmarks.sets import BASE, ROOT, Pictures, spread, write_set
from packshot.config.schema import GenerateSettings
from packshot.dataset.rows import load_rows
from packshot.evaluate.distance import cmmd
from packshot.evaluate.features import plain_features
from packshot.runs.files import folder_hash, replacing_file, replacing_folder
from tools.mini.clip import image_embeddings

TRAIN, HELD_OUT = 300, 64
BATCH, DENOISING_STEPS = 16, 20
# Of the way from the base's distance to that of two real samples, a LoRA trained on the look goes at least this share,
# by each embedding and with every seed; one trained without it at most the other. Written down before the first run.
LEARNT, UNLEARNT = 0.5, 0.1
DARK, MIDDLE, LIGHT = (np.array(rgb, np.float32) for rgb in ((26, 16, 78), (214, 62, 92), (255, 232, 150)))
KINDS = {"styled": "LoRA trained on the look", "plain": "control: LoRA trained without it"}


def look(image_HW3: np.ndarray) -> np.ndarray:
    """A cross-processed print: lightness in three inks (indigo, carmine, straw), steeper, dark towards the corners."""
    grey_HW = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    steep_HW1 = (1 / (1 + np.exp(-7 * (grey_HW - 0.5))))[..., None]
    below, above = np.minimum(2 * steep_HW1, 1), np.maximum(2 * steep_HW1 - 1, 0)
    inked = DARK + (MIDDLE - DARK) * below + (LIGHT - MIDDLE) * above
    y, x = (np.linspace(-1, 1, side, dtype=np.float32) for side in grey_HW.shape)
    corners_HW1 = np.clip(1 - 0.4 * (y[:, None] ** 2 + x[None] ** 2), 0, 1)[..., None]
    return np.rint(inked * corners_HW1).astype(np.uint8)


def begin(folder: Path) -> None:
    """Open the folder of this proof, or go on in it if it is about the same base."""
    folder.mkdir(parents=True, exist_ok=True)
    base, known = folder_hash(BASE, "*.safetensors"), folder / "base.sha256"
    if known.exists() and known.read_text() != base:
        raise SystemExit(f"{folder} is about another base than {BASE}: delete it, or name another with --out.")
    known.write_text(base)


# ---- data ----


def write_sets(folder: Path) -> None:
    """``train``, ``heldout`` and ``floor`` (other held-out rows), each ``styled-`` and ``plain-``."""
    train = load_rows("train", "data/rendered/train")
    held_out = load_rows("heldout", "data/rendered/heldout")
    sets = {
        "train": (train, spread(train, TRAIN)),
        "heldout": (held_out, spread(held_out, HELD_OUT)),
        "floor": (held_out, spread(held_out, HELD_OUT, first=1)),
    }
    for name, (rows, indices) in sets.items():
        for kind in ("styled", "plain"):
            write_set(folder / f"{kind}-{name}", rows, indices, look if kind == "styled" else None)


def pictures_of(folder: Path) -> Pictures:
    """The images of a dataset."""
    rows = load_rows("set", str(folder))
    return [np.asarray(rows.read(index, ("image",))["image"]) for index in range(len(rows))]


# ---- training and drawing ----


def train(folder: Path, kind: str, seed: int, steps: int) -> Path:
    """The export of a run of the real script; the held-out loss is that on pictures with the look, for both kinds."""
    run = folder / "runs" / f"{kind}-{seed}"
    command = [
        *(sys.executable, "train_lora.py", "experiment=lora_mini", "tracking=none", f"run.dir={run}"),
        *(f"run.seed={seed}", f"run.resume={run.exists()}", f"data.cache_dir={folder / 'cache'}"),
        *(f"data.train={folder / f'{kind}-train'}", f"data.validation={folder / 'styled-heldout'}"),
        *("method.rank=16", "method.alpha=16", f"train.max_steps={steps}", "train.batch_size=8"),
        *(f"train.validation_steps={steps}", "train.validate_first=true", "train.validation_samples=1"),
    ]
    if not (run / "export").exists():
        print(" ".join(command), file=sys.stderr)
        if subprocess.run(command, cwd=ROOT).returncode:
            raise SystemExit(f"{run} failed; its log.txt has the reason.")
    return run


def losses(run: Path) -> tuple[float, float]:
    """Held-out loss on the look, before the first and after the last step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line["validation_loss"] for line in lines if "validation_loss" in line]
    return found[0], found[-1]


@torch.no_grad()
def draw(export: Path | None, texts: list[str], folder: Path) -> Pictures:
    """One picture per text with the stock pipeline, the k-th from seed k; kept in ``folder``."""
    files = [folder / f"{number:02}.png" for number in range(len(texts))]
    if not folder.exists():
        pipe: Any = StableDiffusionXLPipeline.from_pretrained(BASE)
        pipe.set_progress_bar_config(disable=True)
        if export:
            pipe.load_lora_weights(str(export))
        with replacing_folder(folder) as temporary:
            for first in range(0, len(texts), BATCH):
                numbers = range(first, min(first + BATCH, len(texts)))
                drawn = pipe(
                    [texts[number] for number in numbers],
                    generator=[torch.Generator().manual_seed(number) for number in numbers],
                    num_inference_steps=DENOISING_STEPS,
                    guidance_scale=GenerateSettings().guidance_scale,
                ).images
                for number, image in zip(numbers, drawn, strict=True):
                    image.save(temporary / files[number].name)
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


@torch.no_grad()
def through_vae(pictures: Pictures) -> Pictures:
    """Decoded as the base's VAE encodes them: what no training of the UNet can be better than."""
    vae: Any = AutoencoderKL.from_pretrained(BASE, subfolder="vae")
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    return list(((decoded + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


# ---- scores ----


@dataclass(frozen=True)
class Scores:
    """Of a set of pictures. distance: CMMD to held-out pictures with the look; probed: share that a linear probe takes
    for pictures with the look; both per embedding."""

    distance: dict[str, float]
    probed: dict[str, float]


class Judge:
    """Scores sets of pictures against held-out ones with the look, by the base's image encoder and by plain features.

    The probes are ridge regressions to ±1, fitted on the training pictures with and without the look.
    """

    def __init__(self, folder: Path) -> None:
        encoder: Any = CLIPVisionModelWithProjection.from_pretrained(BASE, subfolder="image_encoder").eval()
        self.embeddings: dict[str, Callable[[Pictures], np.ndarray]] = {
            "CLIP": lambda pictures: image_embeddings(encoder, pictures).numpy(),
            "features": lambda pictures: np.stack([plain_features(picture) for picture in pictures]),
        }
        self._wanted = self._embed(pictures_of(folder / "styled-heldout"))
        styled, plain = (self._embed(pictures_of(folder / f"{kind}-train")) for kind in ("styled", "plain"))
        self._probes = {name: ridge(styled[name], plain[name]) for name in self.embeddings}

    def _embed(self, pictures: Pictures) -> dict[str, np.ndarray]:
        return {name: embed(pictures) for name, embed in self.embeddings.items()}

    def __call__(self, pictures: Pictures) -> Scores:
        seen = self._embed(pictures)
        sides = {name: np.c_[seen[name], np.ones(len(pictures))] @ self._probes[name] for name in seen}
        return Scores(
            distance={name: cmmd(seen[name], self._wanted[name]) for name in seen},
            probed={name: float((side > 0).mean()) for name, side in sides.items()},
        )


def ridge(positive_ND: np.ndarray, negative_MD: np.ndarray, strength: float = 1e-2) -> np.ndarray:
    """Weights (D + 1,), the last for a column of ones, of the regression to +1 and -1."""
    x = np.r_[positive_ND, negative_MD].astype(np.float64)
    x = np.c_[x, np.ones(len(x))]
    y = np.r_[np.ones(len(positive_ND)), -np.ones(len(negative_MD))]
    return np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)


# ---- report ----


def gone(scores: Scores, base: Scores, floor: Scores, name: str) -> float:
    """Share of the way from the base to two real samples that a set has gone; below 0: away."""
    return (base.distance[name] - scores.distance[name]) / (base.distance[name] - floor.distance[name])


def spread_of(values: list[float], form: str) -> str:
    """Mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{form}} ± {deviation:{form}}"


def table(rows: dict[str, Scores], held_out: dict[str, tuple[float, float]], seeds: list[int]) -> str:
    """Markdown: every set, and mean and spread over the seeds."""
    names = ("CLIP", "features")
    base, floor = rows["base, no LoRA"], rows["other held-out pictures with the look"]
    heads = ("CMMD, CLIP", "CMMD, features", "way gone, CLIP", "way gone, features")
    heads += ("probe, CLIP", "probe, features", "held-out loss before, after")

    def figures(scores: Scores) -> list[tuple[float, str]]:
        found = [(scores.distance[name], ".2f") for name in names]
        found += [(gone(scores, base, floor, name), ".0%") for name in names]
        return found + [(scores.probed[name], ".0%") for name in names]

    lines = ["| set of 64 pictures | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for row, scores in rows.items():
        loss = "{:.4f}, {:.4f}".format(*held_out[row]) if row in held_out else ""
        lines.append(f"| {row} | " + " | ".join(f"{value:{form}}" for value, form in figures(scores)) + f" | {loss} |")
    for kind in KINDS.values():
        columns = zip(*(figures(rows[f"{kind}, seed {seed}"]) for seed in seeds), strict=True)
        cells = [spread_of([value for value, _ in column], column[0][1]) for column in columns]
        after = [held_out[f"{kind}, seed {seed}"][1] for seed in seeds]
        lines.append(f"| **{kind}, mean ± sd** | " + " | ".join(cells) + f" | {spread_of(after, '.4f')} |")
    return "\n".join(lines)


def verdict(rows: dict[str, Scores], seeds: list[int]) -> list[str]:
    """The margins that were missed."""
    base, floor = rows["base, no LoRA"], rows["other held-out pictures with the look"]
    missed = []
    for seed in seeds:
        for name in ("CLIP", "features"):
            learnt, control = (gone(rows[f"{kind}, seed {seed}"], base, floor, name) for kind in KINDS.values())
            if learnt < LEARNT:
                missed.append(f"seed {seed}, {name}: the LoRA has gone {learnt:.0%} of the way, wanted {LEARNT:.0%}")
            if control > UNLEARNT:
                missed.append(f"seed {seed}, {name}: the control has gone {control:.0%}, at most {UNLEARNT:.0%}")
    return missed


def contact_sheet(rows: dict[str, Pictures], file: Path, columns: int = 10) -> None:
    """The first pictures of every set, a line each."""
    Image.fromarray(np.vstack([np.hstack(pictures[:columns]) for pictures in rows.values()])).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "proofs" / "learning")
    args = parser.parse_args()
    folder, seeds = args.out.resolve(), args.seeds
    begin(folder)
    write_sets(folder)
    texts = load_rows("heldout", str(folder / "plain-heldout")).texts
    truth = pictures_of(folder / "styled-heldout")
    sets = {
        "held-out pictures without the look": pictures_of(folder / "plain-heldout"),
        "other held-out pictures with the look": pictures_of(folder / "styled-floor"),
        "held-out pictures with the look, through the VAE": through_vae(truth),
        "base, no LoRA": draw(None, texts, folder / "pictures" / "base"),
    }
    held_out = {}
    for seed in seeds:
        for kind, name in KINDS.items():
            run = train(folder, kind, seed, args.steps)
            sets[f"{name}, seed {seed}"] = draw(run / "export", texts, folder / "pictures" / run.name)
            held_out[f"{name}, seed {seed}"] = losses(run)
    judge = Judge(folder)
    rows = {name: judge(pictures) for name, pictures in sets.items()}
    contact_sheet({"truth": truth, **sets}, folder / "sheet.png")
    missed = verdict(rows, seeds)
    report = table(rows, held_out, seeds) + "\n\n" + ("\n".join(missed) or "Every margin is kept.") + "\n"
    with replacing_file(folder / "report.md") as file:
        file.write_text(report)
    print(report)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
