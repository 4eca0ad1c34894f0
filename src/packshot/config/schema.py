"""The schema of ``conf/``: one dataclass per script, built from one dataclass per group.

These classes are the only place where a key, its type, its default, its range and its help text are written down.
Hydra merges YAML and overrides into them (so a misspelt key cannot pass), ``--help`` is printed from them, and below
the scripts only they travel, never a DictConfig. Ranges that one field cannot express stand in ``validate.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from enum import Enum
from typing import Any

from packshot.config.optimizers import OPTIMIZERS
from packshot.scene import SLOTS


def opt(default: Any, help: str, *, min: float | None = None, max: float | None = None) -> Any:
    """A documented field; ``min`` and ``max`` are inclusive."""
    metadata = {"help": help, "min": min, "max": max}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Names(Enum):
    """Enum whose members print as their name, the way they are written on the command line."""

    def __str__(self) -> str:
        return self.name


TrackerKind = Names("TrackerKind", ["wandb", "none"])
Mode = Names("Mode", ["train", "plan", "check"])
MixedPrecision = Names("MixedPrecision", ["no", "fp16", "bf16"])
LRSchedule = Names("LRSchedule", ["constant", "cosine", "linear", "polynomial", "wsd", "cosine_restarts"])
OptimizerKind = Names("OptimizerKind", list(OPTIMIZERS))
LoraKind = Names("LoraKind", ["lora", "dora", "rslora", "loha", "lokr"])
LoraTargets = Names(
    "LoraTargets", ["attention", "cross_attention", "attention_and_ff", "attention_and_conv", "all_linear"]
)
Quantization = Names("Quantization", ["none", "nf4", "int8"])
AttentionKernel = Names("AttentionKernel", ["auto", "flash", "efficient", "cudnn", "math"])
Condition = Names("Condition", ["inpaint", "canny", "silhouette", "softedge", "depth", "light"])
IPAdapterVariant = Names("IPAdapterVariant", ["base", "plus"])
IPAdapterLayers = Names("IPAdapterLayers", ["all", "style", "layout", "style_and_layout"])
ReferenceSource = Names("ReferenceSource", ["self", "look", "place"])
PredictionType = Names("PredictionType", ["base", "epsilon", "v_prediction"])
LossWeighting = Names("LossWeighting", ["none", "min_snr", "debiased"])
TimestepSampling = Names("TimestepSampling", ["uniform", "logit_normal", "cubic"])
Unconditional = Names("Unconditional", ["zeros", "empty"])
ProductConditioning = Names("ProductConditioning", ["noised", "clean", "channels"])
DatasetKind = Names("DatasetKind", ["background", "product", "rendered"])
RenderSplit = Names("RenderSplit", ["all", "train", "heldout"])
CaptionerKind = Names("CaptionerKind", ["none", "florence2", "llama32_vision", "endpoint"])
CaptionTask = Names("CaptionTask", ["train", "evaluate", "caption", "review", "correct"])
Tuning = Names("Tuning", ["full", "frozen_vision", "language_lora", "cross_attention_lora", "vision_adapter"])
ProductTarget = Names("ProductTarget", ["none", "box", "outline", "mask"])
Constraint = Names("Constraint", ["none", "scene"])
WeightDtype = Names("WeightDtype", ["float32", "bfloat16", "float16"])
ExecutorKind = Names("ExecutorKind", ["local", "ray"])
Placement = Names("Placement", ["original", "center"])
KeepBest = Names("KeepBest", ["none", "validation_loss", "extension"])
Suite = Names("Suite", ["full", "preservation", "scene"])


@dataclass
class RunConfig:
    dir: str | None = opt(None, "folder of this run; default: outputs/<script>/<date-time>")
    seed: int = opt(0, "seed of everything random", min=0, max=2**62)
    resume: bool = opt(False, "go on in an existing run.dir from its newest whole checkpoint")


@dataclass
class LicenseConfig:
    commercial: bool = opt(
        False, "refuse data and weights whose licence is not known to allow commercial use; build_data.py rejects rows"
    )
    allowed: list[str] = opt(
        [], "further licences that allow it, and paths or ids of weights that name none: yours to have read"
    )


@dataclass
class TrackingConfig:
    kind: TrackerKind = opt(TrackerKind.wandb, "wandb (offline when no key is set) or none")
    project: str = opt("packshot", "W&B project")
    name: str | None = opt(None, "W&B run name; default: name of run.dir")
    tags: list[str] = opt([], "W&B tags, at most 64 characters each")


@dataclass
class ModelConfig:
    base: str = opt("data/models/sdxl", "SDXL pipeline folder or hub id")
    vae: str | None = opt(None, "VAE folder or hub id that replaces the base's (sdxl-vae-fp16-fix)")
    image_encoder: str | None = opt(None, "CLIP vision encoder; default: <base>/image_encoder")
    florence2: str = opt("data/models/florence2", "Florence-2 folder or hub id")
    llama32_vision: str = opt("data/models/mllama", "Llama 3.2 Vision folder or hub id")
    resolution: int = opt(128, "side of the square the base was trained on, px", min=32, max=2048)
    quantization: Quantization = opt(
        Quantization.none, "weights of the frozen UNet's transformer layers while a LoRA is trained"
    )


@dataclass
class DataConfig:
    train: str = opt("data/rendered/train", "dataset folder (Parquet) to train on")
    validation: str = opt("data/rendered/heldout", "dataset folder (Parquet) to validate on")
    num_workers: int = opt(0, "loader processes per training process; 0: a thread", min=0, max=64)
    buckets: bool = opt(True, "aspect-ratio buckets of the base's area; false: everything into the square")
    cache: bool = opt(True, "encode pictures and captions once; false: at each access, with the same result")
    cache_dir: str = opt("outputs/cache", "folder of encoded samples; runs share it")


@dataclass
class TrainConfig:
    max_steps: int = opt(100, "optimizer steps", min=1)
    batch_size: int = opt(4, "samples per process and micro-step", min=1)
    gradient_accumulation_steps: int = opt(1, "micro-steps per optimizer step", min=1)
    learning_rate: float = opt(1e-4, "peak learning rate", min=0, max=1)
    lr_schedule: LRSchedule = opt(LRSchedule.cosine, "shape of the learning rate after the warm-up")
    lr_min_ratio: float = opt(0.0, "share of the peak that the learning rate ends at", min=0, max=1)
    lr_power: float = opt(2.0, "exponent of lr_schedule=polynomial", min=0.1, max=10)
    lr_decay_share: float = opt(
        0.2, "last share of the steps after the warm-up, in which lr_schedule=wsd decays", min=0.01, max=1
    )
    lr_cycles: int = opt(3, "cycles of lr_schedule=cosine_restarts", min=1, max=100)
    warmup_steps: int = opt(0, "optimizer steps of linear warm-up", min=0)
    mixed_precision: MixedPrecision = opt(MixedPrecision.no, "precision of the frozen base and of the forward pass")
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass")
    fused_backward: bool = opt(
        False, "apply and free each gradient during the backward pass, so that they never exist together"
    )
    compile: bool = opt(False, "torch.compile the networks, once for each shape of a batch")
    attention: AttentionKernel = opt(AttentionKernel.auto, "PyTorch's attention kernel; auto: the fastest that fits")
    deterministic: bool = opt(
        False, "on a GPU, only kernels that give the same bits each time, so that a resume does too; slower"
    )
    max_grad_norm: float = opt(1.0, "clip gradients to this norm; 0 switches it off", min=0)
    ema_decay: float = opt(
        0.0, "decay of the weights' moving average that is exported; 0 switches it off", min=0, max=1
    )
    checkpointing_steps: int = opt(50, "optimizer steps between checkpoints", min=1)
    checkpoints_total_limit: int = opt(2, "checkpoints kept", min=1)
    validation_steps: int = opt(50, "optimizer steps between validations; 0 switches them off", min=0)
    validate_first: bool = opt(False, "also validate before the first step: the base alone, for comparison")
    validation_samples: int = opt(4, "held-out samples that validation draws", min=1, max=64)
    validation_seeds: int = opt(1, "pictures of each held-out sample and prompt", min=1, max=16)
    validation_prompts: list[str] = opt([], "prompts drawn for every held-out product, besides its own caption")
    keep_best: KeepBest = opt(
        KeepBest.validation_loss, "by what the best checkpoint is chosen; it is kept besides the newest"
    )
    export_best: bool = opt(False, "export the best checkpoint instead of the last step")
    log_steps: int = opt(1, "optimizer steps between lines of metrics.jsonl", min=1)
    process_timeout: int = opt(1800, "seconds that the processes wait for each other before they stop", min=5)


@dataclass
class OptimConfig:
    kind: OptimizerKind = opt(OptimizerKind.adamw, "optimizer")
    beta1: float = opt(0.9, "decay of the gradient's average", min=0, max=0.99999)
    beta2: float = opt(0.999, "decay of its square's average (lion: of the momentum, at most 0.99)", min=0, max=0.99999)
    weight_decay: float = opt(0.01, "decoupled weight decay", min=0, max=1)
    eps: float = opt(1e-8, "added to the root of the second moment", min=1e-20)
    groups: list[str] = opt(
        [], "learning rates of their own: ['regex over parameter names=rate'], in quotes; the first match counts"
    )


@dataclass
class ObjectiveConfig:
    prediction_type: PredictionType = opt(
        PredictionType.base, "what the network predicts; base: as the base was trained"
    )
    zero_terminal_snr: bool = opt(False, "let the last step be pure noise (needs v_prediction)")
    loss_weighting: LossWeighting = opt(
        LossWeighting.none,
        "weight of a timestep in the loss: none; min_snr (Hang et al. 2023); debiased (1/sqrt(SNR), so that errors "
        "count as they disturb the picture)",
    )
    min_snr_gamma: float = opt(5.0, "the SNR at which loss_weighting=min_snr cuts the weight off", min=1e-3)
    timestep_sampling: TimestepSampling = opt(
        TimestepSampling.uniform, "how often a timestep comes: logit_normal prefers the middle, cubic the noisy end"
    )
    logit_normal_location: float = opt(
        0.0, "centre of timestep_sampling=logit_normal; above 0 prefers noisy steps", min=-5, max=5
    )
    logit_normal_scale: float = opt(1.0, "width of timestep_sampling=logit_normal", min=0.05, max=10)
    min_timestep: int = opt(0, "smallest timestep that is trained", min=0)
    max_timestep: int | None = opt(None, "largest timestep that is trained; null: the schedule's last", min=1)
    noise_offset: float = opt(0.0, "per-channel noise offset", min=0, max=1)
    input_perturbation: float = opt(
        0.0, "extra noise on the input alone (0.1 is usual), against exposure bias", min=0, max=1
    )
    caption_dropout: float = opt(0.1, "share of samples trained without their prompt", min=0, max=1)
    unconditional: Unconditional = opt(Unconditional.zeros, "what a dropped prompt becomes: zeros or the encoded ''")
    background_weight: float = opt(1.0, "loss weight of background pixels where a product mask exists", min=0)
    product_weight: float = opt(1.0, "loss weight of product pixels where a product mask exists", min=0)
    boundary_weight: float = opt(1.0, "further weight of a ring around the product, where it would grow", min=0)
    boundary_width: int = opt(2, "width of that ring, latent cells (8 px each)", min=0, max=32)
    product_conditioning: ProductConditioning = opt(
        ProductConditioning.noised,
        "how the network sees the product: noised as the rest; clean at every timestep (learn to fill in around it); "
        "channels: in five more input channels, mask and latents, as inpainting models do (train_lora.py)",
    )


@dataclass
class LoraMethod:
    rank: int = opt(16, "rank of the update", min=1, max=1024)
    alpha: float = opt(16.0, "scale numerator: the update counts alpha/rank (rslora: alpha/sqrt(rank))", min=1e-3)
    kind: LoraKind = opt(
        LoraKind.lora, "form of the update; loha and lokr are exported for peft, the rest for diffusers"
    )
    dropout: float = opt(
        0.0,
        "dropout on the adapter's input (loha, lokr: on its rows); unlike all other draws it depends on batch size, "
        "accumulation and number of processes",
        min=0,
        max=0.9,
    )
    targets: LoraTargets = opt(LoraTargets.attention, "which layers of the UNet are adapted")
    target_modules: str | None = opt(None, "regular expression over whole module names; replaces targets")
    text_encoder: bool = opt(False, "also train a LoRA on the attention of both text encoders")
    text_rank: int | None = opt(
        None, "rank on the text encoders (alpha stays, so the scale is alpha/text_rank); null: rank", min=1, max=1024
    )
    conv_rank: int | None = opt(None, "rank on the convolutions among targets; null: rank", min=1, max=1024)
    conv_alpha: float | None = opt(None, "alpha on the convolutions among targets; null: alpha", min=1e-3)


@dataclass
class IPAdapterMethod:
    variant: IPAdapterVariant = opt(IPAdapterVariant.base, "base (pooled embedding) or plus (patch tokens)")
    num_tokens: int = opt(4, "image tokens the cross-attention sees (plus: queries)", min=1, max=64)
    reference: ReferenceSource = opt(
        ReferenceSource.look,
        "the picture a sample is trained with: self, its own without the product; or, so that a reference's content is "
        "not learnt, with probability peer_reference_prob another sample's: with its surface and mood (look), or "
        "surface and background (place)",
    )
    peer_reference_prob: float = opt(
        0.5,
        "share of samples that are trained with another's reference, where reference=look|place finds one; the others "
        "with their own, which says more",
        min=0,
        max=1,
    )
    image_dropout: float = opt(0.05, "share of samples without the reference", min=0, max=1)
    init: str | None = opt(
        None,
        "adapter to start from: a .safetensors or .bin file in the original layout (ip-adapter_sdxl_vit-h, "
        "ip-adapter-plus_sdxl_vit-h with num_tokens=16), or an export/ folder; null: one without effect",
    )
    resampler_dim: int | None = opt(
        None, "width of variant=plus inside; null: that of init, or the image encoder's", min=64, max=8192
    )


@dataclass
class ControlNetMethod:
    condition: Condition = opt(
        Condition.inpaint,
        "inpaint (background = -1), canny (edges of the product), silhouette (its outline), softedge (its gradients), "
        "depth (its relief) or light (which side the scene's light comes from)",
    )
    init: str | None = opt(None, "ControlNet to start from, folder or hub id; null: a copy of the UNet's encoder")
    extra_controlnets: list[str] = opt(
        [], "export/ folders of ControlNets that work along, frozen unless method.train_extras=true"
    )
    train_extras: bool = opt(
        False, "also train those of method.extra_controlnets; they are exported to export/beside-<k>"
    )
    mask_grow: float = opt(0.0, "px by which the product's mask is grown for the map, here and later", min=-64, max=64)
    mask_feather: float = opt(0.0, "px over which the mask fades, here and later (inpaint)", min=0, max=64)
    mask_jitter: float = opt(0.0, "px by which the mask is grown or shrunk at random in training", min=0, max=64)


@dataclass
class TrainScript:
    """Keys that the three trainers share."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    licenses: LicenseConfig = field(default_factory=LicenseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    mode: Mode = opt(Mode.train, "train; plan prints the cost; check shows what the model will see")


