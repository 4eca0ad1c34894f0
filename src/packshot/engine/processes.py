"""One run over one or many processes: who is here, where it writes, who tracks it."""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from packshot.config.train import MixedPrecision, TrainConfig, check_steps
from packshot.engine.sharding import Sharding, refuse_config
from packshot.engine.task import TrainingConfig
from packshot.errors import ConfigError, PackshotError, first_line
from packshot.runs.folder import Run, log, open_run
from packshot.runs.tracking import Tracker, open_tracker

T = TypeVar("T")
DTYPES = {MixedPrecision.no: torch.float32, MixedPrecision.fp16: torch.float16, MixedPrecision.bf16: torch.bfloat16}
# Distributed types that accelerate would switch on by these variables, and that checkpoints and exports do not support.
# FSDP has a module of its own (engine/sharding.py).
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def refuse_launcher() -> None:
    """Refuse a distributed type that is not supported, before anything is loaded.

    Raises:
        ConfigError: accelerate was configured for one.
    """
    for variable, name in UNSUPPORTED.items():
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise ConfigError(
                f"The launcher asks for {name} ({variable}), which packshot does not support.",
                "Use data-parallel training: accelerate launch --multi_gpu --num_processes N train_lora.py …, or FSDP2 "
                "with --config_file conf/launch/fsdp.yaml.",
            )


def resolve_precision(asked: MixedPrecision) -> MixedPrecision:
    """The precision that ``auto`` stands for: the launcher's, else bf16 on a GPU that has it, else none.

    Raises:
        ConfigError: the launcher asks for a precision that packshot does not have.
    """
    if asked is not MixedPrecision.auto:
        return asked
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if launcher in ("no", "fp16", "bf16"):
        return MixedPrecision[launcher]
    if launcher:
        raise ConfigError(
            f"The launcher asks for mixed precision {launcher}; packshot has no, fp16 and bf16.",
            "Set train.mixed_precision=bf16, which overrides the launcher.",
        )
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return MixedPrecision.bf16 if has_bf16 else MixedPrecision.no


def planned_precision(train: TrainConfig, on_cuda: bool) -> MixedPrecision:
    """The precision of the forward pass; every GPU of the table has bf16, also where this machine has no GPU."""
    if train.mixed_precision is MixedPrecision.auto and on_cuda and not torch.cuda.is_available():
        return MixedPrecision.bf16
    return resolve_precision(train.mixed_precision)


def make_accelerator(train: TrainConfig) -> Accelerator:
    """Accelerate, set up so that an optimizer step takes all micro-batches of all processes.

    It replaces ``train.mixed_precision=auto`` by the precision in use, which checkpoints and ``config.yaml`` then name.
    """
    train.mixed_precision = resolve_precision(train.mixed_precision)
    if torch.cuda.is_available():  # TF32: ten bits of mantissa in matrix products and convolutions of fp32
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    if train.deterministic:  # before the first kernel, because cuBLAS reads its setting only once
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    return Accelerator(
        # without this, processes that torchrun starts on a machine without accelerator know nothing of each other
        cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        mixed_precision=train.mixed_precision.name,  # overrides the environment
        # a bare number would give way to the environment's ACCELERATE_GRADIENT_ACCUMULATION_STEPS
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=train.gradient_accumulation_steps),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=train.process_timeout)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # otherwise every gradient exists twice
        ],
    )


