"""Units of a scene: the frame is FRAME wide and high at the product, which stands at the origin; the camera looks
along +y, at a wall WALL_Y or a backdrop BACKDROP_Y behind it."""

from __future__ import annotations

import math
from typing import Any

FRAME = 3.0
WALL_Y = 2.0
BACKDROP_Y = 7.0

# JSON documents, which the sampler writes and Blender's process reads.
Design = dict[str, Any]  # a product: `sample.design` lists the keys
Words = dict[str, Any]  # a scene as `Scene.to_dict` writes it
Item = dict[str, Any]  # a product in a scene: `product`, `height`, `place` (x, y) and `turn`
Job = dict[str, Any]  # a scene to render: `sample.sample_job` lists the keys


def items_of(job: Job) -> list[Item]:
    """The products of a job: one, or the pieces of a set."""
    first = {"product": job["product"], "height": job["height"], "place": job.get("place", (0.0, 0.0))}
    return [first | {"turn": job["turn"]}, *job.get("others", [])]


def reach_of(job: Job) -> float:
    """Radius on the ground that the job's products need around the origin."""
    reach = 0.0
    for item in items_of(job):
        reach = max(reach, math.hypot(*item["place"]) + item["height"] * FRAME * item["product"]["footprint"] / 2)
    return reach