@dataclass
class ExportConfig:
    kohya: bool = opt(False, "also write the LoRA in the kohya/ComfyUI key layout")


@dataclass
class TrainLora(TrainScript):
    method: LoraMethod = field(default_factory=LoraMethod)
    export: ExportConfig = field(default_factory=ExportConfig)


@dataclass
class TrainIPAdapter(TrainScript):
    method: IPAdapterMethod = field(default_factory=IPAdapterMethod)


@dataclass
class TrainControlNet(TrainScript):
    method: ControlNetMethod = field(default_factory=ControlNetMethod)


@dataclass
class CaptionerConfig:
    kind: CaptionerKind = opt(CaptionerKind.florence2, "which captioner; none leaves captions empty")
    adapter: str | None = opt(None, "folder of a fine-tuned captioner (caption_vlm.py's export/)")
    prompt: str = opt(
        "Describe the scene around the object.", "the instruction the captioner is trained and asked with"
    )
    product: ProductTarget = opt(
        ProductTarget.none,
        "how the captioner is told what the product is, where a mask is known: box (of <loc_…> tokens, Florence-2), "
        "outline (red line), mask (painted grey), none",
    )
    tuning: Tuning = opt(
        Tuning.full,
        "what task=train trains: full; frozen_vision (Florence-2: all but the vision tower); language_lora; "
        "cross_attention_lora or vision_adapter (Llama 3.2 Vision)",
    )
    lora_rank: int = opt(16, "rank of the LoRA presets", min=1, max=1024)
    quantization: Quantization = opt(Quantization.none, "frozen weights of the language model: none or nf4 (QLoRA)")
    dtype: WeightDtype = opt(WeightDtype.float32, "dtype of frozen weights; trained ones are float32")
    constraint: Constraint = opt(
        Constraint.scene, "scene: captions are held to the caption grammar and to words that name no product; none"
    )
    max_new_tokens: int = opt(96, "longest caption, tokens", min=8, max=512)
    batch_size: int = opt(8, "images per generation batch", min=1)
    endpoint: str | None = opt(None, "captioner=endpoint: address of an OpenAI-compatible server, up to and with /v1")
    endpoint_model: str | None = opt(None, "captioner=endpoint: the model's name there")
    endpoint_requests: int = opt(8, "captioner=endpoint: requests under way at once", min=1, max=256)


