"""The samplers that generation offers, by the names under which people know them."""

from __future__ import annotations

from dataclasses import dataclass, field

from packshot.errors import ConfigError


@dataclass(frozen=True)
class SchedulerRow:
    """A sampler of diffusers. kind: its class. options: what its config has besides the base's. most_steps: it takes
    no more."""

    help: str
    kind: str
    options: dict[str, str | int | bool] = field(default_factory=dict)
    most_steps: int | None = None


# Each of them passes tests/unit/test_schedulers.py: at every step the network sees the held cells at the product's own
# noise, and the last state is the product exactly.
SCHEDULERS = {
    "euler": SchedulerRow("Euler", "EulerDiscreteScheduler"),
    "euler_ancestral": SchedulerRow("Euler with fresh noise at each step", "EulerAncestralDiscreteScheduler"),
    "euler_trailing": SchedulerRow(
        "Euler from pure noise, for LoRAs of few steps (Lightning)",
        "EulerDiscreteScheduler",
        {"timestep_spacing": "trailing"},
    ),
    "ddim": SchedulerRow("DDIM", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
    "ddim_trailing": SchedulerRow(
        "DDIM from pure noise, for LoRAs of few steps (Hyper-SD)",
        "DDIMScheduler",
        {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"},
    ),
    "dpmpp_2m": SchedulerRow("DPM++ 2M", "DPMSolverMultistepScheduler"),
    "dpmpp_2m_sde": SchedulerRow("DPM++ 2M SDE", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": SchedulerRow("UniPC", "UniPCMultistepScheduler"),
    "lcm": SchedulerRow("for bases and LoRAs of few steps (LCM)", "LCMScheduler", {"clip_sample": False}, 50),
}
# Samplers that people know from elsewhere, and why each cannot hold a product.
UNUSABLE = {
    "heun": "it calls the network twice for a step, and the second time sees a product of its own making",
    "dpm2": "it calls the network twice for a step, and the second time sees a product of its own making",
    "dpm2_ancestral": "it calls the network twice for a step, and the second time sees a product of its own making",
    "pndm": "its first steps call the network several times, and see products of its own making",
}


def check_scheduler(name: str | None, steps: int) -> None:
    """Raises ConfigError where a sampler is not offered, or does not take so many steps."""
    if name is None:
        return
    offered = f"Offered are {', '.join(SCHEDULERS)}."
    if name in UNUSABLE:
        raise ConfigError(f"scheduler={name} cannot hold a product: {UNUSABLE[name]}.", offered)
    if name not in SCHEDULERS:
        raise ConfigError(f"scheduler={name} is not known.", offered)
    most = SCHEDULERS[name].most_steps
    if most is not None and steps > most:
        raise ConfigError(
            f"scheduler={name} takes at most {most} steps, num_inference_steps={steps}.", "Ask for fewer."
        )
