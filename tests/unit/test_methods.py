"""LoRA, ControlNet, IP-Adapter on the mini SDXL: nothing at step 0, and exports that stock diffusers reads alike."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from packshot.base.load import load_parts
from packshot.config.compose import compose
from packshot.config.schema import (
    ControlNetMethod,
    DataConfig,
    IPAdapterMethod,
    IPAdapterVariant,
    LoraKind,
    LoraMethod,
    MixedPrecision,
    ModelConfig,
    TrainLora,
)
from packshot.engine.keyed_random import SampleKey
from packshot.engine.tensor_cache import TensorCache
from packshot.errors import PackshotError
from packshot.methods import METHODS
from packshot.runs.files import resolve
from packshot.train.encode import Encoder, encode_batch
from packshot.train.examples import Examples, framed, widened
from packshot.train.run import build_task
from packshot.train.task import DiffusionTask

BASE = resolve("data/models/sdxl")
CONFIGS = [
    LoraMethod(rank=4),
    LoraMethod(rank=4, alpha=8, kind=LoraKind.rslora),
    LoraMethod(rank=4, kind=LoraKind.dora),
    ControlNetMethod(),
    IPAdapterMethod(),
    IPAdapterMethod(variant=IPAdapterVariant.plus),
]
NAMES = ["lora", "rslora", "dora", "controlnet", "ip_adapter", "ip_adapter_plus"]


def example(parts, rows, method):
    """A batch of one for ``method.predict``, without a cache."""
    seen = framed(rows[0], (128, 128))
    g = torch.Generator().manual_seed(0)
    width = parts.unet.config.cross_attention_dim
    pooled = parts.text_encoder_2.config.projection_dim
    batch = {
        "prompt_embeds": torch.randn(1, 77, width, generator=g),
        "pooled_prompt_embeds": torch.randn(1, pooled, generator=g),
        "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]]),
    }
    key = SampleKey(0, 0, rows.ids[0])
    condition = method.condition(seen, method.encode([seen]), key) if method else {}
    batch |= {name: tensor[None] for name, tensor in condition.items()}
    noisy = torch.randn(1, parts.unet.config.in_channels, 16, 16, generator=g)
    return noisy, torch.tensor([500]), batch


@torch.no_grad()
def bare(parts, noisy, timesteps, batch):
    added = {"text_embeds": batch["pooled_prompt_embeds"], "time_ids": batch["time_ids"]}
    return parts.unet(noisy, timesteps, encoder_hidden_states=batch["prompt_embeds"], added_cond_kwargs=added).sample


def wake(method):
    """Give every trained parameter a value that shows."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=g))


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_at_step_0_the_adapter_changes_nothing(config, parts, rows):
    before = bare(parts, *example(parts, rows, None))
    method = METHODS[type(config)](parts, config)
    with torch.no_grad():
        after = method.predict(*example(parts, rows, method))
    if isinstance(config, ControlNetMethod):
        assert torch.equal(before, after)
    else:
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_only_the_adapter_is_trained_and_in_fp32(config, parts, rows):
    parts.unet.to(torch.bfloat16)
    method = METHODS[type(config)](parts, config)
    trained = [p for p in method.parameters() if p.requires_grad]
    assert trained
    assert all(p.dtype == torch.float32 for p in trained)
    marks = {"LoraMethod": "lora", "ControlNetMethod": "controlnet.", "IPAdapterMethod": "proj"}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert marks[type(config).__name__] in name or "to_k_ip" in name or "to_v_ip" in name


@pytest.mark.parametrize("config", CONFIGS[:3], ids=NAMES[:3])
def test_stock_diffusers_loads_the_lora_alike(config, parts, rows, tmp_path):
    method = METHODS[type(config)](parts, config)
    wake(method)
    ours = method.predict(*example(parts, rows, method)).detach()
    method.export(tmp_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    plain = bare(pipeline, *example(parts, rows, None))
    pipeline.load_lora_weights(tmp_path)
    theirs = bare(pipeline, *example(parts, rows, None))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (theirs - plain).abs().max() > 1e-2


def test_the_kohya_copy_of_the_lora_gives_the_same_output(parts, rows, tmp_path):
    method = METHODS[LoraMethod](parts, LoraMethod(rank=4, alpha=2))
    wake(method)
    ours = method.predict(*example(parts, rows, method)).detach()
    method.export_kohya(tmp_path)
    state = load_file(tmp_path / "kohya_lora.safetensors")
    assert all(key.startswith("lora_unet_") for key in state)
    pipeline = StableDiffusionXLPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path, weight_name="kohya_lora.safetensors")
    torch.testing.assert_close(ours, bare(pipeline, *example(parts, rows, None)), rtol=1e-4, atol=1e-5)


