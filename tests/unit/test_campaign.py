"""Campaigns: tables of jobs, combinations of columns, changed rows, and runs that are killed."""

import csv
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from packshot.config.compose import compose
from packshot.errors import ConfigError
from packshot.generate.campaign import REPLACED, plan_campaign
from packshot.generate.certificate import load_certificates
from packshot.generate.run import generate

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["num_inference_steps=1", "guidance_scale=1", "num_images=1", "tracking=none", "layers=false"]
# bytes that name the way and not the result
OF_THE_WAY = {"config.yaml", "log.txt", "metrics.jsonl", ".lock"}


@pytest.fixture
def shop(tmp_path):
    """A folder with two products in folders of folders, their masks, and a hidden picture."""
    for number, name in enumerate(("cups/red.png", "cups/small/blue.png")):
        noise = np.random.default_rng(number).integers(0, 256, (72, 64, 3), np.uint8)
        mask = Image.new("L", (64, 72))
        ImageDraw.Draw(mask).ellipse((16, 18, 48, 54), fill=255)
        for folder, picture in (("photos", Image.fromarray(noise)), ("masks", mask)):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / folder / name)
    (tmp_path / "photos" / ".thumbs").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / ".thumbs" / "red.png")
    return tmp_path


def table(shop, text, name="jobs.csv"):
    (shop / name).write_text(text)
    return shop / name


def configured(shop, *more, table="jobs.csv"):
    return compose("generate", [f"campaign={shop / table}", f"run.dir={shop / 'run'}", *QUICK, *more])


def planned(shop, *more, table="jobs.csv"):
    return plan_campaign(configured(shop, *more, table=table)).jobs


