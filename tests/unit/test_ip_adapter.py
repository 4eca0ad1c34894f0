"""IP-Adapter: whose picture is the reference, where its weights start, and what is read of them."""

import json
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from packshot.base.ip_adapters import read_original
from packshot.base.load import load_parts
from packshot.base.shapes import meta_parts
from packshot.config.compose import compose
from packshot.config.schema import (
    IPAdapterMethod,
    IPAdapterVariant,
    LoraMethod,
    ModelConfig,
    ReferenceSource,
    TrainIPAdapter,
)
from packshot.engine.keyed_random import SampleKey
from packshot.errors import ConfigError
from packshot.methods import METHODS
from packshot.methods.ip_adapter import look, place
from packshot.methods.ip_adapter_file import to_original
from packshot.runs.files import resolve
from packshot.scene import Scene
from packshot.train.encode import Encoder
from packshot.train.examples import MAX_PEERS, Examples, choose_peers
from packshot.train.plan import make_plan
from packshot.train.task import DiffusionTask
from packshot.train.validation import prepare_held_out, sample_picture


class Chosen:
    """Some samples of a dataset."""

    def __init__(self, rows, indices):
        self._rows, self._indices = rows, indices
        self.ids, self.texts, self.sizes = ([of[i] for i in indices] for of in (rows.ids, rows.texts, rows.sizes))

    def __len__(self):
        return len(self.ids)

    def read(self, index, images, covering=None):
        return self._rows.read(self._indices[index], images, covering)

    def digest(self, index):
        return self._rows.digest(self._indices[index])


@pytest.fixture(scope="module")
def alike(rows):
    """Three samples of one look, and one of another."""
    looks = defaultdict(list)
    for index in range(len(rows)):
        looks[look(rows.read(index, ()))].append(index)
    several = next(indices for indices in looks.values() if len(indices) >= 3)
    alone = next(indices for indices in looks.values() if len(indices) == 1)
    return Chosen(rows, [*several[:3], *alone])


def make_task(rows, folder=None, **settings):
    """The task of an IP-Adapter and its samples; without a folder they are encoded at each access."""
    config = TrainIPAdapter(method=IPAdapterMethod(**{"image_dropout": 0, "peer_reference_prob": 1, **settings}))
    parts = load_parts(config.model)
    method = METHODS[IPAdapterMethod](parts, config.method)
    examples = Examples(rows, Encoder(parts, method, 128, config.data), folder)
    examples.fill(Accelerator(cpu=True))
    return DiffusionTask(method, parts, config, examples), examples


def own(examples, index):
    """What the method makes of a sample itself."""
    return examples.encoder.method.encode([examples.seen(index)])[0]["reference"]


def whose(examples, reference):
    """The sample whose surroundings a reference shows."""
    far = [float((own(examples, index) - reference).norm()) for index in range(len(examples))]
    assert min(far) < 1e-3
    return far.index(min(far))


def test_peers_share_a_look_and_follow_from_the_ids_alone():
    ids = [f"sample {number}" for number in range(40)]
    keys = [None if number == 7 else "big" if number < 30 else f"pair {number // 2}" for number in range(40)]
    chosen = choose_peers(keys, ids)
    assert chosen[7] == []
    for index, peers in enumerate(chosen):
        assert index not in peers
        assert len(set(peers)) == len(peers) == (0 if index == 7 else MAX_PEERS if index < 30 else 1)
        assert all(keys[other] == keys[index] for other in peers)
    named = {ids[index]: [ids[other] for other in peers] for index, peers in enumerate(chosen)}
    again = choose_peers(keys[::-1], ids[::-1])
    assert named == {ids[39 - index]: [ids[39 - other] for other in peers] for index, peers in enumerate(again)}
    counts = torch.bincount(torch.tensor([other for peers in chosen[:7] + chosen[8:30] for other in peers]))
    assert set(counts[counts > 0].tolist()) == {MAX_PEERS}  # nobody is shown more often than others
    assert choose_peers(["x", "x"], ["same", "same"]) == [[], []]


