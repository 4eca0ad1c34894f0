"""LoRAs in the layouts of other trainers, as base, as start and in generation; what belongs nowhere is refused."""

import hashlib
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from packshot.base.load import load_parts
from packshot.base.lora_files import find_lora, merge_lora, peft_tensors, read_lora
from packshot.base.merge import merge
from packshot.base.original_names import block_names, original_name
from packshot.base.shapes import meta_parts
from packshot.config.compose import compose
from packshot.config.schema import AdaptersConfig, LoraMethod, LoraTargets, ModelConfig
from packshot.errors import ConfigError
from packshot.methods.lora import Lora

RANK = 4
ALPHA = 2.0
LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.1.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"


def networks_of(parts):
    return {"unet": parts.unet, "text_encoder": parts.text_encoder, "text_encoder_2": parts.text_encoder_2}


def random_factors(weight, rank=RANK):
    torch.manual_seed(weight.numel())
    down = torch.randn(rank, *weight.shape[1:])
    up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2))
    return down, up


def wanted_update(weight):
    down, up = random_factors(weight)
    return ((up.flatten(1) @ down.flatten(1)) * ALPHA / RANK).reshape(weight.shape)


def kohya(parts, published):
    """sd-scripts' layout, with the published names or with diffusers'."""
    names = block_names(parts.unet.config)
    stems = {f"lora_te1_text_model_{TEXT.replace('.', '_')}": parts.text_encoder.get_submodule(TEXT)}
    for layer in (LINEAR, CONV):
        name = original_name(layer, names) if published else layer
        stems[f"lora_unet_{name.replace('.', '_')}"] = parts.unet.get_submodule(layer)
    tensors = {}
    for stem, module in stems.items():
        down, up = random_factors(module.weight)
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    return tensors


def diffusers_layout(parts):
    """The layout of diffusers' scripts, whose scale is one: alpha is folded in."""
    tensors = {}
    modules = {f"unet.{layer}": parts.unet.get_submodule(layer) for layer in (LINEAR, CONV)}
    modules[f"text_encoder.text_model.{TEXT}"] = parts.text_encoder.get_submodule(TEXT)
    for name, module in modules.items():
        down, up = random_factors(module.weight)
        tensors[f"{name}.lora_A.weight"] = down
        tensors[f"{name}.lora_B.weight"] = up * ALPHA / RANK
    return tensors


def first_diffusers(parts):
    """The layout of diffusers before peft: attention processors."""
    tensors = {}
    for layer, new in ((LINEAR, "to_k"), (LINEAR.replace("to_k", "to_out.0"), "to_out")):
        down, up = random_factors(parts.unet.get_submodule(layer).weight)
        stem = f"unet.{LINEAR.removesuffix('.to_k')}.processor.{new}_lora"
        tensors[f"{stem}.down.weight"] = down
        tensors[f"{stem}.up.weight"] = up * ALPHA / RANK
    return tensors


LAYOUTS = {
    "kohya_published_names": lambda parts: kohya(parts, published=True),
    "kohya_diffusers_names": lambda parts: kohya(parts, published=False),
    "diffusers": diffusers_layout,
    "first_diffusers": first_diffusers,
}


@pytest.fixture(params=LAYOUTS)
def plain_file(request, parts, tmp_path):
    file = tmp_path / "its own name.safetensors"
    save_file(LAYOUTS[request.param](parts), file)
    return file


def test_every_layout_of_low_rank_gives_the_same_update(plain_file, parts):
    before = {name: weight.clone() for name, weight in parts.unet.state_dict().items()}
    lora = read_lora("adapters.lora", plain_file, networks_of(parts))
    assert lora.is_plain()
    merge_lora(lora, networks_of(parts), 0.5)
    changed = {name for name, weight in parts.unet.state_dict().items() if not torch.equal(weight, before[name])}
    assert f"{LINEAR}.weight" in changed
    assert changed == {f"{layer}.weight" for layer in lora.updates["unet"]}
    for name in changed:
        difference = parts.unet.state_dict()[name] - before[name]
        torch.testing.assert_close(difference, 0.5 * wanted_update(before[name]), rtol=1e-4, atol=1e-5)


