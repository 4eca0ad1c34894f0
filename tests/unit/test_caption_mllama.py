"""Llama 3.2 Vision: labels, padding, masks, loss, generation settings, presets, four-bit training."""

import json

import pytest
import torch
from caption_fixtures import CAPTIONS, PROMPT, TILES, hand_written_cross_entropy, picture, save_tiny_mllama, trained_run
from PIL import Image
from transformers import MllamaForConditionalGeneration

from packshot.caption.decoding import write
from packshot.caption.models import mllama
from packshot.caption.models.adapter import loss_per_sample
from packshot.caption.models.load import load_captioner, ready_adapter
from packshot.caption.models.weights import Source, loading_error
from packshot.config.captioners import CAPTIONERS
from packshot.config.compose import compose
from packshot.config.schema import (
    CaptionerConfig,
    CaptionerKind,
    Constraint,
    ModelConfig,
    Quantization,
    Tuning,
)
from packshot.errors import ConfigError

IMAGES = [picture(0), picture(1)]
NO_MASKS = [None, None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_mllama(tmp_path_factory.mktemp("mllama"))


def settings(**values):
    return CaptionerConfig(kind=CaptionerKind.llama32_vision, **{"constraint": Constraint.none, **values})


def load(folder, trainable=False, **values):
    return mllama.load(ModelConfig(llama32_vision=str(folder)), settings(**values), trainable)


def trained(**values):
    run = trained_run("llama32_vision")
    return load_captioner(
        ModelConfig(llama32_vision=str(run.parent / "base")), settings(**{"adapter": str(run / "export"), **values})
    )


def test_loss_equals_the_cross_entropy_of_the_labels(base):
    adapter = load(base, trainable=True)
    batch = adapter.train_batch(IMAGES, NO_MASKS, CAPTIONS)
    assert (batch["attention_mask"] == 0).any(), "the two captions must differ in length, or padding is not tested"
    with torch.no_grad():
        logits_BTV = adapter.logits(batch)
        losses = loss_per_sample(logits_BTV, batch["labels"])
    for i in range(2):
        by_hand = hand_written_cross_entropy(logits_BTV[i], batch["labels"][i])
        assert losses[i].item() == pytest.approx(by_hand, rel=1e-5)
        alone = adapter.train_batch(IMAGES[i : i + 1], [None], CAPTIONS[i : i + 1])
        labels = torch.cat([torch.full((1, 1), -100), alone.pop("labels")], dim=1)  # the model moves them itself
        with torch.no_grad():
            assert losses[i].item() == pytest.approx(adapter.model(**alone, labels=labels).loss.item(), rel=1e-5)


def test_labels_are_caption_and_end_token_only(base):
    adapter = load(base)
    batch = adapter.train_batch(IMAGES, NO_MASKS, CAPTIONS)
    rows = adapter.model.lm_head.out_features
    for labels, ids, caption in zip(batch["labels"], batch["input_ids"], CAPTIONS, strict=True):
        kept = labels[labels != -100]
        assert adapter.tokenizer.decode(kept) == f"{caption}<|eot_id|>"
        assert kept.max() < rows, "the image token has no row in the output head"
        assert (ids == adapter.tokenizer.bos_token_id).sum() == 1
        assert (ids == adapter.processor.image_token_id).sum() == 1
        at = (labels != -100).nonzero()[0].item()
        assert ids[at + 1] == kept[0], "a label stands beside the position that predicts it"


def test_the_prompt_runs_from_the_picture_to_the_answer(base, tmp_path):
    ids = load(base).generate_batch(IMAGES[:1], [None])["input_ids"][0]
    text = load(base).tokenizer.decode(ids)
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>"
        f"{PROMPT}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    plain = load(save_tiny_mllama(tmp_path, template=None))
    ids = plain.generate_batch(IMAGES[:1], [None])["input_ids"][0]
    assert plain.tokenizer.decode(ids) == f"<|image|><|begin_of_text|>{PROMPT}\n"


def test_training_pads_on_the_right_and_writing_on_the_left(base):
    adapter = load(base)
    attention = adapter.train_batch(IMAGES, NO_MASKS, CAPTIONS)["attention_mask"]
    assert attention[:, 0].all()
    assert not attention[:, -1].all()
    rows = [[1, 2, 3], [1]]
    left = adapter._batch(IMAGES, NO_MASKS, rows, pad_left=True)
    assert left["input_ids"].tolist()[1][-1] == 1
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_text_sees_its_tiles_and_padding_sees_none(base):
    adapter = load(base)
    wide = Image.new("RGB", (112, 28), "red")
    batch = adapter.train_batch([IMAGES[0], wide], NO_MASKS, CAPTIONS)
    mask_BS1T, ids_BS = batch["cross_attention_mask"], batch["input_ids"]
    assert mask_BS1T.shape == (2, ids_BS.shape[1], 1, TILES)
    assert batch["aspect_ratio_mask"].sum(-1).squeeze(1).tolist() == mask_BS1T.amax(1).sum(-1).squeeze(1).tolist()
    for ids, mask, attention in zip(ids_BS, mask_BS1T, batch["attention_mask"], strict=True):
        at = (ids == adapter.processor.image_token_id).nonzero().item()
        sees = mask.any(dim=-1).squeeze(1)
        assert not sees[:at].any()
        assert torch.equal(sees[at:], attention[at:].bool())


def test_overfitted_captions_are_written_exactly():
    captioner = trained()
    assert captioner.caption(IMAGES, NO_MASKS) == CAPTIONS
    assert [captioner.caption([image], [None])[0] for image in IMAGES] == CAPTIONS


def test_swapping_the_images_swaps_the_captions():
    assert trained().caption(IMAGES[::-1], NO_MASKS) == CAPTIONS[::-1]


def test_the_checkpoints_generation_defaults_are_ignored(tmp_path):
    export = trained_run("llama32_vision") / "export"
    for file in export.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    hostile = {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "max_length": 20, "eos_token_id": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(hostile))
    for constraint in Constraint:
        assert trained(adapter=str(tmp_path), constraint=constraint).caption(IMAGES, NO_MASKS) == CAPTIONS


def test_truncation_is_seen():
    captions = trained(max_new_tokens=8).write(IMAGES, NO_MASKS)
    assert [caption.truncated for caption in captions] == [True, True]
    assert not any(caption.truncated for caption in trained().write(IMAGES, NO_MASKS))


# 4 projections of attention and 3 of the MLP in each of 4 layers, A and B of each; 2 layers cross.
# The vision encoder has 3 layers of 4 + 2, and there is one projector.
@pytest.mark.parametrize(
    ("tuning", "count"),
    [
        (Tuning.language_lora, 2 * 4 * 7),
        (Tuning.cross_attention_lora, 2 * 2 * 7),
        (Tuning.vision_adapter, 2 * (2 * 7 + 3 * 6 + 1)),
    ],
)
def test_a_preset_trains_its_layers_and_no_other(base, tuning, count):
    adapter = load(base, trainable=True, tuning=tuning, lora_rank=2)
    trainable = {name for name, parameter in adapter.model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == count
    if tuning is not Tuning.vision_adapter:
        assert all(".language_model." in name for name in trainable)
    if tuning is Tuning.cross_attention_lora:
        assert all(".layers.1." in name or ".layers.3." in name for name in trainable)
    before = {name: parameter.clone() for name, parameter in adapter.model.named_parameters()}
    batch = adapter.train_batch(IMAGES, NO_MASKS, CAPTIONS)
    optimizer = torch.optim.SGD([p for p in adapter.model.parameters() if p.requires_grad], lr=1.0)
    loss_per_sample(adapter.logits(batch), batch["labels"]).mean().backward()
    optimizer.step()
    moved = {name for name, parameter in adapter.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert moved <= trainable
    assert all("lora_B" in name for name in moved), "A moves only once B is not zero"


def test_the_default_preset_trains_no_weight_of_the_base(base):
    adapter = load(base, trainable=True, tuning=Tuning.language_lora)
    assert all("lora_" in n for n, p in adapter.model.named_parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match=r"captioner.tuning=frozen_vision is not for captioner=llama32_vision"):
        compose("caption_vlm", ["captioner=llama32_vision", "captioner.tuning=frozen_vision"])


def test_a_lora_merges_without_change(base, tmp_path):
    adapter = load(base, trainable=True, tuning=Tuning.vision_adapter, lora_rank=4)
    with torch.no_grad():
        for name, parameter in adapter.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    adapter.save(tmp_path)
    merged = load(base, adapter=str(tmp_path))
    batch = adapter.train_batch(IMAGES, NO_MASKS, CAPTIONS)
    with torch.no_grad():
        ours, theirs, plain = adapter.logits(batch), merged.logits(batch), load(base).logits(batch)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 1e-2
    assert [c.text for c in write(adapter, IMAGES, NO_MASKS)] == [c.text for c in write(merged, IMAGES, NO_MASKS)]


def test_a_lora_over_four_bits_takes_a_step_and_comes_back(base, tmp_path):
    four_bit = {"tuning": Tuning.language_lora, "lora_rank": 2, "quantization": Quantization.nf4}
    adapter = load(base, trainable=True, **four_bit)
    kinds = {type(m).__name__ for n, m in adapter.model.named_modules() if "language_model" in n and "base_layer" in n}
    assert "Linear4bit" in kinds
    assert not any("4bit" in type(m).__name__ for n, m in adapter.model.named_modules() if "vision_model" in n)
    batch = adapter.train_batch(IMAGES, NO_MASKS, CAPTIONS)
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = loss_per_sample(adapter.logits(batch), batch["labels"]).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    adapter.save(tmp_path)
    with torch.no_grad():
        again = load(base, adapter=str(tmp_path), quantization=Quantization.nf4)
        torch.testing.assert_close(again.logits(batch), adapter.logits(batch), rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(base):
    gradients = []
    for checkpointing in (False, True):
        adapter = load(base, trainable=True)
        if checkpointing:
            adapter.model.activation_checkpointing_enable({"use_reentrant": False})
        adapter.model.train()
        batch = adapter.train_batch(IMAGES, NO_MASKS, CAPTIONS)
        loss_per_sample(adapter.logits(batch), batch["labels"]).mean().backward()
        gradients.append({n: p.grad for n, p in adapter.model.named_parameters() if p.grad is not None})
    plain, other = gradients
    assert plain.keys() == other.keys()
    assert any("vision_model" in name and grad.any() for name, grad in plain.items())
    for name, grad in plain.items():
        torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-6)


def broken(base, target, change):
    for file in base.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_model_that_would_ignore_its_picture_is_refused(base, tmp_path):
    closed = save_tiny_mllama(tmp_path / "closed", gate=0.0)
    with pytest.raises(ConfigError, match=r"the text never sees the picture"):
        load(closed)


def test_parts_that_do_not_fit_are_refused_with_their_reason(base, tmp_path):
    folder = broken(base, tmp_path, lambda config: config.update(image_token_index=3))
    with pytest.raises(ConfigError, match=r"the image token is 3 in the model"):
        load(folder)
    path = base / "processor_config.json"
    values = json.loads(path.read_text())
    values["image_processor"]["max_image_tiles"] = 2
    (broken(base, tmp_path, lambda config: None) / "processor_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"cuts up to 2 tiles, the model takes 4"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"captioner.product=box with captioner=llama32_vision"):
        compose("caption_vlm", ["captioner=llama32_vision", "captioner.product=box"])
    with pytest.raises(ConfigError, match=r"model.llama32_vision=.*: there is no local path of that name"):
        load("no/such/folder")


def test_a_licence_that_was_not_accepted_is_said_in_a_sentence():
    gated = OSError("You are trying to access a gated repo.\nMake sure to have access to it at https://…")
    source = Source(CAPTIONERS["llama32_vision"], "meta-llama/Llama-3.2-11B-Vision-Instruct", "unused")
    error = loading_error(source, gated)
    assert "model.llama32_vision=meta-llama/Llama-3.2-11B-Vision-Instruct is behind a licence" in str(error)
    assert "European Union" in str(error)
    assert "Florence-2" in str(error)


def test_the_export_loads_in_stock_transformers():
    export = trained_run("llama32_vision") / "export"
    model = MllamaForConditionalGeneration.from_pretrained(export)
    assert model.generation_config.do_sample is False
    assert json.loads((export / "packshot.json").read_text())["captioner"] == "llama32_vision"
    adapter = ready_adapter(ModelConfig(), settings(adapter=str(export)))
    assert adapter.asked.prompt == PROMPT