def test_two_loras_are_both_active_with_their_weights(parts, rows, tmp_path):
    method = METHODS[LoraMethod](parts, LoraMethod(rank=4))
    wake(method)
    method.export(tmp_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    plain = bare(pipeline, *example(parts, rows, None))
    for name in ("one", "two"):
        pipeline.load_lora_weights(tmp_path, adapter_name=name)
    pipeline.set_adapters(["one", "two"], [1.0, -1.0])
    torch.testing.assert_close(bare(pipeline, *example(parts, rows, None)), plain, rtol=1e-3, atol=1e-4)


def test_stock_diffusers_loads_the_controlnet_alike(parts, rows, tmp_path):
    method = METHODS[ControlNetMethod](parts, ControlNetMethod())
    wake(method)
    noisy, timesteps, batch = example(parts, rows, method)
    ours = method.predict(noisy, timesteps, batch).detach()
    method.export(tmp_path)
    method.controlnet = ControlNetModel.from_pretrained(tmp_path)
    torch.testing.assert_close(method.predict(noisy, timesteps, batch).detach(), ours)
    pipeline = StableDiffusionXLControlNetPipeline.from_pretrained(BASE, controlnet=method.controlnet)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a table", image=batch["control_0"], num_inference_steps=1, height=128, width=128, output_type="np"
    ).images
    assert image.shape == (1, 128, 128, 3)


@pytest.mark.parametrize("variant", list(IPAdapterVariant), ids=str)
def test_stock_diffusers_loads_the_ip_adapter_alike(variant, parts, rows, tmp_path):
    method = METHODS[IPAdapterMethod](parts, IPAdapterMethod(variant=variant, image_dropout=0))
    wake(method)
    noisy, timesteps, batch = example(parts, rows, method)
    ours = method.predict(noisy, timesteps, batch).detach()
    method.export(tmp_path)
    keys = load_file(tmp_path / "ip_adapter.safetensors")
    assert {"ip_adapter.1.to_k_ip.weight", "ip_adapter.3.to_v_ip.weight"} <= set(keys)
    assert not any(key.startswith("unet") for key in keys)
    pipeline = StableDiffusionXLPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    pipeline.load_ip_adapter(
        str(tmp_path), subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None
    )
    pipeline.set_ip_adapter_scale(1.0)
    added = {
        "text_embeds": batch["pooled_prompt_embeds"],
        "time_ids": batch["time_ids"],
        "image_embeds": [batch["reference"].unsqueeze(1)],
    }
    with torch.no_grad():
        theirs = pipeline.unet(
            noisy, timesteps, encoder_hidden_states=batch["prompt_embeds"], added_cond_kwargs=added
        ).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", list(IPAdapterVariant), ids=str)
def test_the_null_reference_is_the_one_of_inference(variant, parts):
    method = METHODS[IPAdapterMethod](parts, IPAdapterMethod(variant=variant))
    pipeline = StableDiffusionXLPipeline(**parts.pipeline_components())
    from PIL import Image

    plus = variant is IPAdapterVariant.plus
    _, null = pipeline.encode_image(Image.new("RGB", (64, 64)), "cpu", 1, output_hidden_states=plus or None)
    torch.testing.assert_close(method.null_reference, null[0].float())


