"""Doubtful captions are shown, edited and taken back; a person's words are kept apart and win."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caption_fixtures import CAPTIONS, SCENES, caption_vlm, trained_run, write_dataset
from PIL import Image

from packshot.caption.data import CaptionedRow, read_shard, write_captions
from packshot.dataset import corrections
from packshot.dataset.rows import load_rows
from packshot.errors import ConfigError, PackshotError

BETTER = "Professional photo of an object on a stone shelf, a green wall in the background"


@pytest.fixture
def captioned(tmp_path):
    """A dataset of four captions: one failed, the others of falling certainty."""
    source = write_dataset(tmp_path / "data", shards=(4,), captions=False) / "part-00000.parquet"
    rows = [
        CaptionedRow(CAPTIONS[0], confidence={"surface": 0.9, "lighting": 0.8}),
        CaptionedRow(CAPTIONS[1], confidence={"surface": 0.9, "lighting": 0.2}),
        CaptionedRow(error="names the product (bottle): a bottle on a table"),
        CaptionedRow(CAPTIONS[1], confidence={"surface": 0.5, "lighting": 0.9}),
    ]
    write_captions(tmp_path / "captioned" / "part-00000.parquet", read_shard(source), rows, "key", "florence2", ())
    return tmp_path / "captioned"


def review(folder, *overrides):
    run = caption_vlm(folder.parent, "review", f"data.input={folder}", *overrides, task="review")
    with (run / "review.csv").open(newline="", encoding="utf-8-sig") as file:
        return run, list(csv.DictReader(file))


def edited(run, changes):
    with (run / "review.csv").open(newline="", encoding="utf-8-sig") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        line["corrected"] = changes.get(line["id"], "")
    with (run / "edited.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, lines[0])
        table.writeheader()
        table.writerows(lines)
    return run / "edited.csv"


def correct(folder, table):
    caption_vlm(folder.parent, "correct", f"data.input={folder}", f"data.corrections={table}", task="correct")


def test_failures_come_first_and_then_the_least_certain(captioned):
    run, lines = review(captioned)
    assert [line["id"] for line in lines] == ["id2", "id1", "id3", "id0"]
    assert lines[0]["doubt"].startswith("names the product")
    assert [line["doubt"] for line in lines[1:]] == ["lighting 0.20", "surface 0.50", "lighting 0.80"]
    assert all(line["corrected"] == "" for line in lines)
    page = (run / "review.html").read_text()
    assert page.count("<img") == 4
    assert page.index("id2") < page.index("id1")
    run, lines = review(captioned, "data.review=2", "run.resume=true")
    assert len(lines) == 2


def test_a_correction_wins_and_the_machines_words_stay(captioned):
    run, _ = review(captioned)
    shard = (captioned / "part-00000.parquet").read_bytes()
    correct(captioned, edited(run, {"id1": BETTER, "id2": BETTER}))
    assert (captioned / "part-00000.parquet").read_bytes() == shard
    rows = load_rows("data.train", str(captioned))
    assert rows.texts == [CAPTIONS[0], BETTER, BETTER, CAPTIONS[1]], "the failed row is back, with a person's words"
    assert rows[1]["scene"].background == "a green wall"
    assert rows[0]["scene"] == SCENES[0]
    before = load_rows("data.train", str(captioned)).fingerprint()
    correct(captioned, edited(run, {"id1": CAPTIONS[0]}))
    again = load_rows("data.train", str(captioned))
    assert again.texts[1:3] == [CAPTIONS[0], BETTER], "a later correction replaces its own row only"
    assert again.fingerprint() != before


def test_a_corrected_row_is_not_reviewed_or_captioned_again(captioned):
    run, _ = review(captioned)
    correct(captioned, edited(run, {"id2": BETTER}))
    _, lines = review(captioned, "run.resume=true")
    assert [line["id"] for line in lines] == ["id1", "id3", "id0"]
    trained = trained_run()
    caption_vlm(
        captioned.parent, "captioned", f"data.input={captioned.parent / 'data'}",
        f"captioner.adapter={trained / 'export'}", "run.resume=true", task="caption",
    )  # fmt: skip
    assert pq.read_table(captioned / "part-00000.parquet").column("text").to_pylist() == CAPTIONS * 2
    assert load_rows("data.train", str(captioned)).texts[2] == BETTER


def test_every_mistake_is_named_and_nothing_is_taken_over(captioned):
    run, _ = review(captioned)
    table = edited(run, {"id0": BETTER, "id1": "A bottle of perfume on a table", "id3": ", ,"})
    table.write_text(table.read_text() + f"id9,,,{BETTER}\n")
    with pytest.raises(ConfigError) as caught:
        correct(captioned, table)
    for part in ("names the product (bottle, perfume)", "describes no scene", "no sample id9"):
        assert part in str(caught.value)
    assert not (captioned / corrections.FILE).exists()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8", "cp1252", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_from_any_spreadsheet_is_read(captioned, encoding, separator):
    run, _ = review(captioned)
    better = "Professional photo of an object on a café table"
    edited(run, {"id1": better})
    with (run / "edited.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    with (run / "edited.csv").open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=separator).writerows(lines)
    correct(captioned, run / "edited.csv")
    assert load_rows("data.train", str(captioned)).texts[1] == better


def test_the_review_table_opens_in_excel_as_utf8(captioned):
    run, _ = review(captioned)
    assert (run / "review.csv").read_bytes().startswith(b"\xef\xbb\xbf")


def test_a_table_that_is_none_is_refused(captioned, tmp_path):
    with pytest.raises(ConfigError, match=r"data.corrections is not set"):
        caption_vlm(captioned.parent, "none", f"data.input={captioned}", task="correct")
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"has no columns id and corrected"):
        correct(captioned, tmp_path / "odd.csv")
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        correct(captioned, tmp_path / "picture.png")


def test_a_damaged_corrections_file_is_not_passed_over(captioned):
    (captioned / corrections.FILE).write_text(json.dumps({"id": "id0", "text": BETTER}) + "\n{oops\n")
    with pytest.raises(PackshotError, match=r"corrections.jsonl, line 2 is not a correction"):
        load_rows("data.train", str(captioned))


def test_a_dataset_without_corrections_is_the_same_table(captioned):
    table = pa.table({"id": ["a"], "text": ["b"]})
    assert corrections.apply(table, {}) is table
