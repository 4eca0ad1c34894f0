"""The background at the photograph's own size: drawn again in tiles with the product held in it, or upscaled."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from diffusers.utils.torch_utils import randn_tensor

from packshot.base.inpainting import ProductConv
from packshot.base.schedulers import make_scheduler
from packshot.config.background import Refine
from packshot.config.schema import GenerateSettings
from packshot.diffusion.hold_product import Callback, hold_product
from packshot.diffusion.latents import decode_latents, encode_pixels
from packshot.diffusion.sample import NotFiniteError, rescaled_guidance
from packshot.diffusion.tiles import Box, tiled
from packshot.errors import PackshotError
from packshot.generate.adapters import Pipe
from packshot.generate.canvas import Canvas, Frame, Working, make_working, plan_frame
from packshot.generate.denoise import Conditioning, OnStep, notifying, product_input, product_pixels
from packshot.generate.json_types import Json
from packshot.generate.load import Models
from packshot.imaging.focus import SHARPEST, edge_blur, fill_from_around, narrow_edges, sharpness
from packshot.imaging.pixels import from_network, to_network
from packshot.imaging.upscale import upscale
from packshot.runs.folder import log

SHARED = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "image_encoder")
# what asks for a background that is less sharp than the product
SHALLOW = re.compile(r"\b(shallow depth|shallow focus|out of focus|soft focus|bokeh|blurr(ed|y)|defocus\w*)\b")


@dataclass(frozen=True)
class Drawing:
    """A drawn picture: its working copy, and the picture at that size, float32 (H, W, 3) in [0, 1].

    refined: what was done to it after it was drawn, for the certificate.
    """

    working: Working
    decoded_HW3: np.ndarray
    refined: Json


@dataclass(frozen=True)
class Pass:
    """What a second pass needs besides the first drawing."""

    models: Models
    canvas: Canvas
    conditioning: Conditioning
    settings: GenerateSettings
    seed: int
    on_step: OnStep | None = None


def focus_background(
    canvas: Canvas, before_HW3: np.ndarray, after_HW3: np.ndarray, share: float, prompt: str
) -> tuple[np.ndarray, Json]:
    """A refined background with its edges narrowed, and how sharp it was and is, for certificates.

    share: how far towards the product's own ``edge_blur``. prompt: a shallow depth of field in it leaves them.
    """
    rows, columns = canvas.product_box
    core = np.where(canvas.core_HW[rows, columns], np.uint8(255), np.uint8(0))
    product = np.ascontiguousarray(canvas.rgb_HW3[rows, columns])
    drawn = edge_blur(after_HW3, canvas.outside_HW)
    wanted = edge_blur(product, core)
    result = after_HW3
    reason = None
    if not share:
        reason = "background.sharpen=0"
    elif SHALLOW.search(prompt.lower()):
        reason = "a shallow depth of field is asked for"
    elif drawn is None or wanted is None:
        reason = "no edges to measure"
    else:
        aim = drawn + share * (max(wanted, SHARPEST) - drawn)
        result = narrow_edges(after_HW3, canvas.matte_HW, drawn, aim)
    report: Json = {
        "edge_blur_before": edge_blur(before_HW3, canvas.outside_HW),
        "edge_blur_drawn": drawn,
        "edge_blur_product": wanted,
        "edge_blur_after": edge_blur(result, canvas.outside_HW) if reason is None else drawn,
        "sharpened": reason is None,
        "sharpness_before": sharpness(before_HW3, canvas.outside_HW),
        "sharpness_after": sharpness(result, canvas.outside_HW),
        "sharpness_product": sharpness(product, core),
    }
    if reason:
        report["not_sharpened"] = reason
    return result, report


def refined_frame(canvas: Canvas, models: Models, settings: GenerateSettings) -> Frame:
    """The working size of a second pass: the canvas's own, up to ``background.refine_max_side``."""
    height, width = canvas.matte_HW.shape
    longest = settings.background.refine_max_side or 2 * models.resolution
    scale = min(1.0, longest / max(height, width))
    return plan_frame(height, width, round(scale * (height * width) ** 0.5), models.unit)


