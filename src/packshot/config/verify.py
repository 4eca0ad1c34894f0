"""What is checked on every generated picture, a row each, and the keys that say what follows from it.

Certificates, reports, the review of pictures, retries and the words of the HTTP page derive from the rows. A row names
its measure as ``module:function``, so that this module costs nothing at ``--help``.
"""

from __future__ import annotations

from dataclasses import dataclass

from packshot.config.keys import nearest, opt
from packshot.errors import ConfigError

MOST_RETRIES = 16
_MEASURES = "packshot.generate.checks"


@dataclass(frozen=True)
class CheckRow:
    """A check of a finished picture, by its reason code.

    measure: ``packshot.generate.checks.Shown`` to a number, or to None where it is not defined, which passes.
    limit: the check fails above it, or below it where ``below`` is set. about: what the number is, with its unit.
    fault: what a failure means to the person who looks at the picture. redrawn: whether another drawing may mend it.
    """

    measure: str
    limit: float
    about: str
    fault: str
    below: bool = False
    redrawn: bool = True

    def passes(self, measured: float | None) -> bool:
        """Whether a number is on the right side of the limit."""
        if measured is None:
            return True
        return measured >= self.limit if self.below else measured <= self.limit


# Limits of checks by planted failures: chosen on one half of the held-out renders (benchmarks/verifier.py).
CHECKS = {
    "core_changed": CheckRow(
        f"{_MEASURES}:core_difference",
        0,
        "largest difference of a core pixel to the photo, steps of 255",
        "product pixels changed",
        redrawn=False,
    ),
    "no_opaque_core": CheckRow(
        f"{_MEASURES}:core_pixels",
        1,
        "pixels of the core",
        "no pixel of the product is fully opaque",
        below=True,
        redrawn=False,
    ),
    "product_see_through": CheckRow(
        f"{_MEASURES}:opaque_share",
        0.5,
        "share of the product away from its rim that is fully opaque",
        "the scene shows through the product",
        below=True,
        redrawn=False,
    ),
    "product_cut_by_photo_frame": CheckRow(
        f"{_MEASURES}:cut_sides",
        0,
        "1 where a moved product touches the frame of its photo, else 0",
        "the photograph's frame cuts the product",
        redrawn=False,
    ),
    "background_flat": CheckRow(
        f"{_MEASURES}:background_spread",
        2.0,
        "standard deviation of the background, largest channel, steps of 255, without noise of single pixels",
        "the background is one flat colour",
        below=True,
    ),
    "background_clipped": CheckRow(
        f"{_MEASURES}:clipped_share",
        0.9,
        "share of the background at an end of the range in every channel",
        "the background is nearly all black or white",
    ),
    "background_unchanged": CheckRow(
        f"{_MEASURES}:background_change",
        2.0,
        "mean difference of the background to the photo, steps of 255",
        "the background is still the photograph's",
        below=True,
    ),
    "edge_shows_old_background": CheckRow(
        f"{_MEASURES}:old_background",
        0.4,
        "share of the way from the clean edge to the photo's background that the edge has gone, median of the outline",
        "a rim of the photograph's background is left around the product",
        redrawn=False,
    ),
    "product_extended": CheckRow(
        f"{_MEASURES}:extension",
        0.7,
        "probability that the drawn object goes on beyond the product's mask",
        "the product seems to go on beyond its own outline",
    ),
    "product_floats": CheckRow(
        f"{_MEASURES}:floating",
        0.6,
        "probability that the product hangs in the air",
        "nothing shows that the product stands on the ground",
    ),
    "product_repeated": CheckRow(
        f"{_MEASURES}:repeat",
        0.7,
        "probability that the background shows the product once more",
        "the background shows the product a second time",
    ),
    "background_has_writing": CheckRow(
        f"{_MEASURES}:writing_outside",
        2.8,
        "letters of the background's most regular line, weighed by how regular it is",
        "something like writing stands in the background",
    ),
}


@dataclass
class VerifyConfig:
    retries: int = opt(
        0,
        "how often a picture that fails a check is drawn again, each time from a new seed; pictures that no drawing "
        "can mend, such as those with a doubtful mask, are not",
        min=0,
        max=MOST_RETRIES,
    )
    control: float = opt(
        0.0, "added to the weight of every ControlNet at each such retry, besides the new seed", min=0, max=1
    )
    ignore: list[str] = opt([], "reason codes of checks that are measured and stated, but send no picture to review")

    def check(self) -> None:
        for code in self.ignore:
            if code not in CHECKS:
                close = nearest(code, CHECKS)
                raise ConfigError(
                    f"verify.ignore names {code}, which is not a check." + (f" Did you mean {close}?" if close else ""),
                    f"Allowed are {', '.join(CHECKS)}.",
                )
