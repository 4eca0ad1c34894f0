"""Keys of training: data, steps, optimizer and objective."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import ClassVar

from packshot.config.common import LicenseConfig, Script
from packshot.config.keys import Names, opt
from packshot.config.optimizers import OPTIMIZERS
from packshot.config.plan import PlanConfig
from packshot.errors import ConfigError

Mode = Names("Mode", ["train", "plan", "check"])
MixedPrecision = Names("MixedPrecision", ["auto", "no", "fp16", "bf16"])
LRSchedule = Names("LRSchedule", ["constant", "cosine", "linear", "polynomial", "wsd", "cosine_restarts"])
OptimizerKind = Names("OptimizerKind", list(OPTIMIZERS))
AttentionKernel = Names("AttentionKernel", ["auto", "flash", "efficient", "cudnn", "math"])
KeepBest = Names("KeepBest", ["none", "validation_loss", "extension"])
PredictionType = Names("PredictionType", ["base", "epsilon", "v_prediction"])
LossWeighting = Names("LossWeighting", ["none", "min_snr", "debiased"])
TimestepSampling = Names("TimestepSampling", ["uniform", "logit_normal", "cubic"])
Unconditional = Names("Unconditional", ["zeros", "empty"])
ExportDtype = Names("ExportDtype", ["float32", "float16", "bfloat16"])
ProductConditioning = Names("ProductConditioning", ["noised", "clean", "channels"])


SHIPPED = "data/rendered/train"
SHIPPED_HELDOUT = "data/rendered/heldout"
MOST_REPEATS = 10_000  # of one set; more is a mistake, and would fill the memory with the list of an epoch


@dataclass(frozen=True)
class NamedSet:
    """One set of ``data.train``: where it lies, how often it is seen, and the words before each of its captions.

    weight: None where the sizes of the sets decide.
    """

    path: str
    repeats: int = 1
    weight: float | None = None
    prefix: str = ""


@dataclass
class DataConfig:
    train: list[str] = opt(
        [SHIPPED], "dataset folders (Parquet) to train on, as a list; a path alone is a list of one", lone=True
    )
    train_repeats: list[int] = opt(
        [], "how often an epoch shows each sample of a set, one number for each set of data.train; []: once", lone=True
    )
    train_weights: list[float] = opt(
        [],
        "share of each set in what is trained on, whatever its size, one number for each set of data.train; []: the "
        "sizes decide. With data.train_repeats, a set's number is its weight times its repeats",
        lone=True,
    )
    train_prefixes: list[str] = opt(
        [], "words put before each caption of a set (a trigger), one text for each set of data.train; []: none",
        lone=True,
    )  # fmt: skip
    needs_review: bool = opt(
        False, "also use rows whose column status is not `accepted` (masks in doubt); false: they are left out"
    )
    allow_empty_captions: bool = opt(
        False, "train samples without a caption as unconditional; false: a set with such samples is refused"
    )
    validation: str | None = opt(
        None,
        "dataset folder (Parquet) to validate on; null: the held-out part of the shipped set, or of other sets "
        "data.holdout_share of data.train, which is then not trained on",
    )
    holdout_share: float = opt(
        0.1,
        "without data.validation: share of data.train that is held out, by a hash of the ids, with near-duplicates and "
        "pictures of one product_id on one side; 0: validate on samples that are trained on",
        min=0,
        max=0.5,
    )
    flip: bool = opt(
        False,
        "show samples mirrored at half of their accesses, except those whose caption has a word for a side or for "
        "writing; for sets without writing in the pictures",
    )
    num_workers: int = opt(0, "loader processes per training process; 0: a thread", min=0, max=64)
    buckets: bool = opt(True, "sort samples into aspect-ratio buckets of the base's area; false: only the square")
    smallest_bucket: int = opt(
        1, "buckets with fewer samples are closed, and their samples go to the nearest of the others", min=1
    )
    cache: bool = opt(True, "encode pictures and captions once; false: at each access, with the same result")
    cache_dir: str = opt("outputs/cache", "folder of encoded samples; runs share it")

    def check(self) -> None:
        count = len(self.train)
        if not count or not all(self.train):
            raise ConfigError(f"data.train={self.train} names no set.", "Name one dataset folder or more.")
        for key in ("train_repeats", "train_weights", "train_prefixes"):
            values = getattr(self, key)
            if values and len(values) != count:
                raise ConfigError(
                    f"data.{key}={values} has {len(values)} values, but data.train names {count} sets.",
                    "Give one value for each set, or leave it out.",
                )
        for repeats in self.train_repeats:
            if not 1 <= repeats <= MOST_REPEATS:
                raise ConfigError(
                    f"data.train_repeats={self.train_repeats}: {repeats} is out of range.",
                    f"Each is an integer from 1 to {MOST_REPEATS}.",
                )
        for weight in self.train_weights:
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(
                    f"data.train_weights={self.train_weights}: {weight} is out of range.",
                    "Each is a number above 0; to leave a set out, take it out of data.train.",
                )

    def validation_set(self) -> str | None:
        """The set to validate on; None if a part of ``data.train`` is held out."""
        if self.validation is None and self.train == [SHIPPED]:
            return SHIPPED_HELDOUT
        return self.validation

    def sets(self) -> list[NamedSet]:
        """The sets of ``data.train`` with what the lists beside it say of each."""
        count = len(self.train)
        repeats = self.train_repeats or [1] * count
        weights = self.train_weights or [None] * count
        prefixes = self.train_prefixes or [""] * count
        return [NamedSet(*values) for values in zip(self.train, repeats, weights, prefixes, strict=True)]


@dataclass
class TrainConfig:
    max_steps: int = opt(100, "optimizer steps", min=1)
    batch_size: int = opt(4, "samples per process and micro-step", min=1)
    gradient_accumulation_steps: int = opt(1, "micro-steps per optimizer step", min=1)
    learning_rate: float = opt(1e-4, "peak learning rate", min=0, max=1)
    lr_schedule: LRSchedule = opt(LRSchedule.cosine, "shape of the learning rate after the warm-up")
    lr_min_ratio: float = opt(0.0, "final learning rate as a share of the peak", min=0, max=1)
    lr_power: float = opt(2.0, "exponent of lr_schedule=polynomial", min=0.1, max=10)
    lr_decay_share: float = opt(
        0.2, "share of the steps after the warm-up in which lr_schedule=wsd decays", min=0.01, max=1
    )
    lr_cycles: int = opt(3, "cycles of lr_schedule=cosine_restarts", min=1, max=100)
    warmup_steps: int = opt(0, "optimizer steps of linear warm-up", min=0)
    mixed_precision: MixedPrecision = opt(
        MixedPrecision.auto,
        "precision of the frozen base and of the forward pass; auto: the launcher's, else bf16 on CUDA, else no",
    )
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, more time")
    fused_backward: bool = opt(
        False, "apply and free each gradient during the backward pass, so that memory never holds all of them"
    )
    compile: bool = opt(False, "compile the networks with torch.compile, once for each shape of a batch")
    attention: AttentionKernel = opt(AttentionKernel.auto, "PyTorch's attention kernel; auto: the fastest that fits")
    deterministic: bool = opt(
        False, "on a GPU, use only deterministic kernels, so that a resumed run is exact to the bit; slower"
    )
    max_grad_norm: float = opt(1.0, "clip gradients to this norm; 0 switches it off", min=0)
    ema_decay: float = opt(
        0.0, "decay of the weights' moving average, which is exported; 0 switches it off", min=0, max=1
    )
    checkpointing_steps: int = opt(50, "optimizer steps between checkpoints", min=1)
    checkpoints_total_limit: int = opt(2, "number of checkpoints to keep", min=1)
    validation_steps: int = opt(50, "optimizer steps between validations; 0 switches them off", min=0)
    validate_first: bool = opt(False, "also validate before the first step, to see the base alone")
    validation_samples: int = opt(4, "held-out samples that validation draws", min=1, max=64)
    validation_seeds: int = opt(1, "pictures of each held-out sample and prompt", min=1, max=16)
    validation_prompts: list[str] = opt([], "prompts drawn for every held-out product, in addition to its own caption")
    keep_best: KeepBest = opt(
        KeepBest.validation_loss, "measure that chooses the best checkpoint, which is kept in addition to the newest"
    )
    export_best: bool = opt(False, "export the best checkpoint instead of the last step")
    log_steps: int = opt(1, "optimizer steps between lines of metrics.jsonl", min=1)
    process_timeout: int = opt(1800, "seconds that processes wait for each other before they stop", min=5)

    def check(self) -> None:
        if self.warmup_steps > self.max_steps:
            raise ConfigError(
                f"train.warmup_steps={self.warmup_steps} is longer than train.max_steps={self.max_steps}.",
                "Shorten the warm-up or lengthen the training.",
            )
        if self.export_best and (self.keep_best is KeepBest.none or not self.validation_steps):
            raise ConfigError(
                f"train.export_best=true with train.keep_best={self.keep_best} and "
                f"train.validation_steps={self.validation_steps}: no checkpoint is ever called the best.",
                "Set train.keep_best and train.validation_steps, or export the last step.",
            )


@dataclass
class OptimConfig:
    kind: OptimizerKind = opt(OptimizerKind.adamw, "optimizer")
    beta1: float = opt(0.9, "decay of the gradient's average", min=0, max=0.99999)
    beta2: float = opt(
        0.999, "decay of the squared gradient's average (lion: of the momentum, at most 0.99)", min=0, max=0.99999
    )
    weight_decay: float = opt(0.01, "decoupled weight decay", min=0, max=1)
    eps: float = opt(1e-8, "added to the root of the second moment", min=1e-20)
    groups: list[str] = opt(
        [],
        "learning rates of single parameters: ['regex over parameter names=rate'], in quotes; the first match counts",
    )

    def check(self) -> None:
        group_rates(self)  # it refuses entries that cannot be read
        row = OPTIMIZERS[self.kind.name]
        for key in dataclasses.fields(self):
            value = getattr(self, key.name)
            if key.name not in ("kind", "groups", *row.reads) and value != key.default:
                raise ConfigError(
                    f"optim.{key.name}={value} with optim={row.name}: it does not read this key, so the value would "
                    "change nothing.",
                    f"Leave optim.{key.name} out, or choose another optimizer.",
                )


def group_rates(optim: OptimConfig) -> list[tuple[str, float]]:
    """``optim.groups`` as (regular expression over parameter names, peak learning rate), in the order given.

    Raises:
        ConfigError: an entry is not "regex=rate" with a rate from 0 to 1.
    """
    rates = []
    for text in optim.groups:
        pattern, _, rate = text.rpartition("=")
        try:
            re.compile(pattern)
            peak = float(rate)
        except (ValueError, re.error) as error:
            raise ConfigError(
                f"optim.groups: {text!r} cannot be read as 'regex=learning rate' ({error}).",
                "For example: \"optim.groups=['to_out=1e-5']\".",
            ) from error
        if not pattern or not 0 <= peak <= 1:  # NaN too
            raise ConfigError(
                f"optim.groups: {text!r} needs a pattern and a learning rate from 0 to 1.",
                "For example: \"optim.groups=['to_out=1e-5']\".",
            )
        rates.append((pattern, peak))
    return rates


def check_steps(train: TrainConfig, optim: OptimConfig) -> None:
    """Raises ConfigError when the steps cannot be taken with this optimizer, or not during the backward pass."""
    for conflict in OPTIMIZERS[optim.kind.name].conflicts:
        if conflict.exists(optim, train):
            raise ConfigError(conflict.message.format(optim=optim, train=train), conflict.hint)
    if not train.fused_backward:
        return
    stepwise = [row.name for row in OPTIMIZERS.values() if row.stepwise]
    if train.gradient_accumulation_steps > 1:
        setting = f"train.gradient_accumulation_steps={train.gradient_accumulation_steps}"
        reason = "each gradient is freed before the next micro-step could add to it"
        remedy = "Set train.gradient_accumulation_steps=1"
    elif train.max_grad_norm > 0:
        setting = f"train.max_grad_norm={train.max_grad_norm}"
        reason = "the norm is only known after every gradient has been applied"
        remedy = "Set train.max_grad_norm=0"
    elif train.mixed_precision is MixedPrecision.fp16:
        setting = "train.mixed_precision=fp16"
        reason = "the gradient scaler inspects all gradients before any is applied"
        remedy = "Set train.mixed_precision=bf16"
    elif optim.kind.name not in stepwise:
        setting = f"optim={optim.kind}"
        reason = "its step size depends on all gradients together"
        remedy = f"Set optim to one of {', '.join(stepwise)}"
    else:
        return
    raise ConfigError(
        f"train.fused_backward=true with {setting}: {reason}.", f"{remedy}, or train.fused_backward=false."
    )


@dataclass
class ObjectiveConfig:
    prediction_type: PredictionType = opt(
        PredictionType.base, "what the network predicts; base: as the base was trained"
    )
    zero_terminal_snr: bool = opt(False, "make the last timestep pure noise (needs v_prediction)")
    loss_weighting: LossWeighting = opt(
        LossWeighting.none,
        "weight of a timestep in the loss: none; min_snr (Hang et al. 2023); debiased (1/sqrt(SNR), so that errors "
        "count as they disturb the picture)",
    )
    min_snr_gamma: float = opt(5.0, "the SNR at which loss_weighting=min_snr cuts the weight off", min=1e-3)
    timestep_sampling: TimestepSampling = opt(
        TimestepSampling.uniform, "distribution of timesteps: logit_normal prefers the middle, cubic the noisy end"
    )
    logit_normal_location: float = opt(
        0.0, "centre of timestep_sampling=logit_normal; above 0 prefers noisy steps", min=-5, max=5
    )
    logit_normal_scale: float = opt(1.0, "width of timestep_sampling=logit_normal", min=0.05, max=10)
    min_timestep: int = opt(0, "smallest timestep that is trained", min=0)
    max_timestep: int | None = opt(None, "largest timestep that is trained; null: the schedule's last", min=1)
    noise_offset: float = opt(0.0, "per-channel noise offset", min=0, max=1)
    input_perturbation: float = opt(
        0.0, "further noise on the network's input only (0.1 is usual), against exposure bias", min=0, max=1
    )
    caption_dropout: float = opt(0.1, "share of samples trained without their prompt", min=0, max=1)
    unconditional: Unconditional = opt(
        Unconditional.zeros, "what replaces a dropped prompt: zeros, or the encoding of the empty prompt"
    )
    prompt_chunks: int = opt(
        1,
        "chunks of 75 tokens that are read of a caption; every caption fills as many, an empty one too, and pictures "
        "are drawn with as many",
        min=1,
        max=8,
    )
    background_weight: float = opt(1.0, "loss weight of background pixels where a product mask exists", min=0)
    product_weight: float = opt(1.0, "loss weight of product pixels where a product mask exists", min=0)
    boundary_weight: float = opt(
        1.0, "further loss weight of a ring around the product, into which it could grow", min=0
    )
    boundary_width: int = opt(2, "width of that ring, latent cells (8 px each)", min=0, max=32)
    product_conditioning: ProductConditioning = opt(
        ProductConditioning.noised,
        "how the network sees the product: noised as the rest; clean at every timestep, so that it learns to fill in "
        "around it; channels: in five more input channels, mask and latents, as inpainting models do (train_lora.py)",
    )

    def check(self) -> None:
        # What the base predicts is known when it is loaded; the training task checks the objective again then.
        given = self.prediction_type
        check_objective(self, "v_prediction" if given is PredictionType.base else given.name)


def check_objective(objective: ObjectiveConfig, prediction_type: str, num_timesteps: int | None = None) -> None:
    """Refuses combinations that have no meaning or would give NaN as a weight.

    prediction_type: what the network will predict, the base's own where the config leaves it open. num_timesteps:
    length of the base's schedule, once it is known.

    Raises:
        ConfigError: zero terminal SNR with epsilon; a prediction type that has no target;
            an empty range of timesteps, or timesteps beyond the schedule.
    """
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ConfigError(
            f"The base predicts {prediction_type!r}; only epsilon and v_prediction can be trained.",
            "Choose another model.base, or set objective.prediction_type.",
        )
    if objective.zero_terminal_snr and prediction_type == "epsilon":
        raise ConfigError(
            "Zero terminal SNR (objective.zero_terminal_snr, or the base's own schedule) cannot be trained with "
            "epsilon prediction: at the last step the input is the answer, and SNR weights divide by zero.",
            "Set objective.prediction_type=v_prediction.",
        )
    check_timesteps(objective, num_timesteps)


def check_timesteps(objective: ObjectiveConfig, num_timesteps: int | None) -> None:
    """Raises ConfigError for an empty range of timesteps, or one beyond the schedule; see :func:`check_objective`."""
    last = objective.max_timestep
    if last is not None and last <= objective.min_timestep:
        raise ConfigError(
            f"objective.max_timestep={last} is not above objective.min_timestep={objective.min_timestep}.",
            "The timesteps between them are trained.",
        )
    if num_timesteps is None:
        return
    for key in ("min_timestep", "max_timestep"):
        value = getattr(objective, key)
        if value is not None and value >= num_timesteps:
            raise ConfigError(
                f"objective.{key}={value} is beyond the base's schedule.", f"Its last step is {num_timesteps - 1}."
            )


@dataclass
class ExportConfig:
    dtype: ExportDtype = opt(ExportDtype.float32, "precision of the exported weights; float16 halves the files")


@dataclass
class TrainScript(Script):
    """Keys that the trainers share.

    trains_input_layer: whether the method can train further input channels of the UNet's first layer.
    """

    trains_input_layer: ClassVar[bool] = False

    licenses: LicenseConfig = field(default_factory=LicenseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    mode: Mode = opt(
        Mode.train, "train; plan: print the cost of the run; check: show what the model will see, and measure a step"
    )

    def check(self) -> None:
        super().check()
        conditioning = self.objective.product_conditioning
        if conditioning is ProductConditioning.channels and not self.trains_input_layer:
            raise ConfigError(
                "objective.product_conditioning=channels changes the UNet's first layer, which only train_lora.py "
                "trains.",
                "Set objective.product_conditioning=noised or clean.",
            )
        check_steps(self.train, self.optim)
