"""Bulk captioning: broken rows are recorded and passed over, finished work is kept, columns survive."""

import json
import threading

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caption_fixtures import CAPTIONS, caption_vlm, trained_run, write_dataset

from packshot.caption import stream
from packshot.caption.data import CaptionedRow, Journal
from packshot.caption.models.adapter import Caption
from packshot.caption.models.captioner import Captioner
from packshot.caption.review import doubtful, write_review
from packshot.caption.stream import Given, caption_shard, judge
from packshot.caption.write import summary
from packshot.dataset.rows import load_rows
from packshot.errors import ConfigError, PackshotError
from packshot.scene import Scene


def replace_image(shard, index, content):
    """Put other bytes into the image cell of one row."""
    table = pq.read_table(shard)
    rows = table.column("image").to_pylist()
    rows[index] = {"bytes": content, "path": None}
    column = pa.array(rows, table.schema.field("image").type)
    number = table.column_names.index("image")
    pq.write_table(table.set_column(number, table.schema.field("image"), column), shard)


class Scripted(Captioner):
    """A captioner that answers from a function of the image's size and counts the images it is shown."""

    def __init__(self, answer, batch_size=4):
        super().__init__(write_batch=None, batch_size=batch_size)
        object.__setattr__(self, "answer", answer)
        object.__setattr__(self, "seen", [])

    def write(self, images, masks):
        self.seen.append(len(images))
        return [self.answer(image) for image in images]


class Killed(BaseException):
    """What a signal does: nothing catches it."""


def say(text=CAPTIONS[0]):
    return lambda image: Caption(text, truncated=False)


def column(file, name):
    return pq.read_table(file).column(name).to_pylist()


@pytest.fixture
def shard(tmp_path):
    return write_dataset(tmp_path / "data", shards=(4,), captions=False) / "part-00000.parquet"


def test_a_broken_row_is_recorded_and_the_others_are_captioned(shard, tmp_path):
    replace_image(shard, 1, b"no image at all")
    replace_image(shard, 2, None)
    counts = caption_shard(shard, tmp_path / "out.parquet", Scripted(say()), "a")
    assert (counts["rows"], counts["errors"]) == (4, 2)
    assert column(tmp_path / "out.parquet", "text") == [CAPTIONS[0], None, None, CAPTIONS[0]]
    errors = column(tmp_path / "out.parquet", "caption_error")
    assert errors[0] is None
    assert errors[3] is None
    assert "not an image" in errors[1]
    assert "there is no image" in errors[2]
    assert column(tmp_path / "out.parquet", "scene")[1] is None
    assert Scene.from_dict(column(tmp_path / "out.parquet", "scene")[3]).render() == CAPTIONS[0]


def test_resume_does_the_failed_row_again_and_no_other(shard, tmp_path):
    out, moods = tmp_path / "out.parquet", iter(["calm", "calm", "calm", "naming a bottle", "warm"])
    captioner = Scripted(lambda image: Caption(f"Professional photo of an object, {next(moods)} mood", truncated=False))
    caption_shard(shard, out, captioner, "a")
    assert [error is None for error in column(out, "caption_error")] == [True, True, True, False]
    counts = caption_shard(shard, out, captioner, "a")
    assert captioner.seen == [4, 1]
    assert (counts["captioned"], counts["kept"], counts["errors"]) == (1, 3, 0)
    assert [text.split(", ")[1] for text in column(out, "text")] == ["calm mood"] * 3 + ["warm mood"]


