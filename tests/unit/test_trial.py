"""evaluate.py items=...: pictures of any system, measured against a truth that is known."""

import csv
import json
import shutil
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from trial_fixtures import EDITS, SIDE, Made, made, write_made, write_pictures

from packshot.config.compose import compose
from packshot.dataset.rows import load_rows
from packshot.errors import ConfigError, PackshotError
from packshot.evaluate import bench
from packshot.evaluate.alignment import align
from packshot.evaluate.distance import kid
from packshot.evaluate.features import by_plain_features
from packshot.evaluate.intervals import compare, estimate
from packshot.evaluate.items import TABLE, open_items
from packshot.evaluate.measures import MEASURES, floor_of, measure_all, open_trial
from packshot.evaluate.results import Picture, open_systems
from packshot.evaluate.run import evaluate
from packshot.evaluate.sets import Seen, clip_text, diversity, product_similarity, reference_choice
from packshot.imaging.matte import unmix
from packshot.imaging.outline import segment_near
from packshot.runs.files import resolve

QUICK = ["tracking=none", "captioner=none", "scores.features=plain"]


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    """Three items on the disk with what they are made of."""
    folder = tmp_path_factory.mktemp("items")
    return *write_made(folder / "items", 3), folder / "items"


def measured(item, picture, tmp_path):
    file = tmp_path / f"{item.id}.png"
    Image.fromarray(picture).save(file)
    return measure_all(open_trial(item, Picture(file), segment_near, floor_of(item, segment_near)))


def scores_of_edits(item, made_item, tmp_path):
    """The measures of the true picture, and of every planted edit."""
    found = {"true": measured(item, made_item.compose(), tmp_path)}
    for name, (edit, _) in EDITS.items():
        found[name] = measured(item, edit(made_item), tmp_path)
    return found


def test_a_true_picture_has_no_fault(bed, tmp_path):
    items, several, _ = bed
    found = measured(items[0], several[0].compose(), tmp_path)
    assert found["core_identical_share"] == 1
    assert found["core_delta_e"] == found["shift"] == found["extension"] == 0
    assert found["growth"] < 0.3
    assert found["halo"] < 0.05
    assert found["shadow_error"] < 0.3


def test_every_planted_edit_moves_its_own_score_alone(bed, tmp_path):
    """Another score moves by less than a third of what its own edit moves it."""
    items, several, _ = bed
    found = scores_of_edits(items[0], several[0], tmp_path)
    own = {measure: found[name][measure] - found["true"][measure] for name, (_, measure) in EDITS.items()}
    assert all(change > 0 for change in own.values()), own
    for name, (_, measure) in EDITS.items():
        for other, change in own.items():
            if other != measure:
                assert abs(found[name][other] - found["true"][other]) < change / 3, (name, other)


def test_the_old_background_at_the_edge_is_a_halo(bed, tmp_path):
    """A mask that is two pixels too wide takes a rim of the photograph's wall along."""
    items, several, _ = bed
    wide = cv2.dilate(several[0].mask_HW, np.ones((5, 5), np.uint8))
    picture = np.where((wide > 127)[..., None], several[0].photo(), several[0].plate_HW3)
    assert measured(items[0], picture, tmp_path)["halo"] > 0.3


def test_the_strength_of_a_shadow_has_a_sign(bed, tmp_path):
    """None, half of it, all, and twice as strong in the logarithm of light."""
    items, several, _ = bed
    strengths = []
    for times in (0, 0.5, 1, 2):
        darker_HW = np.rint(255 * (several[0].shadow_HW / 255.0) ** times).astype(np.uint8)
        found = measured(items[0], replace(several[0], shadow_HW=darker_HW).compose(), tmp_path)
        assert found["shadow_error"] == abs(1 - found["shadow_strength"])
        strengths.append(found["shadow_strength"])
    assert strengths[:3] == pytest.approx([0, 0.5, 1], abs=0.2)
    assert strengths[3] > 1.25  # black cannot be darker


def test_a_measure_without_a_direction_ranks_nothing(bed, tmp_path):
    items, several, folder = bed
    pictures = {item.id: one.compose() for item, one in zip(items, several, strict=True)}
    runs = ",".join(str(write_pictures(tmp_path / name, pictures)) for name in ("one", "two"))
    evaluate(compose("evaluate", [f"items={folder}", f"runs=[{runs}]", f"run.dir={tmp_path}/run", *QUICK]))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["lower_is_better"]["shadow_strength"] is None
    assert report["systems"]["one"]["measures"]["shadow_strength"]["items"] == 3
    assert "shadow_strength" not in report["comparisons"]["one against two"]
    assert "shadow_error" in report["comparisons"]["one against two"]


