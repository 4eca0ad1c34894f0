"""Weights in the layouts that the world has: where they lie, which files are taken, what is refused and why."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from benchmarks.original_layout import checkpoint, unet_tensors, vae_tensors
from packshot.base import places
from packshot.base.load import load_parts
from packshot.base.original_names import block_names, original_name
from packshot.base.places import Place, choose_weights, find_place
from packshot.base.shapes import meta_parts
from packshot.base.single_file import PREFIXES
from packshot.config.compose import compose
from packshot.config.schema import ModelConfig
from packshot.errors import ConfigError
from packshot.runs.files import resolve
from packshot.train.run import train

MINI = "data/models/sdxl"


@pytest.fixture(scope="session")
def one_file(tmp_path_factory):
    """The mini base as one fp16 checkpoint in the published layout."""
    file = tmp_path_factory.mktemp("one") / "mini.safetensors"
    save_file(checkpoint(load_parts(ModelConfig())), file)
    return file


def same_weights(one, other, dtype=torch.float16):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name].to(dtype), theirs[name].to(dtype)), name


# ---- a base ----


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_base_in_one_file_has_the_same_weights(one_file, parts, part):
    loaded = load_parts(ModelConfig(base=str(one_file), config=MINI))
    same_weights(getattr(loaded, part), getattr(parts, part))


def test_the_identity_of_a_part_in_one_file_loads_no_part(one_file, tmp_path):
    before = load_parts(ModelConfig(base=str(one_file), config=MINI))
    known = {part: before.identity(part) for part in ("vae", "text_encoder", "text_encoder_2")}
    assert before.loaded() == {"unet", "scheduler"}
    assert len(set(known.values())) == 3
    tensors = load_file(one_file)
    for part, prefix in PREFIXES.items():
        name = next(key for key in tensors if key.startswith(prefix))
        changed = tmp_path / f"{part}.safetensors"
        save_file({**tensors, name: tensors[name] + 1}, changed)
        after = load_parts(ModelConfig(base=str(changed), config=MINI))
        assert {other for other, value in known.items() if after.identity(other) != value} == {part} & set(known)


def test_a_base_in_one_file_brings_tokenizers_and_scheduler(one_file, parts):
    loaded = load_parts(ModelConfig(base=str(one_file), config=MINI))
    for name in ("tokenizer", "tokenizer_2"):
        ids = getattr(loaded, name)("a marble table", padding="max_length").input_ids
        assert ids == getattr(parts, name)("a marble table", padding="max_length").input_ids
    assert loaded.scheduler.config.beta_schedule == "scaled_linear"
    assert loaded.pipeline_components(references=False).keys() >= {"unet", "vae", "text_encoder_2", "tokenizer_2"}


def test_a_file_with_other_shapes_than_sdxl_names_model_config(one_file):
    with pytest.raises(ConfigError, match=r"model\.config"):
        load_parts(ModelConfig(base=str(one_file)))


def test_marks_of_v_prediction_in_a_file_are_honoured(tmp_path, parts):
    file = tmp_path / "v.safetensors"
    save_file({**checkpoint(parts), "v_pred": torch.ones(()), "ztsnr": torch.ones(())}, file)
    from packshot.base.single_file import config_folder

    folder = config_folder(find_place("model.base", str(file)), None)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)


def test_original_names_are_those_of_the_published_sdxl():
    """Diffusers' own conversion takes every tensor at SDXL's real shapes back to its name."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = meta_parts(ModelConfig(base="published/shapes")).unet
    tensors = unet_tensors(unet)
    assert tensors["model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight"].shape == (
        1280,
        2048,
    )
    converted = convert_ldm_unet_checkpoint(dict(tensors), dict(unet.config))
    ours = unet.state_dict()
    assert converted.keys() == ours.keys()
    for name, tensor in converted.items():
        assert tensor is tensors[f"model.diffusion_model.{published(name, unet)}"], name
        assert tensor.shape == ours[name].shape


def published(name, unet):
    module, _, leaf = name.rpartition(".")
    return f"{original_name(module, block_names(unet.config))}.{leaf}"