def test_finished_work_is_not_touched(shard, tmp_path):
    out, captioner = tmp_path / "out.parquet", Scripted(say())
    caption_shard(shard, out, captioner, "a")
    before = out.stat()
    caption_shard(shard, out, captioner, "a")
    assert captioner.seen == [4]
    assert (out.stat().st_mtime_ns, out.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_another_captioner_or_another_input_redoes_the_shard(shard, tmp_path):
    out, captioner = tmp_path / "out.parquet", Scripted(say())
    for identity in ("a", "b"):
        caption_shard(shard, out, captioner, identity)
    assert captioner.seen == [4, 4]
    replace_image(shard, 0, pq.read_table(shard).column("image")[1].as_py()["bytes"])
    caption_shard(shard, out, captioner, "b")
    assert captioner.seen == [4, 4, 4]


def test_an_error_inside_the_model_costs_one_row_not_its_batch(shard, tmp_path):
    calls = []

    def answer(image):
        red = image.getpixel((0, 0))[0] > 100
        calls.append(red)
        if not red:
            raise RuntimeError("out of luck")
        return Caption(CAPTIONS[0], truncated=False)

    caption_shard(shard, tmp_path / "out.parquet", Scripted(answer), "a")
    assert column(tmp_path / "out.parquet", "text") == [CAPTIONS[0], None, CAPTIONS[0], None]
    assert column(tmp_path / "out.parquet", "caption_error")[1] == "RuntimeError: out of luck"


def test_an_error_that_concerns_every_row_ends_the_run(shard, tmp_path):
    def refuse(image):
        raise ConfigError("captioner.endpoint=http://x refuses: no such key.", "Is OPENAI_API_KEY right?")

    with pytest.raises(ConfigError, match="refuses: no such key"):
        caption_shard(shard, tmp_path / "out.parquet", Scripted(refuse), "a")
    assert not (tmp_path / "out.parquet").exists()


LOOPS = "repeats itself, as an untuned captioner does (captioner.adapter names a tuned one)"


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (Caption("Professional photo of an object on a table, calm mood", truncated=False), None),
        (
            Caption("Professional photo of a perfume bottle on a table", truncated=False),
            "names the product (perfume, bottle)",
        ),
        (Caption("Professional photo of an object on a tab", truncated=True), "was cut at captioner.max_new_tokens"),
        (Caption("an object on the right side side side side", truncated=True), LOOPS),
        (Caption("a table and white flowers and white flowers and white flowers", truncated=False), LOOPS),
        (Caption("", truncated=False), "describes no scene"),
    ],
)
def test_an_unusable_caption_is_kept_out_of_text(caption, reason):
    row = judge(caption)
    assert row.text == (caption.text if reason is None else None)
    assert row.error == (None if reason is None else f"{reason}: {caption.text}")


def sure(image):
    return Caption(CAPTIONS[0], truncated=False, confidence={"surface": 0.5, "mood": 0.25})


def test_a_kill_costs_one_batch_and_changes_no_byte(tmp_path):
    shard = write_dataset(tmp_path / "data", shards=(7,), captions=False) / "part-00000.parquet"
    whole, parts = tmp_path / "whole.parquet", tmp_path / "parts.parquet"
    caption_shard(shard, whole, Scripted(sure, batch_size=2), "a")

    def dies(image, counted=[]):  # noqa: B006
        counted.append(image)
        if len(counted) == 5:
            raise Killed
        return sure(image)

    with pytest.raises(Killed):
        caption_shard(shard, parts, Scripted(dies, batch_size=2), "a")
    assert not parts.exists()
    journal = next(tmp_path.glob(".parts.parquet.journal"))
    journal.write_text(journal.read_text()[:-5])  # the last line was being written
    told = []
    again = Scripted(sure, batch_size=2)
    counts = caption_shard(shard, parts, again, "a", told.append)
    assert again.seen == [2, 2], "three rows of seven were kept"
    assert (counts["captioned"], counts["kept"]) == (4, 3)
    assert told == [3, 2, 2]
    assert parts.read_bytes() == whole.read_bytes()
    assert not journal.exists()


def test_pictures_are_decoded_while_the_captioner_works(tmp_path, monkeypatch):
    """Also those of the next shard."""
    folder = write_dataset(tmp_path / "data", shards=(2, 2), captions=False)
    decoded, decode_row, count = threading.Event(), stream.decode_row, []

    def decode(table, index):
        count.append(index)
        if len(count) == 4:
            decoded.set()
        return decode_row(table, index)

    def answer(image):
        assert decoded.wait(timeout=30), "all four are decoded before the first is answered"
        return sure(image)

    monkeypatch.setattr(stream, "decode_row", decode)
    files = [(folder / name, tmp_path / name) for name in ("part-00000.parquet", "part-00001.parquet")]
    counts = stream.caption_shards(files, Scripted(answer, batch_size=2), "a")
    assert [count["captioned"] for _, count in counts] == [2, 2]


