"""Several products in one picture: on one line, each with its own pixels, and certified as what they are."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from packshot.config.compose import compose
from packshot.errors import ConfigError
from packshot.generate import group
from packshot.generate.campaign import plan_campaign
from packshot.generate.jobs import product_jobs
from packshot.generate.run import generate
from packshot.generate.verify import verify

SIZES = {"cup": (20, 30), "pot": (44, 60), "vase": (16, 50)}


@pytest.fixture
def shelf(tmp_path):
    """Photographs of noise, each with a mask that is a rectangle."""
    for number, (name, (width, height)) in enumerate(SIZES.items()):
        noise = np.random.default_rng(number).integers(0, 256, (100, 90, 3), np.uint8)
        mask = Image.new("L", (90, 100))
        ImageDraw.Draw(mask).rectangle((20, 15, 19 + width, 14 + height), fill=255)
        for folder, picture in (("shelf", Image.fromarray(noise)), ("masks", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            picture.save(tmp_path / folder / f"{name}.png")
    return tmp_path


def asked(shelf, *more):
    keys = [f"product={shelf / 'shelf'}", f"mask={shelf / 'masks'}", "together=true", "tracking=none"]
    return compose("generate", [*keys, "background.color=[200,200,200]", *more])


def test_products_stand_on_one_line_with_their_own_pixels(shelf):
    [job] = product_jobs(asked(shelf))
    picture = np.asarray(Image.open(job.product))
    alpha = picture[..., 3]
    assert job.name == "shelf"
    feet = []
    found = 0
    columns = np.flatnonzero(alpha.any(axis=0))
    for run, name in zip(np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1), SIZES, strict=True):
        rows = np.flatnonzero(alpha[:, run].any(axis=1))
        feet.append(rows[-1])
        photo = np.asarray(Image.open(shelf / "shelf" / f"{name}.png"))
        # the mask's soft edge reaches a pixel further out on each side
        top, left = 15 - (rows.size - SIZES[name][1]) // 2, 20 - (run.size - SIZES[name][0]) // 2
        same = photo[top : top + rows.size, left : left + run.size]
        shown = picture[rows[0] : rows[-1] + 1, run[0] : run[-1] + 1]
        solid = shown[..., 3] == 255
        assert (shown[solid][:, :3] == same[solid]).all()
        found += solid.sum()
    assert len(set(feet)) == 1
    assert found > 0.8 * sum(width * height for width, height in SIZES.values())


def test_a_group_is_drawn_certified_and_verified(shelf):
    run = shelf / "run"
    generate(asked(shelf, f"run.dir={run}"))
    certificate = json.loads((run / "shelf-0.json").read_text())
    assert certificate["core"]["max_abs_diff"] == 0
    assert [part.split(" ")[0] for part in certificate["transform"]["decoding"]] == ["cup.png", "pot.png", "vase.png"]
    kept = run / "layers" / "shelf-input.png"
    assert all(finding.passed for finding in verify(run / "shelf-0.png", run / "shelf-0.json", kept))
    before = (run / "shelf-0.png").read_bytes()
    group._MADE.clear()
    generate(asked(shelf, f"run.dir={run}", "run.resume=true"))
    assert (run / "shelf-0.png").read_bytes() == before


def test_a_group_stands_on_a_canvas_like_one_product(shelf):
    run = shelf / "run"
    generate(asked(shelf, f"run.dir={run}", "placement=bottom", "size=[400,300]", "margin=0.05"))
    certificate = json.loads((run / "shelf-0.json").read_text())
    assert certificate["transform"]["size"] == [400, 300]
    assert certificate["core"]["max_abs_diff"] == 0


def test_doubts_about_one_mask_are_doubts_about_the_group(shelf):
    full = Image.new("L", (90, 100), 255)
    ImageDraw.Draw(full).rectangle((30, 30, 60, 60), fill=0)  # inverted: it is full along the frame
    full.save(shelf / "masks" / "pot.png")
    run = shelf / "run"
    generate(asked(shelf, f"run.dir={run}"))
    certificate = json.loads((run / "shelf-0.json").read_text())
    assert certificate["status"] == "needs_review"
    assert "mask_inverted" in certificate["reasons"]


def test_a_campaign_has_groups_and_single_products(shelf):
    (shelf / "jobs.csv").write_text("product,mask,together\nshelf,masks,true\nshelf/cup.png,masks/cup.png,\n")
    config = compose("generate", [f"campaign={shelf / 'jobs.csv'}", "background.color=[9,9,9]", "tracking=none"])
    names = [job.name.rpartition("-")[0] for job in plan_campaign(config).jobs]
    assert names == ["shelf", "cup"]


def test_one_product_is_no_group(shelf):
    with pytest.raises(ConfigError, match="together=true needs several products"):
        product_jobs(compose("generate", [f"product={shelf / 'shelf/cup.png'}", "together=true"]))
