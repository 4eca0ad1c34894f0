"""How often the base, alone and with each adapter, draws a product larger than it is.

    python -m benchmarks.extension outputs/style/export outputs/background/export --products 16

Puts held-out products into the same scenes from the same noise, by the code of generate.py, and measures the raw
decode, before the product's own pixels are laid over it. An adapter is shown the product as it was trained to see it;
the base alone both ways. What is drawn is not drawn again: delete --out to start anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from packshot.base.ip_adapters import EXPORT as IP_ADAPTER_FILE
from packshot.base.lora_files import DIFFUSERS_FILE as LORA_FILE
from packshot.config.schema import AdaptersConfig, GenerateSettings, ProductConditioning
from packshot.dataset.rows import Rows, load_rows
from packshot.generate import Packshot
from packshot.generate.color import delta_e
from packshot.imaging.control_maps import keep_mask
from packshot.imaging.matte import held_cells
from packshot.imaging.outline import compare_size, measure_extension, segment_near
from packshot.imaging.pixels import from_network, to_bytes, to_network, to_unit
from packshot.runs.files import replacing_file
from packshot.train.validation import means, measure

CELL = 8  # px, of a latent
RIM = 2  # px of the product along its outline, where its colours are compared
ROOT = Path(__file__).resolve().parents[1]
PROMPTS = (
    "Professional photo of an object on a marble table, a concrete wall in the background, soft daylight",
    "Professional photo of an object on a wooden podium, surrounded by palm leaves, a beige wall in the background",
)


def adapters_of(folder: Path) -> AdaptersConfig:
    """The adapter in an export folder, recognised by its main file."""
    if (folder / LORA_FILE).exists():
        return AdaptersConfig(lora=str(folder))
    if (folder / IP_ADAPTER_FILE).exists():
        return AdaptersConfig(ip_adapter=str(folder))
    return AdaptersConfig(controlnets=[str(folder)])


def shown_as(tool: Packshot, shown: ProductConditioning) -> Packshot:
    """The same tool, the product shown to its network in another way."""
    return replace(tool, loaded=replace(tool.models, product_conditioning=shown.name))


def tools(model: str, folders: list[Path]) -> Iterator[tuple[str, Packshot]]:
    """The sets of pictures by name, each with what draws it; one base in memory at a time."""
    for shown in (ProductConditioning.noised, ProductConditioning.clean):
        yield f"base alone, product {shown}", shown_as(Packshot.load(model), shown)
    for folder in folders:
        tool = Packshot.load(model, adapters=adapters_of(folder))
        name = folder.parent.name if folder.name == "export" else folder.name
        yield f"{name}, product {tool.models.product_conditioning}", tool


def draw(tool: Packshot, rows: Rows, index: int, shot: int, settings: GenerateSettings, file: Path) -> Image.Image:
    """The raw decode of a held-out product; the shot chooses prompt and noise, the same for every set."""
    if not file.exists():
        row = rows.read(index, ("image", "mask", "depth"))
        tool.set_product(row["image"], row["mask"], row["id"], depth=row.get("depth"))
        [result] = tool.generate(PROMPTS[shot % len(PROMPTS)], 1, seed=1000 * shot + index, settings=settings)
        with replacing_file(file) as temporary:
            result.layers["raw"].save(temporary, "PNG")
    return Image.open(file).convert("RGB")


@lru_cache(maxsize=512)
def floor_of(vae: Any, rows: Rows, index: int) -> dict[str, float]:
    """The same measures on the photo as the VAE gives it back: where the right answer is 0."""
    row = rows.read(index, ("image", "mask"))
    pixels_13HW = to_network(np.asarray(row["image"])[None]).to(vae.device)
    with torch.inference_mode():
        given_back = to_bytes(from_network(vae.decode(vae.encode(pixels_13HW).latent_dist.mean).sample[0]))
    return measure_extension(given_back, np.asarray(row["mask"]), segment_near, compare_size(*given_back.shape[:2]))


def figures(vae: Any, rows: Rows, index: int, raw: Image.Image) -> dict[str, Any]:
    """How far the product in a raw decode has left its mask, above its noise floor; how its edge looks,
    and the share of it that lies in latent cells that can be held."""
    row = rows.read(index, ("image", "mask"))
    matte_HW = np.asarray(row["mask"])
    # the raw decode is at the working size, the matte at the photo's
    drawn_HW3 = np.asarray(raw.resize(row["image"].size, Image.Resampling.LANCZOS))
    rim = (matte_HW >= 128) & (keep_mask(matte_HW / 255, -RIM) == 0)
    edge = float(np.median(delta_e(drawn_HW3[rim], np.asarray(row["image"])[rim])))
    held = CELL**2 * held_cells(to_unit(matte_HW), CELL).sum() / (matte_HW >= 128).sum()
    found = measure(drawn_HW3, matte_HW, floor_of(vae, rows, index))
    return {**found, "edge_delta_e": edge, "held_share": float(held)}


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a line per set."""
    lines = ["| set | pictures | extension rate | mean extension | mean product loss |", "|---|---|---|---|---|"]
    for name, measured in found.items():
        mean = means(measured)
        cells = [f"{mean[key]:.1%}" for key in ("extension_rate", "extension", "product_loss")]
        lines.append(f"| {name} | {len(measured)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def line(pictures: list[Image.Image], side: int = 128) -> np.ndarray:
    """A line of the contact sheet."""
    return np.hstack([np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS)) for picture in pictures])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", type=Path, nargs="*", help="export folders of the trainers")
    parser.add_argument("--model", default="mini", help="a file of conf/model")
    parser.add_argument("--data", default="data/rendered/heldout", help="product dataset")
    parser.add_argument("--products", type=int, default=16, help="spread evenly over the dataset")
    parser.add_argument("--shots", type=int, default=2, help="pictures of each product; prompts take turns")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "proofs" / "extension")
    args = parser.parse_args()
    settings = GenerateSettings(num_inference_steps=args.steps, guidance_scale=args.guidance_scale)
    rows = load_rows("data", args.data)
    indices = [int(place) for place in np.linspace(0, len(rows) - 1, args.products)]
    found: dict[str, list[dict[str, Any]]] = {}
    sheet = [line([rows.read(index, ("image",))["image"] for index in indices])]
    for name, tool in tools(args.model, args.adapters):
        pictures = []
        for shot in range(args.shots):
            for index in indices:
                file = args.out / name.replace(", ", "-").replace(" ", "_") / f"{index:04}-{shot}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                pictures.append((index, draw(tool, rows, index, shot, settings, file)))
            sheet.append(line([picture for _, picture in pictures[-len(indices) :]]))
        found[name] = [figures(tool.models.pipe.vae, rows, index, picture) for index, picture in pictures]
        print(table({name: found[name]}).splitlines()[-1], file=sys.stderr)
    Image.fromarray(np.vstack(sheet)).save(args.out / "sheet.png")
    (args.out / "measured.json").write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
