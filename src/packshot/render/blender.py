"""Render jobs with Cycles: for each the photograph, the same scene without the product, the cut-out and the depth.

    python -m packshot.render.blender --jobs jobs.jsonl --out outputs/renders --size 128 --samples 12

Runs in an environment that has `bpy`, numpy and Pillow only. A job's folder `<out>/<seed>/` appears complete or not
at all; a second run skips the seeds that are there, so the job may be killed at any time. With `--part 0/2` and
`--part 1/2` two processes share the jobs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import bpy
import numpy as np
from PIL import Image

from packshot.render import materials, stage
from packshot.render.products import add_product
from packshot.render.props import add_surroundings


def start_blender(size: int, samples: int, threads: int) -> None:
    """Empty session with Cycles on the CPU: few samples, OIDN, short paths without caustics."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.preferences.addon_enable(module="cycles")
    scene = bpy.context.scene
    render, cycles = scene.render, scene.cycles
    render.engine, render.resolution_x, render.resolution_y, render.resolution_percentage = "CYCLES", size, size, 100
    render.threads_mode, render.threads = "FIXED", threads
    render.use_persistent_data = True
    render.dither_intensity = 0.0  # its noise would end up in the mask
    render.image_settings.file_format, render.image_settings.color_mode, render.image_settings.compression = (
        "PNG",
        "RGB",
        15,
    )
    cycles.device, cycles.samples, cycles.use_adaptive_sampling = "CPU", samples, False
    cycles.use_denoising, cycles.denoiser = True, "OPENIMAGEDENOISE"
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


def build(job: dict[str, Any]) -> list[bpy.types.Object]:
    """Build the job's scene; returns the product's objects."""
    ground = stage.build_surface(job)
    stage.build_background(job)
    add_surroundings(job["scene"]["surroundings"], job["seed"], ground.clear, ground.floor_z)
    product = add_product(job["product"], job["height"] * stage.FRAME, ground.product_z, job["turn"])
    stage.build_light(job)
    stage.build_camera(job, ground.product_z)
    bpy.context.scene.cycles.seed = job["seed"]
    return product


def _render_to(path: Path) -> np.ndarray:
    bpy.context.scene.render.filepath = str(path)
    bpy.ops.render.render(write_still=True)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    Image.fromarray(pixels).save(path)  # without Blender's date and render time: same seed, same bytes
    return pixels


def _render_measures(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Depth (near is bright) and product coverage, both uint8 (height, width), from one emission-only render."""
    scene, cycles = bpy.context.scene, bpy.context.scene.cycles
    view, samples, lit = scene.view_settings, cycles.samples, scene.world
    scene.world = bpy.data.worlds.new("dark")
    scene.world.color = (0, 0, 0)
    bpy.context.view_layer.material_override = materials.measure(
        0.6 * scene.camera.location.length
    )  # the product at 0.6
    cycles.samples, cycles.use_denoising = 32, False
    view.view_transform, view.look, view.exposure, view.use_white_balance = "Raw", "None", 0.0, False
    measures = _render_to(path)
    path.unlink()
    bpy.context.view_layer.material_override = None
    scene.world = lit
    cycles.samples, cycles.use_denoising = samples, True
    return measures[..., 0], measures[..., 1]


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
        shifts = [(dy, dx) for dy in range(3) for dx in range(3)]
        count = sum(weight[dy : dy + height, dx : dx + width] for dy, dx in shifts)
        total = sum(padded[dy : dy + height, dx : dx + width] for dy, dx in shifts)
        grow = ~known & (count > 0)
        if not grow.any():
            raise ValueError("the product covers no pixel fully: nothing to take the edge colour from")
        color[grow] = total[grow] / count[grow][:, None]
        known = known | grow
    color[coverage == 0] = 0
    return np.dstack([np.rint(color).astype(np.uint8), np.where(coverage >= 253, 255, coverage).astype(np.uint8)])


def _check_in_frame(coverage: np.ndarray, job: dict[str, Any]) -> None:
    border = np.concatenate([coverage[0], coverage[-1], coverage[:, 0], coverage[:, -1]])
    share = float((coverage > 127).mean())
    if border.max() > 0 or share < 0.02:
        raise ValueError(f"job {job['seed']}: the product leaves the frame or is hidden (it covers {share:.1%})")


def _draft(job: dict[str, Any], out: Path) -> Path:
    return out / f".{job['seed']}.draft"


def render_job(job: dict[str, Any], out: Path) -> None:
    """Render one job into `<out>/<seed>/` by way of a temporary folder.

    Raises ValueError if the product leaves the frame or is hidden.
    """
    target, draft = out / str(job["seed"]), _draft(job, out)
    if draft.exists():  # of a run that was killed
        shutil.rmtree(draft)
    draft.mkdir()
    clear_scene()
    product = build(job)
    image = _render_to(draft / "image.png")
    for part in product:
        part.hide_render = True
    _render_to(draft / "plate.png")
    for part in product:
        part.hide_render = False
    depth, coverage = _render_measures(draft / "measures.png")
    _check_in_frame(coverage, job)
    Image.fromarray(cut_out(image, coverage)).save(draft / "cutout.png")
    Image.fromarray(depth).save(draft / "depth.png")
    (draft / "job.json").write_text(json.dumps(job, indent=1))
    os.replace(draft, target)


def _silence_blender() -> None:
    """Blender prints two lines a frame to file descriptor 1; keep our own stdout on a copy of it."""
    ours = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = os.fdopen(ours, "w", buffering=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=Path, required=True, help="JSON lines written by packshot.render.sample")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", default="0/1", help="k/n: render only every n-th job, from the k-th")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    jobs = [json.loads(line) for line in args.jobs.read_text().splitlines()][part::parts]
    todo = [job for job in jobs if not (args.out / str(job["seed"])).exists()]
    _silence_blender()
    args.out.mkdir(parents=True, exist_ok=True)
    start_blender(args.size, args.samples, args.threads)
    begin, refused = time.monotonic(), 0
    for done, job in enumerate(todo, 1):
        try:
            render_job(job, args.out)
        except ValueError as error:
            refused += 1
            shutil.rmtree(_draft(job, args.out))
            print(f"refused: {error}")
        rate = done / (time.monotonic() - begin)
        eta = math.ceil((len(todo) - done) / rate / 60)
        print(
            f"part {args.part}: {done}/{len(todo)} scenes, {rate * 60:.1f} a minute, {eta} min left, {refused} refused"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
