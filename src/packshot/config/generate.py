"""Keys of generate.py, evaluate.py and serve.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from packshot.config.background import BackgroundConfig, Refine
from packshot.config.caption import CaptionerConfig
from packshot.config.common import DepthConfig, LicenseConfig, MatteConfig, SceneConfig, Script
from packshot.config.conditions import settings_class
from packshot.config.keys import Names, opt
from packshot.config.output import OutputConfig
from packshot.config.plan import PlanConfig
from packshot.config.schedulers import SCHEDULERS, check_scheduler
from packshot.config.unread import RULES, ReadRule, refuse_unread
from packshot.config.verify import VerifyConfig
from packshot.errors import ConfigError

IPAdapterLayers = Names("IPAdapterLayers", ["all", "style", "layout", "style_and_layout"])
# Named places on a canvas: the shares of the free room that lie left of the product and above it.
POSITIONS = {
    "center": (0.5, 0.5),
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
    "top": (0.5, 0.0),
    "bottom": (0.5, 1.0),
    "top_left": (0.0, 0.0),
    "top_right": (1.0, 0.0),
    "bottom_left": (0.0, 1.0),
    "bottom_right": (1.0, 1.0),
}
PLACEMENTS = ["original", *POSITIONS, "coordinates"]
Placement = Names("Placement", list(PLACEMENTS))
InferenceDtype = Names("InferenceDtype", ["auto", "float32", "float16", "bfloat16"])
Offload = Names("Offload", ["none", "model"])
GenerateMode = Names("GenerateMode", ["generate", "plan"])
Shadow = Names("Shadow", ["auto", "none", "contact"])
Suite = Names("Suite", ["full", "preservation", "scene"])

MOST_REFERENCES = 64  # every one adds its image tokens to what each layer attends to at each step


@dataclass
class AdaptersConfig:
    lora: str | None = opt(
        None, "LoRA: export/ folder of train_lora.py, or a file, folder or hub id in the layout of any trainer"
    )
    lora_scale: float = opt(1.0, "weight of the LoRA", min=0, max=10)
    loras: list[str] = opt([], "several of them instead")
    lora_scales: list[float] = opt([], "one weight for each of adapters.loras, 0 to 10; default 1.0 each")
    lora_start: float = opt(0.0, "share of the denoising steps at which the LoRA becomes active", min=0, max=1)
    lora_end: float = opt(1.0, "share of the denoising steps at which it becomes inactive", min=0, max=1)
    controlnets: list[str] = opt(
        [], "export/ folders of train_controlnet.py, or others after their condition: canny:owner/name"
    )
    controlnet_scales: list[float] = opt([], "one weight per ControlNet; default 1.0 each")
    controlnet_starts: list[float] = opt(
        [], "one share of the steps per ControlNet, at which it becomes active; default 0 each"
    )
    controlnet_ends: list[float] = opt(
        [], "one share of the steps per ControlNet, at which it becomes inactive; default 1 each"
    )
    ip_adapter: str | None = opt(None, "export/ folder of train_ip_adapter.py, or a published file, here or on the hub")
    ip_adapter_scale: float = opt(1.0, "weight of the reference image", min=0, max=2)
    ip_adapter_layers: IPAdapterLayers = opt(
        IPAdapterLayers.all,
        "layers that see the reference: all, the one for style, the one for layout, or both (InstantStyle)",
    )
    ip_adapter_start: float = opt(
        0.0, "share of the denoising steps at which the reference becomes active", min=0, max=1
    )
    ip_adapter_end: float = opt(1.0, "share of the denoising steps at which it becomes inactive", min=0, max=1)

    def lora_paths(self) -> list[str]:
        """``loras``, or the one ``lora``."""
        return self.loras or ([self.lora] if self.lora else [])

    def weights_of_loras(self) -> list[float]:
        """The weight of each of :meth:`lora_paths`."""
        if not self.loras:
            return [self.lora_scale] * len(self.lora_paths())
        return self.lora_scales or [1.0] * len(self.loras)

    def controlnet_spans(self) -> list[tuple[float, float]]:
        """(start, end) of every ControlNet."""
        count = len(self.controlnets)
        return list(zip(self.controlnet_starts or [0.0] * count, self.controlnet_ends or [1.0] * count, strict=True))

    def check_loras(self) -> None:
        """Raises ConfigError where one LoRA and several are mixed, or their weights do not fit."""
        if self.lora and self.loras:
            raise ConfigError(
                "adapters.lora and adapters.loras are both given.", "Add the one to the list of the others."
            )
        if self.loras and self.lora_scale != 1:
            raise ConfigError(
                f"adapters.lora_scale={self.lora_scale:g} is for adapters.lora, not for adapters.loras.",
                "Set adapters.lora_scales, one weight for each.",
            )
        if self.lora_scales and len(self.lora_scales) != len(self.loras):
            raise ConfigError(
                f"adapters.lora_scales has {len(self.lora_scales)} values for {len(self.loras)} LoRAs.",
                "Give one for each of adapters.loras, or none.",
            )
        if any(not 0 <= scale <= 10 for scale in self.lora_scales):
            raise ConfigError(f"adapters.lora_scales={self.lora_scales} are out of range.", "Expected 0 to 10 each.")

    def check(self) -> None:
        self.check_loras()
        for name in ("controlnet_scales", "controlnet_starts", "controlnet_ends"):
            values = getattr(self, name)
            if values and len(values) != len(self.controlnets):
                raise ConfigError(
                    f"adapters.{name} has {len(values)} values for {len(self.controlnets)} ControlNets.",
                    "Give one per ControlNet, or none.",
                )
        spans = [("lora", self.lora_start, self.lora_end)]
        spans.append(("ip_adapter", self.ip_adapter_start, self.ip_adapter_end))
        spans += [("controlnets", start, end) for start, end in self.controlnet_spans()]
        for name, start, end in spans:
            if not 0 <= start < end <= 1:
                raise ConfigError(
                    f"adapters.{name} would be active from {start:g} to {end:g} of the denoising steps.",
                    "A start must be below its end, and both must be from 0 to 1.",
                )


@dataclass
class GenerateSettings(settings_class()):
    """How one picture is made; shared by generate.py and serve.py. The inputs of control maps stand in its base."""

    num_inference_steps: int = opt(30, "denoising steps", min=1, max=1000)
    scheduler: str | None = opt(None, f"sampler: {', '.join(SCHEDULERS)}; default: the base's own")
    guidance_scale: float = opt(5.0, "classifier-free guidance; 1 switches it off", min=1, max=50)
    negative_prompt: str | None = opt(None, "what the picture should not show")
    prompt_chunks: int = opt(
        1,
        "chunks of 75 tokens that are read of a prompt, as many as it needs; adapters that were trained with more "
        "(objective.prompt_chunks) always get theirs",
        min=1,
        max=8,
    )
    prompt_weights: bool = opt(False, "read (word:1.3) as a word that counts more, 0.7 less; false: as it stands")
    placement: Placement = opt(
        Placement.original,
        "original keeps the photo's frame; the named places and coordinates (see `position`) put the product on a "
        "canvas of `size` or `aspect_ratio`; it is never stretched",
    )
    size: list[int] = opt([], "width, height of the canvas in px")
    aspect_ratio: str | None = opt(
        None, "shape of the canvas instead of size, such as 4:5; the product then keeps its own resolution"
    )
    product_scale: float = opt(0.6, "product's share of the canvas within its margins", min=0.05, max=1)
    margin: float = opt(0.0, "share of the canvas's shorter side that stays free on each side", min=0, max=0.45)
    position: list[float] = opt(
        [], "x, y of the product's middle as shares of the canvas, 0,0 being the top left (placement=coordinates)"
    )
    background: BackgroundConfig = field(default_factory=BackgroundConfig)
    shadow: Shadow = opt(
        Shadow.none,
        "a shadow of the product as a layer of its own: contact adds one, auto where the drawn ground has none",
    )
    shadow_strength: float = opt(1.0, "of that shadow; 2 takes away the light that it leaves once more", min=0.1, max=4)
    verify: VerifyConfig = field(default_factory=VerifyConfig)

    def most_steps(self) -> int:
        """Denoising steps of one picture if every retry is needed."""
        return self.num_inference_steps * (1 + self.verify.retries)

    def canvas_ratio(self) -> float | None:
        """Width over height of ``aspect_ratio``. Raises ConfigError where it is not a ratio."""
        if self.aspect_ratio is None:
            return None
        found = re.fullmatch(r"(\d+(?:\.\d+)?)[:/x](\d+(?:\.\d+)?)", self.aspect_ratio.strip())
        ratio = float(found[1]) / float(found[2]) if found and float(found[2]) else 0.0
        if not 0.1 <= ratio <= 10:
            raise ConfigError(
                f"aspect_ratio={self.aspect_ratio} is not a valid shape.", "Expected width:height, such as 4:5."
            )
        return ratio

    def check(self) -> None:
        refuse_unread(self, self.read_rules())
        if self.size and (len(self.size) != 2 or not all(64 <= side <= 8192 for side in self.size)):
            raise ConfigError(
                f"size={self.size} is not a valid canvas size.", "Expected [width,height], each from 64 to 8192 px."
            )
        check_scheduler(self.scheduler, self.num_inference_steps)
        refined = self.background.refine is Refine.tiled
        if refined and int(self.num_inference_steps * self.background.refine_strength) < 1:
            raise ConfigError(
                f"background.refine_strength={self.background.refine_strength:g} of "
                f"num_inference_steps={self.num_inference_steps} is less than one step.",
                "Raise one of them.",
            )
        self.check_placement()

    def read_rules(self) -> tuple[ReadRule, ...]:
        """What is refused where nothing reads it."""
        return RULES

    def check_placement(self) -> None:
        """Raises ConfigError where canvas, place and coordinates do not belong together."""
        if self.placement is Placement.original:
            return
        if bool(self.size) == (self.canvas_ratio() is not None):
            raise ConfigError(
                f"placement={self.placement} needs a canvas size or a shape, one of the two.",
                "Add size=[width,height], in px, or aspect_ratio=4:5.",
            )
        if (self.placement is Placement.coordinates) != bool(self.position):
            raise ConfigError(
                f"placement={self.placement} with position={self.position} do not belong together.",
                "Set placement=coordinates and position=[x,y], shares of the canvas, or neither.",
            )
        if self.position and (len(self.position) != 2 or not all(0 <= share <= 1 for share in self.position)):
            raise ConfigError(f"position={self.position} is not a valid place.", "Expected [x,y], each from 0 to 1.")


def reference_weights(count: int, weights: Sequence[int]) -> list[int]:
    """The weight of each of ``count`` reference images, 1 where none is given.

    Raises:
        ConfigError: there are more or fewer weights than images, one is below 1, or their sum is above 64.
    """
    known = list(weights) or [1] * count
    if len(known) != count:
        raise ConfigError(
            f"reference_weights has {len(known)} values for {count} references.", "Give one per reference, or none."
        )
    if any(weight < 1 for weight in known) or sum(known) > MOST_REFERENCES:
        raise ConfigError(
            f"reference_weights={known} are not valid weights.",
            f"They are whole numbers from 1, together at most {MOST_REFERENCES}.",
        )
    return known


@dataclass
class InferenceConfig:
    dtype: InferenceDtype = opt(
        InferenceDtype.auto, "precision of the networks but the VAE, which stays in float32; auto: float16 on CUDA"
    )
    vae_tiling: bool = opt(
        False,
        "encode and decode pictures larger than the base's in overlapping tiles: less memory, but seams may show in "
        "even areas",
    )
    offload: Offload = opt(
        Offload.none,
        "model: the networks wait in main memory, and each is on the GPU while it works (text encoders, UNet, VAE); "
        "ControlNets stay there until the picture is denoised",
    )


@dataclass
class Generate(Script, GenerateSettings):
    mode: GenerateMode = opt(GenerateMode.generate, "generate; plan: print what plan.images pictures cost on plan.gpu")
    plan: PlanConfig = field(default_factory=PlanConfig)
    licenses: LicenseConfig = field(default_factory=LicenseConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    campaign: str | None = opt(
        None,
        "table of jobs (.csv or .jsonl): a row for each, columns named as the keys that it sets, such as product, "
        "scene.surface, size or seed",
    )
    campaign_cross: bool = opt(False, "make every combination of the columns' distinct values instead")
    product: str = opt("data/products/coffee.png", "product photo, or a folder of them")
    mask: str | None = opt(
        None, "product mask (white = product); null: the photo's alpha channel, or else segmentation"
    )
    together: bool = opt(
        False, "the products of the folder stand in one picture, side by side, each with its photo's own pixels"
    )
    matte: MatteConfig = field(default_factory=MatteConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    prompt: str | None = opt(None, "free text, instead of the structured scene.*")
    scene: SceneConfig = field(default_factory=SceneConfig)
    reference: str | None = opt(None, "image whose look the background takes (needs adapters.ip_adapter)")
    references: list[str] = opt([], "several such images instead")
    reference_weights: list[int] = opt([], "weight of each of them: whole numbers, together at most 64; default 1 each")
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    num_images: int = opt(4, "pictures per product", min=1, max=64)
    output: OutputConfig = field(default_factory=OutputConfig)
    layers: bool = opt(True, "also write the parts of every picture to layers/; evaluate.py reads them")
    baseline: str | None = opt(None, "folder of an earlier run, whose pictures report.html shows next to these")

    def reference_files(self) -> list[str]:
        """``references``, or the one ``reference``."""
        return self.references or ([self.reference] if self.reference else [])

    def check(self) -> None:
        Script.check(self)
        GenerateSettings.check(self)
        if self.prompt and any(vars(self.scene).values()):
            raise ConfigError("prompt and scene.* are both given.", "Use one: the scene is rendered to the prompt.")
        if self.reference and self.references:
            raise ConfigError("reference and references are both given.", "Add the one to the list of the others.")
        files = self.reference_files()
        reference_weights(len(files), self.reference_weights)

    def read_rules(self) -> tuple[ReadRule, ...]:
        """As of one picture; of a campaign each row is checked, which may complete what the command line begins."""
        return () if self.campaign else RULES

    def check_placement(self) -> None:
        """As of one picture; the rows of a campaign may complete what the command line begins, and are checked."""
        if not self.campaign:
            GenerateSettings.check_placement(self)


@dataclass
class EvaluationScores:
    features: str = opt(
        "base",
        "what measures of sets and diversity are taken by, besides plain features: base (the image encoder of the "
        "base), plain (nothing else), or an image encoder, folder or hub id",
    )
    clip: str | None = opt(None, "CLIP model, folder or hub id, that scores pictures against their words")
    dino: str | None = opt(None, "image encoder, such as DINOv2's folder or hub id, that compares the products")


@dataclass
class Evaluate(Script):
    suite: Suite = opt(Suite.full, "full, preservation or scene")
    runs: list[str] = opt(
        [],
        "one or two folders of generate.py to compare; none: the base draws the shipped products first. With items: "
        "folders or tables (.csv, .jsonl) of any system's pictures",
    )
    items: str | None = opt(
        None,
        "what the systems in runs were asked for: a table (.csv, .jsonl) with id, photo, mask and, if known, text, "
        "truth, plate, shadow, reference; or a product set",
    )
    scores: EvaluationScores = field(default_factory=EvaluationScores)
    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    matte: MatteConfig = field(default_factory=MatteConfig)


@dataclass
class ServeConfig:
    host: str = opt("127.0.0.1", "address to listen on")
    port: int = opt(8000, "port to listen on", min=0, max=65535)
    api_key: str | None = opt(None, "bearer key; default: environment PACKSHOT_API_KEY, or else a new one is printed")
    max_upload_mib: float = opt(10.0, "largest accepted file", min=0.01, max=1024)
    max_pixels: int = opt(40_000_000, "largest accepted picture, width x height", min=1)
    queue_size: int = opt(
        8, "requests that may wait behind the running one; further ones are answered with 429", min=0, max=1000
    )
    timeout_seconds: float = opt(
        600.0, "longest time of a request, waiting included; then it is answered with 504", min=0.1, max=86400
    )
    api_keys: str | None = opt(
        None, "file of further keys: a line is a name, a key and, if wanted, requests per minute, between spaces"
    )
    requests_per_minute: int = opt(
        120, "POST requests per minute and key; further ones are answered with 429", min=1, max=1_000_000
    )
    max_work: float = opt(
        400.0, "largest request: denoising steps x pictures x pixels, a canvas up to 1024 x 1024 px counts as 1", min=1
    )
    max_jobs: int = opt(100, "jobs that may wait; further ones are answered with 429", min=1, max=100_000)
    keep_hours: float = opt(24.0, "how long finished jobs and their files are kept", min=0.01, max=87600)
    devices: list[str] = opt(
        [], "one worker process each: numbers of CUDA devices, or cpu; empty: one process on the first device"
    )
    header_seconds: float = opt(10.0, "longest time in which a connection may send its headers", min=0.1, max=600)
    max_connections: int = opt(
        1000, "open connections; fewer where the system's limit of open files is lower", min=8, max=100_000
    )
    cors_origins: list[str] = opt([], "web origins whose scripts may use the API, such as https://shop.example")


@dataclass
class ServedSettings(GenerateSettings):
    """The settings of requests that do not give their own."""

    def read_rules(self) -> tuple[ReadRule, ...]:
        """Without those of a canvas: its keys wait for requests that choose a place."""
        return tuple(rule for rule in RULES if rule.by != ("placement",))

    def check_placement(self) -> None:
        """As of one picture; beside ``placement=original`` the others wait for requests that choose a place."""
        if self.placement is not Placement.original:
            GenerateSettings.check_placement(self)


@dataclass
class Serve(Script):
    licenses: LicenseConfig = field(default_factory=LicenseConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    matte: MatteConfig = field(default_factory=MatteConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    generate: ServedSettings = field(default_factory=ServedSettings)

    def check(self) -> None:
        Script.check(self)
        refuse_unread(self, self.generate.read_rules())
