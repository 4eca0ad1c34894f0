"""build_data.py reads what people have: every kind of source with its captions; what it does not read is named."""

import bz2
import hashlib
import http.server
import io
import json
import os
import shutil
import tarfile
import threading
from typing import ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from packshot.config.compose import compose
from packshot.dataset.text_files import EncodingError, decode_text
from packshot.errors import ConfigError, PackshotError
from packshot.make_dataset.run import build
from packshot.make_dataset.sources import list_items
from packshot.make_dataset.sources.packing import open_unpacked

CAPTIONS = [f"Professional photo of an object on a {thing}" for thing in ("marble table", "café table", "bed of sand")]


def picture(seed, kind="PNG"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (80, 96, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "set"
    made.mkdir()
    for number in range(3):
        (made / f"{number}.png").write_bytes(picture(number))
    return made


def run(source, out, *overrides):
    keys = [f"source.path='{source}'", f"run.dir={out}", "dataset=background", "quality.duplicate_distance=0"]
    build(compose("build_data", [*keys, *overrides]))
    return [row for part in sorted(out.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


def texts(rows):
    return [row["text"] for row in rows]


# --- captions in a folder


def write_jsonl(path):
    lines = [json.dumps({"file_name": f"{n}.png", "text": text}) for n, text in enumerate(CAPTIONS)]
    path.with_suffix(".jsonl").write_text("\n".join(lines), encoding="utf-8")


def write_csv(path):
    path.with_suffix(".csv").write_text(
        "\n".join(["file_name,text", *(f"{n}.png,{text}" for n, text in enumerate(CAPTIONS))]), encoding="utf-8"
    )


def write_excel_csv(path):
    lines = ["file_name;caption", *(f'{n}.png;"{text}"' for n, text in enumerate(CAPTIONS))]
    path.with_suffix(".csv").write_bytes("\r\n".join(lines).encode("cp1252"))


def write_utf16_tsv(path):
    lines = ["file_name\ttext", *(f"{n}.png\t{text}" for n, text in enumerate(CAPTIONS))]
    path.with_suffix(".tsv").write_bytes("\r\n".join(lines).encode("utf-16"))


def write_json_rows(path):
    rows = [{"image_path": f"./{n}.png", "caption": text} for n, text in enumerate(CAPTIONS)]
    path.with_name("labels.json").write_bytes(json.dumps(rows, ensure_ascii=False).encode("utf-16"))


def write_json_object(path):
    path.with_suffix(".json").write_text(json.dumps({f"{n}.png": text for n, text in enumerate(CAPTIONS)}))


def write_kohya_json(path):
    """Absolute names without an ending, and an object for each, as kohya's finetune tools write them."""
    entries = {str(path.parent / str(n)): {"caption": text, "tags": "x"} for n, text in enumerate(CAPTIONS)}
    path.with_name("meta_cap.json").write_text(json.dumps(entries))


def write_json_lines_named_json(path):
    write_jsonl(path)
    path.with_suffix(".jsonl").rename(path.with_suffix(".json"))


def write_parquet(path):
    table = pa.table({"file_name": [f"{n}.png" for n in range(3)], "text": CAPTIONS})
    pq.write_table(table, path.with_suffix(".parquet"))


TABLES = [write_jsonl, write_csv, write_excel_csv, write_utf16_tsv, write_parquet]
TABLES += [write_json_rows, write_json_object, write_kohya_json, write_json_lines_named_json]


@pytest.mark.parametrize("write", TABLES)
def test_a_metadata_table_brings_captions(folder, tmp_path, capsys, write):
    write(folder / "metadata")
    assert texts(run(folder, tmp_path / "out")) == CAPTIONS
    assert "3 of 3 images have a caption" in capsys.readouterr().err


def test_coco_captions_bring_all_captions_and_the_licence(folder, tmp_path):
    images = [{"id": n, "file_name": f"{n}.png", "license": 4} for n in range(3)]
    annotations = [{"image_id": n, "caption": text} for n, text in enumerate(CAPTIONS)]
    annotations.append({"image_id": 1, "caption": "another one "})
    document = {"images": images, "annotations": annotations, "licenses": [{"id": 4, "name": "CC-BY-2.0"}]}
    (folder / "captions_val2017.json").write_text(json.dumps(document))
    rows = run(folder, tmp_path / "out")
    assert texts(rows) == CAPTIONS
    assert rows[1]["captions"] == [CAPTIONS[1], "another one"]
    assert {row["license"] for row in rows} == {"CC-BY-2.0"}


def test_json_that_describes_no_image_is_named(folder, tmp_path, capsys):
    """What is read is told by the content: settings and statistics are not captions."""
    (folder / "0.json").write_text(json.dumps({"caption": CAPTIONS[0]}))
    (folder / "1.json").write_text(json.dumps({"width": 96}))
    (folder / "settings.json").write_text(json.dumps({"rank": 8, "names": ["a"]}))
    (folder / "other.json").write_text(json.dumps({"elsewhere.png": "a caption"}))
    assert texts(run(folder, tmp_path / "out")) == [CAPTIONS[0], "", ""]
    shown = capsys.readouterr().err
    assert "1 of 3 images have a caption" in shown
    assert "1 not read, .json next to an image, without a caption: 1.json" in shown
    assert "2 not read, .json: neither an image nor its caption: other.json, settings.json" in shown


def test_captions_json_must_be_captions(folder, tmp_path):
    (folder / "captions.json").write_text(json.dumps({"0.png": 3}))
    with pytest.raises(ConfigError, match=r"captions\.json: 0\.png is neither a caption nor an object"):
        run(folder, tmp_path / "out")


def test_several_captions_of_a_json_are_kept(folder, tmp_path):
    """Next to the picture or in a tar, a list of captions becomes the column ``captions``."""
    (folder / "0.json").write_text(json.dumps({"caption": CAPTIONS[:2]}))
    assert run(folder, tmp_path / "out")[0]["captions"] == CAPTIONS[:2]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(folder / "0.png", "0.png")
        tar.add(folder / "0.json", "0.json")
        tar.add(folder / "1.png", "1.png")
    rows = run(tmp_path / "a.tar", tmp_path / "packed")
    assert [row["captions"] for row in rows] == [CAPTIONS[:2], None]


def test_a_metadata_table_describes_its_own_folder(folder, tmp_path):
    """file_name is relative to the table, and a table may lie in a subfolder."""
    (folder / "more").mkdir()
    (folder / "0.png").rename(folder / "more" / "0.png")
    lines = [
        {"file_name": "0.png", "prose": CAPTIONS[0], "license": "CC0-1.0"},
        {"file_name": "gone.png", "prose": "x"},
    ]
    (folder / "more" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = run(folder, tmp_path / "out", "source.caption_column=prose")
    assert {row["source"]: row["text"] for row in rows}["set/more/0.png"] == CAPTIONS[0]
    assert {row["license"] for row in rows} == {"CC0-1.0", "unknown"}
    assert rows[-1]["source"] == "set/more/0.png"


def test_a_caption_column_that_is_not_there_is_refused(folder, tmp_path):
    write_csv(folder / "metadata")
    with pytest.raises(ConfigError, match=r"source\.caption_column=prose") as caught:
        run(folder, tmp_path / "out", "source.caption_column=prose")
    assert "file_name, text" in caught.value.hint


def test_kohya_folders_repeat_their_images(tmp_path, capsys):
    for name in ("10_sks bottle", "2_style"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "a.png").write_bytes(picture(len(name)))
        (tmp_path / "train" / name / "a.caption").write_text(CAPTIONS[0])
    rows = run(tmp_path / "train", tmp_path / "out")
    assert [(row["text"], row["repeats"]) for row in rows] == [(CAPTIONS[0], 10), (CAPTIONS[0], 2)]
    assert "'10_sks bottle' 10 times" in capsys.readouterr().err
    assert "repeats" not in run(tmp_path / "train", tmp_path / "once", "source.folder_repeats=false")[0]


@pytest.mark.parametrize("name", ["2024_summer", "02_side", "shoot"])
def test_other_numbered_folders_repeat_nothing(tmp_path, name):
    (tmp_path / "set" / name).mkdir(parents=True)
    (tmp_path / "set" / name / "a.png").write_bytes(picture(0))
    assert "repeats" not in run(tmp_path / "set", tmp_path / "out")[0]


def test_a_folder_without_captions_is_told_on_the_screen(folder, tmp_path, capsys):
    (folder / "notes.md").write_text("x")
    (folder / "raw.jxl").write_bytes(b"\xff\x0a")
    run(folder, tmp_path / "out")
    shown = capsys.readouterr().err
    assert "0 of 3 images have a caption" in shown
    assert "1 not read, .jxl is a format that is not supported: raw.jxl" in shown
    assert "notes.md" in shown


# --- encodings


@pytest.mark.parametrize(
    ("data", "text", "encoding"),
    [
        (CAPTIONS[1].encode(), CAPTIONS[1], ""),
        (b"\xef\xbb\xbf" + CAPTIONS[1].encode(), CAPTIONS[1], ""),
        (CAPTIONS[1].encode("utf-16"), CAPTIONS[1], "utf-16-le"),
        (b"\xfe\xff" + CAPTIONS[1].encode("utf-16-be"), CAPTIONS[1], "utf-16-be"),
        (CAPTIONS[1].encode("utf-16-le"), CAPTIONS[1], "utf-16-le"),
        (CAPTIONS[1].encode("utf-32"), CAPTIONS[1], "utf-32-le"),
        (CAPTIONS[1].encode("cp1252"), CAPTIONS[1], "windows-1252"),
        ("物体在大理石桌上".encode(), "物体在大理石桌上", ""),
        (b"a\0b\r\nc\n", "ab\nc", ""),
        (b"", "", ""),
    ],
)
def test_captions_are_decoded_by_their_bytes(data, text, encoding):
    assert decode_text(data) == (text, encoding)


def test_a_caption_in_no_known_encoding_is_rejected(folder, tmp_path):
    (folder / "0.txt").write_bytes(b"caf\xe9 \x81\x8d")
    (folder / "1.txt").write_bytes(CAPTIONS[1].encode("cp1252"))
    rows = run(folder, tmp_path / "out")
    assert texts(rows) == [CAPTIONS[1], ""]
    found = {row["source"]: row for row in pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()}
    assert "not windows-1252: byte 0x81" in found["set/0.png"]["measure"]
    assert (found["set/1.png"]["reason"], found["set/1.png"]["kept"]) == ("caption_encoding", True)
    with pytest.raises(EncodingError, match="utf-16-le"):
        decode_text(b"\xff\xfea")


# --- img2dataset, tars, lists, saved sets


def pack(path, mode="w"):
    with tarfile.open(path, mode) as tar:
        for number, text in enumerate(CAPTIONS):
            for kind, data in (("jpg", picture(number, "JPEG")), ("json", json.dumps({"caption": text}).encode())):
                member = tarfile.TarInfo(f"{number:09d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("form", ["files", "webdataset", "parquet"])
def test_img2dataset_is_read_in_its_three_forms(tmp_path, capsys, form):
    made = tmp_path / "set"
    (made / "00000").mkdir(parents=True)
    described = {"url": ["https://example.org/x.jpg"] * 3, "caption": CAPTIONS, "key": ["0", "1", "2"]}
    if form == "parquet":
        described["jpg"] = [picture(number, "JPEG") for number in range(3)]
    elif form == "webdataset":
        pack(made / "00000.tar")
    else:
        for number, text in enumerate(CAPTIONS):
            (made / "00000" / f"{number:09d}.jpg").write_bytes(picture(number, "JPEG"))
            (made / "00000" / f"{number:09d}.json").write_text(json.dumps({"caption": text}))
    pq.write_table(pa.table(described), made / "00000.parquet")
    (made / "00000_stats.json").write_text("{}")
    assert texts(run(made, tmp_path / "out")) == CAPTIONS
    shown = capsys.readouterr().err
    assert "00000_stats.json" in shown
    assert form == "parquet" or "3 of 3 images have a caption" in shown


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tars_are_read_plain_and_compressed(tmp_path, mode):
    """What a tar is packed with is told by its bytes, so its name may be anything."""
    pack(tmp_path / "a.tar", mode)
    assert texts(run(tmp_path / "a.tar", tmp_path / "out")) == CAPTIONS


ZSTD = {"one frame": 1, "two frames": 2, "pzstd": 1}


def pack_zstd(path, form):
    """zstd writes one frame, a parallel packer several, pzstd one after a frame of its own."""
    pack(path.with_suffix(""))
    plain = path.with_suffix("").read_bytes()
    path.with_suffix("").unlink()
    size = -(-len(plain) // ZSTD[form])
    packed = [pa.compress(plain[start : start + size], "zstd", asbytes=True) for start in range(0, len(plain), size)]
    path.write_bytes((b"\x50\x2a\x4d\x18\x04\0\0\0size" if form == "pzstd" else b"") + b"".join(packed))


@pytest.mark.parametrize("form", ZSTD)
def test_zstd_tars_are_read(tmp_path, form):
    """Two samples in a shard of the build: the shard of the source is read from its start again."""
    pack_zstd(tmp_path / "a.tar.zst", form)
    assert texts(run(tmp_path / "a.tar.zst", tmp_path / "out", "shard_size=2")) == CAPTIONS


def test_a_zstd_tar_that_is_cut_is_refused(tmp_path):
    pack_zstd(tmp_path / "a.tar.zst", "one frame")
    packed = (tmp_path / "a.tar.zst").read_bytes()
    (tmp_path / "a.tar.zst").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ConfigError, match="not a whole tar file"):
        run(tmp_path / "a.tar.zst", tmp_path / "out")


def test_zstd_seeks_like_a_plain_file(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()
    (tmp_path / "a.zst").write_bytes(pa.compress(content, "zstd", asbytes=True))
    with open_unpacked(str(tmp_path / "a.zst")) as file:
        for place, size in ((2_500_000, 700_000), (10, 5), (2_999_999, 9), (0, 3_000_000), (1_500_000, 1)):
            assert file.seek(place) == place
            assert file.read(size) == content[place : place + size]


def test_members_of_a_tar_that_are_not_read_are_counted(tmp_path, capsys):
    pack(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("9.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "000000000.jpg"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo(".thumbs/0.jpg"))
        tar.addfile(tarfile.TarInfo("000000000.cls"))
    assert len(run(tmp_path / "a.tar", tmp_path / "out")) == 3
    shown = capsys.readouterr().err
    for reason in ("links and devices", "hidden or the system's", "cls"):
        assert f"1 not read, {reason} in tar shards" in shown


def test_a_tar_inside_a_compressed_tar_is_read(tmp_path):
    pack(tmp_path / "00000.tar")
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as outer:
        outer.add(tmp_path / "00000.tar", "00000.tar")
    assert texts(run(tmp_path / "all.tar.gz", tmp_path / "out")) == CAPTIONS


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_a_list_names_files(folder, tmp_path, kind):
    rows = [{"path": str(folder / f"{n}.png") if n else "0.png", "caption": text} for n, text in enumerate(CAPTIONS)]
    place = folder / f"list.{kind}"
    if kind == "csv":
        place.write_text("\n".join(["path,caption", *(f"{row['path']},{row['caption']}" for row in rows)]))
    elif kind == "jsonl":
        place.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        place.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), place)
    assert texts(run(place, tmp_path / "out")) == CAPTIONS


class Server(http.server.BaseHTTPRequestHandler):
    """Pictures by number; /busy fails once, /gone always, /big sends too much."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == "/gone" or (self.path == "/busy" and self.asked.count("/busy") == 1):
            self.send_error(404 if self.path == "/gone" else 503)
            return
        data = bytes(2**20 + 1) if self.path == "/big" else picture(1 if self.path == "/busy" else 0)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Server.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_a_list_of_urls_is_downloaded_once(tmp_path, server):
    digests = [hashlib.sha256(picture(0)).hexdigest(), "", "", "", "0" * 64]
    lines = ["url,text,sha256"]
    for name, digest in zip(("ok", "busy", "gone", "big", "ok"), digests, strict=True):
        lines.append(f"{server}/{name},an object on {name},{digest}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    limits = ["source.download_mib=1", "source.download_seconds=20", "shard_size=2"]
    rows = run(tmp_path / "list.csv", tmp_path / "out", *limits)
    assert texts(rows) == ["an object on ok", "an object on busy"]
    found = {row["source"]: row["measure"] for row in pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()}
    assert "HTTP 404" in found[f"{tmp_path.name}/list.csv#2"]
    assert "more than 1 MiB (source.download_mib)" in found[f"{tmp_path.name}/list.csv#3"]
    assert "its sha256 is" in found[f"{tmp_path.name}/list.csv#4"]
    assert Server.asked.count("/ok") == 1
    assert Server.asked.count("/busy") == 2
    before = len(Server.asked)
    assert run(tmp_path / "list.csv", tmp_path / "out", *limits, "run.resume=true") == rows
    assert set(Server.asked[before:]) == {"/gone", "/big"}, "what is kept is not asked for again"


def test_a_list_without_pictures_is_refused(tmp_path):
    (tmp_path / "list.csv").write_text("name,price\nmug,3\n")
    with pytest.raises(ConfigError, match="names no picture in a column like file_name") as caught:
        run(tmp_path / "list.csv", tmp_path / "out")
    assert "name, price" in caught.value.hint


def test_a_set_saved_by_datasets_is_read(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "prompt": datasets.Value("string")})
    pictures = [{"bytes": picture(n), "path": None} for n in range(3)]
    made = datasets.Dataset.from_dict({"image": pictures, "prompt": CAPTIONS}, features=features)
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "saved")
    rows = run(tmp_path / "saved", tmp_path / "out")
    assert texts(rows) == CAPTIONS
    assert rows[0]["image"]["bytes"] == picture(0)


# --- folders as they are on disks


def test_hidden_folders_are_not_read(folder, tmp_path, capsys):
    for name in (".thumbs", "__MACOSX", "@eaDir"):
        (folder / name).mkdir()
        (folder / name / "9.png").write_bytes(picture(9))
    (folder / "._0.png").write_bytes(b"x")
    assert len(run(folder, tmp_path / "out")) == 3
    assert "4 not read, hidden or the system's" in capsys.readouterr().err


def test_links_are_followed_and_loops_end(folder, tmp_path, capsys):
    shutil.move(folder / "0.png", tmp_path / "elsewhere.png")
    (tmp_path / "linked").mkdir()
    (tmp_path / "elsewhere.png").rename(tmp_path / "linked" / "0.png")
    (folder / "link").symlink_to(tmp_path / "linked")
    (folder / "loop").symlink_to(folder)
    (folder / "broken.png").symlink_to(tmp_path / "gone.png")
    rows = run(folder, tmp_path / "out")
    assert [row["source"] for row in rows] == ["set/1.png", "set/2.png", "set/link/0.png"]
    shown = capsys.readouterr().err
    assert "1 not read, links to a folder that is read already: loop" in shown
    assert "1 not read, No such file or directory: broken.png" in shown


def test_only_regular_files_are_opened(folder, tmp_path, capsys):
    """A FIFO named like a picture would hold the build for ever."""
    os.mkfifo(folder / "p.png")
    assert len(run(folder, tmp_path / "out")) == 3
    assert "1 not read, not regular files: p.png" in capsys.readouterr().err


def test_an_unreadable_folder_is_named(folder, tmp_path, capsys, monkeypatch):
    (folder / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("packshot.make_dataset.sources.walk.os.scandir", refuse)
    assert len(run(folder, tmp_path / "out")) == 3
    assert "1 not read, folders that cannot be opened (Permission denied): closed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["colon::x.png", "a b%20c#1.png", "zip:x.png", "ü.png", "[1].png"])
def test_odd_names_are_names(folder, tmp_path, name):
    (folder / name).write_bytes(picture(7))
    assert f"set/{name}" in [row["source"] for row in run(folder, tmp_path / "out")]


def test_nothing_to_read_names_what_there_is(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.psd").write_bytes(b"8BPS")
    with pytest.raises(ConfigError, match=r"holds no image \(1 files: 1 .psd\)") as caught:
        list_items(compose("build_data", [f"source.path={tmp_path / 'set'}"]).source)
    assert "metadata.jsonl" in caught.value.hint


# --- what the rows hold


def test_source_bytes_are_kept_where_decoding_changed_nothing(tmp_path):
    made = tmp_path / "set"
    made.mkdir()
    turned = Image.open(io.BytesIO(picture(1)))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(made / "turned.jpg", exif=exif)
    (made / "plain.jpg").write_bytes(picture(2, "JPEG"))
    Image.open(io.BytesIO(picture(3))).convert("CMYK").save(made / "press.jpg")
    rows = {row["source"][4:]: row for row in run(made, tmp_path / "out")}
    for name in ("turned.jpg", "plain.jpg"):
        assert rows[name]["image"]["bytes"] == (made / name).read_bytes()
    assert (rows["turned.jpg"]["width"], rows["turned.jpg"]["height"]) == (80, 96)
    assert rows["press.jpg"]["image"]["bytes"].startswith(b"\x89PNG")


def test_max_side_scales_pictures_and_their_masks(folder, tmp_path):
    mask = Image.new("L", (96, 80))
    mask.paste(255, (20, 20, 70, 60))
    (tmp_path / "masks").mkdir()
    for number in range(3):
        mask.save(tmp_path / "masks" / f"{number}.png")
    keys = ["dataset=product", "data.max_side=64", f"source.masks={tmp_path / 'masks'}"]
    row = run(folder, tmp_path / "out", *keys, "quality.min_side=32")[0]
    assert (row["width"], row["height"]) == (64, 53)
    assert Image.open(io.BytesIO(row["image"]["bytes"])).size == Image.open(io.BytesIO(row["mask"]["bytes"])).size
    assert row["id"] == hashlib.sha256(picture(0)).hexdigest()


def test_a_source_that_changes_during_the_build_is_named(folder, tmp_path, monkeypatch):
    from packshot.make_dataset import pictures

    monkeypatch.setattr(pictures, "sha256", lambda data: "0" * 64)
    with pytest.raises(PackshotError, match=r"set/0\.png changed while the dataset was built"):
        run(folder, tmp_path / "out")


def test_a_bz2_file_that_is_cut_is_refused(tmp_path):
    pack(tmp_path / "whole.tar")
    packed = bz2.compress((tmp_path / "whole.tar").read_bytes())
    (tmp_path / "whole.tar").unlink()
    (tmp_path / "a.tar.bz2").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ConfigError, match="not a whole tar file"):
        run(tmp_path / "a.tar.bz2", tmp_path / "out")


def test_colour_variants_are_not_duplicates(tmp_path):
    """A hash of brightness takes a red and a blue mug for one picture; copies of one colour still are."""
    made = tmp_path / "set"
    made.mkdir()
    base = np.full((128, 128, 3), 235, np.uint8)
    base += np.random.default_rng(0).integers(0, 8, base.shape, np.uint8)
    for name, color in {"red": (190, 40, 40), "blue": (40, 90, 190), "green": (30, 120, 60)}.items():
        pixels = base.copy()
        pixels[40:90, 44:84] = color
        Image.fromarray(pixels).save(made / f"{name}.png")
        Image.fromarray(pixels).resize((100, 100)).save(made / f"{name}_small.jpg", quality=80)
    rows = run(made, tmp_path / "out", "quality.duplicate_distance=64")
    assert [row["source"] for row in rows] == ["set/blue.png", "set/green.png", "set/red.png"]


class Downtime(OSError):
    """A store's own error, without a number."""


@pytest.fixture
def store(monkeypatch):
    """Two pictures on a store of its own, and its file class."""
    import fsspec

    from packshot.make_dataset import sources

    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)
    made = fsspec.filesystem("memory")
    for number in range(2):
        made.pipe(f"/shelf/{number}.png", picture(number))
    yield made
    made.rm("/shelf", recursive=True)


@pytest.mark.parametrize("failures", [2, 99])
def test_a_store_that_is_down_is_tried_again_and_then_named(store, tmp_path, monkeypatch, failures):
    """A pause costs seconds; a longer one ends the build with an error and rejects no picture."""
    from packshot.make_dataset.sources import base, files

    left = [failures]

    def read(place):
        if left[0]:
            left[0] -= 1
            raise Downtime("connection refused")
        return base.read_place(place)

    monkeypatch.setattr(files, "read_place", read)
    if failures < 4:
        assert len(run("memory://shelf", tmp_path / "out")) == 2
        return
    with pytest.raises(PackshotError, match=r"shelf/0\.png cannot be read: Downtime: connection refused"):
        run("memory://shelf", tmp_path / "out")


def test_a_store_that_cannot_be_listed_is_a_config_error(store, tmp_path, monkeypatch):
    def fail(self, path, **kwargs):
        raise RuntimeError("no route")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "exists", fail)
        with pytest.raises(ConfigError, match=r"source.path=memory://shelf cannot be read: RuntimeError: no route"):
            run("memory://shelf", tmp_path / "out")


def test_json_that_is_nested_too_deep_is_named(folder, tmp_path):
    (folder / "metadata.jsonl").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        run(folder, tmp_path / "out")
