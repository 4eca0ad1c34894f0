"""What the mini SDXL has learnt, on held-out scenes, compared with what no learning would give.

    python -m benchmarks.family --model data/models/sdxl --out outputs/proofs/family

Reconstruction of the VAE; retrieval by the CLIP pair; and whether the UNet obeys its prompts: pictures drawn for
held-out captions are read slot by slot by the family's own image encoder and by a linear probe on plain features, which
no network has a part in. Each is asked the same about the renders themselves (what it can see at all) and about the
pictures against other scenes' captions (what it would say anyway). Writes ``report.md``, ``grid.png`` (held-out
prompts) and ``slots.png`` (one slot changed alone, a row each).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from transformers import CLIPVisionModelWithProjection

from benchmarks.learning import Pictures, spread_of
from packshot.caption.scores import deal_to_others
from packshot.evaluate.distance import cmmd
from packshot.evaluate.features import plain_features
from packshot.runs.files import replacing_file
from packshot.scene import Scene
from tools.mini.clip import PHRASES, image_embeddings, slot_accuracy, text_embeddings
from tools.mini.data import Render, Renders, bare_phrases
from tools.mini.unet import load_parts, sample
from tools.mini.vae import measure_vae

COLUMNS = 8
START = Scene("a white marble table", ("lemons",), "a grey wall", "soft light from the left side", "calm")
CHANGES: dict[str, tuple[str, ...]] = {
    "surface": (
        *("a white marble table", "a dark wooden table", "a bed of sand", "fresh snow", "a black glossy table"),
        *("a pink podium", "a moss-covered stone", "rippled water"),
    ),
    "background": (
        *("a grey wall", "a pink wall", "a blue wall", "a yellow wall", "a green wall", "a brick wall", "a dark wall"),
        "a forest",
    ),
    "lighting": (
        *("soft light from the left side", "soft light from the right side", "harsh light from the left side"),
        *("harsh light from the right side", "backlight", "golden hour light", "pink neon light", "blue neon light"),
    ),
    "surroundings": (
        *("lemons", "oranges", "green apples", "candles", "white flowers", "palm leaves", "books", "glass spheres"),
    ),
}


# ---- the probe ----


def probe_features(image_HW3: np.ndarray) -> np.ndarray:
    """Colours, edges and layout, and the picture at 8 x 8 in CIELAB."""
    small = cv2.resize(image_HW3, (8, 8), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return np.concatenate([plain_features(image_HW3), cv2.cvtColor(small, cv2.COLOR_RGB2LAB).ravel() / 100])


@dataclass(frozen=True)
class Probe:
    """Ridge regressions from :func:`probe_features` to the phrases of each slot."""

    mean_D: np.ndarray
    scale_D: np.ndarray
    weights: dict[str, np.ndarray]

    @classmethod
    def fit(cls, renders: list[Render], strength: float = 30.0) -> Probe:
        """From training renders."""
        x_ND = np.stack([probe_features(render.image) for render in renders])
        mean, scale = x_ND.mean(0), x_ND.std(0) + 1e-6
        x_ND = np.c_[(x_ND - mean) / scale, np.ones(len(x_ND))]
        inverse = np.linalg.inv(x_ND.T @ x_ND + strength * np.eye(x_ND.shape[1])) @ x_ND.T
        targets = {slot: shown([render.scene for render in renders], slot) for slot in PHRASES}
        return cls(mean, scale, {slot: inverse @ (target - target.mean(0)) for slot, target in targets.items()})

    def __call__(self, images: Pictures, scenes: list[Scene]) -> dict[str, float]:
        """Per slot, how often the likeliest phrase is one of the scene's; scenes with an empty slot do not count."""
        x_ND = np.c_[(np.stack([probe_features(i) for i in images]) - self.mean_D) / self.scale_D, np.ones(len(images))]
        found = {}
        for slot, weights in self.weights.items():
            target = shown(scenes, slot)
            hits = target[np.arange(len(scenes)), (x_ND @ weights).argmax(1)]
            found[slot] = float(hits[target.any(1)].mean())
        return found


def shown(scenes: list[Scene], slot: str) -> np.ndarray:
    """(scenes, phrases of the slot): 1 where a scene has the phrase."""
    wanted = [bare_phrases(scene, slot) for scene in scenes]
    return np.array([[float(phrase in values) for phrase in PHRASES[slot]] for values in wanted])


# ---- scores ----


