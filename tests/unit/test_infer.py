"""The whole way from a photo to a picture with its certificate, on the mini family with stock adapters."""

import hashlib
import io
import json
import logging
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from packshot.base.load import load_parts
from packshot.base.shapes import meta_parts
from packshot.base.tokens import lost_words
from packshot.config.compose import compose
from packshot.config.schema import (
    AdaptersConfig,
    GenerateSettings,
    IPAdapterLayers,
    IPAdapterMethod,
    LoraKind,
    LoraMethod,
    ModelConfig,
    Placement,
    SceneConfig,
)
from packshot.errors import ConfigError, PackshotError
from packshot.evaluate.samples import place_photo
from packshot.generate import Packshot
from packshot.generate.adapter_schedule import Switch, switching
from packshot.generate.adapters import ip_adapter_scales
from packshot.generate.certificate import digest, judge, load_certificates, measure
from packshot.generate.composite import blend
from packshot.generate.denoise import encode
from packshot.generate.jobs import mask_files, product_files
from packshot.generate.load import load_models
from packshot.generate.product import core_of, prepare
from packshot.generate.references import open_references
from packshot.generate.run import generate
from packshot.methods import METHODS
from packshot.scene import Scene

QUICK = GenerateSettings(num_inference_steps=2, guidance_scale=2.0)
SCENE = Scene(surface="a white podium", background="a grey wall")


def photo_and_mask(width=96, height=128, hard=True):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill=255)
    return Image.fromarray(noise), mask


@pytest.fixture(scope="module")
def tool():
    return Packshot.load()