def test_a_look_is_surface_and_mood():
    scene = Scene(surface="A wooden table", mood="calm", background="a wall", surroundings=("leaves",))
    same = Scene(surface="a wooden table", mood="Calm", lighting="soft light", style=("macro",))
    assert look({"scene": scene}) == look({"scene": same})
    for other in (replace(scene, mood=None), replace(scene, surface="a white table"), replace(scene, surface="")):
        assert look({"scene": other}) not in (None, look({"scene": scene}))
    assert look({"scene": Scene(background="a wall")}) is None


def test_a_place_is_surface_and_background():
    scene = Scene("a marble table", ("lemons",), "a brick wall", "backlight", "calm")
    assert place({"scene": scene}) == place({"scene": Scene("A marble table", background="a brick wall", mood="fresh")})
    assert place({"scene": scene}) != place({"scene": Scene("a marble table", background="a forest")})
    assert place({"scene": Scene(mood="calm")}) is None


def test_the_reference_is_a_peer_drawn_at_each_access(alike):
    task, examples = make_task(alike)
    drawn = []
    for epoch in range(12):
        key = SampleKey(0, epoch, alike.ids[0])
        batch = task.collate([examples[0]], [key])
        assert torch.equal(batch["reference"], task.collate([examples[0]], [key])["reference"])
        drawn.append(whose(examples, batch["reference"][0]))
    assert set(drawn) == {1, 2}
    assert drawn != [drawn[0], drawn[1]] * 6
    alone = task.collate([examples[3]], [SampleKey(0, 0, alike.ids[3])])["reference"][0]
    assert torch.equal(alone, own(examples, 3))


def test_a_drawn_reference_ignores_the_order_of_the_set(alike, rows):
    backwards = Chosen(rows, alike._indices[::-1])
    key = SampleKey(0, 5, alike.ids[0])
    here, there = make_task(alike), make_task(backwards)
    drawn = [
        task.method.condition(None, examples[index]["encoded"], key)["reference"]
        for (task, examples), index in ((here, 0), (there, 3))
    ]
    assert torch.equal(*drawn)


def test_another_reference_is_lent_as_often_as_asked_for(alike):
    for share, expected in ((0.0, 0), (0.5, 20), (1.0, 40)):
        task, examples = make_task(alike, peer_reference_prob=share)
        encoded = list(examples[0]["encoded"])
        keys = [SampleKey(0, epoch, alike.ids[0]) for epoch in range(40)]
        drawn = [task.method.condition(None, encoded, key)["reference"] for key in keys]
        lent = sum(not torch.equal(reference, encoded[0]["reference"]) for reference in drawn)
        assert abs(lent - expected) <= (6 if share == 0.5 else 0)


def test_a_sample_is_its_own_reference_if_that_is_asked_for(alike):
    task, examples = make_task(alike, reference=ReferenceSource.self)
    for epoch in range(4):
        batch = task.collate([examples[0]], [SampleKey(0, epoch, alike.ids[0])])
        assert torch.equal(batch["reference"][0], own(examples, 0))


def test_cached_references_equal_those_encoded_on_the_fly(alike, tmp_path):
    task, cached = make_task(alike, tmp_path)
    _, fresh = make_task(alike)
    assert len(cached._caches["method"]) == len(alike)
    for index in range(len(alike)):
        for epoch in range(3):
            key = SampleKey(0, epoch, alike.ids[index])
            a, b = (task.collate([examples[index]], [key])["reference"] for examples in (cached, fresh))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    cached.encoder.release()
    assert torch.isfinite(task(task.collate([cached[0]], [SampleKey(0, 0, alike.ids[0])]))).all()


