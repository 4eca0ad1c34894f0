"""Does a picture take the look of its reference, and does it still obey its prompt?

    python -m benchmarks.references outputs/ip_adapter/export --groups 50

Choice: held-out products are put before the look of one of four held-out scenes, with no word in the prompt;
then the four are ranked by how near they are to the background that was drawn, in an embedding that no adapter was
trained with: the image encoder of the family's Llama 3.2 Vision, and plain colours, edges and layout. By chance .25.
Obedience: held-out captions drawn without a reference and with one of another scene, read slot by slot by a linear
probe (see family.py). Products are painted grey wherever two pictures are compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.family import PHRASES, Probe
from packshot.config.schema import AdaptersConfig, GenerateSettings
from packshot.dataset.rows import Rows, load_rows
from packshot.evaluate.features import plain_features
from packshot.generate import Packshot
from packshot.runs.files import replacing_file, resolve
from packshot.runs.progress import progress
from tools.mini.data import Renders

ROOT = Path(__file__).resolve().parents[1]
CHOICES = 4


# ---- embeddings ----


@lru_cache(maxsize=1)
def _tower(folder: str) -> tuple[Any, Any]:
    from transformers import MllamaForConditionalGeneration, MllamaProcessor

    model: Any = MllamaForConditionalGeneration.from_pretrained(resolve(folder), dtype=torch.float32)
    processor: Any = MllamaProcessor.from_pretrained(resolve(folder))
    return model.model.vision_model.eval(), processor.image_processor


@torch.inference_mode()
def by_llama(image: Image.Image, folder: str = "data/models/mllama") -> np.ndarray:
    """Mean of the image encoder's last states."""
    tower, process = _tower(folder)
    batch = process(images=[image], return_tensors="pt")
    given = {name: batch[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    return tower(**given).last_hidden_state.flatten(0, -2).mean(0).numpy()


def by_plain_features(image: Image.Image) -> np.ndarray:
    """Colours, edges and layout."""
    return plain_features(np.asarray(image))


EMBEDDINGS: dict[str, Callable[[Image.Image], np.ndarray]] = {"Llama": by_llama, "plain": by_plain_features}


def without_product(image: Image.Image, mask: Image.Image) -> Image.Image:
    return Image.composite(Image.new("RGB", image.size, (127, 127, 127)), image.convert("RGB"), mask)


# ---- what is drawn ----


class Drawing:
    """Pictures that are kept and not drawn again."""

    def __init__(self, tool: Packshot, rows: Rows, out: Path, steps: int, guidance_scale: float) -> None:
        self.tool, self.rows, self.out = tool, rows, out
        self.settings = GenerateSettings(num_inference_steps=steps, guidance_scale=guidance_scale)

    def __call__(self, name: str, product: int, prompt: str, reference: int | None, seed: int) -> Image.Image:
        file = self.out / f"{name}.png"
        if not file.exists():
            row = self.rows.read(product, ("image", "mask"))
            self.tool.set_product(row["image"], row["mask"], row["id"])
            look = None if reference is None else self.background(reference)
            [result] = self.tool.generate(prompt, 1, seed, look, self.settings)
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing_file(file) as temporary:
                result.image.save(temporary, "PNG")
        return Image.open(file).convert("RGB")

    def background(self, index: int) -> Image.Image:
        """A held-out scene, its product grey: a reference as training sees it."""
        row = self.rows.read(index, ("image", "mask"))
        return without_product(row["image"], row["mask"])


def groups(rows: Rows, count: int, seed: int) -> list[tuple[int, list[int]]]:
    """(product, four scenes): the scenes differ in surface and in background, the product is of a fifth."""
    rng, scenes = np.random.default_rng(seed), [rows.read(index, ())["scene"] for index in range(len(rows))]
    found = []
    while len(found) < count:
        product, *four = (int(index) for index in rng.choice(len(rows), CHOICES + 1, replace=False))
        looks = [scenes[index] for index in four]
        if all(len({getattr(look, slot) for look in looks}) == CHOICES for slot in ("surface", "background")):
            found.append((product, four))
    return found


def choice(draw: Drawing, count: int, seed: int) -> dict[str, list[bool]]:
    """By embedding: whether each picture is nearest to its own reference."""
    hits: dict[str, list[bool]] = {name: [] for name in EMBEDDINGS}
    with progress("references", total=count * CHOICES) as advance:
        for number, (product, four) in enumerate(groups(draw.rows, count, seed)):
            mask = draw.rows.read(product, ("mask",))["mask"]
            looks = [draw.background(index) for index in four]
            for own, index in enumerate(four):
                drawn = draw(f"choice-{number:03}-{own}", product, "", index, seed + number)
                seen = without_product(drawn, mask)
                for name, embed in EMBEDDINGS.items():
                    far = [1 - _cosine(embed(seen), embed(look), name) for look in looks]
                    hits[name].append(int(np.argmin(far)) == own)
                advance()
    return hits


@lru_cache(maxsize=2)
def _centre(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread of an embedding over training scenes: without them, what all pictures share drowns the rest."""
    rows = load_rows("data", "data/rendered/train")
    taken = [rows.read(int(i), ("image", "mask")) for i in np.linspace(0, len(rows) - 1, 200)]
    values = np.stack([EMBEDDINGS[name](without_product(row["image"], row["mask"])) for row in taken])
    return values.mean(0), values.std(0) + 1e-6


def _cosine(a_D: np.ndarray, b_D: np.ndarray, name: str) -> float:
    mean, spread = _centre(name)
    a, b = (a_D - mean) / spread, (b_D - mean) / spread
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-12))


def obedience(draw: Drawing, count: int, seed: int) -> dict[str, dict[str, float]]:
    """Slot accuracy by the probe, without a reference and with one of another scene."""
    probe = Probe.fit(Renders.open(["data/rendered/train"], "data/rendered/heldout").train)
    asked = [int(place) for place in np.linspace(0, len(draw.rows) - 1, count)]
    rng = np.random.default_rng(seed)
    others = [int(rng.choice([i for i in range(len(draw.rows)) if i != index])) for index in asked]
    scenes = [draw.rows.read(index, ())["scene"] for index in asked]
    found = {}
    for name, references in (("no reference", [None] * count), ("reference of another scene", others)):
        pictures = []
        for number, (index, reference) in enumerate(zip(asked, references, strict=True)):
            kept = f"obey-{number:03}-{'none' if reference is None else 'other'}"
            pictures.append(np.asarray(draw(kept, index, scenes[number].render(), reference, seed + number)))
        slots = probe(pictures, scenes)
        found[name] = {**slots, "mean": float(np.mean([slots[slot] for slot in PHRASES]))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ip_adapter", help="export folder of train_ip_adapter.py")
    parser.add_argument("--scale", type=float, default=1.0, help="adapters.ip_adapter_scale")
    parser.add_argument("--groups", type=int, default=50, help="four pictures each")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=3.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "proofs" / "references")
    args = parser.parse_args()
    tool = Packshot.load(adapters=AdaptersConfig(ip_adapter=args.ip_adapter, ip_adapter_scale=args.scale))
    rows = load_rows("data", "data/rendered/heldout")
    draw = Drawing(tool, rows, args.out, args.steps, args.guidance_scale)
    hits = choice(draw, args.groups, args.seed)
    figures: dict[str, Any] = {name: float(np.mean(values)) for name, values in hits.items()}
    print(f"own reference nearest, {len(hits['plain'])} cases:", figures, flush=True)
    figures["obedience"] = obedience(draw, args.captions, args.seed)
    print(json.dumps(figures, indent=2))
    (args.out / "measured.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