@pytest.mark.slow
def test_planted_edits_on_held_out_renders(tmp_path):
    """The same on real renders, by the mean over items; prints the table of docs/bench.md."""
    found = {}
    for item in bench.export(tmp_path / "items")[:40]:
        photo, mask = item.photo_and_mask()
        parts = Made(mask, unmix(photo, mask), item.read("plate"), item.read("shadow", "L"))
        for name, row in scores_of_edits(item, parts, tmp_path).items():
            for measure, value in row.items():
                found.setdefault(name, {}).setdefault(measure, []).append(value)
    means = {}
    for name, rows in found.items():
        means[name] = {measure: float(np.nanmean(values)) for measure, values in rows.items()}
    changes = {}
    for name in EDITS:
        changes[name] = {measure: means[name][measure] - means["true"][measure] for measure in MEASURES}
    for name, change in changes.items():
        print(f"| {name} | " + " | ".join(f"{value:+.4f}" for value in change.values()) + " |")
    for name, (_, own) in EDITS.items():
        assert changes[name][own] > 0
        for other, (_, measure) in EDITS.items():
            if other != name:
                assert abs(changes[name][measure]) < changes[other][measure] / 3, (name, measure)


# ---- alignment ----


def test_a_move_by_pixels_is_found():
    item = made()
    place = align(item.photo(), item.mask_HW, item.compose(dx=-12))
    assert (place.left, place.top, place.resampling) == (-12, 0, "none")


def test_a_recoloured_half_does_not_move_the_product():
    item = made()
    picture = item.compose()
    picture[40:70, 58:98] = 255 - picture[40:70, 58:98]
    assert align(item.photo(), item.mask_HW, picture).left == 0


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.6])
def test_a_product_on_another_canvas_is_found(scale):
    item = made()
    canvas = cv2.resize(made(9).plate_HW3, (400, 300))
    size = (round(SIDE * scale), round(SIDE * scale))
    photo, mask = (cv2.resize(part, size, interpolation=cv2.INTER_CUBIC) for part in (item.photo(), item.mask_HW))
    left, top = 120, 30
    window = canvas[top : top + size[1], left : left + size[0]]
    window[:] = np.where((mask > 127)[..., None], photo, window)[: window.shape[0]]
    place = align(item.photo(), item.mask_HW, canvas)
    assert place.scale == pytest.approx(scale, rel=0.03)
    middle = SIDE / 2 * scale
    assert place.left + SIDE / 2 * place.scale == pytest.approx(left + middle, abs=3)
    assert place.top + SIDE / 2 * place.scale == pytest.approx(top + middle, abs=3)


def test_a_stated_place_is_not_searched():
    item = made()
    canvas = np.full((300, 400, 3), 90, np.uint8)
    place = align(item.photo(), item.mask_HW, canvas, box=(10, 20, 80, 80))
    assert (place.left, place.top, place.scale, place.stated) == (10, 20, 0.5, True)


def test_a_product_that_is_gone_has_no_place(bed, tmp_path):
    """The plate alone is not a product that was moved by 0."""
    items, several, _ = bed
    assert np.isnan(measured(items[0], several[0].plate_HW3, tmp_path)["shift"])


def test_a_canvas_around_the_same_pixels_is_exact(bed, tmp_path):
    items, several, _ = bed
    wide = cv2.copyMakeBorder(several[0].compose(), 10, 30, 20, 0, cv2.BORDER_REFLECT)
    assert measured(items[0], wide, tmp_path)["core_identical_share"] == 1


def test_the_old_backdrop_in_the_rim_is_an_edge_error(bed, tmp_path):
    """Compared with the photograph, whose rim shows the backdrop too, it would be perfect."""
    items, several, _ = bed
    pasted = np.where((several[0].mask_HW >= 128)[..., None], several[0].photo(), several[0].plate_HW3)
    clean = measured(items[0], several[0].compose(), tmp_path)["edge_delta_e"]
    assert measured(items[0], pasted, tmp_path)["edge_delta_e"] > clean + 1


