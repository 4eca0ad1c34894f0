"""Checks of finished pictures, and drawing again within a budget."""

import json
from dataclasses import replace
from pkgutil import resolve_name
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from packshot.config.checks import validate
from packshot.config.compose import compose
from packshot.config.schema import GenerateSettings, MatteConfig, VerifyConfig
from packshot.config.verify import CHECKS
from packshot.errors import ConfigError
from packshot.generate import Packshot
from packshot.generate.certificate import load_certificates
from packshot.generate.certificate_schema import Certificate, read_certificate
from packshot.generate.doubt_picture import MASK, draw_doubt
from packshot.generate.product import prepare
from packshot.generate.reasons import REASONS, STANDARD_MISSED
from packshot.generate.report import write_report
from packshot.generate.result import Result
from packshot.generate.retries import draw_within_budget, effort, seed_of
from packshot.generate.run import drawing_seconds, generate, outcome
from packshot.imaging.mask_doubt import SIGNS, mask_file_doubts
from packshot.serve.devices import draw
from packshot.serve.requests import read_settings
from packshot.serve.schemas import ApiError, SceneForm

QUICK = GenerateSettings(num_inference_steps=1, guidance_scale=1.0)


def photo_and_mask(side=96):
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).ellipse((side // 4, side // 4, 3 * side // 4, 3 * side // 4), fill=255)
    return Image.fromarray(noise), mask


@pytest.fixture(scope="module")
def tool():
    return Packshot.load().set_product(*photo_and_mask())


def limited(monkeypatch, **limits):
    """The checks with other limits."""
    for code, limit in limits.items():
        monkeypatch.setitem(CHECKS, code, replace(CHECKS[code], limit=limit))


def configured(tmp_path, *overrides):
    for name, image in zip(("photo", "mask"), photo_and_mask(), strict=True):
        image.save(tmp_path / f"{name}.png")
    paths = [f"product={tmp_path}/photo.png", f"mask={tmp_path}/mask.png", f"run.dir={tmp_path}/run"]
    quick = ["num_images=2", "num_inference_steps=1", "guidance_scale=1", "tracking=none"]
    return compose("generate", [*paths, *quick, "scene.surface=a white podium", *overrides])


# ---- the registry ----


@pytest.mark.parametrize("code", CHECKS)
def test_every_check_has_its_measure_and_words(code):
    row = CHECKS[code]
    assert callable(resolve_name(row.measure))
    assert row.about
    assert row.fault
    assert row.passes(None)
    assert row.passes(row.limit)
    assert not row.passes(row.limit - 1e-3 if row.below else row.limit + 1e-3)


def test_a_certificate_states_what_every_check_measured(tool):
    [result] = tool.generate("a table", 1, settings=QUICK)
    checks = result.certificate["checks"]
    assert list(checks) == list(CHECKS)
    for code, check in checks.items():
        assert check["limit"] == CHECKS[code].limit
        assert check["passed"] is (code not in result.certificate["reasons"])
    assert Certificate.model_json_schema()["properties"]["checks"]


def test_an_ignored_check_sends_nothing_to_review(tool, monkeypatch):
    limited(monkeypatch, background_flat=1000.0)
    settings = replace(QUICK, verify=VerifyConfig(ignore=["background_flat"]))
    [strict] = tool.generate("a table", 1, settings=QUICK)
    [lenient] = tool.generate("a table", 1, settings=settings)
    assert "background_flat" in strict.certificate["reasons"]
    assert "background_flat" not in lenient.certificate["reasons"]
    assert lenient.certificate["checks"]["background_flat"]["ignored"]
    assert not lenient.certificate["checks"]["background_flat"]["passed"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ignore": ["background_flatt"]}, "Did you mean background_flat?"),
        ({"retries": 17}, "retries=17 is out of range"),
    ],
)
def test_wrong_keys_are_refused_with_the_way_out(config, message):
    with pytest.raises(ConfigError) as refused:
        validate(VerifyConfig(**config))
    assert message in f"{refused.value} {refused.value.hint}"


def test_retries_without_a_drawing_are_refused():
    with pytest.raises(ConfigError, match=r"verify.retries=2 has no effect with background.color"):
        compose("generate", ["verify.retries=2", "background.color=[255,255,255]"])


def test_more_control_needs_a_controlnet(tmp_path, tool):
    with pytest.raises(ConfigError, match=r"verify\.control=0\.2 has no effect with adapters\.controlnets"):
        configured(tmp_path, "verify.retries=2", "verify.control=0.2")
    settings = replace(QUICK, verify=VerifyConfig(retries=1, control=0.2))
    with pytest.raises(ConfigError, match="without a ControlNet"):
        tool.generate("a table", 1, settings=settings)


# ---- the budget ----


class Drawn:
    """Pictures whose reasons are known beforehand; keeps what was asked of it."""

    def __init__(self, *reasons):
        self.reasons = list(reasons)
        self.asked = []

    def __call__(self, seed, control):
        self.asked.append((seed, control))
        return make_result(self.reasons[len(self.asked) - 1])


def make_result(reasons):
    return Result(Image.new("RGB", (1, 1)), {"reasons": reasons}, {}, b"", None)


def test_the_first_accepted_picture_ends_the_tries():
    drawn = Drawn(["background_flat"], [], [])
    result = draw_within_budget(drawn, 7, VerifyConfig(retries=5, control=0.25))
    assert drawn.asked == [(7, 0.0), (seed_of(7, 1), 0.25)]
    assert result.certificate["chosen"] == 1
    assert [each["reasons"] for each in result.certificate["tries"]] == [["background_flat"], []]


def test_of_failed_tries_the_one_with_fewest_faults_is_taken():
    drawn = Drawn(["background_flat", "background_clipped"], ["background_flat"], ["background_clipped"])
    result = draw_within_budget(drawn, 0, VerifyConfig(retries=2))
    assert result.certificate["chosen"] == 1
    assert result.certificate["reasons"] == ["background_flat"]
    assert len(result.certificate["tries"]) == 3


def test_what_no_drawing_can_mend_is_drawn_once():
    drawn = Drawn(["mask_incomplete", "no_opaque_core"], [])
    assert len(draw_within_budget(drawn, 0, VerifyConfig(retries=3)).certificate["tries"]) == 1


def test_seeds_of_tries_follow_from_the_picture_alone():
    """Neighbouring pictures never share the seed of a try."""
    seeds = {seed_of(seed, number) for seed in range(50) for number in range(10)}
    assert len(seeds) == 500
    assert seed_of(3, 0) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_try_is_the_picture_of_its_seed(tool, monkeypatch):
    """The certificate keeps the seed that was asked for, and names the one that was drawn."""
    limited(monkeypatch, background_flat=1000.0)
    others = ["product_extended", "product_floats"]  # two denoising steps draw what they may well send to review
    settings = replace(QUICK, verify=VerifyConfig(retries=2, ignore=others))
    [first] = tool.generate("a table", 1, seed=5, settings=settings)
    assert first.certificate["request"]["seed"] == 5
    assert len(first.certificate["tries"]) == 3
    assert first.certificate["chosen"] == 0
    [alone] = tool.generate("a table", 1, seed=5, settings=QUICK)
    assert first.png == alone.png
    spreads = []
    for number in range(3):
        [each] = tool.generate("a table", 1, seed=seed_of(5, number), settings=QUICK)
        spreads.append(each.certificate["checks"]["background_flat"]["measured"])
    best = int(np.argmax(spreads))
    limited(monkeypatch, background_flat=(sorted(spreads)[1] + max(spreads)) / 2)
    [again] = tool.generate("a table", 1, seed=5, settings=settings)
    [drawn] = tool.generate("a table", 1, seed=seed_of(5, best), settings=QUICK)
    assert again.certificate["chosen"] == best
    assert again.png == drawn.png


def test_a_run_counts_its_tries_and_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    limited(monkeypatch, background_flat=1000.0)
    generate(configured(tmp_path, "verify.retries=1"))
    run = tmp_path / "run"
    told = (run / "log.txt").read_text()
    assert "0 of 2 pictures are accepted, 2 need review" in told
    assert "they took 4 tries, none of them for an accepted picture" in told
    certificates = load_certificates(run)
    assert effort(certificates) == {"pictures": 2, "accepted": 0, "tries": 4, "steps": 4}
    assert [len(read_certificate(run / f"photo-{k}.json").tries) for k in range(2)] == [2, 2]
    before = {file.name: file.read_bytes() for file in run.glob("photo-*")}
    (run / "photo-1.png").unlink()
    (run / "photo-1.json").unlink()
    with pytest.raises(ConfigError, match="verify differ"):
        generate(configured(tmp_path, "verify.retries=2", "run.resume=true"))
    generate(configured(tmp_path, "verify.retries=1", "run.resume=true"))
    assert {file.name: file.read_bytes() for file in run.glob("photo-*")} == before
    assert "none for an accepted picture" in (run / "report.html").read_text()


def test_a_report_has_the_cost_of_an_accepted_picture(tmp_path):
    generate(configured(tmp_path))
    run = tmp_path / "run"
    for k, (status, tries) in enumerate((("accepted", 3), ("needs_review", 2))):
        file = run / f"photo-{k}.json"
        made = json.loads(file.read_text())
        each = {"seed": 1, "control": 0.0, "reasons": []}
        file.write_text(json.dumps({**made, "status": status, "tries": [each] * tries, "chosen": 0}))
    (run / "metrics.jsonl").write_text('{"seconds": 1.5}\n{"seconds": 2.5}\n{"seco')
    write_report(run)
    assert "an accepted picture took 4.0 s of drawing" in outcome(load_certificates(run), drawing_seconds(run))
    text = (run / "report.html").read_text()
    assert "accepted: 1, to be reviewed: 1" in text
    assert "5.00 tries, 5 denoising steps" in text


# ---- over HTTP ----


def test_a_form_may_ask_for_retries_within_the_servers_limits():
    config = compose("serve", ["serve.api_key=key", "generate.verify.retries=1", "generate.num_inference_steps=10"])
    settings = read_settings(SceneForm(num_images=2), config, False)
    assert settings.steps == 40
    asked = read_settings(SceneForm(num_images=2, retries=3), config, False)
    assert asked.settings.verify.retries == 3
    assert asked.steps == 80
    assert config.generate.verify.retries == 1
    with pytest.raises(ApiError, match=r"num_inference_steps x num_images x \(1 \+ retries\) is 1360"):
        read_settings(SceneForm(num_images=8, retries=16), config, False)


def test_a_server_draws_again(tool, monkeypatch):
    limited(monkeypatch, background_flat=1000.0)
    settings = replace(QUICK, verify=VerifyConfig(retries=2))
    photo, mask = photo_and_mask()
    request = SimpleNamespace(
        products=(photo,),
        masks=(mask,),
        scene="a table",
        num_images=1,
        seed=0,
        reference=None,
        settings=settings,
        with_layers=False,
    )
    steps = []
    [picture] = draw(tool, request, lambda: steps.append(1))
    assert len(steps) == len(picture.certificate["tries"]) == 3


# ---- what a certificate covers ----


def test_a_certificate_says_how_much_of_the_product_it_covers(tool):
    [result] = tool.generate("a table", 1, settings=QUICK)
    core = result.certificate["core"]
    solid = np.asarray(photo_and_mask()[1]) >= 128
    assert core["product_pixels"] == solid.sum()
    assert core["share"] == pytest.approx(core["pixels"] / solid.sum(), abs=1e-4)
    assert 0.8 < core["share"] < 1
    mask = result.certificate["mask"]
    assert mask["source"] == "a mask file that was given"
    assert mask["evidence"]["frame_full"] == {
        "about": "share of the frame in the mask",
        "measured": 0.0,
        "limit": 0.9,
        "passed": True,
    }


def test_numbers_behind_a_doubt_agree_with_its_codes(tool):
    """A product that is cut by the frame: every code has a sign that failed, and the other way round."""
    picture = np.full((120, 160, 3), 235, np.uint8)
    picture[60:, 50:110] = (150, 40, 40)
    product = prepare(Image.fromarray(picture), matte=MatteConfig(min_confidence=0.0))
    assert "mask_touches_frame" in product.mask_reasons
    failed_codes = {SIGNS[name].code for name, sign in product.mask_signs.items() if not sign.passed}
    assert failed_codes == set(product.mask_reasons)
    [result] = tool.with_product(product).generate("a table", 1, settings=QUICK)
    assert not result.certificate["mask"]["evidence"]["frame_share"]["passed"]
    drawn = np.asarray(draw_doubt(product))
    assert (drawn == MASK).all(axis=-1).sum() > 50


def test_a_mask_without_doubt_has_no_picture_of_one():
    assert draw_doubt(prepare(*photo_and_mask())) is None


def test_the_report_shows_where_a_mask_is_in_doubt(tmp_path):
    picture = np.full((120, 160, 3), 235, np.uint8)
    picture[60:, 50:110] = (150, 40, 40)
    Image.fromarray(picture).save(tmp_path / "cut.png")
    quick = ["num_images=1", "num_inference_steps=1", "guidance_scale=1", "tracking=none", "matte.min_confidence=0"]
    generate(compose("generate", [f"product={tmp_path}/cut.png", f"run.dir={tmp_path}/run", *quick]))
    assert (tmp_path / "run/layers/cut-doubt.png").exists()
    text = (tmp_path / "run/report.html").read_text()
    assert "largest share of a side of the frame in the mask" in text
    assert "layers/cut-doubt.png" in text


def test_every_reason_code_has_words_in_one_place():
    """Reports, log lines and the page of the server read them there."""
    masks = {sign.code for sign in SIGNS.values()} | set(mask_file_doubts(np.ones((8, 8), np.float32)))
    assert set(REASONS) == {*CHECKS, *masks, STANDARD_MISSED}
    assert all(REASONS.values())


def test_a_report_says_what_its_codes_mean(tmp_path):
    picture, mask = photo_and_mask()
    picture.save(tmp_path / "p.png")
    ImageOps.invert(mask).save(tmp_path / "m.png")
    keys = [f"product={tmp_path / 'p.png'}", f"mask={tmp_path / 'm.png'}", "background.color=[9,9,9]", "tracking=none"]
    generate(compose("generate", [*keys, "num_images=1", f"run.dir={tmp_path / 'run'}"]))
    for text in ((tmp_path / "run" / "report.html").read_text(), (tmp_path / "run" / "log.txt").read_text()):
        assert f"mask_inverted ({REASONS['mask_inverted']})" in text