def test_gradients_are_equal_with_and_without_checkpointing(parts, rows):
    from packshot.engine.memory import enable_checkpointing

    method = METHODS[ControlNetMethod](parts, ControlNetMethod())
    wake(method)
    arguments = example(parts, rows, method)

    def gradients():
        method.zero_grad()
        method.predict(*arguments).square().mean().backward()
        return [p.grad.clone() for p in method.parameters() if p.requires_grad and p.grad is not None]

    plain = gradients()
    enable_checkpointing(method)
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def make_task(rows, folder=None, method=None, **objective):
    """A task and its samples; without a folder they are encoded at each access."""
    config = TrainLora()
    for name, value in objective.items():
        setattr(config.objective, name, value)
    parts = load_parts(config.model)
    method = METHODS[type(method or LoraMethod())](parts, method or LoraMethod(rank=4))
    examples = Examples(rows, Encoder(parts, method, 128, config.data), folder)
    examples.fill(Accelerator(cpu=True))
    return DiffusionTask(method, parts, config, examples), examples


class Few:
    """The first samples of a dataset."""

    def __init__(self, rows, count):
        self._rows, self.ids, self.texts, self.sizes = rows, rows.ids[:count], rows.texts[:count], rows.sizes[:count]
        self.read, self.digest, self.path = rows.read, rows.digest, rows.path

    def __len__(self):
        return len(self.ids)


def test_batches_are_made_of_the_sample_not_of_the_batch(rows):
    task, examples = make_task(Few(rows, 2))
    samples = [examples[0], examples[1]]
    keys = [SampleKey(0, 2, sample["id"]) for sample in samples]
    together = task.collate(samples, keys)
    for index in (0, 1):
        alone = task.collate([samples[index]], [keys[index]])
        assert all(torch.equal(alone[name][0], together[name][index]) for name in alone)
    assert together["time_ids"].dtype == torch.float32
    assert torch.isfinite(task(together)).all()


@pytest.mark.parametrize(
    "method", [LoraMethod(rank=4), ControlNetMethod(), IPAdapterMethod()], ids=lambda m: type(m).__name__
)
def test_cached_samples_are_those_encoded_on_the_fly(rows, tmp_path, method):
    few = Few(rows, 3)
    _, cached = make_task(few, tmp_path, method)
    task, fresh = make_task(few, None, method)
    key = SampleKey(0, 1, rows.ids[2])
    a, b = (task.collate([examples[2]], [key]) for examples in (cached, fresh))
    assert set(a) == set(b)
    for name in a:
        # the cache was encoded in batches: the same up to rounding
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=2e-5)


def test_a_filled_cache_is_kept_and_damage_is_encoded_again(rows, tmp_path, monkeypatch, caplog):
    few = Few(rows, 3)
    _, first = make_task(few, tmp_path)
    before = first[1]
    encoded = []
    original = Encoder.latents

    def counting(encoder, seen):
        encoded.extend(sample["id"] for sample in seen)
        return original(encoder, seen)

    monkeypatch.setattr(Encoder, "latents", counting)
    make_task(few, tmp_path)
    assert not encoded
    shard = next(tmp_path.glob("latents-*/*.packed"))
    data = bytearray(shard.read_bytes())
    data[5] ^= 1  # one bit of one value, which is noticed when it is used
    shard.write_bytes(data)
    _, damaged = make_task(few, tmp_path)
    assert not encoded
    with pytest.raises(PackshotError, match=r"is damaged \(checksum of the entry at byte 0\)") as caught:
        _ = [damaged[index] for index in range(3)]
    assert "run.resume=true" in caught.value.hint
    _, healed = make_task(few, tmp_path)
    assert sorted(encoded) == sorted(few.ids)
    assert all(torch.equal(before[name], healed[1][name]) for name in ("mean", "std"))
    assert torch.equal(before["prompt"]["prompt_embeds"], healed[1]["prompt"]["prompt_embeds"])
    shard.write_bytes(data[:100])  # half a file
    encoded.clear()
    make_task(few, tmp_path)
    assert len(encoded) == 3


def test_cached_bits_depend_on_the_dataset_alone(rows, tmp_path):
    few = Few(rows, 11)  # one whole chunk and the rest
    _, whole = make_task(few, tmp_path / "whole")
    _, healed = make_task(few, tmp_path / "healed")
    shards = list((tmp_path / "healed").glob("latents-*/*.packed"))
    cache = TensorCache(shards[0].parent)
    cache.open()
    kept = {key: cache.get(key) for key in (healed._key(index) for index in range(10))}
    for shard in shards:
        shard.unlink()
    cache.put(kept)  # all but the last sample are there: its whole chunk is encoded again
    _, healed = make_task(few, tmp_path / "healed")
    for index in range(11):
        assert all(torch.equal(whole[index][name], healed[index][name]) for name in ("mean", "std"))


