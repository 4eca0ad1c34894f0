"""Render jobs with Cycles: the photograph, the same scene without the product, and the scene's layers.

    python -m packshot.render.blender --out outputs/renders --size 128 --samples 12 < jobs.jsonl

Runs in an environment that has `bpy`, numpy and Pillow only (`make render-env`). Jobs are JSON lines on standard input;
for each a line of JSON with its name and `error` (null, or why it was refused) goes to standard output. A job's folder
`<out>/<name>/` appears complete or not at all, and one that is there is not rendered again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import bpy
import numpy as np
from PIL import Image

from packshot.render import camera, materials
from packshot.render.backgrounds import build_background
from packshot.render.frame import FRAME, Job, items_of
from packshot.render.lights import build_light
from packshot.render.products import add_product
from packshot.render.props import add_surroundings
from packshot.render.surfaces import build_surface


def start_blender(size: int, samples: int, threads: int) -> None:
    """Empty session with Cycles on the CPU: few samples, OIDN, short paths without caustics."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.preferences.addon_enable(module="cycles")
    scene = bpy.context.scene
    render, cycles = scene.render, scene.cycles
    render.engine, render.resolution_x, render.resolution_y, render.resolution_percentage = "CYCLES", size, size, 100
    render.threads_mode, render.threads = "FIXED", threads
    render.use_persistent_data = False  # 3 % faster, but what was rendered before would change the noise
    render.dither_intensity = 0.0  # its noise would end up in the mask
    render.image_settings.file_format, render.image_settings.color_mode, render.image_settings.compression = (
        "PNG",
        "RGB",
        15,
    )
    cycles.device, cycles.samples, cycles.use_adaptive_sampling = "CPU", samples, False
    cycles.use_denoising, cycles.denoiser = True, "OPENIMAGEDENOISE"
    cycles.denoising_prefilter = "FAST"  # a third less time than ACCURATE, and no ringing around the product
    cycles.max_bounces, cycles.diffuse_bounces, cycles.glossy_bounces, cycles.transmission_bounces = 6, 2, 3, 6
    cycles.caustics_reflective = cycles.caustics_refractive = False
    cycles.sample_clamp_indirect = 4.0
    cycles.use_light_tree = False  # pays only with many lamps


def clear_scene() -> None:
    """Remove every data block but the scene and the world images, which are slow to load."""
    bpy.context.view_layer.material_override = None
    bpy.context.scene.world = None
    for collection in (
        bpy.data.objects,
        bpy.data.meshes,
        bpy.data.materials,
        bpy.data.lights,
        bpy.data.cameras,
        bpy.data.worlds,
        bpy.data.curves,
    ):
        bpy.data.batch_remove(list(collection))


def build(job: Job) -> list[bpy.types.Object]:
    """Build the job's scene; returns the product's objects."""
    ground = build_surface(job)
    build_background(job)
    add_surroundings(job["scene"]["surroundings"], job["seed"], ground.clear, ground.floor_z)
    product: list[bpy.types.Object] = []
    for item in items_of(job):
        at = (*item["place"], ground.product_z)
        product += add_product(item["product"], item["height"] * FRAME, at, item["turn"])
    grade = camera.GRADES[job["scene"]["mood"]]
    build_light(job, grade.fill)
    camera.apply_grade(grade)
    camera.build_camera(job, ground.product_z)
    bpy.context.scene.cycles.seed = job["seed"]
    return product


def _render_to(path: Path) -> np.ndarray:
    bpy.context.scene.render.filepath = str(path)
    bpy.ops.render.render(write_still=True)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    Image.fromarray(pixels).save(path)  # without Blender's date and render time: same seed, same bytes
    return pixels


@contextmanager
def _unlit(override: bpy.types.Material) -> Iterator[None]:
    """The scene as pure data: every surface emits `override`, nothing lights it, values reach the file as they are."""
    scene, cycles = bpy.context.scene, bpy.context.scene.cycles
    view, samples, lit = scene.view_settings, cycles.samples, scene.world
    graded = (view.view_transform, view.look, view.exposure, view.use_white_balance)
    scene.world = bpy.data.worlds.new("dark")
    scene.world.color = (0, 0, 0)
    bpy.context.view_layer.material_override = override
    cycles.samples, cycles.use_denoising = 32, False
    view.view_transform, view.look, view.exposure, view.use_white_balance = "Raw", "None", 0.0, False
    yield
    bpy.context.view_layer.material_override = None
    scene.world = lit
    cycles.samples, cycles.use_denoising = samples, True
    view.view_transform, view.look, view.exposure, view.use_white_balance = graded