def test_a_journal_of_another_captioner_is_not_read(shard, tmp_path):
    journal = Journal(tmp_path / "out.parquet", "another key")
    journal.add({0: CaptionedRow("a lie")})
    caption_shard(shard, tmp_path / "out.parquet", Scripted(say()), "a")
    assert column(tmp_path / "out.parquet", "text") == [CAPTIONS[0]] * 4


def test_confidence_is_kept_beside_the_caption(shard, tmp_path):
    caption_shard(shard, tmp_path / "out.parquet", Scripted(sure), "a")
    (first, *_) = column(tmp_path / "out.parquet", "caption_confidence")
    assert first == {"surface": 0.5, "mood": 0.25, **dict.fromkeys(("surroundings", "background", "lighting", "style"))}
    before = Scripted(sure)
    caption_shard(shard, tmp_path / "out.parquet", before, "a")
    assert before.seen == []


def test_an_error_of_the_writer_is_the_rows_error(shard, tmp_path):
    captioner = Scripted(lambda image: Caption("", truncated=False, error="RateLimitError: slow down"))
    caption_shard(shard, tmp_path / "out.parquet", captioner, "a")
    assert column(tmp_path / "out.parquet", "caption_error") == ["RateLimitError: slow down"] * 4


def test_pictures_of_one_shape_are_captioned_together(shard, tmp_path):
    table = pq.read_table(shard)
    table = table.append_column("width", pa.array([40, 32, 40, 32])).append_column("height", pa.array([32] * 4))
    pq.write_table(table, shard)
    order = []

    def note(image):
        order.append(image.getpixel((0, 0)))
        return Caption(CAPTIONS[0], truncated=False)

    caption_shard(shard, tmp_path / "out.parquet", Scripted(note, batch_size=2), "a")
    reds = [pixel[0] > pixel[2] for pixel in order]
    assert reds == [False, False, True, True], "rows 1 and 3, then 0 and 2"


def test_other_columns_and_the_features_of_datasets_survive(shard, tmp_path):
    out = tmp_path / "out" / "part-00000.parquet"
    caption_shard(shard, out, Scripted(say()), "a")
    before, after = pq.read_table(shard), pq.read_table(out)
    for name in ("image", "mask", "id", "source", "license"):
        assert after.column(name).equals(before.column(name)), name
    opened = datasets.load_dataset("parquet", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(opened.features["image"], datasets.Image)
    assert opened[0]["image"].size == (32, 32)
    assert opened[0]["scene"]["surroundings"] == ["palm leaves"]


def test_a_set_without_text_columns_gets_them(shard, tmp_path):
    pq.write_table(pq.read_table(shard).select(["id", "image"]), shard)
    caption_shard(shard, tmp_path / "part-00000.parquet", Scripted(say()), "a")
    rows = load_rows("data.train", str(tmp_path / "part-00000.parquet"))
    assert rows.texts == [CAPTIONS[0]] * 4
    assert rows[0]["scene"].render() == CAPTIONS[0]


def test_not_one_caption_is_a_failure_with_an_example(shard, tmp_path):
    caption_shard(shard, tmp_path / shard.name, Scripted(say("A photo of a bottle on a table")), "a")
    with pytest.raises(PackshotError, match=r"none of 4 images got a caption; the first: names the product"):
        summary(tmp_path, [shard])


def test_task_caption_end_to_end_with_resume(tmp_path):
    run = trained_run()
    data = write_dataset(tmp_path / "data", shards=(2, 3), captions=False)
    whole = (data / "part-00001.parquet").read_bytes()
    replace_image(data / "part-00001.parquet", 0, b"broken")
    settings = (f"model.florence2={run.parent / 'base'}", f"captioner.adapter={run / 'export'}", f"data.input={data}")
    out = caption_vlm(tmp_path, "captioned", *settings, task="caption")
    first = (out / "part-00000.parquet").read_bytes()
    assert column(out / "part-00000.parquet", "text") == CAPTIONS
    assert column(out / "part-00001.parquet", "text") == [None, CAPTIONS[1], CAPTIONS[0]]
    with pytest.raises(ConfigError, match="is not empty"):
        caption_vlm(tmp_path, "captioned", *settings, task="caption")
    (data / "part-00001.parquet").write_bytes(whole)
    caption_vlm(tmp_path, "captioned", *settings, "run.resume=true", task="caption")
    assert (out / "part-00000.parquet").read_bytes() == first
    assert load_rows("data.train", str(out)).texts == [*CAPTIONS, CAPTIONS[0], CAPTIONS[1], CAPTIONS[0]]


def test_captions_never_replace_their_input(tmp_path):
    data = write_dataset(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"run.dir=.* is data.input itself"):
        caption_vlm(tmp_path, "data", f"data.input={data}", "run.resume=true", task="caption")
    with pytest.raises(ConfigError, match=r"data.input is not set"):
        caption_vlm(tmp_path, "out", task="caption")


def with_captions(shard, texts, **columns):
    """The shard with these captions and further columns."""
    table = pq.read_table(shard)
    number = table.column_names.index("text")
    table = table.set_column(number, table.schema.field("text"), pa.array(texts, pa.string()))
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, shard)


