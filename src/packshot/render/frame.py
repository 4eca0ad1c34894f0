"""Units of a scene: the frame is FRAME wide and high at the product, which stands at the origin; the camera looks
along +y, at a wall WALL_Y or a backdrop BACKDROP_Y behind it."""

from __future__ import annotations

import math
from typing import Any

FRAME = 3.0
WALL_Y = 2.0
BACKDROP_Y = 7.0


def items_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The products of a job, each with `product`, `height`, `place` (x, y) and `turn`: one, or the pieces of a set."""
    first = {"product": job["product"], "height": job["height"], "place": job.get("place", (0.0, 0.0))}
    return [first | {"turn": job["turn"]}, *job.get("others", [])]


def reach_of(job: dict[str, Any]) -> float:
    """Radius on the ground that the job's products need around the origin."""
    return max(
        math.hypot(*item["place"]) + item["height"] * FRAME * item["product"]["footprint"] / 2 for item in items_of(job)
    )