def test_latents_that_are_not_finite_name_their_sample(rows, tmp_path, monkeypatch):
    original = Encoder.latents

    def broken(encoder, seen):
        tensors = original(encoder, seen)
        tensors[1]["mean"][0, 0, 0] = float("inf")
        return tensors

    monkeypatch.setattr(Encoder, "latents", broken)
    with pytest.raises(PackshotError, match=rf"{rows.ids[1]}.*not finite"):
        make_task(Few(rows, 3), tmp_path)


def test_the_vae_stays_in_fp32_under_mixed_precision(rows):
    _, examples = make_task(Few(rows, 1))
    expected = examples[0]
    examples.encoder.parts.to(torch.device("cpu"), torch.bfloat16)
    assert examples.encoder.parts.unet.dtype == torch.bfloat16
    assert all(torch.equal(examples[0][name], expected[name]) for name in ("mean", "std"))


def test_half_of_a_controlnets_prompts_are_empty_by_default():
    assert compose("train_controlnet", []).objective.caption_dropout == 0.5


def test_pictures_of_other_shapes_go_to_their_bucket(rows, tmp_path):
    few = Few(rows, 2)
    few.sizes = [(128, 128), (96, 160)]
    wide = Image.new("RGB", (160, 96), "teal")
    mask = Image.new("L", (160, 96), 0)
    mask.paste(255, (60, 20, 90, 80))
    few.read = lambda index, images, covering=None: (
        rows.read(0, images) | ({"image": wide, "mask": mask} if index else {})
    )
    few.digest = lambda index: f"shape {index}"
    task, examples = make_task(few, tmp_path)
    assert examples.groups[0] != examples.groups[1]
    sample = examples[1]
    assert sample["mean"].shape[-2:] == (12, 20)
    assert sample["time_ids"].tolist() == [96, 160, 0, 0, 96, 160]
    assert torch.isfinite(task(task.collate([sample], [SampleKey(0, 0, "wide")]))).all()


def test_dropped_captions_lose_both_embeddings_together(rows):
    task, examples = make_task(Few(rows, 1), caption_dropout=0.5)
    sample, kinds = examples[0], set()
    for epoch in range(20):
        batch = task.collate([sample], [SampleKey(0, epoch, rows.ids[0])])
        zero = [bool((batch[name] == 0).all()) for name in ("prompt_embeds", "pooled_prompt_embeds")]
        assert zero[0] == zero[1]
        kinds.add(zero[0])
    assert kinds == {True, False}


def test_text_embeddings_are_those_of_the_stock_pipeline(rows):
    task, examples = make_task(Few(rows, 1))
    pipeline = StableDiffusionXLPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    embeds, negative, pooled, _ = pipeline.encode_prompt(rows.texts[0], do_classifier_free_guidance=True)
    ours = examples[0]["prompt"]
    torch.testing.assert_close(ours["prompt_embeds"], embeds[0])
    torch.testing.assert_close(ours["pooled_prompt_embeds"], pooled[0])
    # what training calls unconditional is what inference subtracts
    assert bool((negative == 0).all()) == (str(task.config.objective.unconditional) == "zeros")


def test_a_changed_picture_mask_or_vae_is_encoded_again(rows, tmp_path):
    few = Few(rows, 2)
    _, examples = make_task(few)
    known = examples._key(0)
    assert known != examples._key(1)
    few.digest = lambda index: "another picture or mask"  # see test_the_digest_follows_mask_and_picture_...
    assert examples._key(0) != known
    encoder = examples.encoder
    with torch.no_grad():
        next(encoder.parts.vae.parameters()).mul_(1.5)
    encoder.parts.vae.save_pretrained(tmp_path)
    for vae, same in ((str(tmp_path), False), (None, True)):
        other = Encoder(load_parts(ModelConfig(vae=vae)), encoder.method, 128, TrainLora().data)
        assert (other.identity.vae == encoder.identity.vae) is same


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2", "feature_extractor"])
def test_tokenizer_and_image_processor_are_part_of_cache_names(part, tmp_path):
    def names(changed):
        encoder = Encoder(changed, METHODS[IPAdapterMethod](changed, IPAdapterMethod()), 128, TrainLora().data)
        return encoder.identity.vae, encoder.identity.text, encoder.identity.method

    known, other = names(load_parts(ModelConfig())), load_parts(ModelConfig())
    source = other._sources[part]
    shutil.copytree(source.folder, tmp_path / part)
    settings = next((tmp_path / part).glob("*_config.json"))
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "do_lower_case": False, "do_resize": False}))
    other._sources = {**other._sources, part: replace(source, place=replace(source.place, path=tmp_path / part))}
    same = [a == b for a, b in zip(known, names(other), strict=True)]
    assert same == [True, part == "feature_extractor", part != "feature_extractor"]


