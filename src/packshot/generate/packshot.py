"""Putting a product into a scene: ``Packshot.load(...).set_product(photo).generate(scene)``."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from packshot.config.checks import validate
from packshot.config.compose import compose as compose_config
from packshot.config.schema import AdaptersConfig, DepthConfig, GenerateSettings, MatteConfig, ModelConfig
from packshot.errors import ConfigError
from packshot.generate import certificate as certificates
from packshot.generate.canvas import Canvas, Working, make_working, place, plan_frame
from packshot.generate.composite import compose, make_layers
from packshot.generate.denoise import OnStep, denoise, encode
from packshot.generate.load import Models, load_models, refuse_light
from packshot.generate.product import Product, Source, prepare
from packshot.generate.references import Reference, open_references
from packshot.scene import Scene
from packshot.scene.light import light_angle

__all__ = ["Packshot", "Result"]


@dataclass(frozen=True)
class Result:
    """One picture.

    image: RGB at the output's size. certificate: JSON-able, see docs of ``packshot.generate.certificate``.
    layers: ``background`` RGB, ``product`` RGBA, ``mask`` L, ``raw`` RGB (the model's own drawing, working size).
    png: the encoded image that the certificate was measured on.
    """

    image: Image.Image
    certificate: dict[str, Any]
    layers: dict[str, Image.Image]
    png: bytes = field(repr=False)


@dataclass
class Packshot:
    """Loaded models and, after :meth:`set_product`, a product.

    ``generate`` may be called from several threads: instances that share models take turns, picture by picture, and
    a request keeps the product it started with. Threads with different products use :meth:`with_product`.
    """

    models: Models
    matte: MatteConfig = field(default_factory=MatteConfig)
    product: Product | None = None
    depth: DepthConfig = field(default_factory=DepthConfig)
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def load(
        cls,
        model: str | ModelConfig = "mini",
        lora: str | None = None,
        controlnets: Sequence[str] = (),
        ip_adapter: str | None = None,
        adapters: AdaptersConfig | None = None,
        matte: MatteConfig | None = None,
        depth: DepthConfig | None = None,
    ) -> Packshot:
        """Load a base and its adapters.

        model: the name of a file in ``conf/model`` or a ModelConfig.
        lora, controlnets, ip_adapter: export folders, each at weight 1; ``adapters`` says the same with weights.

        Raises:
            ConfigError: both ways of naming adapters are used, or a part is missing or does not fit.
        """
        if adapters is not None and (lora or controlnets or ip_adapter):
            raise ConfigError("adapters and lora/controlnets/ip_adapter are both given.", "Use one of the two ways.")
        wanted = adapters or AdaptersConfig(lora=lora, controlnets=list(controlnets), ip_adapter=ip_adapter)
        config = compose_config("generate", [f"model={model}"]).model if isinstance(model, str) else model
        return cls(load_models(config, wanted), matte or MatteConfig(), depth=depth or DepthConfig())

    def set_product(
        self,
        image: Source,
        mask: Source | None = None,
        name: str | None = None,
        depth: Source | None = None,
    ) -> Packshot:
        """Take this product from now on; returns ``self``.

        image: RGB, or RGBA whose alpha is the mask. mask: white = product, of the image's size; found when not given.
        depth: near is bright, of the image's size; estimated when not given, where a ControlNet reads it.

        Raises:
            ConfigError, PackshotError: see :func:`packshot.generate.product.prepare`.
        """
        known = name or (Path(image).stem if isinstance(image, str | Path) else "product")
        network = self.depth.onnx if self._reads("depth_HW") else None
        self.product = prepare(image, mask, self.matte, known, depth, network)
        return self

    def with_product(self, product: Product) -> Packshot:
        """Another Packshot with a prepared product; shares models and turns with this one."""
        return replace(self, product=product)

    def generate(
        self,
        scene: Scene | str,
        num_images: int = 4,
        seed: int = 0,
        reference: Source | Sequence[Source] | None = None,
        settings: GenerateSettings | None = None,
        reference_weights: Sequence[int] = (),
        on_step: OnStep | None = None,
    ) -> list[Result]:
        """``num_images`` pictures, the k-th from ``seed + k``. Same inputs and machine: same bytes.

        scene: a Scene or free text; an empty one leaves all to the references. reference: the picture, or pictures,
        whose look the background takes (needs an IP-Adapter). reference_weights: how often each of several counts, at
        most 64 together; default 1 each. on_step: called after every denoising step of every picture; what it raises
        ends the request, and the device is free again.

        Raises:
            ConfigError: no product is set, or a setting cannot work.
            PackshotError: the model failed (NaN).
        """
        return list(self.stream(scene, num_images, seed, reference, settings, reference_weights, on_step))

    def stream(
        self,
        scene: Scene | str,
        num_images: int = 4,
        seed: int = 0,
        reference: Source | Sequence[Source] | None = None,
        settings: GenerateSettings | None = None,
        reference_weights: Sequence[int] = (),
        on_step: OnStep | None = None,
    ) -> Iterator[Result]:
        """Like :meth:`generate`, one result as soon as it is there."""
        settings = settings or GenerateSettings()
        validate(settings)
        if num_images < 1:
            raise ConfigError(f"num_images={num_images} is out of range.", "Ask for at least one.")
        product, canvas = self.product, self.canvas(settings)
        guides = self._references(reference, reference_weights)
        asked = self._request(scene, settings, guides)
        assert product is not None
        height, width = canvas.matte_HW.shape
        frame = plan_frame(height, width, self.models.resolution, self.models.unit)
        working = make_working(canvas, frame, self.models.pipe.vae_scale_factor)
        with self._turn:
            conditioning = encode(self.models, asked["prompt"], settings, guides, asked["light_angle"])
        for k in range(num_images):
            with self._turn:
                decoded = denoise(self.models, working, conditioning, settings, seed + k, on_step)
            yield self._finish(product, canvas, working, decoded, {**asked, "seed": seed + k}, conditioning.lost_words)

    def request(
        self,
        scene: Scene | str,
        settings: GenerateSettings,
        reference: Source | Sequence[Source] | None = None,
        reference_weights: Sequence[int] = (),
    ) -> dict[str, Any]:
        """What a certificate will say was asked for, without the seed.

        Raises:
            ConfigError: a reference is missing, no image, or no adapter reads it or the light's direction.
        """
        return self._request(scene, settings, self._references(reference, reference_weights))

    def canvas(self, settings: GenerateSettings) -> Canvas:
        """The product on the output's pixel grid."""
        if self.product is None:
            raise ConfigError("no product is set.", "Call set_product(image) first.")
        return place(self.product, settings)

    def _references(self, given: Source | Sequence[Source] | None, weights: Sequence[int]) -> list[Reference]:
        references = open_references(given, weights)
        if references and not self.models.has_ip_adapter:
            raise ConfigError("a reference needs an IP-Adapter, none is loaded.", "Load one: adapters.ip_adapter.")
        return references

    def _reads(self, name: str) -> bool:
        """Whether a ControlNet's map is drawn from that field of a View."""
        return any(control.needs == name for control in self.models.controls)

    def _request(self, scene: Scene | str, settings: GenerateSettings, guides: Sequence[Reference]) -> dict[str, Any]:
        prompt = scene.render() if isinstance(scene, Scene) else scene
        if guides and scene == Scene():  # the references alone speak
            prompt = ""
        understood = scene if isinstance(scene, Scene) else Scene.parse(scene).scene
        return {
            "scene": understood.to_dict(),
            "prompt": prompt,
            "negative_prompt": settings.negative_prompt,
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "light_angle": self._light_angle(understood, settings),
            "reference_sha256": guides[0].sha256 if len(guides) == 1 else None,
            "references": [{"sha256": guide.sha256, "weight": guide.weight} for guide in guides],
        }

    def _light_angle(self, scene: Scene, settings: GenerateSettings) -> float | None:
        """What ControlNets are told of the light; None where none reads it, or nothing is said of it."""
        refuse_light(settings.light_angle, self.models.controls)
        if not self._reads("light"):
            return None
        return light_angle(scene.lighting) if settings.light_angle is None else settings.light_angle

    def _finish(
        self,
        product: Product,
        canvas: Canvas,
        working: Working,
        decoded_HW3: np.ndarray,
        request: dict[str, Any],
        lost_words: dict[str, str],
    ) -> Result:
        picture, background, fit = compose(canvas, working, decoded_HW3)
        image = Image.fromarray(picture)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        measured = certificates.measure(buffer.getvalue(), canvas)
        certificate = {
            "version": certificates.VERSION,
            "packshot": version("packshot"),
            **certificates.judge(picture, canvas, measured),
            **measured,
            "input": {"name": product.name, "sha256": product.sha256},
            "mask": {
                "sha256": certificates.digest(product.alpha_HW),
                "file_sha256": product.mask_sha256,
                "method": product.method,
                "confidence": round(product.confidence, 4),
                "edge": "as given" if product.matte_HW is product.alpha_HW else "hard mask, anti-aliased by 1 px",
            },
            "transform": {"decoding": list(product.decoding), **canvas.transform},
            "working_size": [working.frame.width, working.frame.height],
            "colour_fit": fit.report,
            "request": request,
            "lost_words": lost_words,
            "model": self.models.manifest,
            "product_extension": None,  # needs a second segmentation; evaluate.py measures it
        }
        return Result(image, certificate, make_layers(canvas, working, decoded_HW3, background), buffer.getvalue())
