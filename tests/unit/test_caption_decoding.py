"""Decoding held to the scene grammar, and the confidence of every slot."""

import math
import random
import threading
from contextlib import closing
from itertools import pairwise

import llguidance
import llguidance.hf
import numpy as np
import pytest
import torch
from caption_fixtures import CAPTIONS, SAVES, SCENES, picture, trained_run
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from packshot.caption.decoding import SceneConstraint, write
from packshot.caption.models.load import load_adapter, load_captioner
from packshot.config.schema import CaptionerConfig, CaptionerKind, Constraint, ModelConfig
from packshot.scene import Scene
from packshot.scene.decoding_grammar import scene_grammar
from packshot.scene.grammar import slot_spans
from packshot.scene.scores import PRODUCT_NOUNS, PROP_NOUNS, product_words
from packshot.scene.vocabulary import BACKGROUNDS, LIGHTING, MOODS, POSITIONS, STYLES, SURFACES, SURROUNDINGS

IMAGES = [picture(0), picture(1)]
NO_MASKS = [None, None]
KINDS = ("florence2", "llama32_vision")
MINI = PreTrainedTokenizerFast.from_pretrained("data/models/florence2")
KNOWN = llguidance.hf.from_tokenizer(MINI, n_vocab=len(MINI))


def matcher():
    return llguidance.LLMatcher(KNOWN, llguidance.LLMatcher.grammar_from_lark(scene_grammar()))


def allows(text):
    ids, found = MINI(text, add_special_tokens=False).input_ids, matcher()
    return found.consume_tokens(ids) and found.is_accepting() if found.validate_tokens(ids) == len(ids) else False


phrases = {
    "surface": st.sampled_from(SURFACES),
    "surroundings": st.lists(
        st.builds(lambda t, p: f"{t} {p}".strip(), st.sampled_from(SURROUNDINGS), st.sampled_from(("", *POSITIONS))),
        max_size=3,
    ).map(tuple),
    "background": st.none() | st.sampled_from(BACKGROUNDS),
    "lighting": st.none() | st.sampled_from(LIGHTING),
    "mood": st.none() | st.sampled_from(MOODS),
    "style": st.lists(st.sampled_from(STYLES), unique=True).map(tuple),
}


@given(st.builds(Scene, **phrases))
def test_every_scene_of_the_vocabulary_can_be_written(scene):
    assert allows(scene.render())


def written_at_random(seed, likes):
    """What a model without any sense writes under the grammar: tokens drawn at random, with a taste for some words."""
    rng, found, ids = random.Random(seed), matcher(), []
    while not found.is_stopped() and len(ids) < 120:
        allowed = np.flatnonzero(np.frombuffer(found.compute_logit_bias(), dtype=np.uint8)).tolist()
        liked = [token for token in allowed if token in likes]
        chosen = rng.choice(liked if liked and rng.random() < 0.5 else allowed)
        if chosen == MINI.eos_token_id:
            if rng.random() < 0.9 and len(allowed) > 1:
                continue
            break
        ids.append(chosen)
        found.consume_token(chosen)
    return MINI.decode(ids) if found.is_accepting() or found.is_stopped() else None


MARKERS = {
    token
    for words in (", surrounded by ", " in the background", " light", " mood", " photography, sharp focus", " and ")
    for token in MINI(words, add_special_tokens=False).input_ids
}


@settings(max_examples=150)
@given(st.integers(0, 10**9))
def test_whatever_is_written_parses_and_names_no_product(seed):
    text = written_at_random(seed, MARKERS)
    if text is not None:
        Scene.parse_strict(text)
        assert product_words(text) == []


@pytest.mark.parametrize("noun", sorted(PRODUCT_NOUNS - {"product"}))
def test_no_product_can_be_named(noun):
    for word in (noun, noun + "s", noun.upper()):
        assert not allows(f"Professional photo of an object on a {word}")
        assert not allows(f"Professional photo of an object on a table, a {word} wall in the background")
        around = allows(f"Professional photo of an object on a table, surrounded by {word}")
        assert around == (noun in PROP_NOUNS)
    assert allows(f"Professional photo of an object on a {noun}ish table")


@pytest.mark.parametrize(
    "text",
    [
        "Professional photo of an object",  # describes nothing
        "Professional photo of an object on a table, a calm mood, soft light",  # out of order
        "Professional photo of an object on a table, warm",  # in no slot
        "Professional photo of an object on  a table",
        "Professional photo of an object on a table, shot at 8\U0001ccf9 mm",  # a digit to some readers only
        "Professional photo of an object on a table, in 8\u212a",  # the sign of kelvin, "k" to who ignores case
        "A photo of an object on a table",
        "Professional photo of an object on a table, studio lighting, soft light",  # twice
    ],
)
def test_what_is_no_caption_cannot_be_written(text):
    assert not allows(text)


