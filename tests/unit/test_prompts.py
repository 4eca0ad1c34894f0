"""Prompts of more than 77 tokens, and words with weights."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from serving_fixtures import product_pair

from packshot.base.load import load_parts
from packshot.base.prompts import Piece, count_chunks, embed, split_weights
from packshot.base.tokens import lost_words
from packshot.config.compose import compose
from packshot.config.schema import DataConfig, GenerateSettings, LoraMethod, ModelConfig
from packshot.errors import ConfigError
from packshot.generate import Packshot
from packshot.generate.denoise import encode
from packshot.methods.lora import Lora
from packshot.train.encode import Encoder
from packshot.train.run import train

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = GenerateSettings(num_inference_steps=1, guidance_scale=2.0)
LONG = ", ".join(f"a wall of stone number {number}" for number in range(30))


@pytest.fixture(scope="module")
def tool():
    return Packshot.load().set_product(*product_pair())


def encoded(tool, prompt, **values):
    return encode(tool.models, prompt, replace(SETTINGS, **values))


def captioned(folder):
    """Two held-out rows as a dataset whose captions need three chunks, and none."""
    table = pq.read_table(ROOT / "data/rendered/heldout/part-00000.parquet").slice(0, 2)
    place = table.column_names.index("text")
    folder.mkdir()
    pq.write_table(table.set_column(place, "text", pa.array([LONG, ""])), folder / "part-00000.parquet")
    return folder


def test_training_reads_as_many_chunks_as_drawing_then_does(tmp_path):
    """The whole way: captions in chunks, a few steps, the export, and a short prompt in as many chunks."""
    data = captioned(tmp_path / "set")
    run = tmp_path / "run"
    overrides = ["objective.prompt_chunks=3", "train.max_steps=2", "train.batch_size=2", "train.warmup_steps=0"]
    overrides += [
        "tracking=none",
        "data.allow_empty_captions=true",
        "data.holdout_share=0",
        "train.validation_samples=1",
    ]
    train(
        compose("train_lora", [*overrides, f"data.train={data}", f"run.dir={run}", f"data.cache_dir={tmp_path / 'c'}"])
    )
    assert json.loads((run / "export" / "packshot.json").read_text())["prompt_chunks"] == 3
    tool = Packshot.load(lora=run / "export").set_product(*product_pair())
    assert tool.models.prompt_chunks == 3
    short = encoded(tool, "a marble table")
    assert short.arguments["prompt_embeds"].shape[1] == short.arguments["negative_prompt_embeds"].shape[1] == 3 * 77
    [result] = tool.generate("a marble table", 1, settings=SETTINGS)
    assert result.certificate["core"]["max_abs_diff"] == 0


def test_captions_and_prompts_have_the_same_encoding(tool):
    parts = load_parts(ModelConfig())
    method = Lora(parts, LoraMethod())
    for chunks in (1, 3):
        encoder = Encoder(parts, method, 128, DataConfig(), chunks)
        for text in (LONG, "a marble table"):
            trained = encoder.text([text])[0]
            models = replace(tool.models, prompt_chunks=chunks)
            drawn = encode(models, text, SETTINGS).arguments
            torch.testing.assert_close(trained["prompt_embeds"][None], drawn["prompt_embeds"], rtol=0, atol=1e-5)
            torch.testing.assert_close(trained["pooled_prompt_embeds"][None], drawn["pooled_prompt_embeds"])


def test_chunks_have_a_cache_of_their_own():
    parts = load_parts(ModelConfig())
    method = Lora(parts, LoraMethod())
    names = {Encoder(parts, method, 128, DataConfig(), chunks).identity.text for chunks in (1, 2, 3)}
    assert len(names) == 3


def test_a_lora_on_the_text_encoders_has_one_chunk():
    with pytest.raises(ConfigError, match="trained on one chunk"):
        compose("train_lora", ["objective.prompt_chunks=2", "method.text_encoder=true"])


@pytest.mark.parametrize(("chunks", "lost"), [(1, True), (2, True), (8, False)])
def test_lost_words_begin_where_the_last_chunk_ends(tool, chunks, lost):
    tokenizer = tool.models.pipe.tokenizer
    words = lost_words(tokenizer, LONG, chunks)
    assert bool(words) is lost
    ids = tokenizer(LONG, add_special_tokens=False, verbose=False).input_ids
    assert tokenizer(words, add_special_tokens=False).input_ids == ids[75 * chunks :]


@pytest.mark.parametrize("negative", [None, "blurry"])
def test_one_chunk_is_what_the_stock_pipeline_encodes(tool, negative):
    pipe = tool.models.pipe
    stock = pipe.encode_prompt("a marble table", device=pipe.device, negative_prompt=negative)
    own = embed(pipe, [Piece("a marble table")], 1)
    torch.testing.assert_close(own.prompt_embeds_1LD, stock[0])
    torch.testing.assert_close(own.pooled_1D, stock[2])
    if negative:
        torch.testing.assert_close(embed(pipe, [Piece(negative)], 1).prompt_embeds_1LD, stock[1])


def test_long_prompts_are_read_in_chunks(tool):
    """Both halves of guidance are equally long, and the first chunk is the prompt as it was cut before."""
    cut = encoded(tool, LONG)
    assert cut.lost_words["prompt"]
    needed = count_chunks(tool.models.pipe.tokenizer, [Piece(LONG)])
    assert needed > 2
    whole = encoded(tool, LONG, prompt_chunks=8)
    assert whole.lost_words == {"prompt": "", "negative_prompt": ""}
    embeds = whole.arguments["prompt_embeds"]
    assert embeds.shape[1] == 77 * needed
    assert whole.arguments["negative_prompt_embeds"].shape == embeds.shape
    torch.testing.assert_close(embeds[:, :76], cut.arguments["prompt_embeds"][:, :76])
    assert not torch.allclose(embeds[:, 77:154], embeds[:, :77])
    assert encoded(tool, LONG, prompt_chunks=2).lost_words["prompt"]
    assert encoded(tool, "a table", prompt_chunks=8).arguments["prompt_embeds"].shape[1] == 77


def test_long_prompts_draw_another_picture(tool):
    [cut] = tool.generate(LONG, 1, settings=SETTINGS)
    [whole] = tool.generate(LONG, 1, settings=replace(SETTINGS, prompt_chunks=3))
    assert whole.png != cut.png
    assert whole.certificate["request"]["prompt_chunks"] == 3


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a table", [("a table", 1.0)]),
        ("a (red:1.3) table", [("a ", 1.0), ("red", 1.3), (" table", 1.0)]),
        ("(oak table:0.5)", [("oak table", 0.5)]),
        ("a (red) table", [("a (red) table", 1.0)]),
        (r"a \(red:1.3\) table", [(r"a \(red:1.3\) table", 1.0)]),
        ("ratio (4:5)", [("ratio ", 1.0), ("4", 5.0)]),
        ("", [("", 1.0)]),
    ],
)
def test_weights_are_read_as_other_tools_write_them(prompt, pieces):
    assert [(piece.text, piece.weight) for piece in split_weights(prompt)] == pieces


def test_a_weight_moves_its_word_alone(tool):
    """Twice the weight, twice as far from the empty prompt; weight 1 is the plain word."""
    pipe = tool.models.pipe
    [empty, plain, half, double] = [
        embed(pipe, pieces, 1).prompt_embeds_1LD
        for pieces in ([Piece("")], *[[Piece("a"), Piece("red", weight), Piece("table")] for weight in (1, 0.5, 2)])
    ]
    torch.testing.assert_close(plain, embed(pipe, [Piece("a red table")], 1).prompt_embeds_1LD)
    torch.testing.assert_close(double[:, 2] - empty[:, 2], 2 * (plain[:, 2] - empty[:, 2]))
    torch.testing.assert_close(half[:, 2] - empty[:, 2], 0.5 * (plain[:, 2] - empty[:, 2]))
    others = [place for place in range(77) if place != 2]
    torch.testing.assert_close(double[:, others], plain[:, others])


def test_weights_that_are_not_asked_for_are_named(tool, caplog):
    encoded(tool, "a (red:1.8) table, ratio 4:5")
    assert "(red:1.8) is read as it stands; prompt_weights=true" in caplog.text
    caplog.clear()
    encoded(tool, "a (red:1.8) table", prompt_weights=True)
    encoded(tool, "a (red) table, ratio 4:5")
    assert "prompt_weights" not in caplog.text


def test_weights_count_only_where_they_are_asked_for(tool):
    plain = encoded(tool, "a (red:1.8) table").arguments["prompt_embeds"]
    asked = encoded(tool, "a (red:1.8) table", prompt_weights=True).arguments["prompt_embeds"]
    without = encoded(tool, "a red table").arguments["prompt_embeds"]
    assert not torch.allclose(plain, without)
    assert not torch.allclose(asked, without)
    torch.testing.assert_close(asked[:, [0, 1, 3]], without[:, [0, 1, 3]])