def shaken(folder, file, pattern=""):
    """Random weights instead of an export's zeros, so that the adapter does something."""
    path = folder / file
    g = torch.Generator().manual_seed(0)
    tensors = {k: torch.randn(v.shape, generator=g) * 0.05 if pattern in k else v for k, v in load_file(path).items()}
    save_file(tensors, path)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Export folders as the trainers write them, filled with random weights."""
    root = tmp_path_factory.mktemp("exports")
    parts = load_parts(ModelConfig())
    for name in ("inpaint", "canny", "light"):
        ControlNetModel.from_unet(parts.unet).save_pretrained(root / name)
        (root / name / "packshot.json").write_text(json.dumps({"condition": name}))
        shaken(root / name, "diffusion_pytorch_model.safetensors", "controlnet_")
    for name, config in (("lora", LoraMethod(rank=4)), ("ip_adapter", IPAdapterMethod())):
        method = METHODS[type(config)](load_parts(ModelConfig()), config)
        (root / name).mkdir()
        method.export(root / name)
    shaken(root / "lora", "pytorch_lora_weights.safetensors")
    shaken(root / "ip_adapter", "ip_adapter.safetensors", "_ip.weight")
    return root


def pixels(result):
    return np.asarray(result.image).astype(int)


@pytest.mark.parametrize("size", [(96, 128), (601, 399), (33, 190), (1999, 1501)])
def test_core_is_the_input_byte_for_byte_at_full_resolution(tool, size):
    photo, mask = photo_and_mask(*size)
    [result] = tool.set_product(photo, mask).generate(SCENE, 1, settings=QUICK)
    core = core_of(np.asarray(mask))
    written = np.asarray(Image.open(io.BytesIO(result.png)))
    assert written.shape == (size[1], size[0], 3)
    assert (written == np.asarray(photo))[core].all()
    certificate = result.certificate
    assert certificate["core"]["pixels"] == core.sum()
    assert certificate["core"]["max_abs_diff"] == 0
    assert (
        certificate["core"]["sha256_input"] == certificate["core"]["sha256_output"] == digest(np.asarray(photo)[core])
    )
    outside = np.asarray(mask) == 0
    assert (written != np.asarray(photo))[outside].mean() > 0.9


def test_centered_core_is_the_stated_resampling(tool):
    photo, mask = photo_and_mask(300, 200)
    settings = GenerateSettings(num_inference_steps=2, guidance_scale=1, placement=Placement.center, size=[160, 128])
    [result] = tool.set_product(photo, mask).generate(SCENE, 1, settings=settings)
    core = core_of(np.asarray(result.layers["mask"]))
    assert result.image.size == (160, 128)
    stated = place_photo(photo, result.certificate["transform"])
    assert core.sum() > 100
    assert (np.asarray(result.image) == stated)[core].all()


def test_layers_give_the_picture_again_exactly(tool):
    [result] = tool.set_product(*photo_and_mask()).generate(SCENE, 1, settings=QUICK)
    product = np.asarray(result.layers["product"])
    again = blend(product[..., :3], product[..., 3], np.asarray(result.layers["background"]))
    assert (again == np.asarray(result.image)).all()
    assert (np.asarray(result.layers["mask"]) == product[..., 3]).all()


def test_same_seed_gives_the_same_bytes(tool):
    """The number of pictures asked for changes none of them."""
    tool.set_product(*photo_and_mask())
    three = tool.generate(SCENE, 3, seed=5, settings=QUICK)
    [alone] = tool.generate(SCENE, 1, seed=7, settings=QUICK)
    assert np.abs(pixels(three[2]) - pixels(alone)).max() <= 1
    assert three[2].png == alone.png
    assert three[0].png != three[1].png


def test_on_step_counts_all_steps_and_its_error_ends_them(tool):
    """A server cancels a request between denoising steps; the next one is drawn as if nothing had been."""
    settings = replace(QUICK, num_inference_steps=3)
    steps = []
    tool.set_product(*photo_and_mask())
    whole = tool.generate(SCENE, num_images=2, settings=settings, on_step=lambda: steps.append(len(steps)))
    assert len(steps) == 6

    def stop():
        raise TimeoutError

    with pytest.raises(TimeoutError):
        tool.generate(SCENE, num_images=2, settings=settings, on_step=stop)
    again = tool.generate(SCENE, num_images=2, settings=settings)
    assert [result.png for result in again] == [result.png for result in whole]


def test_threads_with_different_products_do_not_mix(tool):
    products = [prepare(*photo_and_mask(96, height), name=str(height)) for height in (96, 128)]
    alone = [tool.with_product(p).generate(SCENE, 1, settings=QUICK)[0].png for p in products]
    found = [None, None]

    def work(i):
        found[i] = tool.with_product(products[i]).generate(SCENE, 2, settings=QUICK)[0].png

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert found == alone


def test_rgba_input_is_its_own_mask(tool):
    photo, mask = photo_and_mask()
    cutout = photo.copy()
    cutout.putalpha(mask)
    [result] = tool.set_product(cutout).generate(SCENE, 1, settings=QUICK)
    core = core_of(np.asarray(mask))
    assert result.certificate["mask"]["method"] == "alpha"
    assert (np.asarray(result.image) == np.asarray(photo))[core].all()


def test_light_comes_from_where_the_words_or_the_angle_say(tool, exports):
    lit = Packshot.load(controlnets=[str(exports / "light")]).set_product(*photo_and_mask())

    def picture(lighting, angle=None):
        settings = replace(QUICK, light_angle=angle)
        [result] = lit.generate(Scene(surface="a table", lighting=lighting), 1, settings=settings)
        return result.certificate["request"]["light_angle"], result.png

    assert picture("soft light from the left side")[0] == 180
    assert picture("soft light from the left side", 0.0)[0] == 0
    assert picture("soft daylight")[0] is None
    pictures = {picture("soft daylight", angle)[1] for angle in (None, 0.0, 90.0, 180.0, 270.0)}
    assert len(pictures) == 5
    # the map alone tells them apart: 360 degrees are 0 again
    assert picture("soft daylight", 360.0)[1] == picture("soft daylight", 0.0)[1]
    with pytest.raises(ConfigError, match="light_angle=90 has no effect"):
        tool.set_product(*photo_and_mask()).generate(SCENE, 1, settings=replace(QUICK, light_angle=90.0))


@pytest.mark.parametrize("kind", ["lora", "inpaint", "canny", "light", "ip_adapter"])
def test_every_adapter_changes_the_picture_and_is_certified(tool, exports, kind):
    """The certificate names it with the hash of its files."""
    key = {"inpaint": "controlnets", "canny": "controlnets", "light": "controlnets"}.get(kind, kind)
    value = [str(exports / kind)] if key == "controlnets" else str(exports / kind)
    adapted = Packshot.load(adapters=AdaptersConfig(**{key: value}))
    reference = Image.new("RGB", (50, 80), "orange") if kind == "ip_adapter" else None
    product = photo_and_mask()
    [before] = tool.set_product(*product).generate(SCENE, 1, settings=QUICK)
    [after] = adapted.set_product(*product).generate(SCENE, 1, reference=reference, settings=QUICK)
    assert np.abs(pixels(before) - pixels(after)).max() > 1
    [entry] = after.certificate["model"]["adapters"]
    assert entry["name"] == kind
    assert str(exports) not in json.dumps(after.certificate)
    assert str(Path.cwd()) not in json.dumps(after.certificate)  # the base lies in the checkout
    file = next(name for name in entry["files"] if name.endswith(".safetensors"))
    assert entry["files"][file] == hashlib.sha256((exports / kind / file).read_bytes()).hexdigest()


def test_several_loras_add_up_with_their_weights(exports):
    """Twice the same LoRA at half its weight is that LoRA."""
    folder = str(exports / "lora")

    def raw(adapters):
        [result] = Packshot.load(adapters=adapters).set_product(*photo_and_mask()).generate(SCENE, 1, settings=QUICK)
        return np.asarray(result.layers["raw"]).astype(int), result.certificate["model"]["adapters"]

    one, _ = raw(AdaptersConfig(lora=folder))
    two, named = raw(AdaptersConfig(loras=[folder, folder], lora_scales=[0.5, 0.5]))
    other, _ = raw(AdaptersConfig(loras=[folder, folder], lora_scales=[0.5, 0.0]))
    assert np.abs(one - two).max() <= 1
    assert np.abs(one - other).max() > 1
    assert [(entry["kind"], entry["scale"]) for entry in named] == [("lora", 0.5), ("lora", 0.5)]


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"lora": "a", "loras": ["b"]}, "both given"),
        ({"loras": ["a", "b"], "lora_scales": [1.0]}, "1 values for 2 LoRAs"),
        ({"loras": ["a"], "lora_scale": 0.5}, "is for adapters.lora"),
        ({"loras": ["a"], "lora_scales": [11.0]}, "out of range"),
    ],
)
def test_loras_and_weights_must_fit(adapters, message):
    with pytest.raises(ConfigError, match=message):
        AdaptersConfig(**adapters).check()


def test_adapters_work_together_and_scale_zero_switches_off(tool, exports):
    """Each one at weight 0 gives the picture without it."""
    nets = [str(exports / "inpaint"), str(exports / "canny")]
    rest = {"lora": str(exports / "lora"), "ip_adapter": str(exports / "ip_adapter"), "controlnets": nets}
    scene, product, look = SCENE, photo_and_mask(), Image.new("RGBA", (40, 40), (255, 0, 0, 60))
    full = Packshot.load(adapters=AdaptersConfig(**rest)).set_product(*product)
    [on] = full.generate(scene, 1, reference=look, settings=QUICK)
    off = Packshot.load(
        adapters=AdaptersConfig(**rest, lora_scale=0, ip_adapter_scale=0, controlnet_scales=[0.0, 0.0])
    ).set_product(*product)
    [silent] = off.generate(scene, 1, reference=look, settings=QUICK)
    [bare] = tool.set_product(*product).generate(scene, 1, settings=QUICK)
    assert np.abs(pixels(on) - pixels(bare)).max() > 1
    assert np.abs(pixels(silent) - pixels(bare)).max() <= 1
    assert [a.get("condition") for a in on.certificate["model"]["adapters"]] == [None, "inpaint", "canny", None]


def spanned(exports, kind, start, end):
    """A tool whose only adapter, of a kind, counts from one share of the steps to another."""
    if kind in ("lora", "ip_adapter"):
        span = {f"{kind}_start": start, f"{kind}_end": end}
        return Packshot.load(adapters=AdaptersConfig(**{kind: str(exports / kind)}, **span))
    nets = {"controlnets": [str(exports / kind)], "controlnet_starts": [start], "controlnet_ends": [end]}
    return Packshot.load(adapters=AdaptersConfig(**nets))


@pytest.mark.parametrize("kind", ["lora", "inpaint", "ip_adapter"])
def test_an_adapter_counts_only_inside_its_span(tool, exports, kind):
    """At steps outside its span the picture is as without it."""
    look = Image.new("RGB", (50, 80), "orange") if kind == "ip_adapter" else None
    product, four = photo_and_mask(), replace(QUICK, num_inference_steps=4)

    def drawn(tool):
        return [pixels(r) for r in tool.set_product(*product).generate(SCENE, 2, reference=look, settings=four)]

    [bare, _] = [pixels(r) for r in tool.set_product(*product).generate(SCENE, 2, settings=four)]
    always, never, first = (spanned(exports, kind, *span) for span in ((0, 1), (0.3, 0.45), (0, 0.5)))
    pictures = {name: drawn(tool) for name, tool in (("always", always), ("never", never), ("first", first))}
    assert np.abs(pictures["never"][0] - bare).max() <= 1
    for other in ("always", "never"):
        assert np.abs(pictures["first"][0] - pictures[other][0]).max() > 1
    # what a picture leaves switched off is on again for the next
    assert np.array_equal(drawn(first)[0], pictures["first"][0])
    assert np.array_equal(drawn(first)[1], pictures["first"][1])


def test_adapters_are_on_outside_the_steps_whatever_happens():
    """Prompts are encoded there, and text encoders may carry a LoRA."""
    said: list[float] = []
    with suppress(ValueError), switching([Switch((0.0, 0.5), said.append)], 2, lambda *_: {}) as callback:
        callback(None, 0, None, {})
        raise ValueError("in between")
    assert said == [1.0, 0.0, 1.0]


def test_spans_are_recorded_and_checked(exports, tmp_path):
    """Spans without meaning are refused."""
    tool = spanned(exports, "lora", 0.25, 0.75)
    [result] = tool.set_product(*photo_and_mask()).generate(SCENE, 1, settings=QUICK)
    assert result.certificate["model"]["adapters"][0]["steps"] == [0.25, 0.75]
    for keys in (
        ["adapters.lora_start=0.5", "adapters.lora_end=0.5"],
        ["adapters.controlnets=[a,b]", "adapters.controlnet_starts=[0.1]"],
        ["adapters.controlnets=[a]", "adapters.controlnet_ends=[1.5]"],
    ):
        with pytest.raises(ConfigError, match=r"adapters\.(lora|controlnet)"):
            compose("generate", keys)
    merged = METHODS[LoraMethod](load_parts(ModelConfig()), LoraMethod(rank=2, kind=LoraKind.loha))
    merged.export(tmp_path)
    with pytest.raises(ConfigError, match="merged into the base"):
        Packshot.load(adapters=AdaptersConfig(lora=str(tmp_path), lora_end=0.5))


def test_without_a_reference_the_ip_adapter_gets_its_null_image(exports):
    models = load_models(ModelConfig(), AdaptersConfig(ip_adapter=str(exports / "ip_adapter")))
    [embeds] = encode(models, "a wall", QUICK).arguments["ip_adapter_image_embeds"]
    assert embeds.shape[0] == 2
    assert not embeds.any()
    look = open_references(Image.new("RGB", (9, 9), "red"))
    [seen] = encode(models, "a wall", QUICK, look).arguments["ip_adapter_image_embeds"]
    assert not seen[0].any()
    assert seen[1].any()


RED, NOISE = (
    Image.new("RGB", (50, 80), "red"),
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 60, 3), np.uint8)),
)


@pytest.fixture(scope="module")
def guided(exports):
    """A tool with an IP-Adapter and a product."""
    return Packshot.load(adapters=AdaptersConfig(ip_adapter=str(exports / "ip_adapter"))).set_product(*photo_and_mask())


def by_references(tool, references, weights=()):
    [result] = tool.generate(SCENE, 1, reference=references, settings=QUICK, reference_weights=weights)
    return result


def test_a_reference_counts_as_often_as_its_weight(guided):
    """Among several references, weight 2 is the same picture twice."""
    once, both = pixels(by_references(guided, RED)), pixels(by_references(guided, [RED, NOISE]))
    assert np.abs(pixels(by_references(guided, [RED, RED])) - once).max() <= 1
    assert np.abs(pixels(by_references(guided, RED, [3])) - once).max() <= 1
    assert np.abs(pixels(by_references(guided, [NOISE, RED])) - both).max() <= 1
    assert np.abs(pixels(by_references(guided, [RED, NOISE], [1, 1])) - both).max() <= 1
    first, second = (pixels(by_references(guided, [RED, NOISE], weights)) for weights in ([2, 1], [1, 2]))
    assert np.abs(first - second).mean() > 0.1
    assert np.abs(pixels(by_references(guided, [RED, RED, NOISE])) - first).max() <= 1
    # the more one counts, the more the picture is the one of it alone
    assert np.abs(first - once).mean() < np.abs(second - once).mean()


def test_guidance_subtracts_as_many_null_images(guided):
    """The unconditional half has one null image for each reference."""
    [embeds] = encode(guided.models, "a wall", QUICK, open_references([RED, NOISE], [2, 3])).arguments[
        "ip_adapter_image_embeds"
    ]
    assert embeds.shape[:2] == (2, 5)
    assert not embeds[0].any()
    assert torch.equal(embeds[1, 0], embeds[1, 1])
    assert torch.equal(embeds[1, 2], embeds[1, 4])
    assert not torch.allclose(embeds[1, 1], embeds[1, 2], atol=1e-2)


def test_the_certificate_names_every_reference_and_its_weight(guided):
    red, noise = (hashlib.sha256(np.asarray(image).tobytes()).hexdigest() for image in (RED, NOISE))
    none, one, two = (
        by_references(guided, *given).certificate["request"] for given in ((None,), (RED,), ([NOISE, RED], [1, 4]))
    )
    assert (none["reference_sha256"], none["references"]) == (None, [])
    assert (one["reference_sha256"], one["references"]) == (red, [{"sha256": red, "weight": 1}])
    assert two["reference_sha256"] is None
    assert two["references"] == [{"sha256": noise, "weight": 1}, {"sha256": red, "weight": 4}]


def test_weights_that_cannot_be_counted_out_are_refused(guided):
    for weights in ([1], [0, 1], [40, 40]):
        with pytest.raises(ConfigError, match="reference_weights"):
            by_references(guided, [RED, NOISE], weights)


def test_generate_takes_several_references(tmp_path, exports):
    for name, image in (("red", RED), ("noise", NOISE)):
        image.save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in ("red", "noise")]
    keys = [f"references=[{','.join(files)}]", "reference_weights=[2,1]", f"adapters.ip_adapter={exports}/ip_adapter"]
    generate(configured(tmp_path, *keys, "num_images=1"))
    request = load_certificates(tmp_path / "run")["a-0"]["request"]
    hashes = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]
    assert request["references"] == [{"sha256": hashes[0], "weight": 2}, {"sha256": hashes[1], "weight": 1}]


LAYERS = {
    IPAdapterLayers.style: {"up": {"block_0": [0.0, 0.7, 0.0]}},
    IPAdapterLayers.layout: {"down": {"block_2": [0.0, 0.7]}},
    IPAdapterLayers.style_and_layout: {"down": {"block_2": [0.0, 0.7]}, "up": {"block_0": [0.0, 0.7, 0.0]}},
    IPAdapterLayers.all: 0.7,
}


def test_style_and_layout_are_instantstyles_layers():
    """The layers are those of the paper at SDXL's size."""
    unet = meta_parts(ModelConfig(base="stabilityai/stable-diffusion-xl-base-1.0")).unet
    assert {layers: ip_adapter_scales(unet, layers, 0.7) for layers in IPAdapterLayers} == LAYERS