def test_a_low_rank_file_draws_as_when_it_is_merged(plain_file, tmp_path):
    """Through diffusers' loader in generation, and merged into the base by model.loras: the same prediction."""
    from packshot.generate.load import load_models

    drawn = load_models(ModelConfig(), AdaptersConfig(lora=str(plain_file), lora_scale=0.5)).pipe.unet
    merged = load_parts(ModelConfig(loras=[str(plain_file)], lora_scales=[0.5])).unet
    plain = load_parts(ModelConfig()).unet
    first, second, third = (prediction(unet) for unet in (drawn, merged, plain))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
    assert (first - third).abs().max() > 1e-2


@torch.no_grad()
def prediction(unet):
    torch.manual_seed(0)
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    conditioning = {"text_embeds": torch.randn(1, pooled), "time_ids": torch.full((1, 6), 128.0)}
    latents, states = torch.randn(1, 4, 16, 16), torch.randn(1, 77, config.cross_attention_dim)
    return unet(latents, 500, encoder_hidden_states=states, added_cond_kwargs=conditioning).sample


def loha(weight):
    torch.manual_seed(1)
    rows, columns = weight.shape[0], weight[0].numel()
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    shapes = [(rows, RANK), (RANK, columns)] * 2
    tensors = {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=True)}
    one, two = (tensors[f"hada_w{n}_a"] @ tensors[f"hada_w{n}_b"] for n in "12")
    return tensors | {"alpha": torch.tensor(ALPHA)}, (one * two * ALPHA / RANK).reshape(weight.shape)


def lokr(weight):
    torch.manual_seed(2)
    first = torch.randn(4, 2)
    left, right = torch.randn(weight.shape[0] // 4, RANK), torch.randn(RANK, weight[0].numel() // 2)
    tensors = {"lokr_w1": first, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": torch.tensor(ALPHA)}
    return tensors, (torch.kron(first, left @ right) * ALPHA / RANK).reshape(weight.shape)


def full(weight):
    difference = torch.randn(weight.shape)
    return {"diff": difference}, difference


def locon_mid(weight):
    """Three convolutions: 1x1, 3x3, 1x1; compared with what PyTorch computes with them."""
    torch.manual_seed(3)
    down = torch.randn(RANK, weight.shape[1], 1, 1)
    mid = torch.randn(RANK, RANK, 3, 3)
    up = torch.randn(weight.shape[0], RANK, 1, 1)
    picture = torch.eye(weight.shape[1])[:, :, None, None].repeat(1, 1, 3, 3) * 0
    picture[:, :, 1, 1] = torch.eye(weight.shape[1])
    made = torch.nn.functional.conv2d(picture, down)
    made = torch.nn.functional.conv2d(made, mid, padding=1)
    response = torch.nn.functional.conv2d(made, up)  # (input, output, 3, 3), mirrored as convolutions are
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    return tensors, response.permute(1, 0, 2, 3).flip(2, 3)


@pytest.mark.parametrize(
    ("form", "layer"), [(loha, LINEAR), (loha, CONV), (lokr, LINEAR), (full, LINEAR), (locon_mid, CONV)]
)
def test_lycoris_forms_are_merged_by_their_formula(form, layer, parts, tmp_path):
    weight = parts.unet.get_submodule(layer).weight.detach().clone()
    tensors, wanted = form(weight)
    file = tmp_path / "lycoris.safetensors"
    save_file({f"lora_unet_{layer.replace('.', '_')}.{name}": t for name, t in tensors.items()}, file)
    lora = read_lora("model.loras", file, {"unet": parts.unet})
    assert not lora.is_plain()
    merge_lora(lora, {"unet": parts.unet}, 1.0)
    torch.testing.assert_close(parts.unet.get_submodule(layer).weight - weight, wanted, rtol=1e-3, atol=1e-3)


def test_a_dora_keeps_the_lengths_in_its_file(parts, tmp_path):
    weight = parts.unet.get_submodule(LINEAR).weight.detach().clone()
    down, up = random_factors(weight)
    lengths = torch.rand(weight.shape[0], 1) + 1
    stem = f"lora_unet_{LINEAR.replace('.', '_')}"
    file = tmp_path / "dora.safetensors"
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.dora_scale": lengths}, file)
    merge_lora(read_lora("model.loras", file, {"unet": parts.unet}), {"unet": parts.unet}, 1.0)
    merged = parts.unet.get_submodule(LINEAR).weight
    torch.testing.assert_close(merged.norm(dim=1), lengths[:, 0], rtol=1e-4, atol=1e-4)


# ---- refusals ----


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 8)}, "for Flux"),
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 8)}, "Stable Diffusion 1"),
        ({"unet.nowhere.lora_A.weight": torch.zeros(4, 8)}, r"1 of 3 tensors .* such as unet\.nowhere"),
        ({f"unet.{LINEAR}.odd.weight": torch.zeros(4)}, "belong to no layer"),
    ],
    ids=["flux", "sd1", "layer", "factor"],
)
def test_a_tensor_that_belongs_nowhere_refuses_the_file(tensors, says, parts, tmp_path):
    """first-contact D1: diffusers would load the part that fits and say nothing."""
    file = tmp_path / "foreign.safetensors"
    down, up = random_factors(parts.unet.get_submodule(LINEAR).weight)
    known = {f"unet.{LINEAR}.lora_A.weight": down, f"unet.{LINEAR}.lora_B.weight": up}
    save_file({**known, **tensors}, file)
    with pytest.raises(ConfigError, match=says):
        read_lora("adapters.lora", file, networks_of(parts))


