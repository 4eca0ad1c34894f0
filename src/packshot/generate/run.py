"""generate.py: product photos and requests in, a folder of pictures with their certificates out."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from packshot.config.conditions import networks
from packshot.config.schema import Generate, GenerateMode, OutputConfig
from packshot.config.unread import unread_notes
from packshot.errors import ConfigError, PackshotError
from packshot.generate.adapters import check_adapters
from packshot.generate.campaign import named, plan_campaign, set_aside, write_index
from packshot.generate.canvas import check_place
from packshot.generate.certificate import LAYERS, digest, encode_png, load_certificates, verdict
from packshot.generate.doubt_picture import draw_doubt
from packshot.generate.group import as_group
from packshot.generate.jobs import Job, product_jobs
from packshot.generate.json_types import Json
from packshot.generate.load import load_models
from packshot.generate.output import asked_output, deliver
from packshot.generate.packshot import Packshot, Result
from packshot.generate.plan import plan
from packshot.generate.product import Product, prepare
from packshot.generate.reasons import STANDARD_MISSED, explained
from packshot.generate.references import open_references
from packshot.generate.report import write_report
from packshot.generate.retries import effort
from packshot.imaging.upscale import open_upscaler
from packshot.lists import without
from packshot.runs.files import file_sha256, readable, replacing_file, sha256, writing
from packshot.runs.folder import Run, answer, log, open_run
from packshot.runs.licenses import refuse_weights
from packshot.runs.progress import progress
from packshot.runs.tracking import open_tracker

WRITERS = 4  # threads; OpenCV encodes outside the interpreter lock
RESUME = "run.resume=true makes what is missing."
MACHINE = ("device", "dtype")  # parts of a certificate's models that another machine may have otherwise


def generate(config: Generate) -> None:
    """Make ``num_images`` pictures of every product, or of every row of a campaign.

    Inputs are checked before the run folder is made. A product that fails is named and left out, and the others are
    still made.

    Raises:
        ConfigError: inputs or adapters are wrong.
        PackshotError: a product failed.
    """
    refuse_weights(config)
    if config.mode is GenerateMode.plan:
        plan(config)
        return
    campaign = plan_campaign(config) if config.campaign else None
    jobs = without_repeats(campaign.jobs if campaign else product_jobs(config))
    baseline = open_folder("baseline", config.baseline)
    products = check_inputs(config, jobs)
    tool = load_tool(config, jobs)
    run = open_run("generate", config, resumable=False)
    check_made(run.path, tool, jobs)
    run.write_config(config)
    for text in unread_notes(job.config for job in jobs):
        log.warning("%s", text)
    if campaign:
        set_aside(run.path, jobs)
    tracker = open_tracker(run, config, "generate")
    failures = make_all(run, tool, jobs, products)
    write_report(run.path, baseline)
    if campaign:
        write_index(run.path, campaign)
    certificates = load_certificates(run.path)
    for text in outcome(certificates, drawing_seconds(run.path)):
        answer.info("%s", text)
    stems = list(certificates)
    pictures = [run.path / f"{stem}.png" for stem in stems]
    tracker.images("pictures", pictures, stems, step=0)
    tracker.finish()
    answer.info("%d pictures; report: %s", len(pictures), run.path / "report.html")
    raise_failures(failures, len(jobs))


def check_inputs(config: Generate, jobs: list[Job]) -> Products:
    """What prepares the products, once references, adapters and places fit every job.

    Raises:
        ConfigError: they do not, with the row of a campaign.
        PackshotError: all jobs are of one product, and no product is found in its photo.
    """
    named_networks = networks(config)
    needed: Mapping[str, str] = {}
    for job in jobs:
        with named(job.where) if config.campaign else nullcontext():
            open_references(job.config.reference_files(), job.config.reference_weights)
            needed = check_adapters(config.adapters, named_networks, job.config)
    products = Products(config, needed)
    if len({job.product for job in jobs}) == 1:  # then an unusable photo is a wrong input
        only = products.of(jobs[0])
        for job in jobs:
            with named(job.where) if config.campaign else nullcontext():
                check_place(only, job.config)
    return products


def drawing_seconds(folder: Path) -> float:
    """Seconds that the run's log has for drawing, those of pictures lost to an interruption included."""
    seconds = 0.0
    file = folder / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with suppress(ValueError):  # a line that an interruption cut short
            seconds += json.loads(line).get("seconds", 0.0)
    return seconds