MINE = "Professional photo of an object on my own table"


def test_only_empty_captions_are_filled(shard, tmp_path):
    """A person's words stay, with their scene; blanks and failures of earlier captioners count as empty."""
    with_captions(shard, [MINE, "", "  ", CAPTIONS[1]], caption_origin=["source", "", "", "endpoint"])
    captioner = Scripted(say())
    counts = caption_shard(shard, tmp_path / "out.parquet", captioner, "a", given=Given("florence2"))
    assert captioner.seen == [2]
    assert column(tmp_path / "out.parquet", "text") == [MINE, CAPTIONS[0], CAPTIONS[0], CAPTIONS[1]]
    origins = column(tmp_path / "out.parquet", "caption_origin")
    assert origins == ["source", "florence2", "florence2", "endpoint"]
    assert Scene.from_dict(column(tmp_path / "out.parquet", "scene")[0]).surface == "my own table"
    assert (counts["with_caption"], counts["captioned"]) == (2, 2)


def test_all_captions_are_replaced_on_request_alone(shard, tmp_path):
    with_captions(shard, [MINE, "", MINE, MINE])
    out = tmp_path / "out.parquet"
    caption_shard(shard, out, Scripted(say()), "a", given=Given("florence2"))
    assert column(out, "caption_origin") == ["source", "florence2", "source", "source"]
    caption_shard(shard, out, Scripted(say(CAPTIONS[1])), "a", given=Given("florence2", overwrite=True))
    assert column(out, "text") == [CAPTIONS[1]] * 4
    assert column(out, "caption_origin") == ["florence2"] * 4


def test_a_failure_keeps_the_text_it_would_have_replaced(shard, tmp_path):
    """With ``captioner.overwrite=true`` a broken row has its error beside the old text; a resume tries it again."""
    out = tmp_path / shard.name
    pq.write_table(out_of_order(shard), shard)
    given = Given("florence2", overwrite=True, corrections={column(shard, "id")[2]: CAPTIONS[1]})
    replace_image(shard, 0, b"broken")
    replace_image(shard, 2, b"broken")
    replace_image(shard, 3, b"broken")
    caption_shard(shard, out, Scripted(say()), "a", given=given)
    assert column(out, "text") == [MINE, CAPTIONS[0], CAPTIONS[1], None]
    assert column(out, "captions") == [[MINE, "another"], None, None, None]
    assert column(out, "caption_origin") == ["endpoint", "florence2", "source", ""]
    assert ["not an image" in (error or "") for error in column(out, "caption_error")] == [True, False, True, True]
    assert Scene.from_dict(column(out, "scene")[0]).surface == "my own table"
    counts = summary(out.parent, [shard])
    assert (counts["captioned"], counts["stayed"], sum(counts["errors"].values())) == (3, 2, 3)
    assert load_rows("data.train", str(out)).texts == [MINE, CAPTIONS[0], CAPTIONS[1]]
    captioner = Scripted(say())
    assert caption_shard(shard, out, captioner, "a", given=given)["captioned"] == 3


