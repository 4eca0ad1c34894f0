"""How much of a mini stage's step is the network's own forward and backward pass, in CPU time, all in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.mini_speed --steps 8

The bare pass is the same network in the same precision on one batch that is kept. The stage's step draws and encodes a
batch, computes the loss and steps the optimizer; its caches are warm. Rounds alternate, because neighbours on the
machine slow both. Prints samples per CPU second of each and the stage's share of the bare pass.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from packshot.imaging.matting_network import alpha_logits
from tools.mini import matting, unet, vae
from tools.mini.budgeted_training import Loss, fast_precision
from tools.mini.data import Renders, read_renders
from tools.mini.folder import Family
from tools.mini.matting_samples import SIDE, Material

MODELS = Path("data/models")


def step_of(network: torch.nn.Module, loss_of: Loss) -> Callable[[], None]:
    """A whole training step as the stages do it, the average weights left out."""
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-5, foreach=True)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        loss, _ = loss_of(generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def bare_of(network: torch.nn.Module, output_of: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Forward and backward of the network alone."""

    def step() -> None:
        with fast_precision():
            output = output_of()
        output.float().pow(2).mean().backward()
        network.zero_grad(set_to_none=True)

    return step


def channels_last(network: Any) -> None:
    """NHWC in memory, the fast layout of convolutions."""
    network.to(memory_format=torch.channels_last)


def unet_steps(renders: Renders) -> tuple[Callable[[], None], Callable[[], None], int]:
    """The UNet's bare pass, its stage's step, and the batch's size."""
    with tempfile.TemporaryDirectory() as work:
        family = Family.open(Path(work), Path(work) / "out", "sdxl", MODELS)
        parts = unet.load_parts(family.staging)
        config = parts["text_encoder"].config.hidden_size + parts["text_encoder_2"].config.hidden_size
        network = unet.build_unet(4, config, parts["text_encoder_2"].config.projection_dim)
        family.begin(network, "unet")
    channels_last(network)
    latents = torch.randn(unet.BATCH, 4, 16, 16).to(memory_format=torch.channels_last)
    states, pooled = unet.encode_prompts(parts, ["an object on fresh snow"] * unet.BATCH)
    extra = {"text_embeds": pooled, "time_ids": torch.full((unet.BATCH, 6), 128.0)}
    times = torch.randint(1000, (unet.BATCH,))
    bare = bare_of(network, lambda: network(latents, times, states, added_cond_kwargs=extra).sample)
    loss = unet._training_loss(network, parts, renders, unet.LatentCache(parts["vae"]))
    return bare, step_of(network, loss), unet.BATCH


def vae_steps(renders: Renders) -> tuple[Callable[[], None], Callable[[], None], int]:
    """The same of the VAE's decoder, on crops of 64 px."""
    network: Any = vae.AutoencoderKL.from_pretrained(MODELS / "sdxl" / "vae").float()
    channels_last(network)
    network.encoder.requires_grad_(False)
    network.quant_conv.requires_grad_(False)
    vae.CROPS = ((64, 8),)
    latents = torch.randn(8, 4, 8, 8).to(memory_format=torch.channels_last)
    bare = bare_of(network, lambda: network.decode(latents).sample)
    return bare, step_of(network, vae._decoder_loss(network, renders)), 8


def matting_steps(renders: Renders) -> tuple[Callable[[], None], Callable[[], None], int]:
    """The same of the segmentation network."""
    network = matting.build_matting()
    channels_last(network)
    pixels = torch.rand(16, 3, SIDE, SIDE)
    bare = bare_of(network, lambda: alpha_logits(network, pixels))
    return bare, step_of(network, matting._loss(network, Material(renders.train, []), 16)), 16


def cpu_seconds(step: Callable[[], None], count: int) -> float:
    """CPU time of one step, from ``count`` of them."""
    began = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="steps in a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each (default %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    small = Renders(list(read_renders("set", "data/rendered/heldout"))[:32], [])
    for name, make in (("unet", unet_steps), ("vae decoder", vae_steps), ("matting", matting_steps)):
        bare, stage, batch = make(small)
        for _ in range(30):
            stage()  # fills the caches
        bare()
        pairs = [(cpu_seconds(bare, args.steps), cpu_seconds(stage, args.steps)) for _ in range(args.rounds)]
        bare_rate = batch / min(seconds for seconds, _ in pairs)
        stage_rate = batch / min(seconds for _, seconds in pairs)
        print(f"{name}: bare {bare_rate:.1f}, stage {stage_rate:.1f} samples/s, share {stage_rate / bare_rate:.2f}")


if __name__ == "__main__":
    main()
