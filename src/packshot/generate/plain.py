"""Pictures on a background of one colour: nothing is drawn, so no model is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from packshot.config.checks import validate
from packshot.config.schema import GenerateSettings
from packshot.errors import ConfigError
from packshot.generate.canvas import Canvas, place
from packshot.generate.grounding import ground, light_of
from packshot.generate.json_types import Json
from packshot.generate.product import Product, Source
from packshot.generate.request import stated_shadow
from packshot.generate.result import Background, Result, finish
from packshot.scene import Scene

NO_MODELS: Json = {"adapters": []}
# A background of one colour may be flat, as white as the range goes, and that of the photograph.
EXPECTED = ("background_flat", "background_clipped", "background_unchanged")


@dataclass(frozen=True)
class PlainReady:
    """A request made ready. asked: what the certificate states of it, without the seed."""

    product: Product
    canvas: Canvas
    settings: GenerateSettings
    asked: Json


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
        "shadow": stated_shadow(settings),
    }


def draw_plain(ready: PlainReady, seed: int, with_layers: bool) -> Result:
    """The product on its colour."""
    background = np.full_like(ready.canvas.rgb_HW3, ready.settings.background.color)
    stated = {
        "request": {**ready.asked, "seed": seed},
        "lost_words": {"prompt": "", "negative_prompt": ""},
        "model": NO_MODELS,
    }
    fit = {"applied": False, "reason": "nothing was drawn"}
    shadow = ground(ready.canvas, background, ready.settings, light_of(ready.asked, ready.settings))
    behind = Background(background, fit, shadow=shadow)
    return finish(ready.product, ready.canvas, behind, stated, with_layers, EXPECTED)


@dataclass(frozen=True)
class PlainPackshot:
    """Takes the place of a Packshot in runs that draw nothing."""

    product: Product | None = None

    def with_product(self, product: Product) -> PlainPackshot:
        """Another one, with a prepared product."""
        return PlainPackshot(product)

    def canvas(self, settings: GenerateSettings) -> Canvas:
        """The product on the output's pixel grid."""
        if self.product is None:
            raise ConfigError("no product is set.", "Call with_product(product) first.")
        return place(self.product, settings)

    def request(
        self,
        scene: Scene | str,
        settings: GenerateSettings,
        reference: Source | Sequence[Source] | None = None,
        reference_weights: Sequence[int] = (),
    ) -> Json:
        """See ``Packshot.request``; words and references are refused with a colour."""
        return plain_request(settings)

    def manifest(self, settings: GenerateSettings) -> Json:
        """The models, for certificates: none."""
        return NO_MODELS

    def drawer(
        self,
        scene: Scene | str,
        settings: GenerateSettings,
        reference: Source | Sequence[Source] | None = None,
        reference_weights: Sequence[int] = (),
    ) -> Callable[[int, bool], Result]:
        """See ``Packshot.drawer``."""
        validate(settings)
        canvas = self.canvas(settings)
        assert self.product is not None  # canvas() refuses to go on without one
        ready = PlainReady(self.product, canvas, settings, plain_request(settings))
        return lambda seed, with_layers: draw_plain(ready, seed, with_layers)
