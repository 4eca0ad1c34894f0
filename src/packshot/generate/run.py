"""generate.py: one or many product photos, one request, a folder of results."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from packshot.config.schema import Generate, Placement
from packshot.errors import ConfigError, PackshotError
from packshot.generate import Packshot, Result
from packshot.generate.canvas import Canvas
from packshot.generate.certificate import LAYERS, digest, judge, load_certificates, measure, read_png
from packshot.generate.load import check_adapters, load_models
from packshot.generate.product import prepare, product_files, unique_names
from packshot.generate.references import open_references
from packshot.generate.report import write_report
from packshot.imaging.files import is_image, pair_masks
from packshot.runs.files import file_sha256, readable, replacing_file, writing
from packshot.runs.folder import Run, log, open_run
from packshot.runs.licenses import refuse_weights
from packshot.runs.progress import progress
from packshot.runs.tracking import open_tracker
from packshot.scene import Scene

RESUME = "run.resume=true makes what is missing."


def generate(config: Generate) -> None:
    """Make ``num_images`` pictures of every product.

    Inputs are checked before the run folder is made. In a folder of products, one that fails is named and left out,
    and the others are still made.

    Raises:
        ConfigError: inputs or adapters are wrong.
        PackshotError: a product failed.
    """
    refuse_weights(config)
    request = requested(config)
    files = product_files("product", config.product)
    masks = mask_files(config.mask, files)
    baseline = _folder("baseline", config.baseline)
    open_references(config.reference_files(), config.reference_weights)
    network = check_adapters(config.adapters, config.depth, config.light_angle)
    ready = partial(prepare, matte=config.matte, depth_onnx=network)
    first = ready(files[0], masks[files[0]], name=files[0].stem) if len(files) == 1 else None
    tool = Packshot(load_models(config.model, config.adapters), config.matte, depth=config.depth)
    named = list(unique_names(files))
    run = open_run("generate", config, resumable=False)
    check_made(run.path, config, tool, dict(named))
    run.write_config(config)
    tracker = open_tracker(run, config, "generate")
    if config.size and config.placement is Placement.original:
        log.warning("size=%s has no effect: placement=original keeps the photo's frame", config.size)
    failures = []
    with progress("pictures", total=len(files) * config.num_images) as advance:
        for name, file in named:
            try:
                product = first or ready(file, masks[file], name=name)
                copy_input(run, file, name)
                make_pictures(config, run, tool.with_product(product), request, advance)
            except PackshotError as error:
                log.error("%s: %s", file, error)
                failures.append((file, error))
    write_report(run.path, baseline)
    pictures = [run.path / f"{name}.png" for name in load_certificates(run.path)]
    tracker.images("pictures", pictures, [picture.stem for picture in pictures], step=0)
    tracker.finish()
    log.info("%d pictures; report: %s", len(pictures), run.path / "report.html")
    _raise(failures, len(files))


def check_made(folder: Path, config: Generate, tool: Packshot, files: dict[str, Path]) -> None:
    """Pictures that a run folder already has must be those that would be made now.

    Raises:
        ConfigError: a request, a photo or a model differs from what a certificate says; nothing was changed.
    """
    request = tool.request(requested(config), config, config.reference_files(), config.reference_weights)
    for stem, made in load_certificates(folder).items():
        name, _, number = stem.rpartition("-")
        if name not in files:
            continue
        seeded = {**request, "seed": config.run.seed + int(number)}
        now = {"request": seeded, "input": {"name": name, "sha256": file_sha256(files[name])}}
        now["model"] = {part: value for part, value in tool.models.manifest.items() if part not in ("device", "dtype")}
        _refuse(f"{folder / stem}.png", made, json.loads(json.dumps(now)))


def _refuse(picture: str, made: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ConfigError where parts of a certificate are not what they would be now; other parts do not matter."""
    odd = [f"{part}.{key}" for part in now for key, value in now[part].items() if made[part].get(key) != value]
    if odd:
        raise ConfigError(
            f"{picture} was made otherwise ({', '.join(odd)} differ).",
            "Name a new run.dir, or delete the picture and its certificate to make it again. Nothing was changed.",
        )