def test_the_first_samples_find_peers_in_the_whole_set(alike, tmp_path):
    """Validation uses a few samples, of which hardly two have one look."""
    task, examples = make_task(alike)
    first = Examples(alike, examples.encoder, tmp_path, count=1)
    first.fill(Accelerator(cpu=True))
    assert first.peers == examples.peers[:1]
    assert sorted(first.peers[0]) == [1, 2]
    assert len(first._caches["latents"]) == 1
    key = SampleKey(0, -1, alike.ids[0])
    a, b = (task.collate([of[0]], [key])["reference"] for of in (first, examples))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_methods_without_references_read_no_scene(alike, monkeypatch):
    parts = load_parts(TrainIPAdapter().model)
    method = METHODS[LoraMethod](parts, LoraMethod(rank=2))
    examples = Examples(alike, Encoder(parts, method, 128, TrainIPAdapter().data), None)
    monkeypatch.setattr(alike, "read", None)
    assert examples.peers == [[], [], [], []]


class Drawn(Exception):
    """Raised in place of a picture."""


def test_validation_draws_with_the_last_peers_reference(alike):
    task, examples = make_task(alike)
    held_out = prepare_held_out(examples, 0, torch.device("cpu"))

    class Pipeline:
        scheduler = examples.encoder.parts.scheduler
        vae_scale_factor = 8

        def __call__(self, **arguments):
            raise Drawn(arguments["ip_adapter_image_embeds"][0])

    with pytest.raises(Drawn) as caught:
        sample_picture(task, Pipeline(), held_out, {"prompt_embeds": torch.zeros(1)}, seed=0)
    null, reference = caught.value.args[0][:, 0]
    assert torch.equal(null, task.method.null_reference)
    assert whose(examples, reference) == examples.peers[0][-1] != 0


# ---- weights to start from ----

BASE, PLUS = IPAdapterVariant.base, IPAdapterVariant.plus
SDXL = ModelConfig(base="stabilityai/stable-diffusion-xl-base-1.0")


def base_projection(width, embed_dim, tokens=4):
    """``image_proj.*`` of ip-adapter_sdxl_vit-h.safetensors, for other sizes too."""
    return {
        "image_proj.proj.weight": (tokens * width, embed_dim),
        "image_proj.proj.bias": (tokens * width,),
        "image_proj.norm.weight": (width,),
        "image_proj.norm.bias": (width,),
    }


