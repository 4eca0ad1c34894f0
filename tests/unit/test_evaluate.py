"""Scores of finished runs: formulas with known answers, and the report over a real run."""

import json
import shutil
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from packshot.caption.models.adapter import Caption
from packshot.config.compose import compose
from packshot.errors import ConfigError
from packshot.evaluate.adherence import adherence, baseline_scenes, describe, prompts_of, slot_means
from packshot.evaluate.preservation import core_identity, halo_percentiles, hard_paste, noise_floor, preservation
from packshot.evaluate.run import evaluate, score_preservation, summary
from packshot.evaluate.samples import load_sample, open_runs, picture_and_matte, without_nan
from packshot.generate.report import write_page
from packshot.generate.run import generate
from packshot.imaging.outline import extension_of, segment_near
from packshot.scene import Scene

ROOT = Path(__file__).resolve().parents[2]


def adherence_of(run, config):
    return adherence(prompts_of(run), partial(picture_and_matte, run), config.model, config.captioner)


def keep_mask():
    keep = np.zeros((100, 100), bool)
    keep[30:70, 30:70] = True
    return keep


def test_extension_is_unsigned_growth_does_not_pay_for_loss():
    """20 columns grown and 20 lost: a signed area difference would say 0."""
    keep = keep_mask()
    found = np.roll(keep, 20, axis=1)
    scored = extension_of(found, keep)
    assert scored["expansion"] == pytest.approx(20 * 40 / 10_000)
    assert scored["extension"] == pytest.approx((20 * 40 - 40) / 1600)  # less a rim of the 1 px tolerance
    assert scored["loss"] == pytest.approx(19 * 38 / 1600)
    assert scored["iou"] == pytest.approx(20 / 60)


def test_extension_ignores_the_product_and_other_objects():
    keep = keep_mask()
    other = keep.copy()
    other[5:15, 5:15] = True
    assert extension_of(keep, keep) == {"extension": 0, "loss": 0, "iou": 1, "expansion": 0}
    assert extension_of(other, keep) == {"extension": 0, "loss": 0, "iou": 1, "expansion": 0}


def test_grabcut_sees_a_grown_product():
    keep = keep_mask()
    picture = np.full((100, 100, 3), 230, np.uint8)
    picture += np.random.default_rng(0).integers(0, 12, picture.shape, np.uint8)
    same, grown = picture.copy(), picture.copy()
    same[keep] = (180, 30, 30)
    grown[30:70, 30:78] = (180, 30, 30)
    assert extension_of(segment_near(same, keep), keep)["extension"] < 0.02
    assert extension_of(segment_near(grown, keep), keep)["extension"] == pytest.approx(7 * 40 / 1600, abs=0.03)


def test_hard_paste_by_a_resized_mask_loses_product_pixels():
    mask = Image.new("L", (200, 200))
    ImageDraw.Draw(mask).ellipse((40, 40, 160, 160), fill=255)
    photo, wall = np.full((200, 200, 3), 50, np.uint8), np.full((200, 200, 3), 200, np.uint8)
    coarse = hard_paste(photo, np.asarray(mask), wall, np.zeros((32, 32, 3), np.uint8))
    exact = hard_paste(photo, np.asarray(mask), wall, np.zeros((200, 200, 3), np.uint8))
    inside = np.asarray(mask) == 255
    assert (exact[inside] == 50).all()
    assert (coarse[inside] == 200).any()


def test_slot_means_count_only_the_slots_that_were_asked_for():
    asked = [Scene(surface="a stone podium"), Scene(surface="a white table", mood="calm")]
    read = [Scene(surface="a stone podium", background="a wall"), Scene(surface="grass", mood="calm")]
    assert slot_means(read, asked) == {"surface": 0.5, "mood": 1.0, "mean": 0.75}


def test_scene_baseline_is_other_requests_or_else_a_constant():
    a, b = Scene(surface="a stone podium"), Scene(surface="grass")
    name, others = baseline_scenes([a, b, a])
    assert name.startswith("shuffled")
    assert others == [[b], [a], [b]]
    assert baseline_scenes([a, a])[0].startswith("constant")


