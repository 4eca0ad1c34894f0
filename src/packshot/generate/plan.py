"""``mode=plan``: what pictures will cost on a GPU, from the shapes alone; no weights and no product are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from packshot.base.cost import GIB, Cost, fused_attention, planned_gpu
from packshot.base.load import Parts
from packshot.base.shapes import meta_parts
from packshot.config.gpus import Gpu, hours_text, span, verdict_of, verdict_text
from packshot.config.schema import Generate, InferenceDtype, Offload
from packshot.runs.folder import answer, open_run
from packshot.runs.plan_file import answer_figures, write_plan

PICTURES = 1000  # that are planned for where plan.images names no number


@dataclass(frozen=True)
class GenerationPlan:
    """Cost of pictures on one GPU.

    weights_gib: of base, ControlNets and the IP-Adapter's image encoder; LoRAs are next to nothing.
    denoising_gib, decoding_gib: alive at the peak of one pass of the network, and of the VAE, besides weights.
    total_gib: at the peak; with ``inference.offload=model`` only those networks count that are on the GPU together.
    tflop_per_picture: of all denoising steps; vae_tflop_per_picture: of the VAE in fp32, to and fro.
    """

    weights_gib: float
    denoising_gib: float
    decoding_gib: float
    total_gib: float
    tflop_per_picture: float
    vae_tflop_per_picture: float


@dataclass(frozen=True)
class GenerationDecision:
    """What the plan means on a GPU.

    verdict: fits, tight or does not fit. seconds_per_picture, hours: of one and of all pictures, at the highest and at
    the lowest utilisation. price: of all; None if none is given. change: what to change first; empty where it fits.
    """

    gpu: str
    gpu_memory_gib: float
    verdict: str
    seconds_per_picture: tuple[float, float]
    hours: tuple[float, float]
    price: tuple[float, float] | None
    change: str

    def sentences(self) -> Iterator[str]:
        """The decision in words."""
        verdict = verdict_text(self.verdict, self.gpu, self.gpu_memory_gib)
        yield f"{verdict}."
        if self.hours[1]:
            yield f"A picture takes {self.seconds_per_picture[0]:.1f} to {self.seconds_per_picture[1]:.1f} s."
            yield f"All pictures take {hours_text(self.hours)}."
        if self.price:
            yield f"They cost {self.price[0]:.2f} to {self.price[1]:.2f}."
        if self.change:
            yield f"Change first: {self.change}."


def planned_dtype(config: Generate, on_cuda: bool) -> torch.dtype:
    """What the networks but the VAE are loaded in."""
    if config.inference.dtype is InferenceDtype.auto:
        return torch.float16 if on_cuda else torch.float32
    return getattr(torch, config.inference.dtype.name)


def in_dtype(network: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The network with its weights in this dtype; diffusers' own method warns of what real weights would lose."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network


def measure_denoising(config: Generate, parts: Parts, dtype: torch.dtype) -> tuple[Cost, int]:
    """(The cost of one denoising step besides weights, parameters of its ControlNets).

    The working copy has about the pixels of the base's square, whatever the photograph's shape.
    """
    from diffusers import ControlNetModel

    unet: Any = parts.unet  # their forward methods take more than they are annotated with
    controlnet: Any = None
    if config.adapters.controlnets:
        with torch.device("meta"):
            controlnet = in_dtype(ControlNetModel.from_unet(unet, load_weights_from_unet=False), dtype)
    side = config.model.resolution // 2 ** (len(parts.vae.config.block_out_channels) - 1)
    guided = 2 if config.guidance_scale > 1 else 1

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(guided, *shape, device="meta", dtype=dtype)

    noisy = empty(unet.config.in_channels, side, side)
    timesteps = torch.empty(guided, device="meta", dtype=torch.long)
    pooled = parts.text_encoder_2.config.projection_dim or 0  # their config allows none
    added = {"text_embeds": empty(pooled), "time_ids": empty(6)}
    prompt = empty(77 * config.prompt_chunks, unet.config.cross_attention_dim)
    conditioning = {"encoder_hidden_states": prompt, "added_cond_kwargs": added}
    control = empty(3, config.model.resolution, config.model.resolution)
    known = [*unet.parameters(), noisy, timesteps, prompt, control, *added.values()]
    known += controlnet.parameters() if controlnet else []
    with torch.no_grad(), fused_attention(), Cost(known) as cost:
        for _ in config.adapters.controlnets:
            controlnet(noisy, timesteps, controlnet_cond=control, return_dict=False, **conditioning)
        unet(noisy, timesteps, **conditioning)
    nets = len(config.adapters.controlnets)
    return cost, nets * sum(parameter.numel() for parameter in controlnet.parameters()) if nets else 0


def measure_vae(parts: Parts, resolution: int) -> Cost:
    """The cost of encoding and decoding one picture in fp32, besides weights."""
    vae: Any = parts.vae
    pixels = torch.empty(1, vae.config.in_channels, resolution, resolution, device="meta")
    with torch.no_grad(), fused_attention(), Cost([*vae.parameters(), *vae.buffers(), pixels]) as cost:
        vae.decode(vae.encode(pixels).latent_dist.mode())
    return cost


def weights_gib(network: torch.nn.Module, width: int) -> float:
    """GiB of a network's weights of so many bytes."""
    return width * sum(parameter.numel() for parameter in network.parameters()) / GIB


