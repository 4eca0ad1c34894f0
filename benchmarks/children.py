"""What the benchmark compares our trainers with: a plain reference loop and the bare step; one process each.

    python -m benchmarks.children reference lora 40 8 outputs/figures.json

The reference does at every step what the well-known example scripts do: decode and resize the pictures, encode them
with the VAE, encode the prompts, draw noise, step. It is written for this comparison and shares no code with our loop.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import ControlNetModel, DDPMScheduler
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from packshot.base.load import Parts, load_parts
from packshot.config.schema import ControlNetMethod, IPAdapterMethod, LoraMethod, ModelConfig
from packshot.methods import METHODS
from packshot.runs.files import resolve
from packshot.runs.start import start_process

WARM_UP = 5
SIZE = 128


@dataclass(frozen=True)
class Shape:
    """What a reference loop trains on.

    base: pipeline folder. data: dataset folder. size: side of the pictures, px. precision: accelerate's
    mixed_precision. checkpointing: whether activations are recomputed.
    """

    base: str = ModelConfig.base
    data: str = "data/rendered/train"
    size: int = SIZE
    precision: str = "no"
    checkpointing: bool = False


TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
CONFIGS = {"lora": LoraMethod(), "controlnet": ControlNetMethod(), "ip_adapter": IPAdapterMethod()}


class Pictures(Dataset):
    """Rows decoded and transformed at each access."""

    def __init__(self, folder: str, size: int) -> None:
        self.size = (size, size)
        files = sorted(resolve(folder).glob("part-*.parquet"))
        self.table = pq.read_table(files, columns=["image", "mask", "text"])

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {name: self.table.column(name)[index].as_py() for name in self.table.column_names}
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        image = image.resize(self.size, Image.Resampling.BILINEAR)
        mask = Image.open(io.BytesIO(row["mask"]["bytes"])).convert("L").resize(self.size, Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1)
        known = torch.from_numpy(np.asarray(mask, np.float32) / 255)[None] >= 0.5
        control = torch.where(known, (pixels + 1) / 2, -1.0)
        return {"pixels": pixels, "control": control, "reference": image, "text": row["text"]}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    stacked = {name: torch.stack([row[name] for row in rows]) for name in ("pixels", "control")}
    return {**stacked, "reference": [row["reference"] for row in rows], "texts": [row["text"] for row in rows]}


def encode_prompts(parts: Parts, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, pooled = [], None
    for tokenizer, encoder in ((parts.tokenizer, parts.text_encoder), (parts.tokenizer_2, parts.text_encoder_2)):
        ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        output = encoder(ids.to(encoder.device), output_hidden_states=True)
        pooled = output[0]
        hidden.append(output.hidden_states[-2])
    assert pooled is not None
    return torch.cat(hidden, -1), pooled


Predict = Callable[[dict[str, Any], torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]


def reference_lora(parts: Parts) -> tuple[list[torch.nn.Parameter], Predict]:
    parts.unet.add_adapter(LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=TARGETS))
    parameters = [p for p in parts.unet.parameters() if p.requires_grad]
    return parameters, lambda batch, noisy, timesteps, conditioning: parts.unet(noisy, timesteps, **conditioning).sample


def reference_controlnet(parts: Parts) -> tuple[list[torch.nn.Parameter], Predict]:
    network: Any = ControlNetModel.from_unet(parts.unet).requires_grad_(True).train()

    def predict(batch: dict[str, Any], noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: dict[str, Any]):
        down, middle = network(noisy, timesteps, controlnet_cond=batch["control"], return_dict=False, **conditioning)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return parts.unet(noisy, timesteps, **residuals, **conditioning).sample

    return list(network.parameters()), predict


def reference_ip_adapter(parts: Parts) -> tuple[list[torch.nn.Parameter], Predict]:
    method: Any = METHODS[IPAdapterMethod](parts, IPAdapterMethod())  # the stock modules; encoded at each step

    def predict(batch: dict[str, Any], noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: dict[str, Any]):
        with torch.no_grad():
            pixels = parts.feature_extractor(images=batch["reference"], return_tensors="pt").pixel_values
            embeds = parts.image_encoder(pixels).image_embeds
        conditioning["added_cond_kwargs"]["image_embeds"] = [embeds.unsqueeze(1)]
        return parts.unet(noisy, timesteps, **conditioning).sample

    return [p for p in method.parameters() if p.requires_grad], predict


REFERENCES = {"lora": reference_lora, "controlnet": reference_controlnet, "ip_adapter": reference_ip_adapter}


def reference(name: str, steps: int, batch_size: int, shape: Shape = Shape()) -> Iterator[None]:
    """Yields after every optimizer step."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=shape.precision)
    device = accelerator.device
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[shape.precision]
    parts = load_parts(ModelConfig(base=shape.base))
    parts.to(device, dtype)
    parameters, predict = REFERENCES[name](parts)
    for parameter in parameters:
        parameter.data = parameter.data.to(device, torch.float32)
    if shape.checkpointing:
        parts.unet.enable_gradient_checkpointing()
        parts.unet.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    schedule: Any = DDPMScheduler.from_config(parts.scheduler.config)
    loader = DataLoader(Pictures(shape.data, shape.size), batch_size, shuffle=True, collate_fn=collate)
    rates = get_scheduler("constant", optimizer)
    optimizer, loader, rates = accelerator.prepare(optimizer, loader, rates)
    done = 0
    while True:
        for batch in loader:
            with accelerator.autocast():
                loss = reference_loss(parts, schedule, predict, batch, shape)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            loss.item()
            done += 1
            yield
            if done == steps:
                return


