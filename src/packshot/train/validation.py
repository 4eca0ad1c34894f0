"""What validation measures and draws: the loss under fixed noise, and products held in pictures of fixed prompts.

Pictures are made as generate.py makes them: the product's latents are held while the scene is denoised around it. What
is scored is the raw decode, before the product's own pixels are laid over it: there it shows when the model has
enlarged or continued the product.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageDraw
from torch import Tensor

from packshot.config.schema import KeepBest, TrainScript, Unconditional
from packshot.dataset.rows import Row
from packshot.diffusion.protocols import Autoencoder, Pipeline
from packshot.diffusion.sample import NotFiniteError, sample
from packshot.engine.keyed_random import SampleKey
from packshot.engine.step import to_device
from packshot.engine.task import Validated
from packshot.errors import ConfigError, PackshotError
from packshot.imaging.matte import soften_hard_edge, unmix
from packshot.imaging.outline import compare_size, is_extended, measure_extension, segment_near
from packshot.imaging.pixels import from_network, to_bytes
from packshot.lists import column, map_values
from packshot.methods.base import FramedSample
from packshot.runs.files import replacing_file
from packshot.train.examples import Example, Examples, widened

if TYPE_CHECKING:  # it validates with what stands here
    from packshot.train.task import DiffusionTask

LOSS_SAMPLES = 32
STEPS = 20
GUIDANCE = 5.0
MEASURES = ("extension", "product_loss", "product_iou")
MEANS = dict(zip(MEASURES, MEASURES, strict=True)) | {"extension_rate": "extended"}  # figures, and the column of each
GRID_CELL = 256  # px, longer side of a picture in the sheet
GRID_STRIP = 14  # px, a line of words


@dataclass(frozen=True)
class HeldOutSample:
    """A held-out sample made ready for sampling; nothing of it changes from validation to validation.

    sample: encoded (see ``Examples``). truth_HW3: the framed photo. seen: the framed sample with the product's colours
    continued past its edge, as generate.py shows it to the model. matte_HW: uint8, zero where there is no product.
    known_1CHW: the latents of that, scaled. held_1HW: 1 for the latent cells that show nothing but product. floor: the
    measures of :func:`packshot.imaging.outline.extension_of` on the truth as the VAE gives it back: the right answer
    is 0, and no raw decode has a sharper outline.
    """

    sample: Example
    truth_HW3: np.ndarray
    seen: FramedSample
    matte_HW: np.ndarray
    known_1CHW: Tensor
    held_1HW: Tensor
    floor: dict[str, float]


@dataclass(frozen=True)
class PictureSpec:
    """A picture to draw: the sample's index, the prompt (None: its own caption), and the noise's seed."""

    name: str
    index: int
    prompt: str | None
    seed: int


def measure(raw_HW3: np.ndarray, matte_HW: np.ndarray, floor: dict[str, float]) -> dict[str, float | None]:
    """Extension and loss of the product in a raw decode (uint8), above their noise floor; None without a product.

    ``extension`` and ``product_loss`` are shares of the product's area, at least 0: where the segmenter does better
    than on the truth, nothing has shrunk. ``extended``: 1 or 0. ``product_iou``: of the object found and the mask.
    """
    found = measure_extension(raw_HW3, matte_HW, segment_near, compare_size(*matte_HW.shape))
    if not np.isfinite(found["extension"]):
        return dict.fromkeys(("extension", "product_loss", "extended", "product_iou"))
    return {
        "extension": max(0.0, found["extension"] - floor["extension"]),
        "product_loss": max(0.0, found["loss"] - floor["loss"]),
        "extended": is_extended(found["extension"], floor["extension"]),
        "product_iou": found["iou"],
    }


def means(rows: list[Row]) -> dict[str, float]:
    """``extension``, ``extension_rate``, ``product_loss``, ``product_iou`` over rows that show a product."""
    measured = [row for row in rows if row["extension"] is not None]
    return map_values(lambda name: fmean(column(measured, name)), MEANS) if measured else {}


class Validator:
    """The validation of a DiffusionTask: called on every process, returns the same figures on each.

    Raises:
        ConfigError: the best checkpoint is chosen by the extension and none of the samples has a mask.
    """

    def __init__(self, examples: Examples, config: TrainScript) -> None:
        self.examples = examples
        self.config = config
        self.count = min(config.train.validation_samples, len(examples))
        self._texts: dict[str, dict[str, Tensor]] = {}
        self._held: dict[int, HeldOutSample] = {}
        by_extension = config.train.validation_steps and config.train.keep_best is KeepBest.extension
        named = config.data.validation_set() or "(held out of data.train)"
        if by_extension and not any(self.examples.seen(index)["mask"] for index in range(self.count)):
            raise ConfigError(
                f"train.keep_best=extension, but the first {self.count} samples of data.validation={named} have no "
                "mask.",
                "Validate on a product dataset, or set train.keep_best=validation_loss.",
            )

    def fill(self, accelerator: Accelerator) -> None:
        """Encode samples and prompts while the encoders are there."""
        self.examples.fill(accelerator)
        for prompt in self.config.train.validation_prompts:
            self._text(prompt)

    def _text(self, prompt: str) -> dict[str, Tensor]:
        if prompt not in self._texts:
            self._texts[prompt] = widened(self.examples.encoder.text([prompt])[0])
        return self._texts[prompt]

    @torch.no_grad()
    def __call__(self, task: DiffusionTask, folder: Path, accelerator: Accelerator) -> Validated:
        """Write ``<number>.png`` (truth | raw decode), ``grid.png`` and ``table.json`` under ``folder``."""
        figures = {"validation_loss": self.loss(task, accelerator)}
        folder.mkdir(parents=True, exist_ok=True)
        pipeline = cast("Pipeline", task.method.pipeline())
        pipeline.set_progress_bar_config(disable=True)
        specs = self.pictures()
        mine: list[Row] = []
        for spec in specs[accelerator.process_index :: accelerator.num_processes]:
            mine.append(self._draw(task, pipeline, spec, folder, accelerator))
        rows = sorted(gather_object(mine), key=lambda row: row["picture"])
        if accelerator.is_main_process:
            with replacing_file(folder / "table.json") as file:
                file.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
            with replacing_file(folder / "grid.png") as file:
                sheet(rows, folder).save(file, format="png")
        accelerator.wait_for_everyone()
        caption = f"{self.count} products x {len(specs) // self.count} pictures, the truth first"
        return Validated({**figures, **means(rows)}, [folder / "grid.png"], [caption], rows)

    def pictures(self) -> list[PictureSpec]:
        """Products x prompts x seeds. The prompts of one product share their noise, so that they can be compared."""
        train = self.config.train
        seed = self.config.run.seed
        prompts = (None, *train.validation_prompts)
        places = product(range(self.count), prompts, range(train.validation_seeds))
        specs: list[PictureSpec] = []
        for number, (index, prompt, draw) in enumerate(places):
            specs.append(PictureSpec(f"{number:03d}.png", index, prompt, seed + index + 1000 * draw))
        return specs

    def loss(self, task: DiffusionTask, accelerator: Accelerator) -> float:
        """Mean loss of held-out samples under noise and timesteps that stay the same from step to step."""
        count = min(LOSS_SAMPLES, len(self.examples))
        total = torch.zeros((), device=accelerator.device)
        for index in range(accelerator.process_index, count, accelerator.num_processes):
            sample = self.examples[index]
            # the epoch -1 never occurs in training
            batch = task.collate([sample], [SampleKey(self.config.run.seed, -1, sample["id"])])
            with accelerator.autocast():
                total += task(to_device(batch, accelerator.device)).sum()
        summed = accelerator.reduce(total, "sum")
        assert isinstance(summed, Tensor)
        return summed.item() / count

    def _ready(self, index: int, device: torch.device) -> HeldOutSample:
        if index not in self._held:
            self._held[index] = prepare_held_out(self.examples, index, device)
        return self._held[index]

    def _draw(
        self, task: DiffusionTask, pipeline: Pipeline, spec: PictureSpec, folder: Path, accelerator: Accelerator
    ) -> Row:
        """Draw one picture and measure it: its row of the table."""
        held_out = self._ready(spec.index, accelerator.device)
        given = held_out.sample["prompt"] if spec.prompt is None else self._text(spec.prompt)
        with accelerator.autocast():
            prompt = self._embeddings(task, given, held_out.sample["empty"], accelerator.device)
            raw_HW3 = sample_picture(task, pipeline, held_out, prompt, spec.seed)
        Image.fromarray(np.concatenate([held_out.truth_HW3, raw_HW3], axis=1)).save(folder / spec.name)
        return {
            "picture": spec.name,
            "prompt": held_out.seen["text"] if spec.prompt is None else spec.prompt,
            "own_caption": spec.prompt is None,
            "product": held_out.sample["id"],
            "seed": spec.seed,
            **measure(raw_HW3, held_out.matte_HW, held_out.floor),
        }

    def _embeddings(
        self, task: DiffusionTask, given: dict[str, Tensor], empty: dict[str, Tensor], device: torch.device
    ) -> dict[str, Tensor]:
        """The pipeline's embeddings of a prompt, and of what guidance subtracts: a prompt that was dropped."""

        def batched(embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
            return map_values(lambda tensor: tensor[None].to(device), embeddings)

        given, empty = batched(given), batched(empty)
        if task.method.trains_text:
            kept = {"prompt_kept": torch.ones(1, device=device)}
            given, empty = task.encode_prompt(given | kept), task.encode_prompt(empty | kept)
        if self.config.objective.unconditional is Unconditional.zeros:
            empty = map_values(torch.zeros_like, empty)
        return given | dict(zip(map("negative_{}".format, empty), empty.values(), strict=True))


def prepare_held_out(examples: Examples, index: int, device: torch.device) -> HeldOutSample:
    """Make one held-out sample ready; see :class:`HeldOutSample`."""
    seen = examples.seen(index)
    encoder = examples.encoder
    truth = np.asarray(seen["image"])
    mask = np.zeros(truth.shape[:2], np.uint8) if seen["mask"] is None else np.asarray(seen["mask"])
    matte = soften_hard_edge(mask)
    if (matte >= 128).any():
        seen["image"] = Image.fromarray(unmix(truth, matte))
    vae = cast("Autoencoder", encoder.parts.vae)
    sample = examples[index]
    known = encoder.parts.latent_scale().to_unet(encoder.latents([seen])[0]["mean"])
    given_back = to_bytes(from_network(vae.decode(sample["mean"][None].to(vae.device)).sample[0]))
    return HeldOutSample(
        sample=sample,
        truth_HW3=truth,
        seen=seen,
        matte_HW=matte,
        known_1CHW=known[None].to(device),
        held_1HW=sample["held"].to(device),
        floor=measure_extension(given_back, matte, segment_near, compare_size(*matte.shape)),
    )


def sample_picture(
    task: DiffusionTask, pipeline: Pipeline, held_out: HeldOutSample, prompt: dict[str, Tensor], seed: int
) -> np.ndarray:
    """The raw decode of one picture, uint8 (H, W, 3), sampled with the product held.

    Raises:
        PackshotError: the denoiser or the decoder produced NaN or infinity; names the sample.
    """
    known = held_out.known_1CHW
    if "product" in held_out.sample:
        task.show_product(held_out.sample["product"][None].to(known.device))
    shown = task.config.objective.product_conditioning.name
    conditions = task.method.pipeline_inputs(held_out.seen, held_out.sample["encoded"])
    try:
        pixels = sample(
            pipeline, known, held_out.held_1HW, shown, seed, STEPS, guidance_scale=GUIDANCE, **prompt, **conditions
        )
    except NotFiniteError as error:
        raise PackshotError(
            f"validation drew NaN or infinity for sample {held_out.sample['id']}.",
            "Lower train.learning_rate, or use the fp16-fix VAE; the last checkpoint is untouched.",
        ) from error
    return to_bytes(from_network(pixels))


# ---- the sheet ----


def sheet(rows: list[Row], folder: Path) -> Image.Image:
    """One line per product: its truth, then its pictures, each with its measure; those that grew are framed in red."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row["product"], []).append(row)
    pairs = {row["picture"]: _halves(folder / row["picture"]) for row in rows}
    side = max(max(picture.size) for picture in chain(*pairs.values()))
    columns = 1 + max(map(len, lines.values()))
    result = Image.new("RGB", (columns * (side + 4), len(lines) * (side + 2 * GRID_STRIP)), "white")
    draw = ImageDraw.Draw(result)
    for number, (name, specs) in enumerate(lines.items()):
        top = number * (side + 2 * GRID_STRIP)
        result.paste(pairs[specs[0]["picture"]][0], (0, top))
        _words(draw, (0, top + side), ["truth", name[:12]], side)
        for place, row in enumerate(specs, 1):
            picture = pairs[row["picture"]][1]
            left = place * (side + 4)
            result.paste(picture, (left, top))
            if row["extended"]:
                draw.rectangle((left, top, left + picture.width - 1, top + picture.height - 1), outline="red", width=2)
            grown = "" if row["extension"] is None else f"grown {row['extension']:.1%}, "
            words = "own caption" if row["own_caption"] else row["prompt"]
            _words(draw, (left, top + side), [f"{grown}seed {row['seed']}", words], side)
    return result


def _words(draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: list[str], width: int) -> None:
    """Lines below a picture, cut where they would reach the next one."""
    for number, text in enumerate(lines):
        while text and draw.textlength(text) > width:
            text = text[:-1]
        draw.text((corner[0], corner[1] + number * GRID_STRIP), text, fill="black")


def _halves(file: Path) -> tuple[Image.Image, Image.Image]:
    """Truth and picture of a file that holds them side by side, at the sheet's size."""
    with Image.open(file) as both:
        middle = both.width // 2
        halves = both.crop((0, 0, middle, both.height)), both.crop((middle, 0, both.width, both.height))
    for half in halves:
        half.thumbnail((GRID_CELL, GRID_CELL), Image.Resampling.LANCZOS)
    return halves