def layered(exports, layers, scale):
    folder = str(exports / "ip_adapter")
    adapters = AdaptersConfig(ip_adapter=folder, ip_adapter_layers=layers, ip_adapter_scale=scale)
    return Packshot.load(adapters=adapters).set_product(*photo_and_mask())


def test_a_reference_enters_through_the_chosen_layers(tool, exports):
    """All other layers have scale 0."""
    tools = {layers: layered(exports, layers, 2.0) for layers in IPAdapterLayers}
    entered = {
        layers: {
            name.rpartition(".transformer_blocks")[0]
            for name, processor in each.models.pipe.unet.attn_processors.items()
            if getattr(processor, "scale", [0])[0]
        }
        for layers, each in tools.items()
    }
    style, layout = {"up_blocks.0.attentions.1"}, {"down_blocks.2.attentions.0"}
    assert entered[IPAdapterLayers.style] == style
    assert entered[IPAdapterLayers.layout] == layout
    assert entered[IPAdapterLayers.style_and_layout] == style | layout
    assert entered[IPAdapterLayers.all] > style | layout
    results = {layers: by_references(each, NOISE) for layers, each in tools.items()}
    [bare] = tool.set_product(*photo_and_mask()).generate(SCENE, 1, settings=QUICK)
    pictures = [pixels(result) for result in (bare, *results.values())]
    for number, picture in enumerate(pictures):
        assert all(np.abs(picture - other).mean() > 0.1 for other in pictures[:number])
    for layers, result in results.items():
        assert result.certificate["model"]["adapters"][0]["layers"] == layers.name


