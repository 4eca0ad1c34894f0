"""How much longer a guided picture with all adapters takes here than in the stock pipeline of diffusers.

    python -m benchmarks.guided_overhead lora/export controlnet/export ip_adapter/export

Both encode the words and the reference, draw with guidance, ControlNet, LoRA and IP-Adapter, and decode; here the
product is also encoded, and put back after every step. A further picture of a request has words, reference and product
encoded already, here only. Stock loads the exports without any code of this repository. They take turns. Prints medians
of CPU seconds, and the median of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline
from PIL import Image

from packshot import Packshot
from packshot.config.schema import AdaptersConfig, GenerateSettings
from packshot.generate.denoise import control_arguments, denoise, encode
from packshot.generate.references import open_references

BASE = Path("data/models/sdxl")
PHOTO = Path("data/products/coffee.png")
LOOK = Path("data/references/yellow_wall.png")
PROMPT = "Professional photo of an object on a white marble table, a pink wall in the background, soft light"


def cpu_seconds(action: Callable[[], object]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def stock_pipeline(lora: str, controlnet: str, ip_adapter: str) -> StableDiffusionXLControlNetPipeline:
    """The pipeline as its documentation builds it."""
    net = ControlNetModel.from_pretrained(controlnet)
    pipe = StableDiffusionXLControlNetPipeline.from_pretrained(BASE, controlnet=net, add_watermarker=False)
    pipe.load_lora_weights(lora)
    pipe.load_ip_adapter(ip_adapter, subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("lora", "controlnet", "ip_adapter"):
        parser.add_argument(name, help="its export/ folder")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    lora, controlnet, ip_adapter = given.lora, given.controlnet, given.ip_adapter
    adapters = AdaptersConfig(lora=lora, controlnets=[controlnet], ip_adapter=ip_adapter)
    tool = Packshot.load(adapters=adapters).set_product(PHOTO)
    settings = GenerateSettings(num_inference_steps=given.steps, guidance_scale=3.5)
    ready = tool.make_ready(PROMPT, settings, LOOK)
    assert ready.drawing is not None
    working = ready.drawing.working
    stock = stock_pipeline(lora, controlnet, ip_adapter)
    control = control_arguments(tool.models, working, {})["image"][0]
    look = Image.open(LOOK).convert("RGB")

    references = open_references(look, ())

    def here() -> None:
        conditioning = encode(tool.models, PROMPT, settings, references)
        denoise(tool.models, working, conditioning, settings, 0)

    drawing = ready.drawing

    def further() -> None:
        denoise(tool.models, working, drawing.conditioning, settings, 0, None, drawing.product)

    def there() -> None:
        stock(
            prompt=PROMPT,
            image=control,
            ip_adapter_image=look,
            width=working.frame.width,
            height=working.frame.height,
            num_inference_steps=given.steps,
            guidance_scale=3.5,
            generator=torch.Generator().manual_seed(0),
        )

    ways = (here, there, further)
    for way in ways:
        way()
    rounds = [tuple(map(cpu_seconds, ways)) for _ in range(given.rounds)]
    ours, theirs, more = map(statistics.median, zip(*rounds, strict=True))
    first = statistics.median(one / other for one, other, _ in rounds)
    later = statistics.median(one / other for _, other, one in rounds)
    print(f"{given.steps} steps of {working.frame.width}x{working.frame.height} px, {given.rounds} rounds, CPU seconds")
    print(f"the first of a request {ours:.3f}, stock {theirs:.3f}, ratio of neighbours {first:.3f}")
    print(f"a further one {more:.3f}, ratio of neighbours {later:.3f}")


if __name__ == "__main__":
    main()