@pytest.fixture(scope="module", params=KINDS)
def senseless(request, tmp_path_factory):
    """A model with random weights."""
    folder = SAVES[request.param](tmp_path_factory.mktemp(request.param))
    config = CaptionerConfig(kind=CaptionerKind[request.param], max_new_tokens=120)
    return load_adapter(ModelConfig(florence2=str(folder), llama32_vision=str(folder)), config)


def test_an_untrained_model_writes_captions_when_constrained(senseless):
    free = write(senseless, IMAGES, NO_MASKS)
    assert not any(caption.text.startswith("Professional photo of an object on") for caption in free)
    for caption in write(senseless, IMAGES, NO_MASKS, Constraint.scene):
        assert caption.text.startswith("Professional photo of an object on ")
        if not caption.truncated:
            Scene.parse_strict(caption.text)


def test_what_may_follow_is_found_while_the_model_reads(senseless, monkeypatch):
    reads = threading.Event()
    overlapped = []

    class Watched(SceneConstraint):
        def _consume(self, *latest):
            overlapped.append(reads.wait(10))  # the model must begin to read the token before this has ended
            reads.clear()
            super()._consume(*latest)

        def close(self):
            reads.set()  # nothing reads the last token
            super().close()

    expected = write(senseless, IMAGES, NO_MASKS, Constraint.scene)
    monkeypatch.setattr("packshot.caption.decoding.SceneConstraint", Watched)
    with senseless.model.register_forward_pre_hook(lambda *_: reads.set()):
        assert write(senseless, IMAGES, NO_MASKS, Constraint.scene) == expected
    assert len(overlapped) > 10
    assert all(overlapped)


def test_rows_that_have_all_ended_are_left_alone():
    """Where checks for the end are deferred, as on a GPU, scores are asked for once more."""
    ids = [
        *MINI("Professional photo of an object on a beige table", add_special_tokens=False).input_ids,
        MINI.eos_token_id,
    ]
    with closing(SceneConstraint(MINI, rows=1, given=0, lead=[])) as held:
        for count in range(1, len(ids) + 1):
            held.follow(torch.tensor([ids[:count]]), torch.zeros(1, len(MINI)))
        assert not held(torch.tensor([ids]), torch.zeros(1, len(MINI))).isinf().any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_constraint_changes_nothing_that_was_right(kind):
    run = trained_run(kind)
    model = ModelConfig(florence2=str(run.parent / "base"), llama32_vision=str(run.parent / "base"))
    config = CaptionerConfig(kind=CaptionerKind[kind], adapter=str(run / "export"))
    assert config.constraint is Constraint.scene
    assert load_captioner(model, config).caption(IMAGES, NO_MASKS) == CAPTIONS


def test_spans_name_every_clause_of_a_caption():
    for caption, scene in zip(CAPTIONS, SCENES, strict=True):
        spans = slot_spans(caption)
        assert [slot for slot, *_ in spans] == ["surface", "surroundings", "background", "lighting", "mood"]
        assert all(first[2] <= second[1] for first, second in pairwise(spans))
        assert caption[spans[0][1] : spans[0][2]] == f" on {scene.surface}"
        assert caption[spans[2][1] : spans[2][2]] == f"{scene.background} in the background"
    assert slot_spans("A bottle on a table.") == []


@pytest.mark.parametrize("kind", KINDS)
def test_confidence_is_the_probability_of_the_words_of_a_slot(kind):
    run = trained_run(kind)
    config = CaptionerConfig(kind=CaptionerKind[kind], adapter=str(run / "export"), constraint=Constraint.none)
    base = str(run.parent / "base")
    adapter = load_adapter(ModelConfig(florence2=base, llama32_vision=base), config)
    (caption,) = write(adapter, IMAGES[:1], [None])
    assert set(caption.confidence) == {"surface", "surroundings", "background", "lighting", "mood"}
    batch = adapter.train_batch(IMAGES[:1], [None], [caption.text])
    with torch.no_grad():
        logs_TV = torch.log_softmax(adapter.logits(batch)[0].float(), dim=-1)
    labels = batch["labels"][0]
    kept = [
        (t, label) for t, label in enumerate(labels.tolist()) if label not in (-100, adapter.tokenizer.bos_token_id)
    ]
    text, by_hand = "", dict.fromkeys(caption.confidence, 0.0)
    for t, label in kept[:-1]:  # the last is the end token
        begin, text = len(text), adapter.tokenizer.decode([i for _, i in kept if _ <= t], skip_special_tokens=True)
        for slot, start, end in slot_spans(caption.text):
            if begin < end and len(text) > start:
                by_hand[slot] += logs_TV[t, label].item()
    for slot, logarithm in by_hand.items():
        assert caption.confidence[slot] == pytest.approx(math.exp(logarithm), rel=1e-3)
    assert caption.confidence["background"] > 0.5


def test_an_uncertain_model_is_not_confident(senseless):
    for caption in write(senseless, IMAGES, NO_MASKS, Constraint.scene):
        if not caption.truncated:
            assert caption.confidence["surface"] < 0.01