def test_encodings_of_another_precision_have_other_names(rows, tmp_path):
    folders = {}
    for precision in (MixedPrecision.no, MixedPrecision.bf16):
        config = TrainLora()
        config.train.mixed_precision, config.data.cache_dir = precision, str(tmp_path)
        few = Few(rows, 1)
        _, examples = build_task(config, load_parts(config.model), few, few, Accelerator(cpu=True))
        folders[precision] = {name: cache.folder for name, cache in examples._caches.items()}
    assert len({found["text"] for found in folders.values()}) == 2
    assert len({found["latents"] for found in folders.values()}) == 1  # the VAE stays in fp32


def test_over_a_bf16_base_small_steps_still_move_the_weights(parts, rows):
    parts.unet.to(torch.bfloat16)
    method = METHODS[LoraMethod](parts, LoraMethod(rank=2, target_modules=r"mid_block.*attn2\.to_[qkv]$"))
    trained = [p for p in method.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    noisy, timesteps, batch = example(parts, rows, method)
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = method.predict(noisy, timesteps, batch).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.dtype == torch.float32 for p in trained)
    moved = sum(int((p != b).sum()) for p, b in zip(trained, before, strict=True))
    assert moved > 0.99 * sum(p.numel() for p in trained)


def test_pictures_are_encoded_together_by_their_size(parts, rows):
    batches = {128: 4, 384: 4, 512: 4, 768: 1, 1024: 1, 2048: 1}
    assert {side: encode_batch((side, side)) for side in batches} == batches
    method = METHODS[LoraMethod](parts, LoraMethod())
    for side in (128, 512, 1024):
        encoder = Encoder(parts, method, side, DataConfig(buckets=False))
        chunks = Examples(rows, encoder, None)._chunks(range(16))
        assert {len(chunk) for chunk in chunks} == {batches[side]}


# ---- letterbox bars ----


def test_cells_of_letterbox_bars_are_outside(rows):
    """A product as wide as its picture is letterboxed into the square: 32 px above and below, four cells each."""
    _, examples = make_task(Few(rows, 1))
    photo = rows[0]["image"].resize((128, 64))
    sample = {"id": "wide", "text": "", "image": photo, "mask": Image.new("L", photo.size, 255)}
    inside = widened(examples.encoder.latents([framed(sample, (128, 128))])[0])["inside"]
    assert not inside[:, :4].any()
    assert not inside[:, 12:].any()
    assert bool((inside[:, 4:12] == 1).all())


def test_letterbox_bars_do_not_count_in_the_loss(rows, monkeypatch):
    """Whatever the network predicts there; the same error elsewhere counts."""
    task, examples = make_task(Few(rows, 1), background_weight=2.0, boundary_weight=3.0)
    sample = {**examples[0], "inside": examples[0]["inside"].clone()}
    sample["inside"][..., :3] = 0
    batch = task.collate([sample], [SampleKey(0, 0, rows.ids[0])])
    assert not batch["weight"][..., :3].any()
    assert bool((batch["weight"][..., 3:] > 0).all())

    def loss_with_error(columns):
        def predict(noisy_BCHW, timesteps_B, batch):
            prediction = torch.zeros_like(noisy_BCHW)
            prediction[..., columns] += 100
            return prediction

        monkeypatch.setattr(task.method, "predict", predict)
        return task(batch).item()

    assert loss_with_error(slice(0, 3)) == loss_with_error(slice(0, 0))
    assert loss_with_error(slice(0, 4)) > 10 * loss_with_error(slice(0, 0))
