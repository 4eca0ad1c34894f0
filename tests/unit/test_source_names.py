"""Captions are found under the names, columns and encodings of other tools and machines; what is lost is named."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from packshot.config.schema import SourceConfig
from packshot.dataset.text_files import EncodingError, decode_text
from packshot.errors import ConfigError
from packshot.make_dataset.sources import list_items, read_items


def picture(seed, kind="PNG"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (80, 96, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def described(tmp_path, table, content, files=("0.jpg", "1.jpg")):
    """A folder of pictures with a table; the captions by file, and the screen's lines."""
    folder = tmp_path / "set"
    for number, name in enumerate(files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))
    (folder / table).write_bytes(content if isinstance(content, bytes) else content.encode())
    items, notes = list_items(SourceConfig(path=str(folder)))
    return {raw.name[4:]: raw.captions or raw.text for raw in read_items(items)}, notes


@pytest.mark.parametrize(
    ("table", "content"),
    [
        ("metadata.csv", "Image_Path,Prompt\n0.jpg,a\n1.jpg,b\n"),
        ("metadata.csv", "file_name,text\n0,a\n1,b\n"),
        ("data.csv", "path,caption\n.\\0.jpg,a\n1.jpg,b\n"),
        ("list.csv", "path,caption\n/home/me/set/0.jpg,a\nC:\\me\\1.jpg,b\n"),
        ("anything.jsonl", '{"image": "0.jpg", "caption": "a"}\n{"image": "1.JPG", "caption": "b"}\n'),
        ("captions.txt", "image,caption\n0.jpg,a\n1.jpg,b\n"),
        ("captions.tsv", "Filename\tALT\n0.jpg\ta\n1.jpg\tb\n"),
    ],
)
def test_tables_of_other_tools_are_read(tmp_path, table, content):
    found, notes = described(tmp_path, table, content)
    assert found == {"0.jpg": "a", "1.jpg": "b"}
    assert notes == ["2 of 2 images have a caption"]


def test_several_rows_of_a_picture_are_its_captions(tmp_path):
    content = "image,caption\n0.jpg,first\n0.jpg,second\n1.jpg,b\n0.jpg,first\n"
    assert described(tmp_path, "results.csv", content)[0] == {"0.jpg": ("first", "second"), "1.jpg": "b"}
    items, notes = list_items(SourceConfig(path=str(tmp_path / "set" / "results.csv")))
    assert [raw.captions or raw.text for raw in read_items(items)] == [("first", "second"), "b"]
    assert "set/results.csv: 2 of 4 rows name a picture again; its captions are joined" in notes


def test_a_comma_without_quotes_stays_in_its_caption(tmp_path):
    """The words behind it were lost without a line."""
    found, _ = described(tmp_path, "metadata.csv", "file_name,text\n0.jpg,a cup, a table, light\n1.jpg,b\n")
    assert found == {"0.jpg": "a cup, a table, light", "1.jpg": "b"}


def test_cells_beyond_the_columns_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"line 2 has more cells than the 3 columns; put a cell that holds ',' in quotes"
    ):
        described(tmp_path, "metadata.csv", "file_name,text,license\n0.jpg,a cup, a table,CC0-1.0\n")


def test_a_table_without_captions_names_its_columns(tmp_path):
    found, notes = described(tmp_path, "metadata.csv", "file_name,caption_en,label\n0.jpg,a,5\n1.jpg,b,5\n")
    assert found == {"0.jpg": "", "1.jpg": ""}
    line = "set/metadata.csv has no column of captions, but caption_en, label: source.caption_column=<name> reads one"
    assert line in notes


def test_a_table_in_another_encoding_is_named(tmp_path):
    found, notes = described(tmp_path, "metadata.csv", "file_name,text\n0.jpg,café\n1.jpg,b\n".encode("cp1252"))
    assert found["0.jpg"] == "café"
    assert "metadata.csv is not UTF-8: read as windows-1252" in notes


def test_accents_and_case_of_names_may_differ(tmp_path):
    """A Mac composes accents otherwise than Windows does, and endings are upper-case on cameras."""
    folder = tmp_path / "set"
    folder.mkdir()
    for number, name in enumerate(("cafe\u0301.jpg", "IMG_1.JPG", "b.png", "B.png")):
        (folder / name).write_bytes(picture(number))
    (folder / "caf\u00e9.txt").write_text("accent")
    (folder / "img_1.TXT").write_text("case")
    (folder / "B.txt").write_text("of B alone")
    items, _ = list_items(SourceConfig(path=str(folder)))
    found = {raw.name[4:]: raw.text for raw in read_items(items)}
    assert found == {"cafe\u0301.jpg": "accent", "IMG_1.JPG": "case", "b.png": "", "B.png": "of B alone"}


@pytest.mark.parametrize("encoding", ["gb18030", "koi8-r"])
def test_text_that_is_no_western_one_is_not_guessed(encoding):
    text = "在大理石桌上的物体" if encoding == "gb18030" else "предмет на мраморном столе"
    with pytest.raises(EncodingError, match="encoding that cannot be told"):
        decode_text(text.encode(encoding))
    assert decode_text("été à l'île".encode("cp1252")) == ("été à l'île", "windows-1252")


def test_tables_of_pictures_count_their_captions(tmp_path):
    data = [picture(number, "JPEG") for number in range(3)]
    for name, texts, line in (
        ("txt", ["a", "", "b"], "2 of 3 images have a caption"),
        ("label_text", ["a", "b", "c"], "has no column of captions, but label_text: source.caption_column=<name>"),
    ):
        pq.write_table(pa.table({"jpg": data, name: texts}), tmp_path / "t.parquet")
        _, notes = list_items(SourceConfig(path=str(tmp_path / "t.parquet")))
        assert any(line in note for note in notes)


def test_a_table_inside_a_tar_is_no_sample(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in {"0.JPG": picture(0, "JPEG"), "0.TXT": b"a", "metadata.jsonl": b"{}"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    items, notes = list_items(SourceConfig(path=str(tmp_path / "a.tar")))
    assert [raw.text for raw in read_items(items)] == ["a"]
    assert "source.path: 1 not read, jsonl in tar shards: a.tar#metadata.jsonl" in notes


def test_an_archive_is_named_with_the_way_out(tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(ConfigError) as refused:
        list_items(SourceConfig(path=str(tmp_path)))
    assert "is an archive: unpack it: photos.zip" in str(refused.value)