def test_a_folder_with_fp16_files_alone_is_loaded(tmp_path, parts):
    base = tmp_path / "sdxl"
    shutil.copytree(resolve(MINI), base)
    for file in base.rglob("*.safetensors"):
        save_file({k: v.half() for k, v in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
        file.unlink()
    loaded = load_parts(ModelConfig(base=str(base)))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder"):
        same_weights(getattr(loaded, part), getattr(parts, part))
    assert loaded.identity("vae") != parts.identity("vae")


def test_a_vae_in_the_published_layout_is_loaded(tmp_path, parts):
    file = tmp_path / "sdxl_vae.safetensors"
    save_file({k: v.contiguous() for k, v in vae_tensors(parts.vae, prefix="").items()}, file)
    same_weights(load_parts(ModelConfig(vae=str(file))).vae, parts.vae, torch.float32)


def test_an_image_encoder_without_preprocessor_is_loaded(tmp_path, parts):
    """As the published IP-Adapter repository has it; the preparation follows from the encoder's size."""
    folder = tmp_path / "image_encoder"
    shutil.copytree(resolve(MINI) / "image_encoder", folder)
    for place in (folder, folder / "model.safetensors"):
        loaded = load_parts(ModelConfig(image_encoder=str(place)))
        same_weights(loaded.image_encoder, parts.image_encoder)
        assert loaded.feature_extractor.crop_size["height"] == parts.image_encoder.config.image_size


def test_the_scheduler_has_the_class_that_the_base_names(tmp_path):
    base = tmp_path / "sdxl"
    shutil.copytree(resolve(MINI), base)
    file = base / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "DDIMScheduler"}))
    assert isinstance(load_parts(ModelConfig(base=str(base))).scheduler, DDIMScheduler)
    assert isinstance(load_parts(ModelConfig()).scheduler, EulerDiscreteScheduler)


def test_frozen_parts_are_loaded_in_their_dtype():
    loaded = load_parts(ModelConfig(), torch.bfloat16)
    assert loaded.unet.dtype == loaded.text_encoder_2.dtype == torch.bfloat16
    assert loaded.vae.dtype == torch.float32  # SDXL's overflows in half precision


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "pointer of Git LFS"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{", "damaged or cut off"),
    ],
    ids=["empty", "lfs", "cut"],
)
def test_a_broken_base_file_is_refused_with_the_reason(tmp_path, content, reason):
    file = tmp_path / "base.safetensors"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        load_parts(ModelConfig(base=str(file)))


@pytest.mark.parametrize(
    ("key", "seems"),
    [
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "a LoRA"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.weight", "Stable Diffusion 1 or 2"),
        ("double_blocks.0.img_attn.proj.weight", "Flux"),
        ("down_blocks.0.resnets.0.conv1.weight", "one network in diffusers' layout"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path, key, seems):
    file = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match=seems):
        load_parts(ModelConfig(base=str(file)))


# ---- places ----


@pytest.mark.parametrize(
    ("value", "repository", "inside", "revision"),
    [
        ("owner/name", "owner/name", "", None),
        ("owner/name@v1.0", "owner/name", "", "v1.0"),
        ("h94/IP-Adapter/models/image_encoder", "h94/IP-Adapter", "models/image_encoder", None),
        ("owner/name/a file.safetensors@main", "owner/name", "a file.safetensors", "main"),
    ],
)
def test_hub_names_have_folder_and_revision(value, repository, inside, revision):
    place = find_place("model.base", value)
    assert (place.repository, place.inside, place.revision) == (repository, inside, revision)
    assert place.is_file == inside.endswith(".safetensors")


@pytest.mark.parametrize("value", ["nothing", "./gone/base", "data/models/gone", "/gone", "owner/name@", "a b/c"])
def test_what_is_neither_path_nor_hub_name_is_refused(value):
    with pytest.raises(ConfigError, match=r"model\.base=.*there is no such file or folder"):
        find_place("model.base", value)


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors", "model.bin"], None, ["model.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", ["model.fp16.safetensors"]),
        (["model.safetensors"], "fp16", ["model.safetensors"]),
        (["model.non_ema.safetensors", "model.fp16.safetensors"], None, ["model.fp16.safetensors"]),
        (["pytorch_model.bin", "flax_model.msgpack"], None, ["pytorch_model.bin"]),
        (["model.fp16-00002-of-00002.safetensors", "model.fp16-00001-of-00002.safetensors"], None,
         ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]),
        (["openvino_model.bin", "config.json"], None, []),
    ],
)  # fmt: skip
def test_the_files_of_one_variant_are_chosen(names, variant, chosen):
    assert choose_weights(names, variant)[1] == chosen


def test_without_the_hub_a_missing_model_costs_one_sentence(monkeypatch):
    monkeypatch.setattr(places, "hub_answers", lambda: False)
    with pytest.raises(ConfigError, match=r"model\.base=.*: there is no local path .*owner/name was not fetched"):
        load_parts(ModelConfig(base="owner/name"))


@pytest.mark.parametrize("refused", [OSError("no route to host"), RuntimeError("403 Forbidden")])
def test_the_hub_is_asked_once_and_briefly(refused, monkeypatch):
    """An address that never answers, or a proxy that refuses: no library asks again."""
    import huggingface_hub

    asked = []

    class Session:
        def head(self, address, timeout):
            asked.append(timeout)
            if isinstance(refused, OSError):
                raise refused
            return self

        def raise_for_status(self):
            raise refused

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    places.hub_answers.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(ConfigError, match="from the hub, which does not answer"):
                load_parts(ModelConfig(base="owner/name"))
    finally:
        places.hub_answers.cache_clear()
    assert asked == [places.HUB_SECONDS]


