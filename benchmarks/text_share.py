"""How well the text measure tells pictures with planted text from those without, on the shipped renders.

    python -m benchmarks.text_share [pictures]

Half of the held-out plates were looked at while the rules were written; the others are measured apart.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from packshot.imaging.text_share import text_share

PLATES = Path("data/rendered/heldout")
SIDE = 768
SEEN = 120
WORDS = (
    "SALE PRICE shop now new studio collection www example com copyright preview stock image summer 2024 draft sample"
).split()


def plates() -> Iterator[Image.Image]:
    """Renders without a product, and so without print."""
    for file in sorted(PLATES.glob("*.parquet")):
        for cell in pq.read_table(file, columns=["plate"]).column(0).to_pylist():
            plate = Image.open(io.BytesIO(cell["bytes"])).convert("RGB")
            yield plate.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def with_text(image: Image.Image, seed: int) -> Image.Image:
    """One to three words of 22 to 80 px in black or white, from a third to fully opaque."""
    rng = np.random.default_rng(seed)
    text = " ".join(rng.choice(WORDS, int(rng.integers(1, 4))))
    font = ImageFont.load_default(int(rng.integers(22, 80)))
    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    _, _, width, height = draw.textbbox((0, 0), text, font=font)
    left = int(rng.integers(0, max(1, SIDE - int(width))))
    top = int(rng.integers(0, max(1, SIDE - int(height) - 10)))
    tone = 255 if rng.random() < 0.5 else 10
    draw.text((left, top), text, font=font, fill=(tone, tone, tone, int(rng.integers(90, 256))))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=int, nargs="?", default=1000)
    pictures = list(islice(plates(), parser.parse_args().pictures))
    started = time.process_time()
    clean = np.array(list(map(text_share, pictures)))
    seconds = (time.process_time() - started) / len(pictures)
    planted = np.array([text_share(with_text(picture, 1000 + seed)) for seed, picture in enumerate(pictures)])
    for name, part in (("seen", slice(0, SEEN)), ("unseen", slice(SEEN, None))):
        if len(clean[part]):
            for limit in (0.0, 0.002, 0.005):
                found, false = (planted[part] > limit).mean(), (clean[part] > limit).mean()
                print(f"{name}: {len(clean[part])} plates, limit {limit}: text found {found:.3f}, alarms {false:.3f}")
    print(f"{seconds * 1000:.0f} ms of CPU time a picture")


if __name__ == "__main__":
    main()