def test_a_lora_of_another_size_is_refused_by_layer(parts, tmp_path):
    file = tmp_path / "large.safetensors"
    save_file(
        {f"unet.{LINEAR}.lora_A.weight": torch.zeros(4, 2048), f"unet.{LINEAR}.lora_B.weight": torch.zeros(1280, 4)},
        file,
    )
    with pytest.raises(ConfigError, match=rf"update of unet\.{LINEAR} does not fit"):
        read_lora("adapters.lora", file, networks_of(parts))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_lora_that_had_diverged_is_refused_at_once(value, parts, tmp_path):
    file = tmp_path / "lora.safetensors"
    down, up = random_factors(parts.unet.get_submodule(LINEAR).weight)
    up[-1, -1] = value
    save_file({f"unet.{LINEAR}.lora_A.weight": down, f"unet.{LINEAR}.lora_B.weight": up}, file)
    with pytest.raises(ConfigError, match=rf"{LINEAR}\.lora_B\.weight has values that are not finite"):
        read_lora("adapters.lora", file, networks_of(parts))


def test_half_of_an_update_is_refused(parts, tmp_path):
    file = tmp_path / "half.safetensors"
    save_file({f"unet.{LINEAR}.lora_B.weight": torch.zeros(64, 4)}, file)
    with pytest.raises(ConfigError, match="not whole"):
        read_lora("adapters.lora", file, networks_of(parts))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"version https://git-lfs", "Git LFS"), (b"\x09\0\0\0\0\0\0\0{", "cut off")],
)
def test_a_broken_file_is_refused_with_the_reason(content, reason, parts, tmp_path):
    file = tmp_path / "broken.safetensors"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        read_lora("adapters.lora", file, networks_of(parts))


def test_a_folder_with_several_files_asks_for_one(tmp_path):
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ConfigError, match=r"has 2 \.safetensors files: a\.safetensors, b\.safetensors"):
        find_lora("adapters.lora", str(tmp_path))
    (tmp_path / "b.safetensors").unlink()
    assert find_lora("adapters.lora", str(tmp_path)) == tmp_path / "a.safetensors"


def test_keys_at_sdxls_real_shapes_are_all_known(tmp_path):
    """Every linear layer and convolution of the real UNet under sd-scripts' names."""
    unet = meta_parts(ModelConfig(base="published/shapes")).unet
    names = block_names(unet.config)
    tensors = {}
    for layer, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            stem = f"lora_unet_{original_name(layer, names).replace('.', '_')}"
            tensors[f"{stem}.lora_down.weight"] = torch.zeros(1, *module.weight.shape[1:], dtype=torch.float16)
            tensors[f"{stem}.lora_up.weight"] = torch.zeros(
                module.weight.shape[0], 1, *[1] * (module.weight.ndim - 2), dtype=torch.float16
            )
    file = tmp_path / "all.safetensors"
    save_file(tensors, file)
    lora = read_lora("adapters.lora", file, {"unet": unet})
    assert len(lora.updates["unet"]) == len(tensors) / 2 > 700
    assert len(peft_tensors(lora)) == len(tensors)


# ---- method.init ----


def trained_from(file, **keys):
    parts = load_parts(ModelConfig())
    return Lora(parts, LoraMethod(init=str(file), **keys))


