"""How close the filling of a cache comes to the encoder's own speed.

    python -m benchmarks.encoding --side 1024 --pictures 100 --seconds .1    # an encoder that takes .1 s a picture
    python -m benchmarks.encoding --width 4000 --height 3000 --pictures 40 --seconds .1
    python -m benchmarks.encoding --side 128 --pictures 200                  # mini's VAE

With ``--seconds`` the VAE is replaced by one that only waits, as a GPU lets the CPU wait; decoding, framing, planes and
files are real. Prints pictures per second, the encoder's own with as many pictures at a time, their ratio, and CPU
seconds a picture.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw
from torch import Tensor

from packshot.base.load import load_parts
from packshot.config.compose import compose
from packshot.dataset.rows import load_rows
from packshot.methods import build_method
from packshot.runs.start import start_process
from packshot.train.encode import Encoder, encode_batch
from packshot.train.examples import Examples

TIMES_ALONE = 50


class WaitingVae:
    """A VAE that takes its time and computes nothing."""

    device = torch.device("cpu")

    def __init__(self, seconds: float, cell: int) -> None:
        self.seconds = seconds
        self.cell = cell

    def encode(self, pixels_BCHW: Tensor) -> SimpleNamespace:
        """Zeros of the posterior's shape."""
        time.sleep(self.seconds * len(pixels_BCHW))
        height, width = pixels_BCHW.shape[-2:]
        zeros = torch.zeros(len(pixels_BCHW), 4, height // self.cell, width // self.cell)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=zeros, std=zeros.clone()))


def picture(number: int, size: tuple[int, int]) -> dict[str, object]:
    """A row: a photograph-like JPEG (about 1 bit a pixel), its mask, a caption."""
    coarse = np.random.default_rng(number).integers(0, 255, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((size[0] // 3, size[1] // 4, size[0] // 2, size[1] // 2), fill=255)
    cells = {}
    for name, image, kind in (("image", Image.fromarray(coarse).resize(size), "JPEG"), ("mask", mask, "PNG")):
        buffer = BytesIO()
        image.save(buffer, kind)
        cells[name] = {"bytes": buffer.getvalue(), "path": None}
    scene = {"text": "Professional photo of an object on a table", "license": "CC0-1.0", "source": "benchmark"}
    return {**cells, **scene, "id": f"{number:08d}", "width": size[0], "height": size[1]}


def main() -> None:
    """Fill a cache and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--seconds", type=float)
    args = parser.parse_args()
    start_process()
    size = (args.width or args.side, args.height or args.side)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "set").mkdir()
        rows = [picture(number, size) for number in range(args.pictures)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "set" / "part-00000.parquet")
        keys = [f"data.train={folder / 'set'}", f"data.cache_dir={folder / 'cache'}", "tracking=none"]
        config = compose("train_lora", [*keys, f"model.resolution={args.side}", "data.buckets=false"])
        parts = load_parts(config.model)
        method = build_method(parts, config)
        data = load_rows("data.train", str(folder / "set"), pictures=("image", "mask"))
        encoder = Encoder(parts, method, args.side, config.data)
        examples = Examples(data, encoder, folder / "cache")
        if args.seconds:
            encoder.__dict__["_vae"] = WaitingVae(args.seconds, encoder.vae_scale)
        seen = [encoder.ready(examples.seen(0))] * encode_batch((args.side, args.side))
        encoder.text([seen[0]["text"]])  # loads the text encoders, which is not measured
        print("encoders", encoder.identity)
        started = time.monotonic()
        for _ in range(TIMES_ALONE):
            encoder.latents(seen)
        alone = (time.monotonic() - started) / (TIMES_ALONE * len(seen))
        started = time.monotonic()
        before = time.process_time()
        examples.fill(Accelerator(cpu=True))
        filling = (time.monotonic() - started) / len(examples)
        cpu = (time.process_time() - before) / len(examples)
        print(f"{1 / filling:.2f} pictures/s, the encoder alone {1 / alone:.2f}: {alone / filling:.2f} of it")
        print(f"{cpu:.3f} CPU s a picture")


if __name__ == "__main__":
    main()