def without_product(drawing_HW3: np.ndarray, held_HW: np.ndarray) -> np.ndarray:
    """A drawing whose held cells show what is drawn around them. held_HW: bool; all True: the drawing as it is."""
    hidden_HW = (
        cv2.dilate(held_HW.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    )  # the decoder's blur of their border
    return drawing_HW3 if hidden_HW.all() else fill_from_around(drawing_HW3, hidden_HW)


def enlarged(drawing: Drawing, target: Working) -> np.ndarray:
    """A drawing at another working size, without the product: where a second pass starts from, (H, W, 3).

    A cell on the product's edge is free, and the second pass keeps most of what it begins with there. If that were the
    product, its colour would stand out of its outline as a square of the cell's size.
    """
    working = drawing.working
    cell = working.keep_HW.shape[0] // working.held_hw.shape[0]
    held_HW = working.held_hw.repeat(cell, axis=0).repeat(cell, axis=1)
    behind = without_product(np.ascontiguousarray(drawing.decoded_HW3, np.float32), held_HW)
    content = np.ascontiguousarray(behind[working.frame.content])
    larger = target.frame
    size = (larger.content_width, larger.content_height)
    content = cv2.resize(content, size, interpolation=cv2.INTER_CUBIC)
    rows = (larger.top, larger.height - larger.top - larger.content_height)
    columns = (larger.left, larger.width - larger.left - larger.content_width)
    return np.clip(np.pad(content, (rows, columns, (0, 0)), mode="edge"), 0, 1).astype(np.float32)


def later(callback: Callback, begin: int) -> Callback:
    """A callback that counts its steps from the first of a schedule whose first ``begin`` are left out."""

    def shifted(
        pipe: Pipe, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return callback(pipe, step + begin, timestep, tensors)

    return shifted


def second_pipeline(pipe: Pipe, scheduler: str | None) -> Pipe:
    """The stock image-to-image pipeline of the same networks. ControlNets read whole pictures and take no part."""
    parts = {name: pipe.components.get(name) for name in SHARED}
    second = StableDiffusionXLImg2ImgPipeline(
        **parts,
        scheduler=make_scheduler(scheduler, pipe.scheduler),
        feature_extractor=pipe.components.get("feature_extractor"),
        force_zeros_for_empty_prompt=pipe.config.force_zeros_for_empty_prompt,
        requires_aesthetics_score=False,
        add_watermarker=False,
    )
    second.set_progress_bar_config(disable=True)
    return second


def show_tiles(models: Models, working: Working) -> Callable[[Box], None] | None:
    """What lets an inpainting UNet read the product's part of each tile; None for other UNets."""
    conv = models.pipe.unet.conv_in
    if not isinstance(conv, ProductConv):
        return None
    shown = product_input(models.pipe.vae, working).to(models.device)
    return lambda box: conv.show(shown[..., box[0], box[1]])


@torch.no_grad()
def redraw(asked: Pass, start_HW3: np.ndarray, working: Working) -> tuple[np.ndarray, int]:
    """The second pass: (picture, number of tiles). start_HW3: where it begins, float32 in [0, 1].

    Raises:
        PackshotError: the result has NaN or infinity.
    """
    models = asked.models
    pipe = second_pipeline(models.pipe, asked.settings.scheduler)
    background = asked.settings.background
    steps = asked.settings.num_inference_steps
    dtype = asked.conditioning.arguments["prompt_embeds"].dtype
    known = encode_pixels(pipe.vae, product_pixels(working))
    start = encode_pixels(pipe.vae, to_network(start_HW3[None] * 255).contiguous())
    held = torch.from_numpy(working.held_hw[None].astype(np.float32)).to(known.device)
    start = torch.lerp(start, known, held)
    noise = randn_tensor(
        start.shape, generator=torch.Generator("cpu").manual_seed(asked.seed), device=start.device, dtype=dtype
    ).float()
    begin = max(steps - min(int(steps * background.refine_strength), steps), 0)
    clean = models.product_conditioning == "clean"

    def show_clean(sample: torch.Tensor) -> torch.Tensor:
        return torch.lerp(sample.float(), known, held).to(sample.dtype) if clean else sample

    hold = hold_product(known, noise, held, models.product_conditioning)
    side = models.resolution
    cells = side // pipe.vae_scale_factor
    with tiled(pipe.unet, cells, show_tiles(models, working), show_clean) as boxes:
        latents = pipe(
            image=start.to(dtype),
            strength=background.refine_strength,
            num_inference_steps=steps,
            guidance_scale=asked.settings.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(asked.seed),
            original_size=(side, side),
            target_size=(side, side),
            output_type="latent",
            callback_on_step_end=notifying(later(hold, begin), asked.on_step),
            **rescaled_guidance(pipe),
            **asked.conditioning.arguments,
        ).images
    pixels = decode_latents(pipe.vae, latents)[0]
    if not (torch.isfinite(latents).all() and torch.isfinite(pixels).all()):
        raise NotFiniteError("the second pass produced NaN or infinity")
    return from_network(pixels), len(boxes)


def refine_tiled(asked: Pass, drawing: Drawing) -> Drawing:
    """A second pass in tiles. Raises PackshotError: NaN."""
    frame = refined_frame(asked.canvas, asked.models, asked.settings)
    if max(frame.height, frame.width) <= max(drawing.working.frame.height, drawing.working.frame.width):
        log.warning("background.refine=tiled changes nothing: the picture is no larger than it was drawn")
        return replace(drawing, refined={"kind": "tiled", "applied": False, "reason": "drawn at that size already"})
    working = make_working(asked.canvas, frame, asked.models.pipe.vae_scale_factor)
    start = enlarged(drawing, working)
    try:
        picture, tiles = redraw(asked, start, working)
    except NotFiniteError as error:
        raise PackshotError(f"background.refine: {error}.", "Lower background.refine_strength.") from error
    report = {
        "kind": "tiled",
        "applied": True,
        "size": [frame.width, frame.height],
        "tiles": tiles,
        "strength": asked.settings.background.refine_strength,
    }
    return Drawing(working, picture, report)


def refine_upscale(asked: Pass, drawing: Drawing) -> Drawing:
    """The drawing enlarged by the network that ``background.upscaler`` names."""
    path = asked.settings.background.upscaler
    assert path is not None  # the config's check
    picture = upscale(drawing.decoded_HW3, path)
    frame = drawing.working.frame
    factor = picture.shape[0] // frame.height
    larger = Frame(
        frame.height * factor,
        frame.width * factor,
        frame.top * factor,
        frame.left * factor,
        frame.content_height * factor,
        frame.content_width * factor,
    )
    working = make_working(asked.canvas, larger, asked.models.pipe.vae_scale_factor)
    report = {"kind": "upscale", "applied": True, "size": [larger.width, larger.height], "factor": factor}
    return Drawing(working, picture, report)


REFINERS: dict[Refine, Callable[[Pass, Drawing], Drawing]] = {
    Refine.tiled: refine_tiled,
    Refine.upscale: refine_upscale,
}


def refine(asked: Pass, working: Working, decoded_HW3: np.ndarray) -> Drawing:
    """The drawing as ``background.refine`` wants it.

    Raises:
        PackshotError: the second pass failed.
        ConfigError: the upscaler cannot be used.
    """
    drawing = Drawing(working, decoded_HW3, {"kind": "none", "applied": False})
    refiner = REFINERS.get(asked.settings.background.refine)
    return drawing if refiner is None else refiner(asked, drawing)
