"""Does the picture show the scene that was asked for: a captioner describes it, the grammar reads the caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from packshot.caption.models.adapter import Caption
from packshot.caption.models.captioner import Captioner, load_captioner
from packshot.config.schema import CaptionerConfig, ModelConfig
from packshot.errors import PackshotError
from packshot.evaluate.samples import RunFolder, picture_and_matte
from packshot.runs.folder import log
from packshot.scene import SLOTS, Scene
from packshot.scene.scores import score

CONSTANT = Scene(surface="a white table", background="a white wall", lighting="soft light", mood="calm")


def slot_means(read: Sequence[Scene], wanted: Sequence[Scene]) -> dict[str, float]:
    """Mean soft agreement in [0, 1] per slot, over the pictures whose request names that slot; ``mean`` over slots."""
    values: dict[str, list[float]] = {}
    for guess, truth in zip(read, wanted, strict=True):
        scores, asked = score(guess, truth), truth.slots()
        for slot in SLOTS:
            if asked[slot]:
                values.setdefault(slot, []).append(scores[slot].soft)
    means = {slot: float(np.mean(found)) for slot, found in values.items()}
    return {**means, "mean": float(np.mean(list(means.values())))} if means else {}


def baseline_scenes(wanted: Sequence[Scene]) -> tuple[str, list[list[Scene]]]:
    """What the score is worth: the captions of pictures with other requests, or one constant caption.

    Returns a name and, per sample, the scenes that stand in for the caption's; see :func:`adherence`.
    """
    others = [[scene for scene in dict.fromkeys(wanted) if scene != own] for own in wanted]
    if all(others):
        return "shuffled: the same captions scored against the other requests' scenes", others
    return "constant caption, for want of a second scene", []


def describe(run: RunFolder, writer: Captioner) -> list[Caption]:
    """One caption per picture. Only as many pictures are in memory as the captioner takes at once."""
    captions: list[Caption] = []
    stems = list(run.certificates)
    for start in range(0, len(stems), writer.batch_size):
        pairs = [picture_and_matte(run, stem) for stem in stems[start : start + writer.batch_size]]
        captions += writer.write([picture for picture, _ in pairs], [matte for _, matte in pairs])
    return captions


def adherence(run: RunFolder, model: ModelConfig, captioner: CaptionerConfig) -> dict[str, Any]:
    """Slot scores of a run's pictures with their baseline, or ``{"measured": False, "reason": ...}``."""
    # The prompt is what the model was shown; beside a reference it may be empty.
    wanted = [Scene.parse(certificate["request"]["prompt"]).scene for certificate in run.certificates.values()]
    if not any(any(scene.slots().values()) for scene in wanted):
        return {"measured": False, "reason": "no prompt names a slot of a scene"}
    try:
        writer = load_captioner(model, captioner)
    except PackshotError as error:
        return {"measured": False, "reason": f"no captioner: {error.args[0]}"}
    captions = dict(zip(run.certificates, describe(run, writer), strict=True))
    errors = {stem: caption.error for stem, caption in captions.items() if caption.error is not None}
    texts = {stem: caption.text for stem, caption in captions.items() if caption.error is None}
    if errors:
        log.warning(
            "%d pictures have no caption and are not scored; the first: %s", len(errors), next(iter(errors.values()))
        )
    wanted = [scene for stem, scene in zip(captions, wanted, strict=True) if stem in texts]
    if not any(any(scene.slots().values()) for scene in wanted):
        return {"measured": False, "reason": f"no picture with a request was captioned: {next(iter(errors.values()))}"}
    read = [Scene.parse(text).scene for text in texts.values()]
    name, others = baseline_scenes(wanted)
    if others:
        pairs = [(guess, other) for guess, scenes in zip(read, others, strict=True) for other in scenes]
        baseline = slot_means([guess for guess, _ in pairs], [other for _, other in pairs])
    else:
        baseline = slot_means([CONSTANT] * len(wanted), wanted)
    return {
        "measured": True,
        "scores": slot_means(read, wanted),
        "baseline": {"kind": name, "scores": baseline},
        "captions": texts,
        "errors": errors,
    }
