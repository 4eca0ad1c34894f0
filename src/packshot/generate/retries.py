"""Drawing a picture again, from a new seed, until it passes its checks or the budget is spent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace

from packshot.config.verify import CHECKS, VerifyConfig
from packshot.errors import ConfigError
from packshot.generate.json_types import Json
from packshot.generate.load import Models
from packshot.generate.result import Result

Draw = Callable[[int, float], Result]  # a seed, and what is added to the weights of ControlNets


def seed_of(seed: int, number: int) -> int:
    """The seed of a try: the first is the picture's own, each further one follows from it alone."""
    if number == 0:
        return seed
    digest = hashlib.sha256(f"{seed}, try {number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def mendable(reasons: list[str]) -> list[str]:
    """The reasons that another drawing may mend."""
    return [code for code in reasons if code in CHECKS and CHECKS[code].redrawn]


def draw_within_budget(draw: Draw, seed: int, verify: VerifyConfig) -> Result:
    """The first of at most ``1 + verify.retries`` pictures of which no check says that it should be drawn again.

    If there is none, the one with the fewest such reasons, the earlier of two. Its certificate has all tries.
    """
    best: Result | None = None
    fewest = 0
    chosen = 0
    tries: list[Json] = []
    for number in range(1 + verify.retries):
        control = round(number * verify.control, 4)
        result = draw(seed_of(seed, number), control)
        reasons = result.certificate["reasons"]
        tries.append({"seed": seed_of(seed, number), "control": control, "reasons": reasons})
        faults = len(mendable(reasons))
        if best is None or faults < fewest:
            best = result
            fewest = faults
            chosen = number
        if not faults:
            break
    assert best is not None
    return replace(best, certificate={**best.certificate, "tries": tries, "chosen": chosen})


def with_control(models: Models, added: float) -> Models:
    """The models with more weight on every ControlNet."""
    if not added:
        return models
    return replace(models, controlnet_scales=tuple(scale + added for scale in models.controlnet_scales))


def refuse_useless_control(verify: VerifyConfig, controls: int) -> None:
    """Raises ConfigError where retries should have more control and nothing controls. controls: ControlNets loaded."""
    if verify.control and not controls:
        raise ConfigError(
            f"verify.control={verify.control:g} has no effect without a ControlNet.",
            "Add adapters.controlnets, or leave verify.control out.",
        )


def effort(certificates: Mapping[str, Json]) -> Json:
    """What pictures cost: counts of pictures, of those accepted, of tries and of denoising steps."""
    counts = {"pictures": 0, "accepted": 0, "tries": 0, "steps": 0}
    for certificate in certificates.values():
        tries = len(certificate.get("tries") or [None])
        counts["pictures"] += 1
        counts["accepted"] += certificate["status"] == "accepted"
        counts["tries"] += tries
        counts["steps"] += tries * certificate["request"]["num_inference_steps"]
    return counts