# ---- items and systems ----


def test_a_foreign_folder_is_scored_without_any_certificate(bed, tmp_path):
    items, several, folder = bed
    pictures = {item.id: one.compose() for item, one in zip(items[:2], several, strict=False)}
    theirs = write_pictures(tmp_path / "theirs", pictures)
    (theirs / "logo.png").write_bytes((theirs / "item0.png").read_bytes())
    evaluate(compose("evaluate", [f"items={folder}", f"runs=[{theirs}]", f"run.dir={tmp_path}/run", *QUICK]))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    system = report["systems"]["theirs"]
    assert system["measures"]["core_identical_share"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "items": 2}
    assert system["missing"] == ["item2"]
    assert system["set"]["cmmd, plain"] >= 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "2 of 3 items" in log
    assert "1 pictures belong to no item, such as logo.png" in log
    assert "Worst cases" in (tmp_path / "run" / "report.html").read_text()


def test_two_systems_are_compared_item_by_item(bed, tmp_path):
    items, several, folder = bed
    good = write_pictures(tmp_path / "good", {item.id: one.compose() for item, one in zip(items, several, strict=True)})
    edit, measure = EDITS["recoloured label"]
    bad = write_pictures(tmp_path / "bad", {item.id: edit(one) for item, one in zip(items, several, strict=True)})
    keys = [f"items={folder}", f"runs=[{good},{bad}]", f"run.dir={tmp_path}/run", "suite=preservation", *QUICK]
    evaluate(compose("evaluate", keys))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    found = report["comparisons"]["good against bad"]
    assert (found[measure]["wins"], found[measure]["ties"], found[measure]["losses"]) == (3, 0, 0)
    assert found["shift"]["ties"] == 3


def test_order_and_format_of_files_change_no_score(bed, tmp_path):
    items, several, folder = bed
    pictures = {item.id: one.compose(dx=-3) for item, one in zip(items, several, strict=True)}
    systems = [write_pictures(tmp_path / "png", pictures), write_pictures(tmp_path / "bmp", pictures, "bmp")]
    systems.append(write_pictures(tmp_path / "webp", pictures, "webp", lossless=True))
    with (tmp_path / "table.csv").open("w", newline="") as file:
        rows = [["id", "picture"], *([name, f"png/{name}.png"] for name in reversed(pictures))]
        csv.writer(file).writerows(rows)
    runs = ",".join(map(str, [*systems, tmp_path / "table.csv"]))
    evaluate(compose("evaluate", [f"items={folder}", f"runs=[{runs}]", f"run.dir={tmp_path}/run", *QUICK]))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    found = [(system["measures"], system["set"], system["by_item"]) for system in report["systems"].values()]
    assert len(found) == 4
    assert all(one == found[0] for one in found)


def test_a_product_set_can_be_the_items(tmp_path):
    rows = open_items(Path("data/rendered/showcase"), tmp_path / "items")
    assert len(rows) == 24
    photo, mask = rows[0].photo_and_mask()
    assert photo.shape[:2] == mask.shape
    assert (tmp_path / "items" / TABLE).exists()


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("id,photo\na,photo.png\n", "row 1 of .* has no mask.\n .* The table has id, photo."),
        ("id,photo,mask\n", "has no rows"),
        ("id,photo,mask\na,photo.png,nowhere.png\n", "there is no such file"),
        ("id,photo,mask\na,photo.png,mask.png\na,photo.png,mask.png\n", "more than once"),
    ],
)
def test_wrong_items_are_named(tmp_path, table, says):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    (tmp_path / "items.csv").write_text(table)
    with pytest.raises(ConfigError, match=says):
        open_items(tmp_path / "items.csv", tmp_path)


def test_an_empty_mask_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    Image.new("L", (8, 8), 0).save(tmp_path / "mask.png")
    (tmp_path / "items.csv").write_text("id,photo,mask\na,photo.png,mask.png\n")
    [item] = open_items(tmp_path / "items.csv", tmp_path)
    with pytest.raises(PackshotError, match="empty"):
        item.photo_and_mask()


def test_wrong_results_are_named(bed, tmp_path):
    items, _, _ = bed
    with pytest.raises(ConfigError, match="runs is empty"):
        open_systems([], items)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no picture of any item"):
        open_systems([str(tmp_path / "empty")], items)
    (tmp_path / "table.csv").write_text("id,picture,seconds\nitem0,table.csv,fast\n")
    with pytest.raises(ConfigError, match="wrong number"):
        open_systems([str(tmp_path / "table.csv")], items)


