"""Pictures on a background of one colour: nothing is drawn, so no model is needed."""

from __future__ import annotations

import numpy as np

from packshot.config.schema import GenerateSettings
from packshot.generate.canvas import Canvas
from packshot.generate.grounding import ground, light_of
from packshot.generate.json_types import Json
from packshot.generate.product import Product
from packshot.generate.request import stated_shadow, stated_verify
from packshot.generate.result import Background, Result, finish
from packshot.scene import Scene

NO_MODELS: Json = {"adapters": []}
# A background of one colour may be flat, as white as the range goes, and that of the photograph; it has no ground.
EXPECTED = ("background_flat", "background_clipped", "background_unchanged", "product_floats")


def plain_request(settings: GenerateSettings) -> Json:
    """What a certificate states as asked for, without the seed."""
    return {
        "scene": Scene().to_dict(),
        "prompt": "",
        "negative_prompt": None,
        "num_inference_steps": 0,
        "guidance_scale": 1.0,
        "references": [],
        "background_color": list(settings.background.color),
        **stated_shadow(settings),
        "light_angle": getattr(settings, "light_angle", None),
        "verify": stated_verify(settings.verify),
    }


def draw_plain(
    product: Product, canvas: Canvas, settings: GenerateSettings, request: Json, with_layers: bool
) -> Result:
    """The product on its colour. request: what the certificate states as asked for."""
    background = np.full_like(canvas.rgb_HW3, settings.background.color)
    stated = {
        "request": request,
        "lost_words": {"prompt": "", "negative_prompt": ""},
        "model": NO_MODELS,
    }
    fit = {"applied": False, "reason": "nothing was drawn"}
    shadow = ground(canvas, background, settings, light_of(request, settings))
    behind = Background(background, fit, shadow=shadow)
    return finish(product, canvas, behind, stated, with_layers, EXPECTED, settings.verify.ignore)