def result_bytes(folder):
    """Every file of a finished run by its path, without those that name the way."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name not in OF_THE_WAY]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


BOTH = "product,mask,scene.surface,size,placement,seed\n"
RED = "photos/cups/red.png,masks/cups/red.png"
BLUE = "photos/cups/small/blue.png,masks/cups/small/blue.png"


def test_each_row_is_a_job_with_its_own_settings(shop):
    table(shop, f"{BOTH}{RED},oak,96x128,center,7\n{BLUE},,,,\n")
    red, blue = planned(shop, "scene.surface=marble")
    assert (red.config.scene.surface, blue.config.scene.surface) == ("oak", "marble")
    assert (red.config.size, blue.config.size) == ([96, 128], [])
    assert (red.config.run.seed, blue.config.run.seed) == (7, 0)
    assert red.mask == shop / "masks/cups/red.png"


def test_csv_and_json_lines_give_the_same_jobs(shop):
    table(shop, f"{BOTH}{RED},oak,96x128,center,7\n")
    row = {"product": "photos/cups/red.png", "mask": "masks/cups/red.png", "scene.surface": "oak", "size": [96, 128]}
    table(shop, json.dumps({**row, "placement": "center", "seed": 7, "negative_prompt": None}) + "\n", "jobs.jsonl")
    [from_csv], [from_json] = planned(shop), planned(shop, table="jobs.jsonl")
    assert from_csv.name == from_json.name
    assert from_json.config.size == from_csv.config.size == [96, 128]


def test_a_folder_is_walked_as_build_data_walks_it(shop):
    """Folders in folders count, hidden ones do not, and masks pair by their path."""
    table(shop, "product,mask,scene.surface\nphotos,masks,oak\n")
    jobs = planned(shop)
    assert [job.product.name for job in jobs] == ["red.png", "blue.png"]
    assert jobs[1].mask == shop / "masks/cups/small/blue.png"


def test_a_cross_combines_the_distinct_values(shop):
    """A product keeps its mask; columns of one scene stay together; empty cells add nothing."""
    text = "product,mask,scene.surface,scene.mood,seed\n"
    table(shop, f"{text}{RED},oak,calm,1\n{BLUE},moss,wild,2\n{BLUE},oak,calm,\n")
    jobs = planned(shop, "campaign_cross=true")
    seen = {(job.product.name, job.mask.name, job.config.scene.surface, job.config.run.seed) for job in jobs}
    assert len(jobs) == len(seen) == 2 * 2 * 2
    assert {(name, mask) for name, mask, *_ in seen} == {("red.png", "red.png"), ("blue.png", "blue.png")}
    moods = {(job.config.scene.surface, tuple(job.config.scene.mood or "")) for job in jobs}
    assert len(moods) == 2


def test_rows_complete_the_place_of_the_command_line(shop):
    table(shop, f"product,mask,placement\n{RED},left\n{BLUE},\n")
    with pytest.raises(ConfigError, match=r"campaign row 2: size=\[96, 96\] has no effect with placement=original"):
        planned(shop, "size=[96,96]")
    table(shop, f"product,mask,placement\n{RED},left\n{BLUE},right\n")
    jobs = planned(shop, "size=[96,96]", "product_scale=0.4")
    assert [job.config.placement.name for job in jobs] == ["left", "right"]


def test_repeated_rows_are_made_once(shop):
    table(shop, f"{BOTH}{RED},oak,,,\n{BLUE},oak,,,\n{RED},oak,,,\n")
    assert len(planned(shop)) == 2


def test_the_jobs_of_a_product_follow_each_other(shop):
    """So that a product is prepared once."""
    table(shop, f"{BOTH}{RED},oak,,,\n{BLUE},oak,,,\n{RED},moss,,,\n{BLUE},moss,,,\n")
    assert [job.product.stem for job in planned(shop)] == ["red", "red", "blue", "blue"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("product,surfaces\na.png,oak\n", r"row 1: there is no column 'surfaces'"),
        ("seed\nmany\n", r"row 1: seed=many has a value of the wrong type"),
        ("seed\n1\n-3\n", r"row 2: run.seed=-3 is out of range"),
        ("size\n96x128\n", r"row 1: size=\[96, 128\] has no effect with placement=original"),
        ("prompt,scene.surface\na desk,oak\n", r"row 1: prompt and scene.\* are both given"),
        ("placement\nmiddle\n", r"row 1: placement=middle has a value of the wrong type"),
        ("product\nmissing.png\n", r"row 1: product=missing.png: no such file"),
        ("product\n", r"has no rows"),
        ("run.dir\nelsewhere\n", r"there is no column 'run.dir'"),
        ("lighting\nsoft\n", r"Did you mean scene\.lighting\?"),
        ("seed,run.seed\n1,2\n", r"row 1: run.seed and another column both set run.seed"),
        ("product,together\nphotos/cups/red.png,true\n", r"row 1: together=true needs several products"),
    ],
)
def test_a_wrong_table_is_refused_with_its_row(shop, text, message):
    table(shop, text)
    with pytest.raises(ConfigError) as error:
        planned(shop)
    assert re.search(message, str(error.value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("light_angle\n90\n", r"row 1: light_angle=90 has no effect with shadow=none"),
        ("placement,position,size\ncoordinates,0.01;0.5,128x128\n", r"row 1 \(red.png\): position=\[0.01, 0.5\]"),
    ],
)
def test_a_row_that_cannot_be_drawn_is_named(shop, text, message):
    table(shop, text)
    files = [f"product={shop / 'photos/cups/red.png'}", f"mask={shop / 'masks/cups/red.png'}"]
    with pytest.raises(ConfigError, match=message):
        generate(configured(shop, *files))
    assert not (shop / "run").exists()


def test_a_cross_without_a_campaign_is_refused():
    with pytest.raises(ConfigError, match="campaign_cross=true has no effect with campaign=null"):
        compose("generate", ["campaign_cross=true"])


def test_interpolations_in_a_cell_are_plain_text(shop):
    """A cell may come from strangers: it must not read the environment."""
    table(shop, "scene.surface\n${oc.env:HOME}\n")
    assert planned(shop)[0].config.scene.surface == "${oc.env:HOME}"


def test_a_changed_row_redoes_only_itself(shop):
    """Its old pictures are set aside and counted, the index follows the table, and all other files stay untouched."""
    table(shop, f"note.sku,{BOTH}A1,{RED},oak,,,\nA2,{BLUE},oak,,,\nA3,{BLUE},moss,,,\n")
    generate(configured(shop))
    run = shop / "run"
    before = {path: path.stat().st_mtime_ns for path in run.glob("*-*-0.png")}
    assert len(before) == 3
    table(shop, f"note.sku,{BOTH}A1,{RED},oak,,,\nA2,{BLUE},sand,,,\nA3,{BLUE},moss,,,\n")
    generate(configured(shop, "run.resume=true"))
    after = {path: path.stat().st_mtime_ns for path in run.glob("*-*-0.png")}
    kept = before.keys() & after.keys()
    assert len(kept) == 2
    assert all(before[path] == after[path] for path in kept)
    assert len(list((run / REPLACED).glob("*.png"))) == 1
    rows = list(csv.DictReader((run / "campaign.csv").read_text("utf-8-sig").splitlines()))
    assert [(row["note.sku"], row["scene.surface"]) for row in rows] == [("A1", "oak"), ("A2", "sand"), ("A3", "moss")]
    assert all((run / row["picture"]).exists() for row in rows)


def test_a_changed_photo_redoes_only_its_rows(shop):
    table(shop, f"{BOTH}{RED},oak,,,\n{BLUE},oak,,,\n")
    names = [job.name for job in planned(shop)]
    Image.effect_noise((64, 72), 60).save(shop / "photos/cups/red.png")
    again = [job.name for job in planned(shop)]
    assert again[0] != names[0]
    assert again[1] == names[1]


def test_one_scene_is_kept_across_products(shop):
    """Two products of a size with one request are drawn from one noise: far from them the scenes are alike."""
    table(shop, f"{BOTH}{RED},oak,96x96,center,\n{BLUE},oak,96x96,center,\n{BLUE},oak,96x96,center,5\n")
    generate(configured(shop, "num_inference_steps=4", "product_scale=0.4"))
    pictures = {}
    for stem, certificate in load_certificates(shop / "run").items():
        seed = certificate["request"]["seed"]
        pictures[certificate["input"]["name"].split("-")[0], seed] = np.asarray(Image.open(shop / f"run/{stem}.png"))
    border = np.ones((96, 96), bool)
    border[16:80, 16:80] = False
    same = np.abs(pictures["red", 0].astype(int) - pictures["blue", 0])[border].mean()
    other = np.abs(pictures["blue", 5].astype(int) - pictures["blue", 0])[border].mean()
    assert same < 0.5 * other


# ---- kills ----


def run_killed(arguments, folder, after):
    """Start generate.py and kill it once ``after`` pictures have been written; whether it was killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "generate.py", *arguments], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        if len(list(folder.glob("*-*-*.png"))) >= after:
            process.kill()
            process.wait()
            return True
        time.sleep(0.002)
    assert process.returncode == 0
    return False