def test_training_starts_from_a_kohya_lora(parts, tmp_path):
    file = tmp_path / "start.safetensors"
    tensors = {k: v for k, v in kohya(parts, published=True).items() if "_0_attn2_to_k" in k}
    save_file(tensors, file)
    method = trained_from(file, rank=RANK, alpha=8.0)
    method.export(tmp_path / "export")
    exported = load_file(tmp_path / "export" / "pytorch_lora_weights.safetensors")
    down, up = exported[f"unet.{LINEAR}.lora_A.weight"], exported[f"unet.{LINEAR}.lora_B.weight"]
    torch.testing.assert_close(up @ down, wanted_update(parts.unet.get_submodule(LINEAR).weight), rtol=1e-4, atol=1e-4)
    others = [value for key, value in exported.items() if "lora_B" in key and LINEAR not in key]
    assert not any(value.any() for value in others)


def test_a_start_of_another_rank_names_the_rank(parts, tmp_path):
    file = tmp_path / "start.safetensors"
    save_file({k: v for k, v in kohya(parts, published=True).items() if "_0_attn2_to_k" in k}, file)
    with pytest.raises(ConfigError, match=f"Set method.rank={RANK}"):
        trained_from(file, rank=8)


def test_a_start_that_adapts_more_names_the_targets(parts, tmp_path):
    file = tmp_path / "start.safetensors"
    save_file({k: v for k, v in kohya(parts, published=True).items() if "te1" not in k}, file)
    with pytest.raises(ConfigError, match=r"method\.targets"):
        trained_from(file, rank=RANK)
    assert trained_from(file, rank=RANK, targets=LoraTargets.attention_and_conv)


def test_our_own_exports_are_loaded_by_file_and_folder(parts, tmp_path):
    from packshot.generate.load import load_models

    method = Lora(parts, LoraMethod(rank=RANK, alpha=ALPHA))
    for name, parameter in method.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    export = tmp_path / "export"
    method.export(export)
    method.export_kohya(export)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(export / "kohya_lora.safetensors", alone)
    values = [export, export / "pytorch_lora_weights.safetensors", export / "kohya_lora.safetensors", alone]
    results = [prediction(load_models(ModelConfig(), AdaptersConfig(lora=str(value))).pipe.unet) for value in values]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-3, atol=1e-4)


def test_a_lora_of_the_base_is_a_key_of_every_script():
    config = compose("train_controlnet", ["model.loras=[a,b]", "model.lora_scales=[1,0.5]"])
    assert config.model.merged_loras() == [1.0, 0.5]
    with pytest.raises(ConfigError, match=r"model\.lora_scales has 1 values for 2"):
        compose("generate", ["model.loras=[a,b]", "model.lora_scales=[1]"])


# ---- what the world reads ----


