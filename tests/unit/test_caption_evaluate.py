"""Caption scores and their baselines."""

import json
import math

import pytest
from caption_fixtures import CAPTIONS, SCENES, caption_vlm, picture, trained_run

from packshot.caption.cider import cider
from packshot.caption.models.adapter import Caption
from packshot.caption.score_pages import article, confusion_page, worst_page
from packshot.caption.scores import (
    confusion,
    constant_caption,
    deal_to_others,
    invented,
    leakage,
    measure,
    soft_f1,
    with_baselines,
)
from packshot.scene import Scene


def captions(texts, truncated=False):
    return [Caption(text, truncated) for text in texts]


def test_perfect_captions_score_one_and_others_less():
    assert measure(captions(CAPTIONS), SCENES)["mean"] == {"exact": 1.0, "soft": 1.0, "soft_interval_95": [1.0, 1.0]}
    assert measure(captions(CAPTIONS[::-1]), SCENES)["mean"]["soft"] < 0.5


def test_leaks_truncation_and_broken_grammar_are_counted():
    texts = [CAPTIONS[0], CAPTIONS[1].replace("an object", "a glass bottle")]
    scores = measure([Caption(texts[0], True), Caption(texts[1], False)], SCENES)
    assert (scores["leakage_rate"], scores["truncated_rate"], scores["parse_rate"]) == (0.5, 0.5, 0.5)


def test_the_constant_caption_has_the_most_frequent_values():
    scenes = [
        Scene("a table", ("lemons",), "a wall", "soft daylight", "calm"),
        Scene("a table", (), "a wall", "backlight", "warm"),
        Scene("a rock", (), "mountains", "soft daylight", "calm"),
    ]
    expected = Scene("a table", (), "a wall", "soft daylight", "calm")
    assert constant_caption([scene.render() for scene in scenes]) == expected.render()


@pytest.mark.parametrize("count", [2, 3, 10, 57])
def test_shuffling_leaves_no_image_its_own_caption(count):
    others = deal_to_others(count, seed=1)
    assert sorted(others) == list(range(count))
    assert all(other != own for own, other in enumerate(others))


def test_a_captioner_that_looks_stands_above_both_baselines():
    truths = SCENES * 4
    scores = with_baselines(captions(CAPTIONS * 4), truths, CAPTIONS[0], seed=0)
    assert scores["captioner"]["mean"]["exact"] == 1.0
    assert scores["baselines"]["constant_caption"]["mean"]["exact"] == pytest.approx(0.5)
    assert scores["baselines"]["constant_caption"]["caption"] == CAPTIONS[0]
    assert scores["baselines"]["shuffled_images"]["mean"]["exact"] < 1.0


def test_shuffling_costs_a_blind_captioner_nothing():
    truths = SCENES * 4
    scores = with_baselines(captions([CAPTIONS[0]] * 8), truths, CAPTIONS[0], seed=0)
    assert scores["captioner"] == scores["baselines"]["shuffled_images"]


def test_the_page_shows_truth_and_caption_escaped(tmp_path):
    hostile = Caption("a <script>alert(1)</script>", True)
    worst_page(tmp_path / "worst.html", [article(picture(0), "id<1>", hostile, SCENES[0])])
    page = (tmp_path / "worst.html").read_text()
    assert "<script>" not in page
    assert CAPTIONS[0] in page
    assert "cut at the longest length" in page
    assert page.count("data:image/jpeg;base64,") == 1


def test_task_evaluate_writes_scores_beside_their_baselines(tmp_path):
    run = trained_run()
    shared = (f"model.florence2={run.parent / 'base'}", f"data.train={run.parent / 'data'}")
    shared += (f"data.validation={run.parent / 'data'}", f"captioner.adapter={run / 'export'}")
    out = caption_vlm(tmp_path, "scores", *shared, task="evaluate")
    scores = json.loads((out / "scores.json").read_text())
    assert scores["samples"] == 4
    assert scores["captioner"]["mean"]["exact"] == 1.0
    assert scores["captioner"]["parse_rate"] == 1.0
    assert set(scores["captioner"]["slots"]) == {"surface", "surroundings", "background", "lighting", "mood", "style"}
    for baseline in scores["baselines"].values():
        assert baseline["mean"]["soft"] < 1.0
    assert (out / "worst.html").read_text().count("<article>") == 4
    assert scores["unconstrained"]["mean"]["exact"] == 1.0
    assert scores["captioner"]["leakage"] == {"other": {"captions": 4, "rate": 0.0}}
    assert scores["captioner"]["invented"] == {"things": 0.0, "captions": 0.0}
    assert scores["captioner"]["cider"] > scores["baselines"]["constant_caption"]["mean"]["soft"]
    assert scores["confusion"]["background"] == {"a blue sky": {"a blue sky": 2}, "a red wall": {"a red wall": 2}}
    assert "2 of 2" in (out / "confusion.html").read_text()
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["captioner/soft_f1"] > line["shuffled_images/soft_f1"]


