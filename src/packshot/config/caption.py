"""Keys of captioners, and of caption_vlm.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from packshot.config.captioners import CAPTION_TASKS, CAPTIONERS, CaptionTaskRow, presets, presets_help
from packshot.config.common import LicenseConfig, Quantization, Script
from packshot.config.keys import Names, opt
from packshot.config.plan import PlanConfig
from packshot.config.train import DataConfig, KeepBest, OptimConfig, TrainConfig, check_steps
from packshot.errors import ConfigError

CaptionerKind = Names("CaptionerKind", list(CAPTIONERS))
CaptionMode = Names("CaptionMode", ["run", "plan"])
CaptionTask = Names("CaptionTask", list(CAPTION_TASKS))
Tuning = Names("Tuning", list(presets()))
ProductTarget = Names("ProductTarget", ["none", "box", "outline", "mask"])
Constraint = Names("Constraint", ["none", "scene"])
WeightDtype = Names("WeightDtype", ["float32", "bfloat16", "float16"])

LOCATED = ", ".join(family.title for family in CAPTIONERS.values() if family.has_locations)


def refuse_unset(reason: str, values: Mapping[str, str | None]) -> None:
    """Raises ConfigError when one of these keys has no value. reason: the setting that needs them."""
    for key, value in values.items():
        if not value:
            raise ConfigError(f"{reason} needs {' and '.join(values)}: {key} is not set.", f"Add {key}=<value>.")


@dataclass
class CaptionerConfig:
    kind: CaptionerKind = opt(CaptionerKind.florence2, "which captioner; none leaves captions empty")
    adapter: str | None = opt(None, "folder of a fine-tuned captioner (caption_vlm.py's export/)")
    overwrite: bool = opt(
        False, "caption rows that have a caption too, and replace it; false: only empty ones, a person's words stay"
    )
    prompt: str = opt("Describe the scene around the object.", "the instruction in training and in captioning")
    product: ProductTarget = opt(
        ProductTarget.none,
        "how the captioner sees which object is the product, where a mask is known: box (of <loc_…> tokens, "
        f"{LOCATED}), outline (red line), mask (painted grey), none",
    )
    tuning: Tuning = opt(Tuning.full, f"what task=train trains: {presets_help()}")
    lora_rank: int = opt(16, "rank of the LoRA presets", min=1, max=1024)
    quantization: Quantization = opt(Quantization.none, "frozen weights of the language model: none or nf4 (QLoRA)")
    dtype: WeightDtype = opt(WeightDtype.float32, "dtype of frozen weights; trained weights are float32")
    constraint: Constraint = opt(
        Constraint.scene,
        "scene: captions must follow the caption grammar and must not name a product; none: free text",
    )
    max_new_tokens: int = opt(96, "longest caption, tokens", min=8, max=512)
    batch_size: int = opt(8, "images per generation batch", min=1)
    endpoint: str | None = opt(None, "captioner=endpoint: address of an OpenAI-compatible server, up to and with /v1")
    endpoint_model: str | None = opt(None, "captioner=endpoint: name of the model on that server")
    endpoint_requests: int = opt(8, "captioner=endpoint: number of concurrent requests", min=1, max=256)
    endpoint_guided: bool = opt(
        True,
        "captioner=endpoint: send the scene's fields as a JSON schema that the server decodes under (response_format); "
        "one that refuses it is asked without",
    )

    def check(self) -> None:
        if self.quantization is Quantization.int8:
            raise ConfigError(
                "captioner.quantization=int8: the layers of the captioners cannot be trained over eight bits.",
                "Use captioner.quantization=nf4 or none.",
            )
        family = CAPTIONERS[self.kind.name]
        refuse_unset(f"captioner={self.kind}", {f"captioner.{name}": getattr(self, name) for name in family.needs})
        if self.product is ProductTarget.box and family.writes and not family.has_locations:
            raise ConfigError(
                f"captioner.product=box with captioner={self.kind}: only {LOCATED} has tokens for places.",
                "Use captioner.product=outline or mask.",
            )

    def check_trainable(self) -> None:
        """Raises ConfigError when the family has no preset ``tuning``, or its weights would not be plain float32."""
        family = CAPTIONERS[self.kind.name]
        if not family.adapter:
            trainable = [other.name for other in CAPTIONERS.values() if other.adapter]
            raise ConfigError(
                f"captioner={self.kind} has no weights here that could be trained.",
                f"Use captioner={' | '.join(trainable)}.",
            )
        if self.tuning.name not in family.presets:
            raise ConfigError(
                f"captioner.tuning={self.tuning} is not for captioner={self.kind}.",
                f"It takes {', '.join(family.presets)}.",
            )
        if family.presets[self.tuning.name].modules:
            return
        for key, plain in (("quantization", Quantization.none), ("dtype", WeightDtype.float32)):
            value = getattr(self, key)
            if value is not plain:
                raise ConfigError(
                    f"captioner.{key}={value} with captioner.tuning={self.tuning}: it is for frozen weights.",
                    f"Use a LoRA preset (captioner.tuning=language_lora), or captioner.{key}={plain}.",
                )


@dataclass
class CaptionDataConfig(DataConfig):
    input: str | None = opt(None, "dataset folder (Parquet) to caption, to review or to correct")
    review: int = opt(64, "task=review: number of captions to show, failures and the least certain first", min=1)
    corrections: str | None = opt(None, "task=correct: review.csv with its column `corrected` filled in")


@dataclass
class CaptionVLM(Script):
    licenses: LicenseConfig = field(default_factory=LicenseConfig)
    task: CaptionTask = opt(
        CaptionTask.train, "; ".join(f"{task.name}: {task.about}" for task in CAPTION_TASKS.values())
    )
    mode: CaptionMode = opt(CaptionMode.run, "run; plan: print what the task costs on plan.gpu")
    plan: PlanConfig = field(default_factory=PlanConfig)
    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    data: CaptionDataConfig = field(default_factory=CaptionDataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def check(self) -> None:
        super().check()
        train = self.train
        check_steps(train, self.optim)
        if train.compile:
            raise ConfigError(
                "train.compile=true: captions differ in length, and every length would be compiled again.",
                "Set train.compile=false.",
            )
        if train.keep_best is KeepBest.extension or train.validation_prompts or train.validation_seeds > 1:
            raise ConfigError(
                "train.keep_best=extension, train.validation_prompts and train.validation_seeds are about drawn "
                "pictures, but a captioner draws none.",
                "Leave them out; train.keep_best=validation_loss works for captioners.",
            )
        task = CAPTION_TASKS[self.task.name]
        if self.mode is CaptionMode.plan:
            self.check_plan(task)
            return
        refuse_unset(f"task={task.name}", {f"data.{name}": getattr(self.data, name) for name in task.needs})
        if task.trains and self.data.allow_empty_captions:
            raise ConfigError(
                "data.allow_empty_captions=true: a captioner has nothing to learn from a sample without a caption.",
                "Leave it out; task=caption writes captions.",
            )
        if self.data.flip:
            raise ConfigError(
                "data.flip=true: a captioner learns which side is which from pictures as they are.", "Leave it out."
            )
        if task.trains:
            self.captioner.check_trainable()

    def check_plan(self, task: CaptionTaskRow) -> None:
        """Raises ConfigError where there is nothing to plan."""
        if not (task.trains or task.writes):
            raise ConfigError(
                f"task={task.name} with mode=plan: no network runs there.", "Plan task=train or task=caption."
            )
        if not CAPTIONERS[self.captioner.kind.name].shapes:
            local = [row.name for row in CAPTIONERS.values() if row.shapes]
            raise ConfigError(
                f"captioner={self.captioner.kind} with mode=plan: its model does not run here.",
                f"Plan captioner={' | '.join(local)}.",
            )
        if task.trains:
            self.captioner.check_trainable()
        elif self.plan.images is None:
            raise ConfigError(f"task={task.name} mode=plan needs plan.images.", "Set it to the number of pictures.")