def reference_loss(
    parts: Parts, schedule: DDPMScheduler, predict: Predict, batch: dict[str, Any], shape: Shape
) -> torch.Tensor:
    """Encode a batch of pictures and prompts, noise the latents, and compare what is predicted with the noise."""
    with torch.no_grad(), torch.autocast(parts.vae.device.type, enabled=False):
        posterior = parts.vae.encode(batch["pixels"].to(parts.vae.device)).latent_dist
        latents = parts.latent_scale().to_unet(posterior.sample())
        prompt_embeds, pooled = encode_prompts(parts, batch["texts"])
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
    noisy = schedule.add_noise(latents, noise, timesteps)  # type: ignore[arg-type]
    size = [shape.size, shape.size, 0, 0, shape.size, shape.size]
    time_ids = torch.tensor([size] * len(latents), dtype=torch.float32, device=latents.device)
    added = {"text_embeds": pooled, "time_ids": time_ids}
    conditioning = {"encoder_hidden_states": prompt_embeds, "added_cond_kwargs": added}
    return F.mse_loss(predict(batch, noisy, timesteps, conditioning).float(), noise.float())


def bare(name: str, steps: int, batch_size: int) -> Iterator[None]:
    """Forward, backward, clip and step of our method on tensors that lie in memory: the limit of any loop."""
    start_process()  # the same allocator as ours
    parts = load_parts(ModelConfig())
    method: Any = METHODS[type(CONFIGS[name])](parts, CONFIGS[name])
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    width, side = parts.unet.config.cross_attention_dim, SIZE // 8
    shape = (batch_size, parts.unet.conv_in.in_channels, side, side)
    batch = {
        "prompt_embeds": torch.randn(batch_size, 77, width),
        "pooled_prompt_embeds": torch.randn(batch_size, parts.text_encoder_2.text_projection.out_features),
        "time_ids": torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * batch_size, dtype=torch.float32),
        "control_0": torch.rand(batch_size, 3, SIZE, SIZE),
        "reference": torch.randn(batch_size, parts.image_encoder.config.projection_dim),
    }
    noisy, noise, timesteps = torch.randn(shape), torch.randn(shape), torch.randint(0, 1000, (batch_size,))
    for _ in range(steps):
        F.mse_loss(method.predict(noisy, timesteps, batch), noise).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    loops = {"reference": reference, "bare": bare}
    parser.add_argument("kind", choices=loops)
    parser.add_argument("method", choices=CONFIGS)
    parser.add_argument("steps", type=int, help=f"more than the {WARM_UP} that are not counted")
    parser.add_argument("batch_size", type=int)
    parser.add_argument("out", help="JSON file")
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"steps: {args.steps}; the first {WARM_UP} are not counted, so more are needed")
    cv2.setNumThreads(1)
    begins = loops[args.kind](args.method, args.steps, args.batch_size)
    moments = []
    for _ in begins:
        moments.append(time.time())
    steady = (len(moments) - WARM_UP) * args.batch_size / (moments[-1] - moments[WARM_UP - 1])
    with open(args.out, "w") as file:
        json.dump({"first_step": moments[0], "last_step": moments[-1], "images_per_second": steady}, file)


if __name__ == "__main__":
    main()