def test_rows_without_a_picture_or_with_one_twice_are_named(bed, tmp_path):
    items, _, _ = bed
    shutil.copy(items[0].pictures["truth"], tmp_path / "a.png")
    table = tmp_path / "table.csv"
    for rows, says in (
        ("name,file\nitem0,a.png\n", "row 1 of .* has no id or no picture.\n .* The table has name, file."),
        ("id,picture\nitem0,a.png\nitem0,a.png\n", "a.png twice for item0"),
        ("id,picture\nother,a.png\n", "no picture of any item.\n  A row of a table has the id of an item"),
    ):
        table.write_text(rows)
        with pytest.raises(ConfigError, match=says):
            open_systems([str(table)], items)


def test_ids_of_a_table_are_read_as_those_of_items(bed, tmp_path):
    """Spaces around a cell, and accents as a Mac writes them."""
    items, _, _ = bed
    shutil.copy(items[0].pictures["truth"], tmp_path / "a.png")
    table = tmp_path / "table.csv"
    table.write_text("id, picture\n" + unicodedata.normalize("NFD", " größe , a.png\n"), encoding="utf-8")
    [system] = open_systems([str(table)], [replace(items[0], id="größe")])
    assert list(system.pictures) == ["größe"]


def test_damaged_files_beside_pictures(tmp_path):
    """A killed run leaves half a line in its metrics; a certificate that is cut cannot decide whose a picture is."""
    items, several = write_made(tmp_path / "items", 2)
    names = [replace(items[0], id="shoe"), replace(items[1], id="shoe-1")]
    folder = write_pictures(tmp_path / "theirs", {"shoe": several[0].compose(), "shoe-1": several[0].compose()})
    (folder / "shoe-1.json").write_text('{"input": ')
    with pytest.raises(ConfigError, match=r"shoe-1\.json is no certificate"):
        open_systems([str(folder)], names)
    (folder / "shoe-1.json").write_text(json.dumps({"input": {"name": "shoe-1"}}))
    (folder / "metrics.jsonl").write_text('{"picture": "shoe", "seconds": 2}\n{"picture": "shoe-1", "sec')
    [system] = open_systems([str(folder)], names)
    assert system.pictures["shoe"][0].costs == {"seconds": 2.0}


def test_pictures_without_the_product_are_counted(bed, tmp_path):
    _, several, folder = bed
    write_pictures(tmp_path / "theirs", {"item0": several[0].compose(), "item1": several[1].compose()})
    (tmp_path / "theirs.csv").write_text(
        'id,picture,box\nitem0,theirs/item0.png,"900,900,128,128"\nitem1,theirs/item1.png,\n'
    )
    keys = [f"items={folder}", f"runs=[{tmp_path}/theirs.csv]", f"run.dir={tmp_path}/run", "suite=preservation", *QUICK]
    evaluate(compose("evaluate", keys))
    told = (tmp_path / "run" / "log.txt").read_text()
    assert "1 pictures have no pixel of the product's core, such as item0.png" in told


def test_a_name_with_two_readings_needs_a_table_or_a_certificate(tmp_path):
    """``shoe-1.png`` is the second picture of ``shoe`` or the only one of ``shoe-1``."""
    items, several = write_made(tmp_path / "items", 2)
    names = [replace(items[0], id="shoe"), replace(items[1], id="shoe-1")]
    folder = write_pictures(tmp_path / "theirs", {"shoe-0": several[0].compose(), "shoe-1": several[0].compose()})
    with pytest.raises(ConfigError, match="Name the pictures in a table"):
        open_systems([str(folder)], names)
    (folder / "shoe-1.json").write_text(json.dumps({"input": {"name": "shoe"}}))
    [system] = open_systems([str(folder)], names)
    assert [picture.file.name for picture in system.pictures["shoe"]] == ["shoe-0.png", "shoe-1.png"]


def test_two_files_for_one_picture_are_refused(bed, tmp_path):
    items, several, _ = bed
    folder = write_pictures(tmp_path / "theirs", {"item0": several[0].compose()})
    shutil.copy(folder / "item0.png", folder / "item0-0.png")
    with pytest.raises(ConfigError, match="two pictures of item0"):
        open_systems([str(folder)], items)


