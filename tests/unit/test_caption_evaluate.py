"""Caption scores and their baselines."""

import json

import pytest
from caption_fixtures import CAPTIONS, SCENES, caption_vlm, picture, trained_run

from packshot.caption.adapter import Caption
from packshot.caption.evaluate import (
    constant_caption,
    deal_to_others,
    measure,
    soft_f1,
    with_baselines,
    worst_page,
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


def test_the_constant_caption_takes_every_slots_most_frequent_value():
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


def test_a_captioner_that_does_not_look_loses_nothing_by_shuffling():
    truths = SCENES * 4
    scores = with_baselines(captions([CAPTIONS[0]] * 8), truths, CAPTIONS[0], seed=0)
    assert scores["captioner"] == scores["baselines"]["shuffled_images"]


def test_the_page_shows_truth_and_caption_and_runs_no_markup_of_theirs(tmp_path):
    worst_page(
        tmp_path / "worst.html", [picture(0)], ["id<1>"], [Caption("a <script>alert(1)</script>", True)], SCENES[:1]
    )
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
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["captioner/soft_f1"] > line["shuffled_images/soft_f1"]


def test_soft_f1_is_the_mean_of_five_slots():
    four_right = CAPTIONS[0].replace("minimalist mood", "playful mood")
    assert soft_f1(four_right, SCENES[0]) == pytest.approx(0.8)
