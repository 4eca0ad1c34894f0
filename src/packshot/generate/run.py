"""generate.py: one or many product photos, one request, a folder of results."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from packshot.config.conditions import networks
from packshot.config.schema import Generate
from packshot.errors import ConfigError, PackshotError
from packshot.generate import Packshot, Result
from packshot.generate.certificate import LAYERS, digest, encode_png, load_certificates
from packshot.generate.json_types import Json
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

WRITERS = 4  # threads; OpenCV encodes outside the interpreter lock
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
    baseline = open_folder("baseline", config.baseline)
    open_references(config.reference_files(), config.reference_weights)
    named_networks = networks(config)
    needed = check_adapters(config.adapters, named_networks, config)
    ready = partial(prepare, matte=config.matte, networks=needed)
    first = ready(files[0], masks[files[0]], name=files[0].stem) if len(files) == 1 else None
    tool = Packshot(load_models(config.model, config.adapters, config.inference), config.matte, networks=named_networks)
    named = list(unique_names(files))
    run = open_run("generate", config, resumable=False)
    check_made(run.path, config, tool, dict(named))
    run.write_config(config)
    tracker = open_tracker(run, config, "generate")
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
    stems = list(load_certificates(run.path))
    pictures = [run.path / f"{stem}.png" for stem in stems]
    tracker.images("pictures", pictures, stems, step=0)
    tracker.finish()
    log.info("%d pictures; report: %s", len(pictures), run.path / "report.html")
    raise_failures(failures, len(files))


def check_made(folder: Path, config: Generate, tool: Packshot, files: dict[str, Path]) -> None:
    """Pictures that a run folder already has must be those that would be made now.

    Raises:
        ConfigError: a request, a photo or a model differs from what a certificate states; nothing was changed.
    """
    request = tool.request(requested(config), config, config.reference_files(), config.reference_weights)
    for stem, made in load_certificates(folder).items():
        name, _, number = stem.rpartition("-")
        if name not in files:
            continue
        seeded = {**request, "seed": config.run.seed + int(number)}
        now = {"request": seeded, "input": {"name": name, "sha256": file_sha256(files[name])}}
        now["model"] = {part: value for part, value in tool.models.manifest.items() if part not in ("device", "dtype")}
        refuse_difference(f"{folder / stem}.png", made, json.loads(json.dumps(now)))


def refuse_difference(picture: str, made: Json, now: Json) -> None:
    """Raises ConfigError where parts of a certificate are not what they would be now; other parts do not matter."""
    mismatched = []
    for part, values in now.items():
        for key, value in values.items():
            if made[part].get(key) != value:
                mismatched.append(f"{part}.{key}")
    if mismatched:
        raise ConfigError(
            f"{picture} was made otherwise ({', '.join(mismatched)} differ).",
            "Name a new run.dir, or delete the picture and its certificate to make it again. Nothing was changed.",
        )


def raise_failures(failures: list[tuple[Path, PackshotError]], total: int) -> None:
    """Raises PackshotError where products failed: the error itself if there was only one product."""
    if len(failures) == 1 == total:
        raise failures[0][1]
    if failures:
        names = ", ".join(file.name for file, _ in failures[:5])
        raise PackshotError(f"{len(failures)} of {total} products failed: {names}.", "log.txt has the reason for each.")


def requested(config: Generate) -> Scene | str:
    """The free prompt, or the Scene of ``scene.*`` (an empty one asks for nothing in particular)."""
    return config.prompt if config.prompt else Scene.from_dict(asdict(config.scene))


def open_folder(key: str, path: str | None) -> Path | None:
    """The folder that a key names, if it names one. Raises ConfigError where it is not a folder."""
    found = readable(key, path) if path else None
    if found and not found.is_dir():
        raise ConfigError(f"{key}={path} is not a folder.", "Name a folder that generate.py wrote.")
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
    """All pictures of one product that the run folder does not have yet.

    The files of a picture are written while the next one is drawn.
    """
    assert tool.product is not None
    name = tool.product.name
    missing = missing_pictures(config, run, tool)
    advance(config.num_images - len(missing))
    with ThreadPoolExecutor(WRITERS) as writers:
        previous = None
        for k in missing:
            started = time.monotonic()
            [result] = tool.stream(
                request,
                1,
                config.run.seed + k,
                config.reference_files(),
                config,
                config.reference_weights,
                with_layers=config.layers,
            )
            if previous is not None:
                previous.result()
            previous = writers.submit(write, run.path, f"{name}-{k}", result, writers)
            seconds = time.monotonic() - started
            status = result.certificate["status"]
            run.metrics({"step": k, "picture": f"{name}-{k}", "seconds": seconds, "status": status})
            advance(seconds_each=seconds)
        if previous is not None:
            previous.result()


def missing_pictures(config: Generate, run: Run, tool: Packshot) -> list[int]:
    """The numbers of the pictures of one product that the run folder does not have.

    Raises:
        ConfigError: a picture that is there shows the product under another mask or at another place.
    """
    assert tool.product is not None
    transform = json.loads(json.dumps(tool.canvas(config).transform))
    mask = {"sha256": digest(tool.product.alpha_HW)}
    missing = []
    for k in range(config.num_images):
        stem = f"{tool.product.name}-{k}"
        certificate = run.path / f"{stem}.json"
        if not certificate.exists():
            missing.append(k)
            continue
        made = json.loads(certificate.read_text())
        refuse_difference(f"{run.path / stem}.png", made, {"mask": mask, "transform": transform})
    return missing


def write(folder: Path, stem: str, result: Result, writers: Executor) -> Json:
    """Layers, picture and, last, the certificate.

    The certificate was measured on the encoded picture. The file is read again, and its hash shows that it has those
    very bytes: what was measured then holds for it.

    Raises:
        PackshotError: the file on the disk is not the picture that was measured.
    """
    path = folder / f"{stem}.png"
    with writing(str(path), RESUME):
        files = {folder / LAYERS / f"{stem}-{layer}.png": image for layer, image in result.layers.items()}
        for _ in writers.map(write_layer, files, files.values()):
            pass  # the loop raises what a writer raised
        with replacing_file(path) as temporary:
            temporary.write_bytes(result.png)
        if file_sha256(path) != result.certificate["output_sha256"]:
            raise PackshotError(f"{path} was not written as it was drawn.", "Check the disk, and make it again.")
        with replacing_file(folder / f"{stem}.json") as temporary:
            text = json.dumps(result.certificate, indent=2, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8")
    if result.certificate["reasons"]:
        log.warning("%s needs review: %s", path, ", ".join(result.certificate["reasons"]))
    return result.certificate


def write_layer(file: Path, image: Image.Image) -> None:
    """One part of a picture as a PNG file."""
    with replacing_file(file) as temporary:
        temporary.write_bytes(encode_png(np.asarray(image)))
