"""Keys of what lies behind the product."""

from __future__ import annotations

from dataclasses import dataclass

from packshot.config.keys import Names, opt
from packshot.errors import ConfigError

Refine = Names("Refine", ["none", "tiled", "upscale"])


@dataclass
class BackgroundConfig:
    color: list[int] = opt(
        [], "red, green, blue from 0 to 255: a background of this colour, and nothing is drawn; [255,255,255] is white"
    )
    refine: Refine = opt(
        Refine.none,
        "how the drawing becomes as large as the photo: none enlarges it, tiled draws it again in overlapping tiles "
        "around the product, upscale uses background.upscaler",
    )
    refine_max_side: int | None = opt(
        None, "longest side of a second pass in tiles, px; default: twice the side that the base was trained on", min=64
    )
    refine_strength: float = opt(
        0.35, "share of the noise that a second pass begins with: 0 changes nothing, 1 draws anew", min=0.02, max=1
    )
    sharpen: float = opt(
        0.5,
        "how far the edges of a refined background are narrowed towards the product's own: 0 leaves them, 1 aims at "
        "the same; a shallow depth of field in the prompt leaves them too",
        min=0,
        max=1,
    )
    upscaler: str | None = opt(None, "ONNX network that enlarges a picture (ESRGAN and its like)")

    def check(self) -> None:
        if self.color and (len(self.color) != 3 or not all(0 <= value <= 255 for value in self.color)):
            raise ConfigError(
                f"background.color={self.color} is not a colour.", "Expected [red,green,blue], each from 0 to 255."
            )
        if self.refine is Refine.upscale and not self.upscaler:
            raise ConfigError(
                "background.refine=upscale needs a network that enlarges pictures, and none is shipped.",
                "Set background.upscaler=<file.onnx>, or background.refine=tiled.",
            )