@pytest.mark.parametrize("layers", list(IPAdapterLayers), ids=str)
def test_at_scale_zero_no_layer_lets_a_reference_in(tool, exports, layers):
    [bare] = tool.set_product(*photo_and_mask()).generate(SCENE, 1, settings=QUICK)
    assert np.abs(pixels(by_references(layered(exports, layers, 0.0), NOISE)) - pixels(bare)).max() <= 1


def test_references_alone_speak_where_there_is_no_scene(exports):
    """As in training, where a dropped prompt is zeros and not the encoding of an empty one."""
    models = load_models(ModelConfig(), AdaptersConfig(ip_adapter=str(exports / "ip_adapter")))
    silent, spoken = (encode(models, prompt, QUICK).arguments for prompt in ("", "a wall"))
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        assert not silent[name].any()
        assert spoken[name].any()
    tool, look = Packshot(models).set_product(*photo_and_mask()), Image.new("RGB", (50, 80), "orange")
    prompts = [
        tool.generate(scene, 1, reference=reference, settings=QUICK)[0].certificate["request"]["prompt"]
        for scene, reference in ((Scene(), look), (Scene(), None), (SCENE, look))
    ]
    assert prompts == ["", Scene().render(), SCENE.render()]


def test_reference_without_ip_adapter_is_refused(tool):
    with pytest.raises(ConfigError, match="needs an IP-Adapter"):
        tool.set_product(*photo_and_mask()).generate(SCENE, 1, reference=Image.new("RGB", (8, 8)))


