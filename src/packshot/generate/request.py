"""What is asked for besides the product: the scene in words, references, and the inputs of control maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from packshot.config.background import BackgroundConfig, Refine
from packshot.config.schema import GenerateSettings, Shadow
from packshot.config.verify import VerifyConfig
from packshot.errors import ConfigError
from packshot.generate.conditions import asked_inputs
from packshot.generate.json_types import Json
from packshot.generate.load import Models
from packshot.generate.product import Source
from packshot.generate.references import Reference, open_references
from packshot.scene import Scene


def usable_references(
    models: Models, given: Source | Sequence[Source] | None, weights: Sequence[int]
) -> list[Reference]:
    """The references of a request. Raises ConfigError: one is missing or not an image, or no adapter reads it."""
    references = open_references(given, weights)
    if references and not models.has_ip_adapter:
        raise ConfigError("a reference needs an IP-Adapter, none is loaded.", "Load one: adapters.ip_adapter.")
    return references


def stated_shadow(settings: GenerateSettings) -> Json:
    """The shadow that was asked for, in certificates; null where none was, as in those of older versions."""
    asked = settings.shadow is not Shadow.none
    changed = asked and settings.shadow_strength != GenerateSettings.shadow_strength
    return {
        "shadow": settings.shadow.name if asked else None,
        "shadow_strength": settings.shadow_strength if changed else None,
    }


def stated_refine(background: BackgroundConfig) -> Json | None:
    """How the drawing is refined, in certificates; null where it is not, as in those of older versions."""
    if background.refine is Refine.none:
        return None
    return {
        "kind": background.refine.name,
        "max_side": background.refine_max_side,
        "strength": background.refine_strength,
        "sharpen": background.sharpen,
        "upscaler": Path(background.upscaler).name if background.upscaler else None,
    }


def stated_verify(verify: VerifyConfig) -> Json | None:
    """What was asked for, in certificates; null for the defaults, as in those of older versions."""
    if verify == VerifyConfig():
        return None
    return {"retries": verify.retries, "control": verify.control, "ignore": sorted(verify.ignore)}


def describe_request(
    models: Models, scene: Scene | str, settings: GenerateSettings, references: Sequence[Reference]
) -> Json:
    """What a certificate states as asked for, without the seed.

    Raises:
        ConfigError: an input of control maps is given that no ControlNet reads.
    """
    prompt = scene.render() if isinstance(scene, Scene) else scene
    if references and scene == Scene():  # then the references alone describe the picture
        prompt = ""
    understood = scene if isinstance(scene, Scene) else Scene.parse(scene).scene
    return {
        "scene": understood.to_dict(),
        "prompt": prompt,
        "negative_prompt": settings.negative_prompt,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        **asked_inputs(settings, understood, models.controls),
        "reference_sha256": references[0].sha256 if len(references) == 1 else None,
        "prompt_weights": settings.prompt_weights or None,
        "prompt_chunks": settings.prompt_chunks if settings.prompt_chunks > 1 else None,
        "scheduler": settings.scheduler,
        **stated_shadow(settings),
        "refine": stated_refine(settings.background),
        "verify": stated_verify(settings.verify),
        "references": [{"sha256": reference.sha256, "weight": reference.weight} for reference in references],
    }
