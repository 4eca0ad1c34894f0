"""Florence-2: labels, loss, generation settings, LoRA."""

import json

import pytest
import torch
from caption_fixtures import CAPTIONS, PROMPT, hand_written_cross_entropy, picture, save_tiny_florence, trained_run
from PIL import Image

from packshot.caption.decoding import write
from packshot.caption.models import florence2
from packshot.caption.models.adapter import loss_per_sample
from packshot.caption.models.load import load_captioner, ready_adapter
from packshot.caption.models.weights import Asked
from packshot.config.schema import CaptionerConfig, CaptionerKind, Constraint, ModelConfig, ProductTarget, Tuning
from packshot.errors import ConfigError

IMAGES = [picture(0), picture(1)]
NO_MASKS = [None, None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_florence(tmp_path_factory.mktemp("florence2"))


def load(folder, trainable=False, **settings):
    return florence2.load(ModelConfig(florence2=str(folder)), CaptionerConfig(**settings), trainable)


def trained(**settings):
    settings = {"adapter": str(trained_run() / "export"), "constraint": Constraint.none, **settings}
    return load_captioner(ModelConfig(florence2=str(trained_run().parent / "base")), CaptionerConfig(**settings))


def test_loss_equals_the_cross_entropy_of_the_labels(base):
    adapter = load(base, trainable=True)
    batch = adapter.train_batch(IMAGES, NO_MASKS, CAPTIONS)
    assert (batch["labels"] == -100).any(), "the two captions must differ in length, or padding is not tested"
    with torch.no_grad():
        logits_BTV = adapter.logits(batch)
        losses = loss_per_sample(logits_BTV, batch["labels"])
    for i in range(2):
        assert losses[i].item() == pytest.approx(
            hand_written_cross_entropy(logits_BTV[i], batch["labels"][i]), rel=1e-5
        )
        alone = adapter.train_batch(IMAGES[i : i + 1], [None], CAPTIONS[i : i + 1])
        del alone["decoder_input_ids"]  # the model derives them from the labels itself
        with torch.no_grad():
            assert losses[i].item() == pytest.approx(adapter.model(**alone).loss.item(), rel=1e-5)


def test_labels_are_caption_and_end_token_only(base):
    adapter = load(base, trainable=True)
    tokenizer = adapter.processor.tokenizer
    labels = adapter.train_batch(IMAGES, NO_MASKS, CAPTIONS)["labels"]
    for row, caption in zip(labels, CAPTIONS, strict=True):
        kept = row[row != -100]
        assert tokenizer.decode(kept) == f"<s>{caption}</s>"
        assert (row[len(kept) :] == -100).all()
        assert tokenizer.pad_token_id not in kept


def test_loss_does_not_depend_on_mode_or_generator(base):
    adapter = load(base, trainable=True)  # the checkpoint's config asks for dropout 0.1 and drop path 0.1
    batch = adapter.train_batch(IMAGES, NO_MASKS, CAPTIONS)
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        adapter.model.train()
        losses.append(loss_per_sample(adapter.logits(batch), batch["labels"]).detach())
    assert torch.equal(*losses)


def test_overfitted_captions_are_written_exactly():
    captioner = trained()
    assert captioner.caption(IMAGES, NO_MASKS) == CAPTIONS
    assert [captioner.caption([image], [None])[0] for image in IMAGES] == CAPTIONS


def test_swapping_the_images_swaps_the_captions():
    assert trained().caption(IMAGES[::-1], NO_MASKS) == CAPTIONS[::-1]


HOSTILE = {
    "num_beams": 3, "no_repeat_ngram_size": 3, "early_stopping": True, "forced_bos_token_id": 0,
    "forced_eos_token_id": 2, "max_length": 20, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def test_the_checkpoints_generation_defaults_are_ignored(tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    for file in (trained_run() / "export").iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").write_text(json.dumps(HOSTILE))
    for constraint in Constraint:
        assert trained(adapter=str(folder), constraint=constraint).caption(IMAGES, NO_MASKS) == CAPTIONS
    adapter = ready_adapter(ModelConfig(), CaptionerConfig(adapter=str(folder)))
    settings = adapter.model.generation_config.to_dict()
    assert settings["num_beams"] == 1
    assert not any(settings[name] for name in ("no_repeat_ngram_size", "forced_bos_token_id", "forced_eos_token_id"))


def test_truncation_is_seen():
    captioner = trained(max_new_tokens=8)
    captions = captioner.write(IMAGES, NO_MASKS)
    assert [caption.truncated for caption in captions] == [True, True]
    assert all(full.startswith(cut.text) for full, cut in zip(CAPTIONS, captions, strict=True))
    assert not any(caption.truncated for caption in trained().write(IMAGES, NO_MASKS))


def test_lora_adapts_the_language_model_and_merges_exactly(base, tmp_path):
    adapter = load(base, trainable=True, tuning=Tuning.language_lora, lora_rank=4)
    names = [name for name, parameter in adapter.model.named_parameters() if parameter.requires_grad]
    # self-attention of the encoder; self- and cross-attention of the decoder; fc1 and fc2 of both; A and B of each
    assert len(names) == 2 * ((4 + 2) + (8 + 2))
    assert all(".language_model." in name and ".lora_" in name for name in names)
    assert not any("lm_head" in name or "vision_tower" in name for name in names)

    with torch.no_grad():
        for name, parameter in adapter.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    adapter.save(tmp_path)
    merged = load(base, adapter=str(tmp_path))
    batch = adapter.train_batch(IMAGES, NO_MASKS, CAPTIONS)
    with torch.no_grad():
        ours, theirs, plain = adapter.logits(batch), merged.logits(batch), load(base).logits(batch)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 1e-2
    assert write(adapter, IMAGES, NO_MASKS) == write(merged, IMAGES, NO_MASKS)


def test_a_lora_is_refused_over_another_base(base, tmp_path):
    tuned = {"tuning": Tuning.language_lora, "lora_rank": 2}
    load(base, trainable=True, **tuned).save(tmp_path / "lora")
    other = save_tiny_florence(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"is a LoRA over .*, not .*other"):
        load(other, adapter=str(tmp_path / "lora"))
    with pytest.raises(ConfigError, match=r"would put a second one over it"):
        load(base, trainable=True, adapter=str(tmp_path / "lora"), **tuned)
    # over a whole export, it is the export that a LoRA belongs to
    export = trained_run() / "export"
    load(base, trainable=True, adapter=str(export), **tuned).save(tmp_path / "second")
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(export)


def test_full_tuning_trains_all_and_loading_trains_none(base):
    assert all(p.requires_grad and p.dtype == torch.float32 for p in load(base, trainable=True).model.parameters())
    assert not any(p.requires_grad for p in load(base).model.parameters())


def test_the_product_box_follows_the_prompt(base):
    adapter = load(base)
    mask = Image.new("L", (32, 32), 255)
    adapter.asked = Asked(PROMPT, ProductTarget.box)
    ids = adapter.generate_batch([picture(0)], [mask])["input_ids"][0]
    text = adapter.processor.tokenizer.decode(ids)
    assert text.endswith(f"<s>{PROMPT}<loc_0><loc_0><loc_968><loc_968></s>")
    adapter.asked = Asked("<MORE_DETAILED_CAPTION>", ProductTarget.box)
    ids = adapter.generate_batch([picture(0)], [mask])["input_ids"][0]
    assert "Describe with a paragraph what is shown in the image.<loc_0>" in adapter.processor.tokenizer.decode(ids)


def break_config(folder, target, change):
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_what_cannot_be_loaded_is_refused_with_its_reason(base, tmp_path):
    with pytest.raises(ConfigError, match=r"model.florence2=.*: there is no local path of that name"):
        load("no/such/folder")
    with pytest.raises(ConfigError, match=r"captioner.adapter=.*no such file"):
        load(base, adapter=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"has no packshot.json"):
        load(base, adapter=str(base))
    with pytest.raises(ConfigError, match=r"captioner.product=box needs"):
        load(base, product=ProductTarget.box)
    with pytest.raises(ConfigError, match=r"captioner.max_new_tokens=512 is more than"):
        load(base, max_new_tokens=512)
    with pytest.raises(ConfigError, match=r"captioner=none has no weights here"):
        load_captioner(ModelConfig(), CaptionerConfig(kind=CaptionerKind.none))


def test_ids_that_disagree_with_the_tokenizer_are_refused(base, tmp_path):
    broken = break_config(base, tmp_path, lambda config: config["text_config"].update(eos_token_id=1))
    with pytest.raises(ConfigError, match=r"eos_token_id is 1 in the model but 2 in the tokenizer"):
        load(broken)