def broadcast_from_main(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """The result of ``make`` on the main process, for every process: a disk may look different to each of them."""
    if accelerator.num_processes == 1:
        return make()
    results = [make()] if accelerator.is_main_process else [None]
    broadcast_object_list(results)
    return cast(T, results[0])


# Words in the errors that gloo and NCCL raise when a peer is gone.
BROKEN = ("connection", "timed out", "timeout", "peer", "nccl", "gloo", "unhandled system error")


@contextmanager
def translate_lost_process(accelerator: Accelerator) -> Iterator[None]:
    """Work that all processes do: when one of them is gone, the others stop with an error message, not a traceback.

    Raises:
        PackshotError: the connection to another process broke, or it did not come within ``train.process_timeout``.
    """
    try:
        yield
    except RuntimeError as error:  # the type that gloo and NCCL raise; others of this type are passed on
        message = str(error).lower()
        if accelerator.num_processes == 1 or not any(sign in message for sign in BROKEN):
            raise
        raise PackshotError(
            f"Process {accelerator.process_index} has lost another process of this run ({first_line(error)}).",
            "Look at the last lines of the other processes; run.resume=true continues from the newest checkpoint.",
        ) from error


@dataclass
class Session:
    """One run over one or many processes. ``run`` and ``tracker`` exist on the main process only.

    sharding: None where every process holds all weights.
    """

    accelerator: Accelerator
    path: Path
    run: Run | None
    tracker: Tracker | None
    sharding: Sharding | None = None

    def report(self, step: int, figures: dict[str, float], space: str = "train") -> None:
        """A line of metrics and the tracker's figures; nothing on the other processes.

        space: prefix of the figures' names in the tracker, ``train`` or ``val``. The metrics line has none.
        """
        if self.run and self.tracker:
            self.run.metrics({"step": step, **figures})
            self.tracker.log(figures, step, space)

    def finish(self) -> None:
        """Close the tracker; nothing on the other processes."""
        if self.tracker:
            self.tracker.finish()


def start(
    script: str,
    config: TrainingConfig,
    train: TrainConfig,
    resumable: bool = True,
    sharding: Sharding | None = None,
) -> Session:
    """Open the run on the main process and tell the others where it is; ``resumable`` as in :func:`open_run`.

    sharding: what the launcher asks for. One process has nothing to shard.

    Raises:
        PackshotError: on every process, when the main one cannot open the folder.
        ConfigError: the launcher's precision does not go with the other settings.
    """
    train.mixed_precision = resolve_precision(train.mixed_precision)
    config.train.mixed_precision = train.mixed_precision  # ``train`` may be a copy with other settings
    check_steps(config.train, config.optim)  # once more: the launcher may have chosen fp16
    if sharding:
        refuse_config(config)
    accelerator = make_accelerator(train)
    run: Run | None = None
    tracker: Tracker | None = None
    outcome: Path | PackshotError = Path()
    if accelerator.is_main_process:
        try:
            run = open_run(script, config, resumable)
            tracker = open_tracker(run, config, job_type=script)
            outcome = run.path
        except PackshotError as error:
            outcome = error
    opened = broadcast_from_main(accelerator, lambda: outcome)
    if isinstance(opened, PackshotError):
        raise opened
    refuse_unshared(opened, accelerator)
    if sharding and accelerator.num_processes == 1:
        log.warning("the launcher asks for FSDP and started one process: nothing is sharded")
        sharding = None
    return Session(accelerator, opened, run, tracker, sharding)


def announce(session: Session, train: TrainConfig) -> None:
    """Log processes, device, precision and effective batch of a training, and what a launcher did not start."""
    if not session.run:
        return
    accelerator = session.accelerator
    world = accelerator.num_processes
    device = accelerator.device
    name = f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
    samples = world * train.gradient_accumulation_steps * train.batch_size
    log.info(
        "%d process%s on %s, mixed precision %s; %d samples per optimizer step (%d x %d micro-steps x %d)",
        world, "es" if world > 1 else "", name, train.mixed_precision, samples, world,
        train.gradient_accumulation_steps, train.batch_size,
    )  # fmt: skip
    if session.sharding:
        log.info("%s", session.sharding.words())
    missing = missing_processes(world)
    if missing:
        log.warning("%s", missing)


def missing_processes(world: int) -> str | None:
    """A warning about a launcher that was asked for more processes than it started; None if there is none.

    world: the number of processes that know of each other.
    """
    hint = "Start them with torchrun --nproc_per_node N, or accelerate launch --multi_gpu --num_processes N."
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if "WORLD_SIZE" not in os.environ and tasks > world:
        return f"Slurm was asked for {tasks} tasks (SLURM_NTASKS), but each of them runs alone. {hint}"
    # accelerate launch names the main process whenever it is asked for several, also where it then starts only one
    if "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ:
        return f"The launcher was asked for several processes (MASTER_ADDR is set), but started one. {hint}"
    return None


def refuse_unshared(run: Path, accelerator: Accelerator) -> None:
    """Raises PackshotError, on every process, when one of them does not see the run folder of the main one."""
    if accelerator.num_processes == 1:
        return
    sign = run / broadcast_from_main(accelerator, lambda: f".{uuid.uuid4().hex}.sign")
    if accelerator.is_main_process:
        sign.touch()
    accelerator.wait_for_everyone()
    blind = gather_object([] if sign.exists() else [f"{accelerator.process_index} (on {platform.node()})"])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        sign.unlink()
    if blind:
        raise PackshotError(
            f"run.dir={run}: process {', '.join(blind)} sees another folder of that name, or none.",
            "Several machines need a run.dir, and a data.cache_dir, on storage that they share.",
        )