def kohya_export(tmp_path, parts, *overrides):
    """A kohya file as a training writes it."""
    from packshot.methods.base import Exported

    config = compose("train_lora", ["method.rank=4", *overrides])
    method = Lora(parts, config.method)
    method.export_dtype = getattr(torch, config.export.dtype.name)
    exported = Exported(config, "epsilon", samples=40, step=100)
    method.export_kohya(tmp_path, exported)
    with safe_open(tmp_path / "kohya_lora.safetensors", "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_a_kohya_export_has_sd_scripts_own_names(parts, tmp_path):
    """As published LoRAs for SDXL have them; the number of a block follows from the config."""
    _, tensors = kohya_export(tmp_path, parts)
    stems = {name.partition(".")[0] for name in tensors}
    assert "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q" in stems
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0" in stems
    assert not any("down_blocks" in stem or "mid_block_" in stem for stem in stems)


def test_a_kohya_export_tells_what_it_is(parts, tmp_path):
    """Keys that sd-scripts and web interfaces look at."""
    head, _ = kohya_export(tmp_path, parts, "method.trigger_words=[nordlicht style, oak]", "train.mixed_precision=no")
    assert head["ss_base_model_version"] == "sdxl_base_v1-0"
    assert head["ss_network_module"] == "networks.lora"
    assert (head["ss_network_dim"], head["ss_network_alpha"]) == ("4", "4")
    assert head["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert head["modelspec.trigger_phrase"] == "nordlicht style, oak"
    assert json.loads(head["ss_tag_frequency"]) == {"captions": {"nordlicht style": 40, "oak": 40}}
    assert (head["ss_num_train_images"], head["ss_steps"]) == ("40", "100")
    content = (tmp_path / "kohya_lora.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert head["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()


def test_exports_are_written_in_the_precision_that_is_asked_for(parts, tmp_path):
    _, tensors = kohya_export(tmp_path, parts, "export.dtype=float16")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    method = Lora(load_parts(ModelConfig()), LoraMethod(rank=RANK))
    method.export_dtype = torch.bfloat16
    method.export(tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "half" / "pytorch_lora_weights.safetensors").values()} == {
        torch.bfloat16
    }
    assert {parameter.dtype for parameter in method.parameters() if parameter.requires_grad} == {torch.float32}


def test_a_merged_base_is_a_pipeline_folder(parts, tmp_path):
    file = tmp_path / "look.safetensors"
    save_file(kohya(parts, published=True), file)
    keys = [f"model.loras=[{file}]", "model.lora_scales=[0.5]", f"run.dir={tmp_path / 'run'}"]
    merge(compose("merge", keys))
    folder = tmp_path / "run" / "model"
    expected = load_parts(ModelConfig(loras=[str(file)], lora_scales=[0.5]))
    loaded = load_parts(ModelConfig(base=str(folder)))
    for name in ("unet", "text_encoder"):
        ours, theirs = getattr(loaded, name).state_dict(), getattr(expected, name).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert json.loads((folder / "data.json").read_text())["loras"] == {str(file): 0.5}


def test_a_merge_without_loras_is_refused():
    with pytest.raises(ConfigError, match=r"model\.loras is empty"):
        merge(compose("merge", []))


def test_pickles_and_other_files_are_no_loras(tmp_path, parts):
    pickled, listed, picture = (tmp_path / name for name in ("look.bin", "list.pt", "picture.png"))
    torch.save({"unet.somewhere.lora.up.weight": torch.zeros(2, 2)}, pickled)
    torch.save([1, 2], listed)
    Image.new("RGB", (8, 8)).save(picture)
    for file, says in (
        (pickled, "belong to no layer"),
        (listed, "no file of tensors"),
        (picture, "no file of tensors"),
    ):
        with pytest.raises(ConfigError, match=f"{file.name}.* {says}"):
            read_lora("model.loras", file, {"unet": parts.unet})
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = parts.unet.get_submodule(layer).weight
    up, down = torch.ones(len(weight), 2), torch.ones(2, weight.shape[1])
    tensors = {f"unet.{layer}.lora.up.weight": up, f"unet.{layer}.lora.down.weight": down}
    torch.save(tensors, pickled)
    with pytest.raises(ConfigError, match=r"look\.bin is a pickle.*\n  Convert it once: safetensors"):
        read_lora("model.loras", pickled, {"unet": parts.unet})
    save_file(tensors, pickled)  # the content counts, not the name
    assert list(read_lora("model.loras", pickled, {"unet": parts.unet}).updates["unet"]) == [layer]


def test_a_merge_beyond_the_dtype_of_the_export_is_refused(parts, tmp_path):
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = parts.unet.get_submodule(layer).weight
    tensors = {
        f"unet.{layer}.lora.up.weight": torch.full((len(weight), 2), 1e3),
        f"unet.{layer}.lora.down.weight": torch.full((2, weight.shape[1]), 1e3),
    }
    save_file(tensors, tmp_path / "look.safetensors")
    keys = [f"model.loras=[{tmp_path}/look.safetensors]", f"run.dir={tmp_path}/merged", "export.dtype=float16"]
    with pytest.raises(ConfigError, match=r"too large for export\.dtype=float16"):
        merge(compose("merge", keys))
    assert not (tmp_path / "merged" / "model").exists()


def test_a_lora_merged_into_a_text_encoder_changes_its_identity(parts, tmp_path):
    """Otherwise embeddings in the cache would be those of the base without it."""
    file = tmp_path / "look.safetensors"
    save_file(kohya(parts, published=True), file)
    merged = load_parts(ModelConfig(loras=[str(file)]))
    assert merged.identity("text_encoder") != parts.identity("text_encoder")
    assert merged.identity("text_encoder_2") == parts.identity("text_encoder_2")
    assert merged.pipeline_components(references=False)["text_encoder"] is merged.text_encoder