def test_lost_words_are_reported_in_log_and_certificate(tool, caplog):
    prompt = "a wall, " + " ".join(f"word{i}" for i in range(200))
    logging.getLogger("packshot").propagate = True
    [result] = tool.set_product(*photo_and_mask()).generate(prompt, 1, settings=QUICK)
    assert result.certificate["lost_words"]["prompt"].replace(" ", "").endswith("word199")
    assert "word199" in caplog.text.replace(" ", "")
    assert lost_words(tool.models.pipe.tokenizer, SCENE.render()) == ""


def test_nan_is_an_error_that_names_the_seed(tool, monkeypatch):
    tool.set_product(*photo_and_mask())
    forward = tool.models.pipe.unet.forward
    monkeypatch.setattr(tool.models.pipe.unet, "forward", lambda *a, **k: (forward(*a, **k)[0] * float("nan"),))
    with pytest.raises(PackshotError, match="NaN or infinity for seed 3"):
        tool.generate(SCENE, 1, seed=3, settings=QUICK)


def test_no_image_encoder_is_loaded_without_need(tool):
    """Only an IP-Adapter reads references."""
    assert tool.models.pipe.image_encoder is None
    parts = load_parts(ModelConfig())
    METHODS[LoraMethod](parts, LoraMethod()).pipeline()
    assert "image_encoder" not in parts.loaded()


