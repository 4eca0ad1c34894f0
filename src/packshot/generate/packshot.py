"""Putting a product into a scene: ``Packshot.load(...).set_product(photo).generate(scene)``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from packshot.config.checks import validate
from packshot.config.compose import compose as compose_config
from packshot.config.compose import with_values
from packshot.config.schema import AdaptersConfig, GenerateSettings, InferenceConfig, MatteConfig, ModelConfig
from packshot.errors import ConfigError
from packshot.generate.canvas import Canvas, Working, make_working, place, plan_frame
from packshot.generate.composite import drawn_background
from packshot.generate.conditions import read_by, scene_inputs
from packshot.generate.denoise import Conditioning, EncodedProduct, OnStep, denoise, encode, encode_product
from packshot.generate.grounding import ground, light_of
from packshot.generate.group import as_group, cut_out
from packshot.generate.json_types import Json
from packshot.generate.load import Models, load_models
from packshot.generate.plain import NO_MODELS, draw_plain, plain_request
from packshot.generate.product import Product, Source, prepare
from packshot.generate.refine import Pass, focus_background, refine
from packshot.generate.request import describe_request, usable_references
from packshot.generate.result import Background, Result, finish
from packshot.generate.retries import draw_within_budget, refuse_useless_control, with_control
from packshot.scene import Scene

__all__ = ["Packshot", "Result"]


@dataclass(frozen=True)
class Drawing:
    """What a background that is drawn needs besides."""

    working: Working
    conditioning: Conditioning
    product: EncodedProduct


@dataclass(frozen=True)
class Ready:
    """A request made ready: what all of its pictures share.

    asked: what certificates state of it, without the seed. drawing: None for a background of one colour.
    """

    product: Product
    canvas: Canvas
    settings: GenerateSettings
    asked: Json
    drawing: Drawing | None


@dataclass
class Packshot:
    """Loaded models and, after :meth:`set_product`, a product.

    ``generate`` may be called from several threads: instances that share models take turns, picture by picture, and
    a request keeps the product it started with. Threads with different products use :meth:`with_product`.
    loaded: None where only backgrounds of one colour are asked for.
    """

    loaded: Models | None
    matte: MatteConfig = field(default_factory=MatteConfig)
    product: Product | None = None
    networks: Mapping[str, str] = field(default_factory=dict)
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def models(self) -> Models:
        """The loaded models. Raises ConfigError: none are."""
        if self.loaded is None:
            raise ConfigError("no model is loaded.", "Use Packshot.load, or name a background.color.")
        return self.loaded

    @classmethod
    def load(
        cls,
        model: str | ModelConfig = "mini",
        lora: str | Path | None = None,
        controlnets: Sequence[str | Path] = (),
        ip_adapter: str | Path | None = None,
        adapters: AdaptersConfig | None = None,
        matte: MatteConfig | None = None,
        networks: Mapping[str, str] | None = None,
        inference: InferenceConfig | None = None,
    ) -> Packshot:
        """Load a base and its adapters.

        model: the name of a file in ``conf/model`` or a ModelConfig.
        lora, controlnets, ip_adapter: export folders, each at weight 1; ``adapters`` names them with weights.
        networks: ONNX files that estimate what control maps are drawn from, by the input's name (``depth``).
        inference: precision and memory.

        Raises:
            ConfigError: both ways of naming adapters are used, or a part is missing or does not fit.
        """
        if adapters is not None and (lora or controlnets or ip_adapter):
            raise ConfigError("adapters and lora/controlnets/ip_adapter are both given.", "Use one of the two ways.")
        wanted = adapters or AdaptersConfig(
            lora=None if lora is None else str(lora),
            controlnets=list(map(str, controlnets)),
            ip_adapter=None if ip_adapter is None else str(ip_adapter),
        )
        config = compose_config("generate", [f"model={model}"]).model if isinstance(model, str) else model
        return cls(load_models(config, wanted, inference), matte or MatteConfig(), networks=networks or {})

    def set_product(
        self,
        image: Source,
        mask: Source | None = None,
        name: str | None = None,
        **inputs: Source | None,
    ) -> Packshot:
        """Take this product from now on; returns ``self``.

        image: RGB, or RGBA whose alpha is the mask. mask: white = product, of the image's size; found when not given.
        inputs: pictures of the image's size that control maps are drawn from, such as ``depth`` (near is bright); they
        are estimated when not given, where a ControlNet reads them and a network for it is known.

        Raises:
            ConfigError, PackshotError: see :func:`packshot.generate.product.prepare`.
        """
        known = name or (Path(image).stem if isinstance(image, str | Path) else "product")
        given = {key: picture for key, picture in inputs.items() if picture is not None}
        self.product = prepare(image, mask, self.matte, known, given, self.read_networks())
        return self

    def set_group(
        self,
        images: Sequence[Source],
        masks: Sequence[Source | None] = (),
        names: Sequence[str] = (),
        most_pixels: int | None = None,
    ) -> Packshot:
        """Take several products from now on, side by side in one picture; returns ``self``.

        images: photos as of :meth:`set_product`, from left to right. masks: one for each, or none at all. names: of the
        photos, for certificates. most_pixels: largest size of the cut-out that they make.

        Raises:
            ConfigError, PackshotError: see :func:`packshot.generate.product.prepare`; or the cut-out is too large.
        """
        if len(images) < 2 or len(masks) not in (0, len(images)):
            raise ConfigError(
                f"a group of {len(images)} products has {len(masks)} masks.",
                "Give at least two products, and a mask for each of them or for none.",
            )
        known = list(names) or [f"product {number}" for number in range(1, len(images) + 1)]
        products = []
        for image, mask, name in zip(images, masks or [None] * len(images), known, strict=True):
            products.append(prepare(image, mask, self.matte, name))
        whole = cut_out(products, most_pixels)
        self.product = as_group(prepare(whole.photo, None, self.matte, networks=self.read_networks()), whole)
        return self

    def read_networks(self) -> dict[str, str]:
        """Those of ``networks`` whose estimate a ControlNet reads."""
        read = read_by(self.loaded.controls) if self.loaded else set()
        return {key: path for key, path in self.networks.items() if key in read}

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
        **values: object,
    ) -> list[Result]:
        """``num_images`` pictures, the k-th from ``seed + k``. Same inputs and machine: same bytes.

        scene: a Scene or free text; an empty one leaves all to the references. settings: how a picture is made;
        ``values`` replace some of them by name, as in ``generate(scene, num_inference_steps=20)``. reference: the
        picture, or pictures, whose look the background takes (needs an IP-Adapter). reference_weights: how often each
        of several counts, at most 64 together; default 1 each. on_step: called after every denoising step of every
        picture; what it raises ends the request, and the device is free again.

        Raises:
            ConfigError: no product is set, a setting does not exist, or it cannot work.
            PackshotError: the model failed (NaN).
        """
        settings = with_values(settings or GenerateSettings(), values)
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
        with_layers: bool = True,
    ) -> Iterator[Result]:
        """Like :meth:`generate`, one result as soon as it is there. with_layers: whether results have their parts."""
        if num_images < 1:
            raise ConfigError(f"num_images={num_images} is out of range.", "Ask for at least one.")
        ready = self.make_ready(scene, settings, reference, reference_weights)
        for number in range(seed, seed + num_images):
            yield self.draw(ready, number, on_step, with_layers)

    def make_ready(
        self,
        scene: Scene | str,
        settings: GenerateSettings | None = None,
        reference: Source | Sequence[Source] | None = None,
        reference_weights: Sequence[int] = (),
    ) -> Ready:
        """All that the pictures of a request share, made once. Arguments and errors as of :meth:`generate`."""
        settings = settings or GenerateSettings()
        validate(settings)
        canvas = self.canvas(settings)
        product = self.product
        assert product is not None  # canvas() refuses to go on without one
        if settings.background.color:
            return Ready(product, canvas, settings, plain_request(settings), None)
        refuse_useless_control(settings.verify, len(self.models.controls))
        references = usable_references(self.models, reference, reference_weights)
        asked = describe_request(self.models, scene, settings, references)
        height, width = canvas.matte_HW.shape
        frame = plan_frame(height, width, self.models.resolution, self.models.unit)
        working = make_working(canvas, frame, self.models.pipe.vae_scale_factor)
        with self._turn:
            conditioning = encode(self.models, asked["prompt"], settings, references, scene_inputs(asked))
            encoded = encode_product(self.models, working)
        return Ready(product, canvas, settings, asked, Drawing(working, conditioning, encoded))

    def drawer(
        self,
        scene: Scene | str,
        settings: GenerateSettings,
        reference: Source | Sequence[Source] | None = None,
        reference_weights: Sequence[int] = (),
    ) -> Callable[[int, bool], Result]:
        """What makes the picture of a seed, with or without its layers, from one :meth:`make_ready`."""
        ready = self.make_ready(scene, settings, reference, reference_weights)
        return lambda seed, with_layers: self.draw(ready, seed, None, with_layers)

    def draw(self, ready: Ready, seed: int, on_step: OnStep | None = None, with_layers: bool = True) -> Result:
        """One picture of a request, drawn again within ``verify.retries``. Raises PackshotError: the model failed."""
        request = {**ready.asked, "seed": seed}
        if ready.drawing is None:
            return draw_plain(ready.product, ready.canvas, ready.settings, request, with_layers)
        drawing = ready.drawing

        def draw_once(number: int, control: float) -> Result:
            return self.draw_once(ready, drawing, number, control, on_step, with_layers)

        result = draw_within_budget(draw_once, seed, ready.settings.verify)
        return replace(result, certificate={**result.certificate, "request": request})

    def draw_once(
        self, ready: Ready, drawing: Drawing, seed: int, control: float, on_step: OnStep | None, with_layers: bool
    ) -> Result:
        """The picture of a seed as it comes. control: is added to the weights of ControlNets.

        Raises:
            PackshotError: the model failed (NaN).
        """
        canvas = ready.canvas
        settings = ready.settings
        request = {**ready.asked, "seed": seed}
        models = with_control(self.models, control)
        working = drawing.working
        conditioning = drawing.conditioning
        with self._turn:
            decoded = denoise(models, working, conditioning, settings, seed, on_step, drawing.product)
            second = Pass(models, canvas, conditioning, settings, seed, on_step)
            drawn = refine(second, working, decoded)
        stated = {"request": request, "lost_words": conditioning.lost_words, "model": self.models.manifest}
        rgb, fit = drawn_background(canvas, drawn.working, drawn.decoded_HW3)
        refined = drawn.refined
        if refined["applied"]:
            before, _ = drawn_background(canvas, working, decoded)
            rgb, focus = focus_background(canvas, before, rgb, settings.background.sharpen, request["prompt"])
            refined = {**refined, **focus}
        shadow = ground(canvas, rgb, settings, light_of(request, settings))
        background = Background(rgb, fit.report, drawn.working, drawn.decoded_HW3, shadow, refined)
        return finish(ready.product, canvas, background, stated, with_layers, ignored=settings.verify.ignore)

    def manifest(self, settings: GenerateSettings) -> Json:
        """The models that a request with these settings uses, for certificates."""
        return NO_MODELS if settings.background.color else self.models.manifest

    def request(
        self,
        scene: Scene | str,
        settings: GenerateSettings,
        reference: Source | Sequence[Source] | None = None,
        reference_weights: Sequence[int] = (),
    ) -> Json:
        """What a certificate will state as asked for, without the seed.

        Raises:
            ConfigError: a reference is missing or not an image, or no adapter reads it or an input of control maps.
        """
        if settings.background.color:
            return plain_request(settings)
        references = usable_references(self.models, reference, reference_weights)
        return describe_request(self.models, scene, settings, references)

    def canvas(self, settings: GenerateSettings) -> Canvas:
        """The product on the output's pixel grid."""
        if self.product is None:
            raise ConfigError("no product is set.", "Call set_product(image) first.")
        return place(self.product, settings)