def out_of_order(shard):
    """The shard with one person's caption of several, a machine's, one that is corrected, and none."""
    several = pa.array([[MINE, "another"], None, [CAPTIONS[0], "another"], None])
    with_captions(shard, [MINE, CAPTIONS[1], CAPTIONS[0], ""], caption_origin=["endpoint", "source", "florence2", ""])
    return pq.read_table(shard).append_column("captions", several)


def test_a_correction_counts_as_a_persons_caption(shard, tmp_path):
    with_captions(shard, [CAPTIONS[1], "", "", ""], caption_origin=["florence2", "", "", ""])
    ids = column(shard, "id")
    given = Given("florence2", corrections={ids[0]: MINE, ids[2]: MINE})
    captioner = Scripted(say())
    caption_shard(shard, tmp_path / "out.parquet", captioner, "a", given=given)
    assert captioner.seen == [2]
    assert column(tmp_path / "out.parquet", "text") == [MINE, CAPTIONS[0], MINE, CAPTIONS[0]]
    assert column(tmp_path / "out.parquet", "caption_origin") == ["source", "florence2"] * 2


def test_the_screen_counts_what_is_kept_and_filled(tmp_path):
    run = trained_run()
    data = write_dataset(tmp_path / "data", shards=(3,), captions=False)
    with_captions(data / "part-00000.parquet", [MINE, "", ""])
    settings = (f"model.florence2={run.parent / 'base'}", f"captioner.adapter={run / 'export'}", f"data.input={data}")
    out = caption_vlm(tmp_path, "filled", *settings, task="caption")
    screen = (out / "log.txt").read_text()
    assert "1 captions of the source kept (captioner.overwrite=true replaces them)" in screen
    assert "2 empty captions filled by florence2" in screen
    counts = json.loads((out / "captions.json").read_text())
    assert (counts["kept"], counts["written"]) == (1, 2)
    out = caption_vlm(tmp_path, "replaced", *settings, "captioner.overwrite=true", task="caption")
    assert "1 captions of the source are replaced (captioner.overwrite=true)" in (out / "log.txt").read_text()
    assert column(out / "part-00000.parquet", "text")[0] == CAPTIONS[0]


def test_failures_are_counted_and_reviewed_with_their_text(tmp_path):
    run = trained_run()
    data = write_dataset(tmp_path / "data", shards=(3,), captions=False)
    with_captions(data / "part-00000.parquet", [MINE, MINE, ""])
    replace_image(data / "part-00000.parquet", 0, b"broken")
    settings = (f"model.florence2={run.parent / 'base'}", f"captioner.adapter={run / 'export'}", f"data.input={data}")
    out = caption_vlm(tmp_path, "replaced", *settings, "captioner.overwrite=true", task="caption")
    screen = (out / "log.txt").read_text()
    assert "1 captions of the source are replaced (captioner.overwrite=true)" in screen
    assert "1 captions of the source stay, because the captioner failed on their images" in screen
    assert "1 rows not captioned: " in screen
    counts = json.loads((out / "captions.json").read_text())
    assert (counts["captioned"], counts["kept"], counts["written"]) == (3, 1, 2)
    samples = doubtful(load_rows("data.input", str(out), captions=False, pictures=("image",)), 1)
    write_review(tmp_path, samples, str(out))
    table = (tmp_path / "review.csv").read_text(encoding="utf-8-sig")
    assert "not an image" in table
    assert MINE in table