def encoded(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def test_verdict_names_what_is_wrong(tool):
    photo, mask = photo_and_mask()
    canvas = tool.set_product(photo, mask).canvas(QUICK)
    rgb, flat = np.asarray(photo), np.full((128, 96, 3), 77, np.uint8)
    touched = rgb.copy()
    touched[64, 48] ^= 1
    pasted = blend(canvas.foreground_HW3, canvas.matte_HW, flat)
    cases = {"background_unchanged": rgb, "core_changed": touched, "background_flat": pasted}
    for reason, picture in cases.items():
        verdict = judge(picture, canvas, measure(encoded(picture), canvas))
        assert verdict["status"] == "needs_review"
        assert reason in verdict["reasons"]
    assert measure(encoded(touched), canvas)["core"]["max_abs_diff"] == 1


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (10, 10), 255), "mask is 10x10 px, the photo product is 96x128 px"),
        (Image.new("L", (96, 128), 0), "is empty"),
        (Image.new("L", (96, 128), 255), "the whole picture"),
    ],
)
def test_unusable_masks_are_refused_with_a_sentence(mask, message):
    with pytest.raises(ConfigError, match=message):
        prepare(photo_and_mask()[0], mask)


def test_pictures_in_memory_are_read_like_files(tmp_path):
    photo, mask = photo_and_mask()
    turned = photo.getexif()
    turned[0x0112] = 6
    grey = photo.convert("L")
    grey.putalpha(mask)
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    for name, picture, given, step in (
        ("turned.png", photo, None, "upright"),
        ("grey.png", grey, None, ""),
        ("deep.png", deep, mask, "16 bits"),
    ):
        given = given or (mask.transpose(Image.Transpose.ROTATE_270) if step == "upright" else None)
        picture.save(tmp_path / name, exif=turned if step == "upright" else None)
        file = prepare(tmp_path / name, given)
        with Image.open(tmp_path / name) as opened:
            memory = prepare(opened, given)
        for product in (file, memory):
            assert step in " ".join(product.decoding)
        np.testing.assert_array_equal(memory.rgb_HW3, file.rgb_HW3)
        np.testing.assert_array_equal(memory.alpha_HW, file.alpha_HW)
    assert file.rgb_HW3.shape == (128, 96, 3)
    assert prepare(tmp_path / "turned.png", mask.transpose(Image.Transpose.ROTATE_270)).rgb_HW3.shape == (96, 128, 3)