def shadow_layer(shaded: np.ndarray, plate: np.ndarray) -> np.ndarray:
    """What the product does to the light of the scene around it: uint8 (height, width), 255 where it does nothing.

    shaded, plate: uint8 RGB (height, width, 3), the scene with the product hidden from the camera only, and without it.
    Multiplying the plate by the layer darkens it as the product's shadow and its mirror image do.
    """
    with_it, without = (pixels @ np.array([0.2126, 0.7152, 0.0722]) + 4.0 for pixels in (shaded, plate))
    return np.rint(np.clip(with_it / without, 0, 1) * 255).astype(np.uint8)


def cut_out(image: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    """RGBA (height, width, 4) uint8: the photograph's own bytes where the product covers the pixel fully.

    A pixel on the edge mixes product and background, so its colour is taken from covered neighbours, ring by ring.
    """
    known = coverage >= 253
    color = np.where(known[..., None], image, 0).astype(np.float64)
    while not known[coverage > 0].all():
        weight = np.pad(known.astype(np.float64), 1)
        padded = np.pad(color * known[..., None], ((1, 1), (1, 1), (0, 0)))
        height, width = known.shape
        count = np.zeros(known.shape)
        total = np.zeros(color.shape)
        for dy, dx in itertools.product(range(3), repeat=2):  # the pixel and its eight neighbours
            count += weight[dy : dy + height, dx : dx + width]
            total += padded[dy : dy + height, dx : dx + width]
        grow = ~known & (count > 0)
        if not grow.any():
            raise ValueError("the product covers no pixel fully: nothing to take the edge colour from")
        color[grow] = total[grow] / count[grow][:, None]
        known = known | grow
    color[coverage == 0] = 0
    return np.dstack([np.rint(color).astype(np.uint8), np.where(coverage >= 253, 255, coverage).astype(np.uint8)])


def _check_in_frame(coverage: np.ndarray, job: Job) -> None:
    border = np.concatenate([coverage[0], coverage[-1], coverage[:, 0], coverage[:, -1]])
    share = float((coverage > 127).mean())
    if border.max() > 0 or share < (0.006 if "frame" in job else 0.02):
        raise ValueError(f"job {job['seed']}: the product leaves the frame or is hidden (it covers {share:.1%})")


def _show(parts: list[bpy.types.Object], camera_sees: bool, exists: bool = True) -> None:
    for part in parts:
        part.hide_render, part.visible_camera = not exists, camera_sees


def _set_frame(job: Job, size: int) -> None:
    """The picture's width and height; the longer side is `size`, the other a multiple of 8."""
    width, height = job.get("frame", (1.0, 1.0))
    render = bpy.context.scene.render
    render.resolution_x = size if width == 1 else 8 * round(size * width / 8)
    render.resolution_y = size if height == 1 else 8 * round(size * height / 8)


def _render_layers(job: Job, folder: Path, size: int) -> None:
    _set_frame(job, size)
    product = build(job)
    image = _render_to(folder / "image.png")
    _show(product, camera_sees=True, exists=False)
    plate = _render_to(folder / "plate.png")
    _show(product, camera_sees=False)
    shadow = shadow_layer(_render_to(folder / "shadow.png"), plate)
    _show(product, camera_sees=True)
    distance = bpy.context.scene.camera.location.length
    with _unlit(materials.measure(0.5 * distance)):  # the product's depth comes out at 0.5
        depth, coverage, _ = np.moveaxis(_render_to(folder / "depth.png"), -1, 0)
    with _unlit(materials.normals()):
        _render_to(folder / "normals.png")
    _check_in_frame(coverage, job)
    Image.fromarray(shadow).save(folder / "shadow.png")
    Image.fromarray(cut_out(image, coverage)).save(folder / "cutout.png")
    Image.fromarray(depth).save(folder / "depth.png")


def render_job(job: Job, folder: Path, size: int) -> None:
    """Render one job into `folder` by way of a temporary one next to it.

    Raises ValueError if the product leaves the frame or is hidden.
    """
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
    draft.mkdir(parents=True)
    try:
        clear_scene()
        _render_layers(job, draft, size)
        (draft / "job.json").write_text(json.dumps(job, indent=1))
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _take_stdout() -> TextIO:
    """Blender prints two lines a frame to file descriptor 1: keep our own standard output on a copy of it."""
    ours = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return os.fdopen(ours, "w", buffering=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--core", type=int, help="stay on this core; with several renderers the denoiser's threads only spin"
    )
    args = parser.parse_args()
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    answers = _take_stdout()
    start_blender(args.size, args.samples, args.threads)
    for line in sys.stdin:
        job, error = json.loads(line), None
        folder = args.out / str(job.get("name", job["seed"]))
        try:
            if not folder.exists():
                render_job(job, folder, args.size)
        except ValueError as problem:
            error = str(problem)
        print(json.dumps({"name": folder.name, "error": error}), file=answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
