"""Keys of build_data.py: sources, quality, rendering, and who does the work."""

from __future__ import annotations

from dataclasses import dataclass, field

from packshot.config.caption import CaptionerConfig
from packshot.config.common import DepthConfig, LicenseConfig, MatteConfig, SceneConfig, Script
from packshot.config.keys import Names, opt
from packshot.config.sources import conventions
from packshot.errors import ConfigError

DatasetKind = Names("DatasetKind", ["background", "product", "rendered"])
BuildTask = Names("BuildTask", ["build", "review_masks"])
WithoutMask = Names("WithoutMask", ["reject", "find"])
RenderSplit = Names("RenderSplit", ["all", "train", "heldout"])
ProductNaming = Names("ProductNaming", ["keep", "report", "reject"])
ExecutorKind = Names("ExecutorKind", ["local", "ray"])


@dataclass
class SourceConfig:
    path: str = opt("data/products", f"a folder, glob or file, local or s3:// and similar; {conventions()}")
    masks: str | None = opt(None, "folder with a mask per image, same file name (white = product)")
    without_mask: WithoutMask = opt(
        WithoutMask.reject, "images without a file in source.masks: reject them, or find their mask by matte.model"
    )
    license: str = opt("unknown", "licence of every image of the source (SPDX id or name)")
    caption_column: str | None = opt(
        None, "column or JSON key that holds the captions; null: text, caption, prompt or description"
    )
    folder_repeats: bool = opt(True, "folders named <N>_<name> repeat their images N times in training (kohya)")
    downloads: str | None = opt(
        None, "lists of URLs: folder in which pictures are kept; null: downloads/ in the run folder"
    )
    download_seconds: float = opt(20.0, "lists of URLs: longest wait for a picture, each try", min=0.1, max=3600)
    download_mib: float = opt(64.0, "lists of URLs: largest picture", min=0.01, max=4096)
    download_retries: int = opt(3, "lists of URLs: further tries after an error that may pass", min=0, max=20)


@dataclass
class CaptionsConfig:
    product: ProductNaming = opt(
        ProductNaming.keep,
        "captions of the source that name a product: keep them; report them in rejected.parquet and keep them; or "
        "reject their images",
    )


@dataclass
class StorageConfig:
    max_side: int | None = opt(None, "scale pictures down to this longer side, px; null: as they are", min=64)


@dataclass
class QualityConfig:
    min_side: int = opt(64, "reject images with a shorter side, px", min=1)
    max_pixels: int = opt(120_000_000, "reject images with more pixels (decompression bombs)", min=1)
    min_sharpness: float = opt(
        0.003, "reject blurred images (edges against contrast at 512 px; images in focus have 0.05 and more)", min=0
    )
    duplicate_distance: int = opt(
        4, "reject images within this Hamming distance of an earlier one; -1: keep all", min=-1
    )


@dataclass
class CurationConfig:
    max_foreground: float | None = opt(
        None,
        "dataset=background: reject pictures of which matte.model sees more than this share as an object in front; "
        "null: do not look",
        min=0,
        max=1,
    )
    max_product: float | None = opt(
        None,
        "dataset=background: reject pictures that show a product with more than this confidence, judged by what the "
        "mini family's network sees; null: do not look",
        min=0,
        max=1,
    )
    max_text: float | None = opt(
        None,
        "reject pictures with more than this share under lines of text or a watermark; 0: with any; null: do not look",
        min=0,
        max=1,
    )
    max_face: float | None = opt(
        None,
        "reject pictures in which curation.detector sees a face with more than this confidence; null: do not look",
        min=0,
        max=1,
    )
    max_nudity: float | None = opt(
        None,
        "reject pictures in which curation.detector sees nudity with more than this confidence; null: do not look",
        min=0,
        max=1,
    )
    detector: str | None = opt(
        None,
        "detector of curation.max_face and max_nudity: an ONNX file of Ultralytics' YOLO; null: NudeNet's, which the "
        "extra safety installs",
    )
    max_similarity: float | None = opt(
        None,
        "reject pictures whose embedding has this cosine with an earlier one, or a larger one; null: do not compare",
        min=0,
        max=1,
    )
    encoder: str | None = opt(
        None,
        "image encoder of curation.max_similarity: a folder with CLIP's image tower, or an ONNX file; null: mini's",
    )


@dataclass
class ExecutorConfig:
    kind: ExecutorKind = opt(
        ExecutorKind.local,
        "what works on shards: processes of this machine, or the Ray cluster at RAY_ADDRESS (default: this machine)",
    )
    workers: int = opt(1, "number of shards in work at the same time", min=1, max=256)


@dataclass
class RenderConfig:
    count: int = opt(24, "number of scenes", min=1, max=1_000_000)
    seeds: list[int] = opt([], "render these scenes instead (the numbers in the column `source`)")
    size: int = opt(128, "side of the square picture, px", min=32, max=4096)
    samples: int = opt(12, "light paths per pixel; 12 are enough at 128 px, 64 at 512 and more", min=1, max=4096)
    quality: int | None = opt(
        None, "0 to 100: lossy pictures (AVIF), while masks stay lossless; null: lossless", min=0, max=100
    )
    split: RenderSplit = opt(
        RenderSplit.all, "train and heldout share no product and no pair of surface and background; all: both, 6 to 1"
    )
    scene: SceneConfig = field(default_factory=SceneConfig)
    nearest: bool = opt(
        False, "replace a phrase of render.scene that the renderer does not know by the most similar one"
    )
    folder: str | None = opt(
        None,
        "keep finished scenes here and reuse those of other runs, one build at a time; null: only during the build",
    )
    environment: str = opt(".venv-render", "Blender's environment (`make render-env`)")

    def check(self) -> None:
        if len(set(self.seeds)) < len(self.seeds) or any(seed < 0 for seed in self.seeds):
            raise ConfigError(
                f"render.seeds={self.seeds} repeats a seed or has one below 0.", "Name each scene once, by its number."
            )


@dataclass
class ReviewConfig:
    count: int = opt(1000, "task=review_masks: masks on the page, the worst first", min=1)


@dataclass
class BuildData(Script):
    task: BuildTask = opt(
        BuildTask.build, "build a dataset, or review_masks: a page and files of the doubtful masks of source.path"
    )
    licenses: LicenseConfig = field(default_factory=LicenseConfig)
    dataset: DatasetKind = opt(DatasetKind.product, "background (image, text), product (image, mask, text) or rendered")
    source: SourceConfig = field(default_factory=SourceConfig)
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    data: StorageConfig = field(default_factory=StorageConfig)
    matte: MatteConfig = field(default_factory=MatteConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    review: ReviewConfig = field(default_factory=ReviewConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    curation: CurationConfig = field(default_factory=CurationConfig)
    render: RenderConfig = field(default_factory=RenderConfig)
    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    shard_size: int = opt(256, "input images per shard", min=1)

    def check(self) -> None:
        """Raises ConfigError where a limit for empty backgrounds meets a set of products."""
        super().check()
        if self.dataset is DatasetKind.background:
            return
        limits = {"max_foreground": self.curation.max_foreground, "max_product": self.curation.max_product}
        for key, limit in limits.items():
            if limit is not None:
                raise ConfigError(
                    f"curation.{key}={limit:g} would reject the products of dataset={self.dataset}.",
                    "Set dataset=background, or leave it out.",
                )