def test_summary_is_the_worst_identity_and_other_means():
    rows = [{"core_max_abs_diff": 0.0, "loss": 0.2}, {"core_max_abs_diff": 9.0, "loss": float("nan")}]
    assert summary(rows) == {"core_max_abs_diff": 9.0, "loss": 0.2}
    assert without_nan({"a": float("nan"), "b": {"c": 1.0}}) == {"a": None, "b": {"c": 1.0}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder of generate.py, two pictures of one product."""
    root = tmp_path_factory.mktemp("runs")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 3, 3), np.uint8))
    photo = noise.resize((96, 128), Image.Resampling.BICUBIC)
    mask = Image.new("L", (96, 128))
    ImageDraw.Draw(mask).ellipse((20, 30, 75, 100), fill=255)
    photo.save(root / "a.png")
    mask.save(root / "mask.png")
    keys = [f"product={root}/a.png", f"mask={root}/mask.png", f"run.dir={root}/run", "num_images=2"]
    quick = ["num_inference_steps=1", "guidance_scale=1", "tracking=none", "scene.surface=a white podium"]
    generate(compose("generate", keys + quick))
    return root / "run"


def test_preservation_sees_one_changed_core_pixel(finished):
    [run] = open_runs([str(finished)])
    sample = load_sample(run, "a-0")
    scored = preservation(sample, segment_near)
    assert scored.ours["core_max_abs_diff"] == 0
    assert scored.ours["core_identical_share"] == 1
    assert scored.ours["edge_halo_p95"] < scored.hard_paste["edge_halo_p95"]
    touched = sample.picture_HW3.copy()
    touched[64, 48] ^= 255
    pixels = sample.core_HW.sum()
    assert core_identity(touched, sample)["core_identical_share"] == pytest.approx(1 - 1 / pixels)


def test_halo_is_the_median_and_the_95th_percentile():
    assert halo_percentiles(np.arange(101.0)) == {"edge_halo_p50": 50, "edge_halo_p95": 95}


@pytest.mark.parametrize("resampling", ["none", "pillow lanczos"])
def test_the_noise_floor_is_measured_where_nothing_was_drawn(finished, resampling):
    """On the unedited photo; a moved product has no such photo, so it stands on plain grey."""
    [run] = open_runs([str(finished)])
    sample = load_sample(run, "a-0")
    sample = replace(sample, certificate={"transform": {"resampling": resampling}})
    shown = []
    noise_floor(sample, lambda image_HW3, keep_HW: shown.append(image_HW3) or keep_HW)
    is_grey = bool((shown[0][0] == 127).all())  # the first row lies outside of the product
    assert is_grey == (resampling != "none")


def test_report_holds_all_systems_and_unmeasured_scenes(finished, tmp_path):
    keys = [f"runs=[{finished}]", f"run.dir={tmp_path}/out", "captioner=none", "tracking=none"]
    evaluate(compose("evaluate", keys))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    systems = report["preservation"]["systems"]
    assert set(systems) == {"run", "run, raw decode", "hard paste", "noise floor"}
    assert systems["run"]["core_identical_share"] == 1
    assert set(systems["run"]) <= set(report["definitions"])
    assert report["scene"]["run"]["measured"] is False
    assert "captioner=none" in report["scene"]["run"]["reason"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "not measured" in page
    assert page.count("data:image/") == 4


def test_without_runs_the_base_draws_what_is_shipped(tmp_path, monkeypatch):
    """Away from the checkout and from earlier runs, as on a machine that has only the repository."""
    monkeypatch.chdir(tmp_path)
    evaluate(compose("evaluate", ["run.dir=out", "captioner=none", "tracking=none"]))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    shipped = {f"{file.stem}-0" for file in (ROOT / "data" / "products").iterdir()}
    assert report["runs"] == {"base": "out/base"}
    assert set(report["preservation"]["pictures"]["base"]) == shipped
    assert report["preservation"]["systems"]["base"]["core_identical_share"] == 1
    assert report["scene"]["base"]["reason"] != "no prompt names a slot of a scene"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "report: out/report.html" in log  # also after the drawing, which has a log of its own


def test_suite_preservation_leaves_the_scene_out(finished, tmp_path):
    keys = [f"runs=[{finished}]", f"run.dir={tmp_path}/out", "suite=preservation", "tracking=none"]
    evaluate(compose("evaluate", keys))
    assert "scene" not in json.loads((tmp_path / "out" / "report.json").read_text())


def prompted(run, stem, prompt):
    """The run, had this picture been drawn with another prompt."""
    certificate = run.certificates[stem]
    changed = {**certificate, "request": {**certificate["request"], "prompt": prompt}}
    return replace(run, certificates={**run.certificates, stem: changed})


def test_captioning_keeps_no_more_pictures_than_a_batch(finished):
    [run] = open_runs([str(finished)])
    seen = []

    class Writer:
        batch_size = 1

        def write(self, images, masks):
            assert all(picture() is None for picture in seen)
            seen.extend(weakref.ref(picture) for picture in [*images, *masks])
            return [Caption(f"caption {len(seen)}", False) for _ in images]

    assert [
        caption.text for caption in describe(list(run.certificates), partial(picture_and_matte, run), Writer())
    ] == ["caption 2", "caption 4"]


def test_a_report_is_written_part_by_part(tmp_path):
    class Part(str):
        pass

    written = []

    def parts():
        for number in range(3):
            assert not any(part() for part in written[:-1])  # the last one is still in this function
            part = Part(f"<p>{number}{'.' * 100_000}</p>")  # more than a file buffers
            written.append(weakref.ref(part))
            yield part

    write_page(tmp_path / "page.html", "a < b", parts())
    text = (tmp_path / "page.html").read_text()
    assert "<title>a &lt; b</title>" in text
    assert text.replace(".", "").endswith("<body><p>0</p><p>1</p><p>2</p></body></html>")


def test_adherence_scores_captions_against_the_request(finished, monkeypatch):
    class Writer:
        batch_size = 2

        def write(self, images, masks):
            return [
                Caption(f"Professional photo of an object on {what}", False) for what in ("a white podium", "grass")
            ]

    monkeypatch.setattr("packshot.evaluate.adherence.load_captioner", lambda *_: Writer())
    [run] = open_runs([str(finished)])
    config = compose("evaluate", [])
    scored = adherence_of(run, config)
    assert scored["scores"] == {"surface": 0.5, "mean": 0.5}
    assert list(scored["captions"]) == ["a-0", "a-1"]
    other = prompted(run, "a-1", Scene(surface="grass").render())
    shuffled = adherence_of(other, config)
    assert shuffled["scores"]["mean"] == 1
    assert shuffled["baseline"]["scores"]["mean"] == 0


def test_uncaptioned_pictures_are_reported_not_scored(finished, monkeypatch):
    captions = [Caption("Professional photo of an object on a white podium", False), Caption("", False, error="busy")]
    writer = SimpleNamespace(batch_size=2, write=lambda images, masks: captions)
    monkeypatch.setattr("packshot.evaluate.adherence.load_captioner", lambda *_: writer)
    [run] = open_runs([str(finished)])
    config = compose("evaluate", [])
    scored = adherence_of(run, config)
    assert scored["scores"] == {"surface": 1.0, "mean": 1.0}
    assert scored["errors"] == {"a-1": "busy"}
    assert set(scored["captions"]) == {"a-0"}
    captions[0] = Caption("", False, error="away")
    failed = adherence_of(run, config)
    assert failed == {"measured": False, "reason": "no picture with a request was captioned: away"}


def test_adherence_scores_the_prompt_not_the_request(finished):
    """With a reference the prompt may be empty: no model saw the requested scene, so there is nothing to score."""
    [run] = open_runs([str(finished)])
    silent = prompted(prompted(run, "a-0", ""), "a-1", "")
    assert silent.certificates["a-0"]["request"]["scene"]["surface"]
    config = compose("evaluate", [])
    assert adherence_of(silent, config) == {
        "measured": False,
        "reason": "no prompt names a slot of a scene",
    }


def test_folders_that_are_no_runs_are_refused(tmp_path, finished):
    with pytest.raises(ConfigError, match="no finished pictures"):
        open_runs([str(tmp_path)])
    with pytest.raises(ConfigError, match="no such file"):
        open_runs([str(tmp_path / "missing")])
    with pytest.raises(ConfigError, match="3 folders"):
        open_runs([str(finished)] * 3)


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["x/run", "y/run"], ["x/run", "y/run"]),
        (["x/last/run", "y/last/run"], ["x/last/run", "y/last/run"]),
        (["x/run", "x/other"], ["run", "other"]),
        (["x/hard paste", "x/run"], ["x/hard paste", "x/run"]),
    ],
)
def test_runs_of_the_same_name_keep_apart(finished, tmp_path, folders, names):
    for folder in folders:
        shutil.copytree(finished, tmp_path / folder)
    runs = open_runs([str(tmp_path / folder) for folder in folders])
    systems = score_preservation(compose("evaluate", []), runs, tmp_path)["systems"]
    assert len(systems) == 6  # each run, its raw decode, the hard paste and the noise floor
    assert [run.name for run in runs] == names


def test_one_run_given_twice_is_refused(finished, monkeypatch):
    monkeypatch.chdir(finished)
    with pytest.raises(ConfigError, match="twice"):
        open_runs([str(finished), "."])
    [here] = open_runs(["."])
    assert here.name == "run"
