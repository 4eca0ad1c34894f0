"""Keys of what lies behind the product."""

from __future__ import annotations

from dataclasses import dataclass

from packshot.config.keys import opt
from packshot.errors import ConfigError


@dataclass
class BackgroundConfig:
    color: list[int] = opt(
        [], "red, green, blue from 0 to 255: a background of this colour, and nothing is drawn; [255,255,255] is white"
    )

    def check(self) -> None:
        if self.color and (len(self.color) != 3 or not all(0 <= value <= 255 for value in self.color)):
            raise ConfigError(
                f"background.color={self.color} is not a colour.", "Expected [red,green,blue], each from 0 to 255."
            )