def test_a_mask_in_an_alpha_channel_is_read(tmp_path):
    items, several = write_made(tmp_path, 1)
    white = Image.new("RGBA", (SIDE, SIDE), "white")
    white.putalpha(Image.fromarray(several[0].mask_HW))
    white.save(items[0].pictures["mask"])
    assert (items[0].photo_and_mask()[1] == several[0].mask_HW).all()


@pytest.mark.parametrize("box", ["nan,0,128,128", "0,0,128,64", "0,0,1e9,1e9", "1,2,3"])
def test_a_wrong_box_is_refused(bed, tmp_path, box):
    items, _, folder = bed
    shutil.copy(items[0].pictures["truth"], tmp_path / "a.png")
    (tmp_path / "table.csv").write_text(f'id,picture,box\nitem0,a.png,"{box}"\n')
    keys = [f"items={folder}", f"runs=[{tmp_path}/table.csv]", f"run.dir={tmp_path}/run", "suite=preservation", *QUICK]
    with pytest.raises(PackshotError, match="box"):
        evaluate(compose("evaluate", keys))


def test_costs_that_are_stated_are_reported(bed, tmp_path):
    items, several, folder = bed
    write_pictures(tmp_path / "theirs", {item.id: one.compose() for item, one in zip(items, several, strict=True)})
    rows = [["id", "picture", "seconds"], *([f"item{k}", f"theirs/item{k}.png", k + 1.0] for k in range(3))]
    with (tmp_path / "theirs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    keys = [f"items={folder}", f"runs=[{tmp_path}/theirs.csv]", f"run.dir={tmp_path}/run", "suite=scene", *QUICK]
    evaluate(compose("evaluate", keys))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["systems"]["theirs.csv"]["measures"]["seconds"]["mean"] == 2.0


# ---- measures of sets, and how sure they are ----


def seen_of(items, pictures):
    found = []
    for item, picture in zip(items, pictures, strict=True):
        _, mask = item.photo_and_mask()
        found.append(Seen(item, Picture(item.pictures["photo"]), picture, mask))
    return found


def test_diversity_is_zero_for_copies_of_one_picture(bed):
    items, several, _ = bed
    same = seen_of([items[0], items[0]], [several[0].compose()] * 2)
    other = seen_of([items[0], items[0]], [several[0].compose(), several[0].compose() // 3])
    assert diversity(same, by_plain_features)["item0"] == pytest.approx(0, abs=1e-9)
    assert diversity(other, by_plain_features)["item0"] > 0.01


def test_pictures_that_are_their_references_are_chosen(tmp_path):
    items, _ = write_made(tmp_path, 5)
    colours = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40), (40, 200, 200)]
    looks = [np.full((SIDE, SIDE, 3), colour, np.uint8) for colour in colours]
    for item, look in zip(items, looks, strict=True):
        Image.fromarray(look).save(item.pictures["reference"])
    assert set(reference_choice(seen_of(items, looks), by_plain_features).values()) == {1.0}
    swapped = [*looks[1:], looks[0]]
    assert set(reference_choice(seen_of(items, swapped), by_plain_features).values()) == {0.0}


def test_kid_by_hand():
    """Two points a set: (x·y / D + 1)³ over the pairs of different points, and between the sets."""
    a = np.array([[1.0, 0.0], [0.0, 1.0]])
    b = np.array([[1.0, 1.0], [1.0, 0.0]])
    between = np.mean([(1 / 2 + 1) ** 3, (1 / 2 + 1) ** 3, (1 / 2 + 1) ** 3, 1.0])
    assert kid(a, b) == pytest.approx(1000 * (1.0 + 1.5**3 - 2 * between))


def test_an_interval_holds_the_mean_and_no_order():
    values = {f"i{k}": float(k % 7) for k in range(50)}
    known = estimate(values)
    assert known.low < known.mean < known.high
    assert estimate(dict(reversed(values.items()))) == known
    assert estimate({"a": float("nan")}) is None
    assert estimate({**values, "broken": float("nan")}) == known


def test_wins_follow_the_direction_of_the_measure():
    first, second = {"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 2.0, "b": 2.0, "c": 1.0, "d": 0.0}
    lower = compare(first, second, lower_is_better=True)
    assert (lower.wins, lower.ties, lower.losses) == (1, 1, 1)
    higher = compare({"a": 2.0}, {"a": 1.0}, lower_is_better=False)
    assert (higher.wins, higher.losses) == (1, 0)


def write_clip(folder):
    """A CLIP model of random weights with its tokenizer."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    side = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = CLIPTokenizer.from_pretrained("data/models/sdxl/tokenizer")
    text = {**side, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = {**side, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def test_clip_and_dino_scores_by_weights_that_are_given(bed, tmp_path):
    import torch
    from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer

    items, several, _ = bed
    write_clip(tmp_path)
    seen = seen_of(items[:1], [several[0].compose()])
    found = clip_text(seen, str(tmp_path))["item0"]
    model = CLIPModel.from_pretrained(tmp_path).eval()
    words = CLIPTokenizer.from_pretrained(tmp_path)([items[0].text], return_tensors="pt", padding=True)
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(
        images=[Image.fromarray(several[0].compose())], return_tensors="pt"
    )
    with torch.inference_mode():
        outputs = model(pixel_values=pixels["pixel_values"], **words)
    cosine = torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds).item()
    assert found == pytest.approx(100 * cosine, abs=1e-3)
    from packshot.evaluate.features import named_encoder

    embed = named_encoder(str(tmp_path), "scores.dino")
    same = product_similarity(seen_of(items[:1], [several[0].photo()]), embed)["item0"]
    other = product_similarity(seen_of(items[:1], [255 - several[0].photo()]), embed)["item0"]
    assert same == pytest.approx(1.0, abs=1e-5)
    assert other < same


# ---- the benchmark ----


def test_the_benchmark_takes_its_rows_as_they_were_published(tmp_path, monkeypatch):
    rows = load_rows("bench", bench.HELD_OUT)
    taken = bench.bench_rows(rows)
    products = [rows.read(index, ())["product_id"] for index in taken]
    assert (len(taken), set(Counter(products).values())) == (76, {4})
    assert rows.ids == load_rows("held out", "data/rendered/heldout").ids
    table = tmp_path / "heldout.csv"
    lines = resolve(bench.FROZEN).read_text().splitlines()
    monkeypatch.setattr(bench, "FROZEN", str(table))
    sample_id, product_id, digest = lines[1].split(",")
    table.write_text("\n".join([lines[0], f"{'0' * 64},{product_id},{digest}"]))
    with pytest.raises(ConfigError, match="lacks 000"):
        bench.bench_rows(rows)
    table.write_text("\n".join([lines[0], f"{sample_id},{product_id},{'0' * 64}"]))
    with pytest.raises(ConfigError, match=f"another picture or mask for {sample_id}"):
        bench.bench_rows(rows)


def test_the_benchmark_prints_a_row_for_a_folder(tmp_path, capsys):
    items = bench.export(tmp_path / "items")
    folder = tmp_path / "truth"
    folder.mkdir()
    for item in items[:3]:
        shutil.copy(item.pictures["truth"], folder / f"{item.id}.png")
        photo, mask = item.photo_and_mask()
        assert (photo[mask == 255] == item.read("truth")[mask == 255]).all()
    bench.main([str(folder), "--out", str(tmp_path / "bench"), "--set", "scores.features=plain"])
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith(f"| truth | 3 of {len(items)} | 100.0% (100.0% to 100.0%) |")
    with pytest.raises(ConfigError, match="not empty"):
        bench.export(tmp_path / "items")
    with pytest.raises(ConfigError, match="names no pictures"):
        bench.main([])
    with pytest.raises(ConfigError, match="usage"):
        bench.main(["--nothing"])


def test_a_benchmark_beside_other_files_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("id,photo\n")
    for arguments, says in (
        ([str(tmp_path), "--out", str(file)], "--out .*file is a file"),
        (["--export", str(file)], "--export .*file is a file"),
        (["--out"], "packshot bench: argument --out: expected one argument.\n  usage: packshot bench"),
    ):
        with pytest.raises(ConfigError, match=says):
            bench.main(arguments)
    (tmp_path / "bench-items").mkdir()
    (tmp_path / "bench-items" / TABLE).write_text("id,photo\nx,y\n")  # of another version, or cut
    with pytest.raises(ConfigError, match="has other items than the benchmark"):
        bench.main([str(tmp_path), "--out", str(tmp_path / "bench")])