def test_a_place_on_the_hub_lists_and_fetches_its_own_folder(monkeypatch, tmp_path):
    files = ("README.md", "unet/config.json", "unet/model.fp16.safetensors", "unet/deep/other.json", "vae/config.json")
    fetched = []

    def fetch(key, repository, revision, wanted):
        fetched.extend(wanted)
        return tmp_path

    monkeypatch.setattr(places, "repository_files", lambda *_: files)
    monkeypatch.setattr(places, "fetch_files", fetch)
    place = Place("model.base", "owner/name", None, "owner/name").below("unet")
    assert place.names() == ["config.json", "model.fp16.safetensors"]
    assert place.fetch(["config.json"]) == tmp_path / "unet"
    assert fetched == ["unet/config.json"]


# ---- ControlNets and IP-Adapters of others ----


@pytest.fixture
def controlnet(parts, tmp_path):
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    net = ControlNetModel.from_unet(parts.unet)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    net.save_pretrained(tmp_path / "net")
    return net, tmp_path / "net"


def test_a_controlnet_of_others_is_named_after_its_condition(controlnet):
    from packshot.config.schema import AdaptersConfig
    from packshot.generate.load import load_models

    net, folder = controlnet
    with pytest.raises(ConfigError, match=r"Write its control map before its name, adapters\.controlnets=\["):
        load_models(ModelConfig(), AdaptersConfig(controlnets=[str(folder)]))
    models = load_models(ModelConfig(), AdaptersConfig(controlnets=[f"canny:{folder}"]))
    assert models.controls[0].condition == "canny"
    same_weights(models.pipe.controlnet.nets[0], net, torch.float32)


def test_a_controlnet_of_ours_has_one_condition(controlnet):
    from packshot.base.controlnets import read_control

    (controlnet[1] / "packshot.json").write_text('{"condition": "depth"}')
    assert read_control("adapters.controlnets", controlnet[1], "depth").condition == "depth"
    with pytest.raises(ConfigError, match="was trained on depth, not on canny"):
        read_control("adapters.controlnets", controlnet[1], "canny")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "a controlnet.safetensors"])
def test_controlnets_are_loaded_as_variant_and_as_file(controlnet, parts, name):
    from packshot.base.controlnets import load_controlnet

    net, folder = controlnet
    saved = folder / "diffusion_pytorch_model.safetensors"
    saved.rename(folder / name)
    source = folder if "fp16" in name else folder / name
    same_weights(load_controlnet("method.init", str(source), parts.unet), net, torch.float32)


def test_a_controlnet_file_of_another_size_is_refused(controlnet, parts, tmp_path):
    from packshot.base.controlnets import load_controlnet

    file = tmp_path / "other.safetensors"
    save_file({"controlnet_mid_block.weight": torch.zeros(8, 8, 1, 1)}, file)
    with pytest.raises(ConfigError, match=r"method\.init=.*cannot be loaded into this base"):
        load_controlnet("method.init", str(file), parts.unet)


@pytest.mark.parametrize("name", ["ip-adapter_sdxl_vit-h.safetensors", "ip-adapter_sdxl_vit-h.bin"])
def test_an_ip_adapter_under_its_published_name_is_loaded(tmp_path, parts, name):
    from packshot.config.schema import AdaptersConfig, IPAdapterMethod
    from packshot.generate.load import load_models
    from packshot.methods.ip_adapter import IPAdapter

    (tmp_path / "export").mkdir()
    IPAdapter(parts, IPAdapterMethod()).export(tmp_path / "export")
    tensors = load_file(tmp_path / "export" / "ip_adapter.safetensors")
    file = tmp_path / name
    if name.endswith(".bin"):
        groups = {"image_proj": {}, "ip_adapter": {}}
        for key, tensor in tensors.items():
            group, _, short = key.partition(".")
            groups[group][short] = tensor
        torch.save(groups, file)
    else:
        save_file(tensors, file)
    models = load_models(ModelConfig(), AdaptersConfig(ip_adapter=str(file)))
    assert models.has_ip_adapter
    assert models.manifest["adapters"][0]["files"].keys() == {name}


def test_microsofts_florence_names_the_readable_copy():
    from packshot.caption.models.weights import find
    from packshot.config.schema import CaptionerConfig

    with pytest.raises(ConfigError, match="florence-community/Florence-2-large"):
        find("florence2", ModelConfig(florence2="microsoft/Florence-2-large"), CaptionerConfig())


@pytest.mark.parametrize(
    ("script", "key", "value"),
    [
        ("train_lora", "method.init", "outputs/none"),
        ("train_lora", "model.loras", "[outputs/none]"),
        ("train_controlnet", "method.extra_controlnets", "[outputs/none]"),
        ("train_ip_adapter", "model.image_encoder", "outputs/none"),
    ],
)
def test_missing_weights_are_refused_before_data_and_models_load(script, key, value, monkeypatch):
    monkeypatch.setattr("packshot.train.run.load_training", lambda *_, **__: pytest.fail("data was read"))
    with pytest.raises(ConfigError, match=rf"{key}=outputs/none: there is no such file or folder"):
        train(compose(script, [f"{key}={value}", "tracking=none"]))