def retrieval(parts: dict, renders: list[Render]) -> dict[str, float]:
    """Share of pictures whose own caption is the nearest, or among the five nearest, of all; and of captions."""
    images = image_embeddings(parts["image_encoder"], [render.image for render in renders])
    texts = [render.scene.render() for render in renders]
    likeness_IT = (images @ text_embeddings(parts["text_encoder_2"], parts["tokenizer_2"], texts).T).numpy()
    found = {}
    for name, table in (("caption of a picture", likeness_IT), ("picture of a caption", likeness_IT.T)):
        rank = (table > np.diag(table)[:, None]).sum(1)
        found |= {f"{name}, @{k}": float((rank < k).mean()) for k in (1, 5)}
    return found


def obedience(parts: dict, renders: Renders, count: int, seeds: int, unet: Any) -> tuple[Pictures, list[str]]:
    """The pictures of the first seed, and a table: slots as each judge reads them."""
    asked = renders.held_out[:: max(1, len(renders.held_out) // count)][:count]
    scenes = [render.scene for render in asked]
    texts = [scene.render() for scene in scenes]
    drawn = [sample(parts, unet, texts, seed=seed * 1000) for seed in range(seeds)]
    probe = Probe.fit(renders.train)
    judges = {"CLIP": lambda images, of: slot_accuracy(parts, images, of), "probe": probe}
    others = [scenes[index] for index in deal_to_others(len(scenes), seed=0)]
    renders_of = [render.image for render in asked]
    lines = ["| judge, pictures | " + " | ".join(PHRASES) + " | mean |", "|---|" + "---|" * (len(PHRASES) + 1)]
    for judge, read in judges.items():
        rows = {
            "the renders themselves": [read(renders_of, scenes)],
            "drawn for the caption": [read(images, scenes) for images in drawn],
            "drawn, other scenes' captions": [read(images, others) for images in drawn],
        }
        for name, found in rows.items():
            cells = [spread_of([figures[slot] for figures in found], ".2f") for slot in PHRASES]
            mean = spread_of([float(np.mean(list(figures.values()))) for figures in found], ".2f")
            lines.append(f"| {judge}, {name} | " + " | ".join(cells) + f" | {mean} |")
    return drawn[0], lines


def distance(folder: Path, drawn: Pictures, renders: Renders) -> str:
    """CMMD of the drawn pictures to held-out renders, and that of as many training renders."""
    encoder: Any = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").eval()
    rng = np.random.default_rng(0)
    held_out = [render.image for render in renders.held_out]
    real = [renders.train[index].image for index in rng.choice(len(renders.train), len(drawn), replace=False)]

    def both(pictures: Pictures) -> str:
        clip = cmmd(image_embeddings(encoder, pictures).numpy(), image_embeddings(encoder, held_out).numpy())
        some, all_of = (np.stack([plain_features(picture) for picture in these]) for these in (pictures, held_out))
        plain = cmmd(some, all_of)
        return f"{clip:.2f} by CLIP, {plain:.2f} by plain features"

    return f"drawn {both(drawn)}; as many training renders {both(real)}"


def rows_of(pictures: Pictures, file: Path) -> None:
    """Save pictures, ``COLUMNS`` to a row, at twice their size."""
    rows = [np.hstack(pictures[first : first + COLUMNS]) for first in range(0, len(pictures), COLUMNS)]
    sheet = Image.fromarray(np.vstack(rows))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.LANCZOS).save(file)


def changed_alone(slot: str, phrase: str) -> str:
    """The caption of the start scene with another phrase in one slot."""
    value: Any = (phrase,) if slot == "surroundings" else phrase
    return replace(START, **{slot: value}).render()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("data/models/sdxl"))
    parser.add_argument("--out", type=Path, default=Path("outputs/proofs/family"))
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    from diffusers import UNet2DConditionModel

    args.out.mkdir(parents=True, exist_ok=True)
    renders, parts = Renders.open(["data/rendered/train"], "data/rendered/heldout"), load_parts(args.model)
    unet: Any = UNet2DConditionModel.from_pretrained(args.model / "unet").float().eval()
    lines = ["VAE, dB: " + ", ".join(f"{k} {v:.2f}" for k, v in measure_vae(parts["vae"], renders.held_out).items())]
    found = retrieval(parts, renders.held_out)
    chance = 1 / len(renders.held_out)
    lines.append("CLIP: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()) + f" (chance @1 {chance:.3f})")
    drawn, table = obedience(parts, renders, args.pictures, args.seeds, unet)
    lines += ["CMMD: " + distance(args.model, drawn, renders), "", *table]
    rows_of(drawn[: 4 * COLUMNS], args.out / "grid.png")
    alone = [changed_alone(slot, phrase) for slot, phrases in CHANGES.items() for phrase in phrases]
    rows_of([sample(parts, unet, [text])[0] for text in alone], args.out / "slots.png")
    with replacing_file(args.out / "report.md") as file:
        file.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
