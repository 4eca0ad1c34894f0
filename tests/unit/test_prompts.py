"""Prompts of more than 77 tokens, and words with weights."""

from dataclasses import replace

import pytest
import torch
from serving_fixtures import product_pair

from packshot.base.prompts import Piece, count_chunks, embed, split_weights
from packshot.config.schema import GenerateSettings
from packshot.generate import Packshot
from packshot.generate.denoise import encode

SETTINGS = GenerateSettings(num_inference_steps=1, guidance_scale=2.0)
LONG = ", ".join(f"a wall of stone number {number}" for number in range(30))


@pytest.fixture(scope="module")
def tool():
    return Packshot.load().set_product(*product_pair())


def encoded(tool, prompt, **values):
    return encode(tool.models, prompt, replace(SETTINGS, **values))


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


def test_weights_count_only_where_they_are_asked_for(tool):
    plain = encoded(tool, "a (red:1.8) table").arguments["prompt_embeds"]
    asked = encoded(tool, "a (red:1.8) table", prompt_weights=True).arguments["prompt_embeds"]
    without = encoded(tool, "a red table").arguments["prompt_embeds"]
    assert not torch.allclose(plain, without)
    assert not torch.allclose(asked, without)
    torch.testing.assert_close(asked[:, [0, 1, 3]], without[:, [0, 1, 3]])
