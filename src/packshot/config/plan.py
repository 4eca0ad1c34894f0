"""Keys of ``mode=plan``: the machine that a training, or generation, is planned for."""

from __future__ import annotations

from dataclasses import dataclass

from packshot.config.gpus import GPUS
from packshot.config.keys import Names, opt
from packshot.errors import ConfigError

GpuKind = Names("GpuKind", list(GPUS))


@dataclass
class PlanConfig:
    gpu: GpuKind | None = opt(
        None,
        "GPU to plan for: "
        + ", ".join(f"{gpu.name} ({gpu.memory_gib:g} GiB)" for gpu in GPUS.values())
        + "; null: the one of this machine, if there is one",
    )
    gpus: int | None = opt(None, "number of GPUs, one process each; null: the launcher's processes", min=1, max=4096)
    images: int | None = opt(
        None, "number of samples, so that no dataset is needed; in generation the number of pictures (1000)", min=1
    )
    sharded: bool | None = opt(
        None,
        "whether the GPUs divide weights, gradients and optimizer state among them (conf/launch/fsdp.yaml); null: as "
        "the launcher says",
    )
    gpu_hour_price: float | None = opt(None, "price of a GPU for an hour, in any currency", min=0)
    utilisation_low: float = opt(
        0.15, "share of the GPU's peak that slow work reaches; make gpu-check measures it", min=0.01, max=1
    )
    utilisation_high: float = opt(0.4, "share of the GPU's peak that fast work reaches", min=0.01, max=1)

    def check(self) -> None:
        if self.utilisation_low > self.utilisation_high:
            raise ConfigError(
                f"plan.utilisation_low={self.utilisation_low} is above plan.utilisation_high={self.utilisation_high}.",
                "They are the ends of a range.",
            )