def make_plan(config: Generate, on_cuda: bool) -> GenerationPlan:
    """The plan of the pictures that a config asks for."""
    dtype = planned_dtype(config, on_cuda)
    parts = meta_parts(config.model)
    in_dtype(parts.unet, dtype)
    denoising, control_parameters = measure_denoising(config, parts, dtype)
    vae = measure_vae(parts, config.model.resolution)
    width = dtype.itemsize
    readers = [weights_gib(parts.text_encoder, width), weights_gib(parts.text_encoder_2, width)]
    if config.adapters.ip_adapter:
        readers.append(weights_gib(parts.image_encoder, width))
    unet = weights_gib(parts.unet, width)
    nets = control_parameters * width / GIB
    vae_weights = weights_gib(parts.vae, 4)
    weights = sum(readers) + unet + nets + vae_weights
    peaks = denoising.peak / GIB, vae.peak / GIB
    total = weights + max(peaks)
    if config.inference.offload is not Offload.none:
        total = max(*readers, unet + nets + peaks[0], vae_weights + peaks[1])
    return GenerationPlan(
        weights_gib=weights,
        denoising_gib=peaks[0],
        decoding_gib=peaks[1],
        total_gib=total,
        tflop_per_picture=denoising.flops / 1e12 * config.num_inference_steps,
        vae_tflop_per_picture=vae.flops / 1e12,
    )


def decide(config: Generate, result: GenerationPlan, gpu: Gpu, gpus: int, pictures: int) -> GenerationDecision:
    """What a plan means on GPUs, of which each draws its share of the pictures."""
    slow, fast = config.plan.utilisation_low, config.plan.utilisation_high
    # the VAE runs in fp32, whose products (TF32) have half of bf16's peak
    tflop = result.tflop_per_picture + 2 * result.vae_tflop_per_picture
    seconds = span(tflop, gpu.tflops, fast, slow)
    hours = (seconds[0] * pictures / gpus / 3600, seconds[1] * pictures / gpus / 3600)
    price = None
    if config.plan.gpu_hour_price is not None:
        rate = config.plan.gpu_hour_price * gpus
        price = (rate * hours[0], rate * hours[1])
    verdict = verdict_of(result.total_gib, gpu)
    change = ""
    if verdict != "fits":
        whole = planned_dtype(config, on_cuda=True) is torch.float32
        change = "fewer adapters.controlnets, or a GPU with more memory"
        if whole:
            change = "inference.dtype=bfloat16"
        elif config.inference.offload is Offload.none:
            change = "inference.offload=model"
    return GenerationDecision(gpu.title, gpu.memory_gib, verdict, seconds, hours, price, change)


def plan(config: Generate) -> None:
    """Write ``plan.json`` and print it as a table."""
    gpu = planned_gpu(config.plan)
    result = make_plan(config, on_cuda=gpu is not None)
    pictures = config.plan.images or PICTURES
    gpus = config.plan.gpus or 1
    run = open_run("generate", config)
    written = asdict(result) | {"pictures": pictures, "gpus": gpus}
    decided = decide(config, result, gpu, gpus, pictures) if gpu else None
    if decided:
        written |= asdict(decided)
    write_plan(run, written)
    answer_figures(written)
    answer.info("Networks alone are counted: photographs are prepared and pictures put together on the CPU.")
    refine = config.background.refine
    if refine.name != "none":
        answer.info("background.refine=%s is not counted: it depends on the photograph's size", refine)
    for sentence in decided.sentences() if decided else ():
        answer.info("%s", sentence)