def plus_projection(width, embed_dim, dim, heads, tokens=16, depth=4):
    """``image_proj.*`` of ip-adapter-plus_sdxl_vit-h.safetensors, for other sizes too."""
    shapes = {
        "latents": (1, tokens, dim),
        "proj_in.weight": (dim, embed_dim),
        "proj_in.bias": (dim,),
        "proj_out.weight": (width, dim),
        "proj_out.bias": (width,),
        "norm_out.weight": (width,),
        "norm_out.bias": (width,),
    }
    for i in range(depth):
        shapes |= {f"layers.{i}.0.{norm}.{part}": (dim,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        shapes |= {
            f"layers.{i}.0.to_q.weight": (64 * heads, dim),
            f"layers.{i}.0.to_kv.weight": (2 * 64 * heads, dim),
            f"layers.{i}.0.to_out.weight": (dim, 64 * heads),
            f"layers.{i}.1.0.weight": (dim,),
            f"layers.{i}.1.0.bias": (dim,),
            f"layers.{i}.1.1.weight": (4 * dim, dim),
            f"layers.{i}.1.3.weight": (dim, 4 * dim),
        }
    return {f"image_proj.{name}": shape for name, shape in shapes.items()}


def attention_shapes(hidden_sizes, width):
    """``ip_adapter.*``: keys and values of the cross-attentions, which have the odd numbers among all attentions."""
    return {
        f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight": (hidden, width)
        for number, hidden in enumerate(hidden_sizes)
        for part in "kv"
    }


def documented(variant):
    """Names and shapes of the published file for SDXL and CLIP-ViT-H."""
    # down_blocks.1 and 2, up_blocks.0 and 1, mid_block: their transformers times the layers of each
    hidden_sizes = [640] * 2 * 2 + [1280] * 2 * 10 + [1280] * 3 * 10 + [640] * 3 * 2 + [1280] * 10
    assert len(hidden_sizes) == 70
    projection = {BASE: base_projection(2048, 1024), PLUS: plus_projection(2048, 1280, 1280, 20)}[variant]
    return projection | attention_shapes(hidden_sizes, 2048)


def mini_file(folder, variant, suffix):
    """A file as it is published, but for the mini base, of random values; its resampler is wider than that base's."""
    # down_blocks.1 and 2, up_blocks.0 and 1, mid_block
    hidden_sizes = [128] * 1 + [160] * 2 + [160] * 2 * 2 + [128] * 2 * 1 + [160] * 2
    projection = {BASE: base_projection(128, 80), PLUS: plus_projection(128, 128, 192, 3)}[variant]
    g = torch.Generator().manual_seed(2)
    shapes = projection | attention_shapes(hidden_sizes, 128)
    tensors = {name: torch.randn(shape, generator=g) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    file = folder / f"published{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, file)
    else:
        groups = defaultdict(dict)
        for name, tensor in tensors.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = tensor
        torch.save(dict(groups), file)
    return file, tensors


def started(parts, variant, init, **settings):
    tokens = {BASE: 4, PLUS: 16}[variant]
    return METHODS[IPAdapterMethod](
        parts, IPAdapterMethod(variant=variant, init=str(init), **({"num_tokens": tokens} | settings))
    )


@torch.no_grad()
def predicted(unet, reference):
    g = torch.Generator().manual_seed(0)
    width, pooled = unet.config.cross_attention_dim, 80
    added = {
        "text_embeds": torch.randn(1, pooled, generator=g),
        "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]]),
        "image_embeds": [reference[None, None]],
    }
    noisy, prompt = torch.randn(1, 4, 16, 16, generator=g), torch.randn(1, 77, width, generator=g)
    return unet(noisy, torch.tensor([500]), encoder_hidden_states=prompt, added_cond_kwargs=added).sample


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("variant", [BASE, PLUS], ids=str)
def test_published_weights_are_read_and_written_unchanged(variant, suffix, parts, alike, tmp_path):
    file, tensors = mini_file(tmp_path, variant, suffix)
    method = started(parts, variant, file)
    reference = method.encode([alike.read(0, ("image", "mask"))])[0]["reference"]
    ours = predicted(parts.unet, reference)
    pipeline = StableDiffusionXLPipeline.from_pretrained(resolve("data/models/sdxl"), torch_dtype=torch.float32)
    pipeline.load_ip_adapter(str(tmp_path), subfolder="", weight_name=file.name, image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(1.0)
    torch.testing.assert_close(ours, predicted(pipeline.unet, reference), rtol=1e-4, atol=1e-5)
    pipeline.set_ip_adapter_scale(0.0)
    assert (ours - predicted(pipeline.unet, reference)).abs().max() > 0.01
    (tmp_path / "export").mkdir()
    method.export(tmp_path / "export")
    written = load_file(tmp_path / "export" / "ip_adapter.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    trained = [p for p in method.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(tensor.numel() for tensor in tensors.values())


def test_an_export_folder_is_a_start_too(parts, tmp_path):
    file, tensors = mini_file(tmp_path, PLUS, ".safetensors")
    started(parts, PLUS, file).export(tmp_path)
    again = started(load_parts(ModelConfig()), PLUS, tmp_path)
    state = to_original(again.projection, again.processors)
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("variant", [BASE, PLUS], ids=str)
def test_ip_adapter_at_sdxl_size_has_the_published_shapes(variant):
    with torch.device("meta"):
        config = IPAdapterMethod(variant=variant, num_tokens={BASE: 4, PLUS: 16}[variant])
        method = METHODS[IPAdapterMethod](meta_parts(SDXL), config)
    state = to_original(method.projection, method.processors)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == documented(variant)


def header_only(file, shapes):
    """A .safetensors file in half precision whose values are a hole in the disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with file.open("r+b") as opened:
        opened.truncate(8 + len(header) + end)


@pytest.mark.parametrize("variant", [BASE, PLUS], ids=str)
def test_published_files_fit_sdxl_without_reading_values(variant, tmp_path):
    file = tmp_path / "published.safetensors"
    header_only(file, documented(variant))
    assert all(tensor.is_meta for tensor in read_original("method.init", str(file), meta=True).values())
    with torch.device("meta"):
        method = started(meta_parts(SDXL), variant, file)
    assert all(tensor.is_meta for tensor in to_original(method.projection, method.processors).values())


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_plan_counts_the_resampler_of_the_file_it_starts_from(suffix, tmp_path):
    file, tensors = mini_file(tmp_path, PLUS, suffix)
    config = compose("train_ip_adapter", ["method.variant=plus", "method.num_tokens=16", f"method.init={file}"])
    assert make_plan(config, 10).trained_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert all(tensor.is_meta for tensor in read_original("method.init", str(file), meta=True).values())


def test_a_resampler_is_as_wide_as_it_is_told_to_be(parts):
    method = METHODS[IPAdapterMethod](parts, IPAdapterMethod(variant=PLUS, resampler_dim=256))
    assert method.projection.latents.shape == (1, 4, 256)
    assert method.projection.layers[0].attn.heads == 4


@pytest.mark.parametrize(
    ("variant", "settings", "says"),
    [
        (PLUS, {"num_tokens": 4}, r"method\.num_tokens=4.*method\.variant=plus.*\(1, 16, 192\).*\(1, 4, 192\)"),
        (PLUS, {"num_tokens": 4}, r"Set method\.num_tokens=16"),
        (PLUS, {"resampler_dim": 128}, r"method\.resampler_dim=128.*\(1, 16, 192\).*\(1, 16, 128\)"),
        (PLUS, {"variant": BASE}, r"method\.variant=base.*\(1, 16, 192\).*\(512, 80\).*\n.*Set method\.variant=plus"),
        (BASE, {"variant": PLUS}, r"Set method\.variant=base"),
        (BASE, {"num_tokens": 8}, r"method\.num_tokens=8.*\(512, 80\).*\(1024, 80\)"),
    ],
    ids=["few_tokens", "way_out", "resampler", "plus_as_base", "base_as_plus", "many_tokens"],
)
def test_weights_of_other_settings_are_refused_with_both_shapes(variant, settings, says, parts, tmp_path):
    file, _ = mini_file(tmp_path, variant, ".safetensors")
    with pytest.raises(ConfigError) as caught:
        started(parts, **{"variant": variant, "init": file} | settings)
    caught.match(says)


def test_weights_of_another_base_or_kind_are_refused(parts, tmp_path):
    file, tensors = mini_file(tmp_path, BASE, ".safetensors")
    first = "ip_adapter.1.to_k_ip.weight"
    cases = {
        "narrow": {**tensors, first: tensors[first][:, :64].contiguous()},
        "less": {name: tensor for name, tensor in tensors.items() if name != first},
        "else": {"lora.weight": torch.ones(2)},
    }
    for name, content in cases.items():
        save_file(content, tmp_path / f"{name}.safetensors")
    torch.save({"image_proj": [1]}, tmp_path / "list.bin")
    (tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:1000])
    (tmp_path / "torn.bin").write_bytes(b"no archive")
    for name, says in {
        "narrow.safetensors": r"model\.base.*\(128, 64\) and not.*\(128, 128\)",
        "less.safetensors": rf"no {first} and not {first} \(128, 128\)",
        "else.safetensors": "holds no IP-Adapter",
        "list.bin": "not a dict of dicts",
        "torn.safetensors": "cannot be read",
        "torn.bin": "cannot be read",
        "gone.safetensors": "no such file",
        "": r"has no ip_adapter\.safetensors",
    }.items():
        with pytest.raises(ConfigError, match=rf"method\.init=.*{says}"):
            started(load_parts(ModelConfig()) if name == "narrow.safetensors" else parts, BASE, tmp_path / name)


def test_settings_that_no_base_adapter_has_are_refused():
    for key in ("num_tokens", "resampler_dim"):
        compose("train_ip_adapter", [f"method.{key}=64", "method.variant=plus"])
        with pytest.raises(ConfigError, match=rf"method\.{key}=64 with method\.variant=base"):
            compose("train_ip_adapter", [f"method.{key}=64"])
