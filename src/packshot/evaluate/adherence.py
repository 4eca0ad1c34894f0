"""Does the picture show the requested scene? A captioner describes it, and the scene grammar parses the caption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from packshot.caption.models.adapter import Caption
from packshot.caption.models.captioner import Captioner
from packshot.caption.models.load import load_captioner
from packshot.caption.scores import read_scenes
from packshot.config.schema import CaptionerConfig, ModelConfig
from packshot.errors import PackshotError
from packshot.evaluate.samples import FinishedRun, Json
from packshot.lists import map_values, select
from packshot.runs.folder import log
from packshot.scene import Scene
from packshot.scene.scores import score

Read = Callable[[str], tuple[Image.Image, Image.Image]]
CONSTANT = Scene(surface="a white table", background="a white wall", lighting="soft light", mood="calm")


def names_a_slot(scene: Scene) -> bool:
    """Whether the scene asks for anything that can be scored."""
    return any(scene.slots().values())


def slot_means(parsed: Sequence[Scene], requested: Sequence[Scene]) -> dict[str, float]:
    """Mean soft agreement in [0, 1] per slot, over the pictures whose request names the slot; ``mean`` over slots."""
    values: dict[str, list[float]] = {}
    for guess, truth in zip(parsed, requested, strict=True):
        scores = score(guess, truth)
        for slot, texts in truth.slots().items():
            if texts:
                values.setdefault(slot, []).append(scores[slot].soft)
    if not values:
        return {}
    means = map_values(lambda agreements: float(np.mean(agreements)), values)
    return {**means, "mean": float(np.mean(list(means.values())))}


def baseline_scenes(requested: Sequence[Scene]) -> tuple[str, list[list[Scene]]]:
    """What a caption is scored against to find the score of an uninformed one: other requests, or one constant caption.

    Returns the baseline's name and, per sample, the other scenes; no samples where all requests are the same.
    """
    distinct = list(dict.fromkeys(requested))
    if len(distinct) < 2:
        return "constant caption, because all requests are the same scene", []
    others = []
    for own in requested:
        others.append([scene for scene in distinct if scene != own])
    return "shuffled: the same captions scored against the other requests' scenes", others


def baseline_means(parsed: Sequence[Scene], requested: Sequence[Scene]) -> Json:
    """The baseline's kind and its :func:`slot_means`."""
    kind, others = baseline_scenes(requested)
    if not others:
        return {"kind": kind, "scores": slot_means([CONSTANT] * len(requested), requested)}
    guesses: list[Scene] = []
    truths: list[Scene] = []
    for guess, scenes in zip(parsed, others, strict=True):
        guesses += [guess] * len(scenes)
        truths += scenes
    return {"kind": kind, "scores": slot_means(guesses, truths)}


def describe(names: Sequence[str], read: Read, writer: Captioner) -> list[Caption]:
    """One caption per picture. Only as many pictures are in memory as the captioner takes in one batch."""
    captions: list[Caption] = []
    for start in range(0, len(names), writer.batch_size):
        pictures, mattes = zip(*map(read, names[start : start + writer.batch_size]), strict=True)
        captions += writer.write(pictures, mattes)
    return captions


def not_measured(reason: str) -> Json:
    """The entry of a report for a run whose scene cannot be scored."""
    return {"measured": False, "reason": reason}


def prompts_of(run: FinishedRun) -> dict[str, str]:
    """What the model was given for each picture; empty where a reference alone guides the scene."""
    return {stem: certificate["request"]["prompt"] for stem, certificate in run.certificates.items()}


def adherence(prompts: Mapping[str, str], read: Read, model: ModelConfig, captioner: CaptionerConfig) -> Json:
    """Slot scores of pictures with their baseline, or the reason why there are none.

    prompts: by the picture's name. read: the picture (RGB) and its product's matte (L) by that name.
    """
    requested = {name: Scene.parse(prompt).scene for name, prompt in prompts.items()}
    if not any(map(names_a_slot, requested.values())):
        return not_measured("no prompt names a slot of a scene")
    try:
        writer = load_captioner(model, captioner)
    except PackshotError as error:
        return not_measured(f"no captioner: {error.args[0]}")
    texts: dict[str, str] = {}
    errors: dict[str, str] = {}
    for name, caption in zip(prompts, describe(list(prompts), read, writer), strict=True):
        if caption.error is None:
            texts[name] = caption.text
        else:
            errors[name] = caption.error
    first_error = next(iter(errors.values()), "")
    if errors:
        log.warning("%d pictures have no caption and are not scored; the first: %s", len(errors), first_error)
    captioned = list(select(requested, texts).values())
    if not any(map(names_a_slot, captioned)):
        return not_measured(f"no picture with a request was captioned: {first_error}")
    parsed = read_scenes(texts.values())
    return {
        "measured": True,
        "scores": slot_means(parsed, captioned),
        "baseline": baseline_means(parsed, captioned),
        "captions": texts,
        "errors": errors,
    }