def outcome(certificates: Mapping[str, Json], seconds: float) -> list[str]:
    """How many pictures are accepted, what that took, and which checks do not count, a line each.

    seconds: that were spent on drawing.
    """
    found = effort(certificates)
    review = found["pictures"] - found["accepted"]
    lines = [f"{found['accepted']} of {found['pictures']} pictures are accepted, {review} need review"]
    if found["tries"] > found["pictures"]:
        each = f"{found['tries'] / found['accepted']:.1f} each" if found["accepted"] else "none of them"
        lines.append(f"they took {found['tries']} tries, {each} for an accepted picture (verify.retries)")
    if found["steps"] and found["accepted"]:
        lines.append(f"an accepted picture took {seconds / found['accepted']:.1f} s of drawing")
    skipped: Counter[str] = Counter()
    for certificate in certificates.values():
        for code, check in (certificate.get("checks") or {}).items():
            skipped[code] += check["ignored"] and not check["passed"]
    for code, count in (+skipped).items():
        lines.append(f"{count} pictures fail {code}, which verify.ignore leaves out")
    return lines


def without_repeats(jobs: list[Job]) -> list[Job]:
    """The jobs, with one picture of each that draws nothing: all of its pictures would be the same."""
    kept = []
    left_out = 0
    for job in jobs:
        if job.config.background.color and job.config.num_images > 1:
            left_out += job.config.num_images - 1
            job = replace(job, config=replace(job.config, num_images=1))
        kept.append(job)
    if left_out:
        log.warning(
            "background.color draws nothing, so all pictures of a product are the same; %d of num_images are left out",
            left_out,
        )
    return kept


def load_tool(config: Generate, jobs: list[Job]) -> Packshot:
    """What draws the jobs; models are loaded if any job needs them."""
    for upscaler in {job.config.background.upscaler for job in jobs} - {None}:
        open_upscaler(str(upscaler))  # a file that is none costs no loading of models
    needed = not all(job.config.background.color for job in jobs)
    models = load_models(config.model, config.adapters, config.inference) if needed else None
    return Packshot(models, config.matte, networks=networks(config))


@dataclass
class Products:
    """Prepares products for jobs; the last one is kept, because jobs of one product follow each other."""

    config: Generate
    needed: Mapping[str, str]
    last: tuple[Path, Path | None, Product] | None = None

    def of(self, job: Job) -> Product:
        """The product of a job, with the name of its files. Raises PackshotError: the photo or its mask is unusable."""
        if self.last is None or self.last[:2] != (job.product, job.mask):
            prepared = prepare(job.product, job.mask, self.config.matte, job.name, networks=self.needed)
            if job.group:
                prepared = as_group(prepared, job.group)
            self.last = (job.product, job.mask, prepared)
        return replace(self.last[2], name=job.name)


def make_all(run: Run, tool: Packshot, jobs: list[Job], products: Products) -> list[tuple[str, PackshotError]]:
    """The pictures of all jobs; returns those that failed, with the reason of each."""
    failures = []
    copies: dict[Path, Path] = {}
    with progress("pictures", total=sum(job.config.num_images for job in jobs)) as advance:
        for job in jobs:
            try:
                product = products.of(job)
                copy_input(run, job, copies)
                write_doubt(run, job, product)
                make_pictures(run, tool.with_product(product), job, advance)
            except PackshotError as error:
                log.error("%s: %s", job.where, error)
                failures.append((job.where, error))
    return failures


def check_made(folder: Path, tool: Packshot, jobs: list[Job]) -> None:
    """Pictures that a run folder already has must be those that would be made now.

    Raises:
        ConfigError: a request, a photo or a model differs from what a certificate states; nothing was changed.
    """
    by_name = {job.name: job for job in jobs}
    for stem, made in load_certificates(folder).items():
        name, _, number = stem.rpartition("-")
        job = by_name.get(name)
        if job is None:
            continue
        config = job.config
        request = tool.request(job.request, config, config.reference_files(), config.reference_weights)
        seeded = {**request, "seed": config.run.seed + int(number)}
        now = {"request": seeded, "input": {"name": name, "sha256": file_sha256(job.product)}}
        now["model"] = without(tool.manifest(config), *MACHINE)
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


def raise_failures(failures: list[tuple[str, PackshotError]], total: int) -> None:
    """Raises PackshotError where jobs failed: the error itself if there was only one job."""
    if len(failures) == 1 == total:
        raise failures[0][1]
    if failures:
        names = ", ".join(Path(where).name for where, _ in failures[:5])
        raise PackshotError(f"{len(failures)} of {total} products failed: {names}.", "log.txt has the reason for each.")


def open_folder(key: str, path: str | None) -> Path | None:
    """The folder that a key names, if it names one. Raises ConfigError where it is not a folder."""
    found = readable(key, path) if path else None
    if found and not found.is_dir():
        raise ConfigError(f"{key}={path} is not a folder.", "Name a folder that generate.py wrote.")
    return found


def copy_input(run: Run, job: Job, copies: dict[Path, Path]) -> None:
    """Keep the product photo itself next to the layers, so that reports and evaluations need nothing from outside.

    copies: the copy of each photo so far; jobs of one photo share its bytes where the file system can.
    """
    target = run.path / LAYERS / f"{job.name}-input{job.product.suffix.lower()}"
    with writing(str(target), RESUME), replacing_file(target) as temporary:
        earlier = copies.setdefault(job.product, target)
        try:
            if earlier == target:
                raise OSError
            os.link(earlier, temporary)
        except OSError:
            shutil.copyfile(job.product, temporary)