def _raise(failures: list[tuple[Path, PackshotError]], total: int) -> None:
    if len(failures) == 1 == total:
        raise failures[0][1]
    if failures:
        names = ", ".join(file.name for file, _ in failures[:5])
        raise PackshotError(f"{len(failures)} of {total} products failed: {names}.", "log.txt says why, one by one.")


def requested(config: Generate) -> Scene | str:
    """The free prompt, or the Scene of ``scene.*`` (an empty one asks for nothing in particular)."""
    return config.prompt if config.prompt else Scene.from_dict(asdict(config.scene))


def _folder(key: str, path: str | None) -> Path | None:
    found = readable(key, path) if path else None
    if found and not found.is_dir():
        raise ConfigError(f"{key}={path} is no folder.", "Name a folder that generate.py wrote.")
    return found


def mask_files(mask: str | None, files: list[Path]) -> dict[Path, Path | None]:
    """The mask of every product: none, one file for one product, or a folder with a picture of the same stem for each.

    Raises:
        ConfigError: one mask for several products, a folder that lacks some, or several masks for one.
    """
    if mask is None:
        return dict.fromkeys(files)
    found = readable("mask", mask)
    if found.is_file():
        if len(files) > 1:
            raise ConfigError(f"mask={mask} is one file for {len(files)} products.", "Give a folder of masks.")
        return {files[0]: found}
    names = sorted(file.name for file in found.iterdir() if is_image(file) and file.is_file())
    pairs = pair_masks(f"mask={mask}", [file.name for file in files], names)
    missing = [file.name for file in files if file.name not in pairs]
    if missing:
        raise ConfigError(f"mask={mask} has no mask for {', '.join(missing[:5])}.", "File names must agree.")
    return {file: found / pairs[file.name] for file in files}


def copy_input(run: Run, file: Path, name: str) -> None:
    """Keep the product photo itself beside the layers, so that reports and evaluations need nothing from outside."""
    target = run.path / LAYERS / f"{name}-input{file.suffix.lower()}"
    with writing(str(target), RESUME), replacing_file(target) as temporary:
        shutil.copyfile(file, temporary)


def make_pictures(
    config: Generate, run: Run, tool: Packshot, request: Scene | str, advance: Callable[..., None]
) -> None:
    """All pictures of one product that the run folder does not have yet."""
    assert tool.product is not None
    name, canvas = tool.product.name, tool.canvas(config)
    moved = json.loads(json.dumps(canvas.transform))
    for k in range(config.num_images):
        stem = f"{name}-{k}"
        certificate = run.path / f"{stem}.json"
        if certificate.exists():
            mask = {"sha256": digest(tool.product.alpha_HW)}
            _refuse(f"{run.path / stem}.png", json.loads(certificate.read_text()), {"mask": mask, "transform": moved})
            advance()
            continue
        started = time.monotonic()
        references, weights = config.reference_files(), config.reference_weights
        [result] = tool.generate(request, 1, config.run.seed + k, references, config, weights)
        certificate = write(run.path, stem, result, canvas)
        seconds = time.monotonic() - started
        run.metrics({"step": k, "picture": stem, "seconds": seconds, "status": certificate["status"]})
        advance(seconds_each=seconds)


def write(folder: Path, stem: str, result: Result, canvas: Canvas) -> dict[str, Any]:
    """Picture, layers and, last, the certificate, measured anew on the file as it lies on disk."""
    path = folder / f"{stem}.png"
    with writing(str(path), RESUME):
        for layer, image in result.layers.items():
            with replacing_file(folder / LAYERS / f"{stem}-{layer}.png") as temporary:
                image.save(temporary, "PNG")
        with replacing_file(path) as temporary:
            temporary.write_bytes(result.png)
        png = path.read_bytes()
        measured = measure(png, canvas)
        certificate = {**result.certificate, **measured, **judge(read_png(png), canvas, measured)}
        with replacing_file(folder / f"{stem}.json") as temporary:
            temporary.write_text(json.dumps(certificate, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if certificate["reasons"]:
        log.warning("%s needs review: %s", path, ", ".join(certificate["reasons"]))
    return certificate