@dataclass
class CaptionDataConfig(DataConfig):
    input: str | None = opt(None, "dataset folder (Parquet) to caption, to review or to correct")
    review: int = opt(64, "task=review: how many captions are shown, failures and the least certain first", min=1)
    corrections: str | None = opt(None, "task=correct: review.csv with a column `corrected` filled in")


@dataclass
class CaptionVLM:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    licenses: LicenseConfig = field(default_factory=LicenseConfig)
    task: CaptionTask = opt(
        CaptionTask.train,
        "train, evaluate (scores.json), caption (a dataset), review (its doubtful captions, as a page and a table to "
        "edit) or correct (take the edited table)",
    )
    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    data: CaptionDataConfig = field(default_factory=CaptionDataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass
class SourceConfig:
    path: str = opt("data/products", "images: a folder, a glob, Parquet or tar shards; local or s3:// and the like")
    masks: str | None = opt(None, "folder with a mask per image, same file name (white = product)")
    license: str = opt("unknown", "licence of every image of the source (SPDX id or name)")


@dataclass
class MatteConfig:
    onnx: str | None = opt(None, "ONNX file of a salient-object network, used instead of matte.network")
    network: str | None = opt(
        None, "folder of the family's segmentation network, which guides GrabCut; null: GrabCut alone"
    )
    min_confidence: float = opt(0.5, "masks below this confidence are rejected", min=0, max=1)


@dataclass
class DepthConfig:
    onnx: str | None = opt(
        None, "ONNX file of a monocular depth network (MiDaS, Depth Anything), for ControlNets that read depth"
    )


@dataclass
class QualityConfig:
    min_side: int = opt(64, "reject images with a shorter side, px", min=1)
    max_pixels: int = opt(120_000_000, "reject larger images (decompression bombs)", min=1)
    min_sharpness: float = opt(
        0.003, "reject blurred images (edges against contrast at 512 px; in focus: 0.05 up)", min=0
    )
    duplicate_distance: int = opt(
        4, "reject images within this Hamming distance of an earlier one; -1: keep all", min=-1
    )


@dataclass
class ExecutorConfig:
    kind: ExecutorKind = opt(
        ExecutorKind.local,
        "who works on shards: processes of this machine, or the Ray cluster at RAY_ADDRESS (default: this machine)",
    )
    workers: int = opt(1, "shards in work at the same time", min=1, max=256)


def scene_fields() -> list[tuple[str, Any, Any]]:
    """A key for each slot of a Scene, as ``make_dataclass`` takes them."""
    fields: list[tuple[str, Any, Any]] = []
    for name, row in SLOTS.items():
        kind: Any = list[str] if row.many else str if row.order == 0 else str | None
        fields.append((name, kind, opt([] if row.many else "" if row.order == 0 else None, row.help)))
    return fields


@dataclass
class SceneConfig(make_dataclass("SceneKeys", scene_fields())):
    """The slots of a Scene as config keys."""


@dataclass
class RenderConfig:
    count: int = opt(24, "scenes", min=1, max=1_000_000)
    seeds: list[int] = opt([], "render these scenes instead (the numbers in the column `source`)")
    size: int = opt(128, "side of the square picture, px", min=32, max=4096)
    samples: int = opt(12, "light paths per pixel; 12 do at 128 px, 64 at 512 and more", min=1, max=4096)
    quality: int | None = opt(
        None, "0 to 100: lossy pictures (AVIF), masks stay lossless; null: lossless", min=0, max=100
    )
    split: RenderSplit = opt(
        RenderSplit.all, "train and heldout share no product and no pair of surface and background; all: both, 6 to 1"
    )
    scene: SceneConfig = field(default_factory=SceneConfig)
    nearest: bool = opt(False, "replace a phrase of render.scene that the renderer lacks by the most similar one")
    folder: str | None = opt(
        None, "keep finished scenes here and reuse those of other runs, one build at a time; null: only while building"
    )
    environment: str = opt(".venv-render", "Blender's environment (`make render-env`)")


@dataclass
class BuildData:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    licenses: LicenseConfig = field(default_factory=LicenseConfig)
    dataset: DatasetKind = opt(DatasetKind.product, "background (image, text), product (image, mask, text) or rendered")
    source: SourceConfig = field(default_factory=SourceConfig)
    matte: MatteConfig = field(default_factory=MatteConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    render: RenderConfig = field(default_factory=RenderConfig)
    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    shard_size: int = opt(256, "input images per shard", min=1)


@dataclass
class AdaptersConfig:
    lora: str | None = opt(None, "export/ folder of train_lora.py")
    lora_scale: float = opt(1.0, "weight of the LoRA", min=0, max=10)
    lora_start: float = opt(0.0, "share of the denoising steps after which the LoRA begins to count", min=0, max=1)
    lora_end: float = opt(1.0, "share of the denoising steps after which it no longer counts", min=0, max=1)
    controlnets: list[str] = opt([], "export/ folders of train_controlnet.py")
    controlnet_scales: list[float] = opt([], "one weight per ControlNet; default 1.0 each")
    controlnet_starts: list[float] = opt([], "one share of the steps per ControlNet, where it begins; default 0 each")
    controlnet_ends: list[float] = opt([], "one share of the steps per ControlNet, where it ends; default 1 each")
    ip_adapter: str | None = opt(None, "export/ folder of train_ip_adapter.py")
    ip_adapter_scale: float = opt(1.0, "weight of the reference image", min=0, max=2)
    ip_adapter_layers: IPAdapterLayers = opt(
        IPAdapterLayers.all,
        "where the reference enters: all layers, or the one for style, the one for layout, or both (InstantStyle)",
    )
    ip_adapter_start: float = opt(0.0, "share of the denoising steps after which the reference counts", min=0, max=1)
    ip_adapter_end: float = opt(1.0, "share of the denoising steps after which it no longer counts", min=0, max=1)

    def controlnet_spans(self) -> list[tuple[float, float]]:
        """(start, end) of every ControlNet."""
        count = len(self.controlnets)
        return list(zip(self.controlnet_starts or [0.0] * count, self.controlnet_ends or [1.0] * count, strict=True))


@dataclass
class GenerateSettings:
    """How one picture is made; shared by generate.py and serve.py."""

    num_inference_steps: int = opt(30, "denoising steps", min=1, max=1000)
    guidance_scale: float = opt(5.0, "classifier-free guidance; 1 switches it off", min=1, max=50)
    negative_prompt: str | None = opt(None, "what the picture should not show")
    placement: Placement = opt(
        Placement.original, "original keeps the photo's frame; center puts the product in `size`"
    )
    size: list[int] = opt([], "width, height of the output in px (placement=center)")
    product_scale: float = opt(0.6, "product's share of the canvas (placement=center)", min=0.05, max=1)
    light_angle: float | None = opt(
        None,
        "where light comes from, degrees: 0 the right, 90 behind, 180 the left, 270 the front; for ControlNets that "
        "read light; null: as scene.lighting says, or open",
        min=0,
        max=360,
    )


@dataclass
class Generate(GenerateSettings):
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    licenses: LicenseConfig = field(default_factory=LicenseConfig)
    product: str = opt("data/products/coffee.png", "product photo, or a folder of them")
    mask: str | None = opt(None, "product mask (white = product); found from alpha or by segmentation if not given")
    matte: MatteConfig = field(default_factory=MatteConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    prompt: str | None = opt(None, "free text; scene.* is the structured way")
    scene: SceneConfig = field(default_factory=SceneConfig)
    reference: str | None = opt(None, "image whose look the background takes (needs adapters.ip_adapter)")
    references: list[str] = opt([], "several such images instead")
    reference_weights: list[int] = opt(
        [], "how often each of them counts among the others: whole numbers, at most 64 together; default 1 each"
    )
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    num_images: int = opt(4, "pictures per product", min=1, max=64)
    baseline: str | None = opt(None, "folder of an earlier run; report.html shows its pictures beside these")

    def reference_files(self) -> list[str]:
        """``references``, or the one ``reference``."""
        return self.references or ([self.reference] if self.reference else [])


@dataclass
class Evaluate:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    suite: Suite = opt(Suite.full, "full, preservation or scene")
    runs: list[str] = opt(
        [], "one or two folders of generate.py to score side by side; none: the base draws the shipped products"
    )
    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    matte: MatteConfig = field(default_factory=MatteConfig)


@dataclass
class ServeConfig:
    host: str = opt("127.0.0.1", "address to listen on")
    port: int = opt(8000, "port to listen on", min=0, max=65535)
    api_key: str | None = opt(None, "bearer key; default: environment PACKSHOT_API_KEY, else a new one is printed")
    max_upload_mib: float = opt(10.0, "largest accepted file", min=0.01, max=1024)
    max_pixels: int = opt(40_000_000, "largest accepted picture, width x height", min=1)
    queue_size: int = opt(8, "requests that may wait behind the running one; more are answered 429", min=0, max=1000)
    timeout_seconds: float = opt(600.0, "longest a request may take, waiting included; then 504", min=0.1, max=86400)


@dataclass
class Serve:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    licenses: LicenseConfig = field(default_factory=LicenseConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    matte: MatteConfig = field(default_factory=MatteConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    generate: GenerateSettings = field(default_factory=GenerateSettings)


SCRIPTS: dict[str, type] = {
    "build_data": BuildData,
    "caption_vlm": CaptionVLM,
    "train_lora": TrainLora,
    "train_ip_adapter": TrainIPAdapter,
    "train_controlnet": TrainControlNet,
    "generate": Generate,
    "evaluate": Evaluate,
    "serve": Serve,
}