def write_doubt(run: Run, job: Job, product: Product) -> None:
    """Show where the mask of a product is in doubt, next to the layers; nothing where it is not."""
    drawn = draw_doubt(product)
    if drawn is not None:
        target = run.path / LAYERS / f"{job.name}-doubt.png"
        with writing(str(target), RESUME):
            write_layer(target, drawn)


def make_pictures(run: Run, tool: Packshot, job: Job, advance: Callable[..., None]) -> None:
    """All pictures of one job that the run folder does not have yet.

    The files of a picture are written while the next one is drawn.
    """
    config = job.config
    missing = missing_pictures(run, tool, job)
    advance(config.num_images - len(missing))
    if not missing:
        return
    draw = tool.drawer(job.request, config, config.reference_files(), config.reference_weights)
    with ThreadPoolExecutor(WRITERS) as writers:
        previous = None
        for k in missing:
            started = time.monotonic()
            result = draw(config.run.seed + k, config.layers)
            if previous is not None:
                previous.result()
            previous = writers.submit(write, run.path, f"{job.name}-{k}", result, writers, config.output)
            seconds = time.monotonic() - started
            line = {"step": k, "picture": f"{job.name}-{k}", "seconds": seconds}
            line |= {"status": result.certificate["status"], "tries": len(result.certificate.get("tries") or [None])}
            run.metrics(line)
            advance(seconds_each=seconds)
        if previous is not None:
            previous.result()


def missing_pictures(run: Run, tool: Packshot, job: Job) -> list[int]:
    """The numbers of the pictures of one job that the run folder does not have.

    Raises:
        ConfigError: a picture that is there shows the product under another mask or at another place.
    """
    assert tool.product is not None
    output = {"asked": asked_output(job.config.output)}
    made_before = []
    missing = []
    for k in range(job.config.num_images):
        certificate = run.path / f"{job.name}-{k}.json"
        (made_before if certificate.exists() else missing).append(k)
    if made_before:
        transform = json.loads(json.dumps(tool.canvas(job.config).transform))
        mask = {"sha256": digest(tool.product.alpha_HW)}
        for k in made_before:
            stem = run.path / f"{job.name}-{k}"
            made = json.loads(stem.with_name(f"{stem.name}.json").read_text(encoding="utf-8"))
            made.setdefault("delivery", {"asked": asked_output(OutputConfig())})  # of an older version
            refuse_difference(f"{stem}.png", made, {"mask": mask, "transform": transform, "delivery": output})
    return missing


def write(folder: Path, stem: str, result: Result, writers: Executor, output: OutputConfig | None = None) -> Json:
    """Layers, picture, the file that is handed over and, last, the certificate.

    The certificate was measured on the encoded picture. The files are read again, and their hashes show that they have
    those very bytes: what was measured then holds for them.

    Raises:
        PackshotError: a file on the disk is not the one that was measured, or cannot be as small as asked for.
    """
    path = folder / f"{stem}.png"
    delivery = deliver(stem, result.image, result.png, result.canvas, output or OutputConfig())
    certificate = {**result.certificate, "delivery": delivery.report}
    certificate["output_sha256"] = sha256(delivery.master)
    standard = delivery.report["standard"]
    if standard is not None and not standard["passed"]:
        certificate |= verdict([*certificate["reasons"], STANDARD_MISSED])
    with writing(str(path), RESUME):
        files = {folder / LAYERS / f"{stem}-{layer}.png": image for layer, image in result.layers.items()}
        for _ in writers.map(write_layer, files, files.values()):
            pass  # the loop raises what a writer raised
        write_bytes(path, delivery.master, certificate["output_sha256"])
        if delivery.name != path.name:
            write_bytes(folder / delivery.name, delivery.data, delivery.report["sha256"])
        with replacing_file(folder / f"{stem}.json") as temporary:
            text = json.dumps(certificate, indent=2, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8")
    if certificate["reasons"]:
        log.warning("%s needs review: %s", path, explained(certificate["reasons"]))
    return certificate


def write_bytes(path: Path, data: bytes, expected: str) -> None:
    """Write a file. expected: its SHA-256. Raises PackshotError: the disk has other bytes."""
    with replacing_file(path) as temporary:
        temporary.write_bytes(data)
    if file_sha256(path) != expected:
        raise PackshotError(f"{path} was not written as it was drawn.", "Check the disk, and make it again.")


def write_layer(file: Path, image: Image.Image) -> None:
    """One part of a picture as a PNG file."""
    with replacing_file(file) as temporary:
        temporary.write_bytes(encode_png(np.asarray(image)))
