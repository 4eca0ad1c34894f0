"""Keys of captioners, and of caption_vlm.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from packshot.config.common import LicenseConfig, Quantization, Script
from packshot.config.keys import Names, opt
from packshot.config.train import DataConfig, KeepBest, OptimConfig, TrainConfig, check_steps
from packshot.errors import ConfigError

CaptionerKind = Names("CaptionerKind", ["none", "florence2", "llama32_vision", "endpoint"])
CaptionTask = Names("CaptionTask", ["train", "evaluate", "caption", "review", "correct"])
Tuning = Names("Tuning", ["full", "frozen_vision", "language_lora", "cross_attention_lora", "vision_adapter"])
ProductTarget = Names("ProductTarget", ["none", "box", "outline", "mask"])
Constraint = Names("Constraint", ["none", "scene"])
WeightDtype = Names("WeightDtype", ["float32", "bfloat16", "float16"])


@dataclass
class CaptionerConfig:
    kind: CaptionerKind = opt(CaptionerKind.florence2, "which captioner; none leaves captions empty")
    adapter: str | None = opt(None, "folder of a fine-tuned captioner (caption_vlm.py's export/)")
    prompt: str = opt("Describe the scene around the object.", "the instruction in training and in captioning")
    product: ProductTarget = opt(
        ProductTarget.none,
        "how the captioner sees which object is the product, where a mask is known: box (of <loc_…> tokens, "
        "Florence-2), outline (red line), mask (painted grey), none",
    )
    tuning: Tuning = opt(
        Tuning.full,
        "what task=train trains: full; frozen_vision (Florence-2: all but the vision tower); language_lora; "
        "cross_attention_lora or vision_adapter (Llama 3.2 Vision)",
    )
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

    def check(self) -> None:
        if self.quantization is Quantization.int8:
            raise ConfigError(
                "captioner.quantization=int8: the layers of the captioners cannot be trained over eight bits.",
                "Use captioner.quantization=nf4 or none.",
            )
        if self.product is ProductTarget.box and self.kind not in (CaptionerKind.florence2, CaptionerKind.none):
            raise ConfigError(
                f"captioner.product=box with captioner={self.kind}: only Florence-2 has tokens for places.",
                "Use captioner.product=outline or mask.",
            )

    def check_trainable(self) -> None:
        """Raises ConfigError when the weights that ``tuning`` trains would not be plain float32."""
        if self.tuning not in (Tuning.full, Tuning.frozen_vision):
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
        CaptionTask.train,
        "train, evaluate (scores.json), caption (a dataset), review (its doubtful captions, as a page and a table to "
        "edit) or correct (apply the edited table)",
    )
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
        if self.task is CaptionTask.train:
            self.captioner.check_trainable()