def test_soft_f1_is_the_mean_of_five_slots():
    four_right = CAPTIONS[0].replace("minimalist mood", "playful mood")
    assert soft_f1(four_right, SCENES[0]) == pytest.approx(0.8)


def test_what_was_called_what_is_counted_per_slot():
    guess = Scene("a stone podium", ("books", "lemons"), "a blue sky").render()
    table = confusion(captions([guess, guess]), [SCENES[0], SCENES[1]])
    assert table["surface"] == {
        "a linen tablecloth": {"a stone podium": 1},
        "a stone podium": {"a stone podium": 1},
    }
    assert table["surroundings"]["lemons"] == {"lemons": 1}, "things are paired as they agree best, in any order"
    assert table["surroundings"]["books"] == {"books": 1}
    assert sum(table["surroundings"]["palm leaves"].values()) == 1
    assert table["mood"] == {"calm": {"": 1}, "minimalist": {"": 1}}


def test_invented_things_are_counted_and_synonyms_are_not():
    truths = [Scene("a table", ("green palm leaves", "lemons")), Scene("a table"), Scene("a table", ("books",))]
    guesses = [Scene("a table", ("palm leaves", "candles")), Scene("a table", ("books",)), Scene("a table")]
    assert invented(guesses, truths) == {"things": 2 / 3, "captions": 2 / 3}
    assert invented([Scene("a table")], truths[:1]) == {"things": 0.0, "captions": 0.0}


def test_leakage_knows_the_category_beside_the_common_names():
    said = captions(
        ["Professional photo of an object on a wooden chest", "Professional photo of an object on a bottle"]
    )
    table = leakage(said + captions([CAPTIONS[0]]), ["chest", "other", "chest"])
    assert table == {"chest": {"captions": 2, "rate": 0.5}, "other": {"captions": 1, "rate": 1.0}}


def test_the_confusion_page_runs_no_markup_of_captions(tmp_path):
    confusion_page(tmp_path / "page.html", {"mood": {"<b>calm</b>": {"": 1, "<i>warm</i>": 2, "<b>calm</b>": 3}}}, 6)
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;calm&lt;/b&gt;" in page
    assert "3 of 6" in page
    assert "nothing 1" in page
    assert "<i>" not in page


CORPUS = [scene.render() for scene in SCENES] * 5 + ["Professional photo of an object on a table, warm mood"]


def test_cider_is_ten_for_the_truth_and_low_for_common_words():
    truths = [scene.render() for scene in SCENES]
    assert cider(truths, truths, CORPUS) == pytest.approx(10.0)
    assert cider(truths[::-1], truths, CORPUS) < 2
    assert cider(["Professional photo of an object"] * 2, truths, CORPUS) < cider(truths[::-1], truths, CORPUS)
    assert cider([""], truths[:1], CORPUS) == 0.0
    assert cider(truths[:1], truths[:1], CORPUS) == pytest.approx(10.0), "one caption alone is no worse than many"


def test_cider_by_hand():
    # one word each, the longer n-grams are empty: 10 / 4 of a cosine of 1, times the penalty for one word too many
    assert cider(["lemons"], ["lemons"], ["books", "lemons", "candles"]) == pytest.approx(2.5)
    weights = math.log(3) - math.log(1)
    cosine = weights**2 / (math.sqrt(2 * weights**2) * weights)
    expected = 10 / 4 * cosine * math.exp(-1 / (2 * 6.0**2))
    assert cider(["lemons candles"], ["lemons"], ["books", "lemons", "candles"]) == pytest.approx(expected)