def killed_to_the_end(shop, rows, kills, *more):
    """Both results: of an unbroken run, and of one that was killed several times."""
    lines = [f"{RED if number % 2 else BLUE},{surface},,,\n" for number, surface in enumerate(rows)]
    table(shop, BOTH + "".join(lines))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that are killed: the number changes the last bits
    generate(configured(shop, *more))
    torch.set_num_threads(threads)
    expected = result_bytes(shop / "run")
    broken = shop / "broken"
    arguments = [f"campaign={shop / 'jobs.csv'}", f"run.dir={broken}", "run.resume=true", *QUICK, *more]
    draw = random.Random(0)
    places = sorted(draw.sample(range(1, len(rows)), kills))
    killed = [run_killed(arguments, broken, place) for place in places]
    assert all(killed)
    assert not run_killed(arguments, broken, len(rows) + 1)
    return expected, result_bytes(broken)


def test_a_killed_campaign_ends_with_the_same_bytes(shop):
    expected, found = killed_to_the_end(shop, ["oak", "moss", "sand", "snow"], 2, "layers=true")
    assert found == expected


@pytest.mark.slow
def test_200_rows_killed_five_times_end_alike(shop):
    expected, found = killed_to_the_end(shop, [f"surface {number}" for number in range(200)], 5)
    assert found == expected