def test_colours_under_a_transparent_pixel_never_become_product():
    photo, mask = photo_and_mask()
    hidden = Image.new("RGB", photo.size, (255, 0, 255))
    hidden.paste(photo, mask=mask)
    hidden.putalpha(mask)
    larger = Image.new("L", photo.size)
    ImageDraw.Draw(larger).rectangle((16, 16, 80, 112), fill=255)
    product = prepare(hidden, larger)
    added = (np.asarray(larger) == 255) & (np.asarray(mask) == 0)
    assert (product.rgb_HW3[added] == 255).all()
    np.testing.assert_array_equal(prepare(hidden).rgb_HW3, np.asarray(hidden)[..., :3])


def test_a_cut_out_short_of_full_alpha_is_opaque_inside():
    """Matting tools stop a little below 255."""
    photo, mask = photo_and_mask()
    photo.putalpha(mask.point(lambda value: value * 250 // 255))
    product = prepare(photo)
    assert product.method == "alpha"
    np.testing.assert_array_equal(product.alpha_HW, np.asarray(mask))


def test_a_see_through_product_is_sent_to_review(tool):
    """The new scene would shine through it."""
    photo, mask = photo_and_mask()
    for level, found in ((255, False), (240, True)):
        soft = np.asarray(mask) // 255 * level
        soft[64, 48] = 255
        canvas = tool.set_product(photo, Image.fromarray(soft)).canvas(QUICK)
        flat = np.full((128, 96, 3), 77, np.uint8)
        verdict = judge(flat, canvas, measure(encoded(flat), canvas))
        assert ("product_see_through" in verdict["reasons"]) is found


def test_unusable_photos_are_refused_with_a_sentence(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("hello")
    for path in (tmp_path / "missing.png", text, tmp_path):
        with pytest.raises(ConfigError, match="product="):
            prepare(path)
    with pytest.raises(ConfigError, match="at least 32 px"):
        prepare(Image.new("RGB", (8, 8)), Image.new("L", (8, 8), 255))


def test_generate_without_a_product_says_what_to_do():
    with pytest.raises(ConfigError, match="no product is set"):
        Packshot(None).generate(SCENE)


def configured(tmp_path, *overrides):
    photo, mask = photo_and_mask()
    for folder, image in (("in", photo), ("masks", mask)):
        (tmp_path / folder).mkdir(exist_ok=True)
        image.save(tmp_path / folder / "a.png")
    paths = [f"product={tmp_path}/in", f"mask={tmp_path}/masks", f"run.dir={tmp_path}/run"]
    quick = ["num_images=2", "num_inference_steps=1", "guidance_scale=1", "tracking=none"]
    return compose("generate", [*paths, *quick, "scene.surface=a white podium", *overrides])


def test_a_folder_of_masks_has_one_mask_per_product(tmp_path):
    """Notes and folders in it are left alone."""
    for folder in ("in", "masks"):
        (tmp_path / folder / "b.png").mkdir(parents=True)
        Image.new("L", (40, 40)).save(tmp_path / folder / "a.png")
    (tmp_path / "masks" / "a.txt").write_text("drawn on Monday")
    (tmp_path / "masks" / "c.txt").write_text("to be drawn")
    [product] = product_files("product", str(tmp_path / "in"))
    assert mask_files(str(tmp_path / "masks"), [product]) == {product: tmp_path / "masks" / "a.png"}
    with pytest.raises(ConfigError, match=r"mask=.*masks has no mask for c.jpg"):
        mask_files(str(tmp_path / "masks"), [product, tmp_path / "in" / "c.jpg"])
    Image.new("L", (40, 40)).save(tmp_path / "masks" / "a.tif")
    with pytest.raises(ConfigError, match=r"mask=.*masks has several masks for a.png: a.png, a.tif"):
        mask_files(str(tmp_path / "masks"), [product])


def test_run_folder_has_pictures_layers_and_report(tmp_path):
    """Each picture has its certificate."""
    generate(configured(tmp_path))
    run = tmp_path / "run"
    certificates = load_certificates(run)
    assert list(certificates) == ["a-0", "a-1"]
    for stem, certificate in certificates.items():
        assert certificate["output_sha256"] == hashlib.sha256((run / f"{stem}.png").read_bytes()).hexdigest()
        assert certificate["request"]["scene"]["surface"] == "a white podium"
        assert all((run / "layers" / f"{stem}-{x}.png").exists() for x in ("background", "product", "mask", "raw"))
    page = (run / "report.html").read_text()
    assert "a white podium" in page
    assert page.count("data:image/") >= 5
    assert "http" not in page.replace("http-equiv", "")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["picture"] for line in lines] == ["a-0", "a-1"]


def test_a_resumed_run_makes_only_what_is_missing(tmp_path):
    """It overwrites nothing."""
    generate(configured(tmp_path))
    run = tmp_path / "run"
    kept = (run / "a-0.png").stat().st_mtime_ns
    expected = (run / "a-1.png").read_bytes()
    (run / "a-1.json").unlink()
    with pytest.raises(ConfigError, match="not empty"):
        generate(configured(tmp_path))
    generate(configured(tmp_path, "run.resume=true"))
    assert (run / "a-0.png").stat().st_mtime_ns == kept
    assert (run / "a-1.png").read_bytes() == expected
    assert (run / "a-1.json").exists()


@pytest.mark.parametrize(
    ("override", "differs"),
    [
        ("scene.surface=moss", "request.prompt"),
        ("run.seed=5", "request.seed"),
        ("model.vae=data/models/sdxl/vae", "vae"),
    ],
)
def test_a_run_is_not_gone_on_with_under_another_request(tmp_path, override, differs):
    generate(configured(tmp_path))
    before = {file: file.read_bytes() for file in sorted((tmp_path / "run").glob("*.[pjy]*"))}
    with pytest.raises(ConfigError, match=differs):
        generate(configured(tmp_path, "run.resume=true", "num_images=3", override))
    assert {file: file.read_bytes() for file in sorted((tmp_path / "run").glob("*.[pjy]*"))} == before
    assert "config.yaml" in {file.name for file in before}


def test_a_run_is_not_gone_on_with_under_another_photo_or_mask(tmp_path):
    config = configured(tmp_path)
    generate(config)
    again = replace(config, run=replace(config.run, resume=True))
    moved = Image.new("L", (96, 128))
    ImageDraw.Draw(moved).rectangle((30, 30, 70, 70), fill=255)
    moved.save(tmp_path / "masks" / "a.png")
    with pytest.raises(PackshotError, match="mask"):
        generate(again)
    Image.effect_noise((96, 128), 50).save(tmp_path / "in" / "a.png")
    with pytest.raises(ConfigError, match=r"input\.sha256"):
        generate(again)


def test_odd_names_are_linked_and_long_ones_refused(tmp_path):
    """Links in the report are quoted; the error names the limit."""
    config = configured(tmp_path, "num_images=1")
    for folder in ("in", "masks"):
        (tmp_path / folder / "a.png").rename(tmp_path / folder / "50% #1?.png")
    generate(config)
    assert 'href="50%25%20%231%3F-0.json"' in (tmp_path / "run" / "report.html").read_text()
    for folder in ("in", "masks"):
        (tmp_path / folder / "50% #1?.png").rename(tmp_path / folder / f"{'x' * 245}.png")
    with pytest.raises(PackshotError, match="cannot be written: File name too long"):
        generate(replace(config, run=replace(config.run, dir=str(tmp_path / "second"))))


def test_a_place_off_the_canvas_is_refused_before_the_run(tmp_path):
    keys = ["placement=coordinates", "size=[300,300]", "position=[0.05,0.5]", "background.color=[9,9,9]"]
    with pytest.raises(ConfigError, match="partly outside the canvas of 300x300 px"):
        generate(compose("generate", [*keys, f"run.dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_one_bad_product_fails_the_run_but_not_the_others(tmp_path):
    """The others are made, and the exit code is that of a failure."""
    config = configured(tmp_path)
    for folder in ("in", "masks"):
        Path(tmp_path / folder / "b.png").write_text("no image")
    with pytest.raises(PackshotError, match=r"1 of 2 products failed: b\.png"):
        generate(config)
    assert list(load_certificates(tmp_path / "run")) == ["a-0", "a-1"]


def test_prompt_is_escaped_in_the_report(tmp_path):
    config = configured(tmp_path, "num_images=1")
    generate(replace(config, scene=SceneConfig(), prompt="<script>alert(1)</script>"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("kind", ["lora", "controlnets", "ip_adapter"])
def test_a_wrong_adapter_folder_is_refused_first(tmp_path, kind):
    """No run folder exists then."""
    value = f"[{tmp_path}]" if kind == "controlnets" else str(tmp_path)
    with pytest.raises(ConfigError, match=f"adapters.{kind}"):
        generate(configured(tmp_path, f"adapters.{kind}={value}"))
    assert not (tmp_path / "run").exists()
