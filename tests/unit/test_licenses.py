"""The commercial profile: rows are rejected, datasets and weights refused, with the way out; without it nothing is."""

import json
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from packshot.caption.run import run as caption
from packshot.config.compose import compose
from packshot.config.schema import LicenseConfig
from packshot.dataset.rows import load_rows
from packshot.errors import ConfigError
from packshot.generate.run import generate
from packshot.make_dataset.run import build
from packshot.runs.licenses import allows, refuse_weights, weights_licenses
from packshot.runs.provenance import write_provenance
from packshot.train.run import train

COMMERCIAL = LicenseConfig(commercial=True)


@pytest.mark.parametrize(
    ("name", "let_in"),
    [
        ("CC0-1.0", True),
        ("cc-by-4.0", True),
        ("CC-BY-SA-3.0", True),
        ("Apache-2.0", True),
        ("openrail++", True),
        ("creativeml-openrail-m", True),
        ("CC-BY-NC-4.0", False),
        ("cc-by-nc-sa-4.0", False),
        ("CC-BY-ND-4.0", False),
        ("bria-rmbg-1.4", False),
        ("llama3.2", False),
        ("research only, mit", False),
        ("unknown", False),
        ("", False),
        (None, False),
    ],
)
def test_what_allows_commercial_use_is_known_by_name(name, let_in):
    assert allows(COMMERCIAL, name) is let_in
    assert allows(LicenseConfig(), name)
    assert not name or allows(LicenseConfig(commercial=True, allowed=[f" {name.upper()}"]), name)


@pytest.fixture
def photos(tmp_path):
    """A folder of four different photographs."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, colour in enumerate(("red", "blue", "white", "black")):
        image = Image.new("RGB", (160, 120), "grey")
        ImageDraw.Draw(image).rectangle((20 + 20 * number, 20, 70 + 20 * number, 50 + 10 * number), fill=colour)
        image.save(folder / f"{number}.png")
    return folder


def made(photos, out, *overrides):
    """The ids of a background set, and its rejections as (source, reason, measure)."""
    common = ["dataset=background", "captioner=none", "tracking=none", "quality.min_sharpness=0"]
    build(compose("build_data", [*common, f"source.path={photos}", f"run.dir={out}", *overrides]))
    rejected = pq.read_table(out / "rejected.parquet").to_pylist()
    ids = [row["id"] for file in sorted(out.glob("part-*.parquet")) for row in pq.read_table(file).to_pylist()]
    return ids, [(row["source"], row["reason"], row["measure"]) for row in rejected]


def test_rows_are_rejected_with_their_licence(photos, tmp_path):
    """The commercial profile does not accept it."""
    everything, _ = made(photos, tmp_path / "all", "source.license=CC-BY-NC-4.0")
    assert len(everything) == 4
    # the set is a source again: its rows bring their licences
    table = pq.read_table(tmp_path / "all" / "part-00000.parquet")
    names = ["CC0-1.0", "CC-BY-NC-4.0", "My Shop", "mit"]
    (tmp_path / "mixed").mkdir()
    mixed = table.set_column(table.column_names.index("license"), "license", [names])
    pq.write_table(mixed, tmp_path / "mixed" / "part-00000.parquet")
    kept, rejected = made(tmp_path / "mixed", tmp_path / "sold", "licenses.commercial=true")
    assert len(kept) == 2
    assert [(reason, measure) for _, reason, measure in rejected] == [
        ("license", "CC-BY-NC-4.0"),
        ("license", "My Shop"),
    ]
    kept, rejected = made(
        tmp_path / "mixed", tmp_path / "own", "licenses.commercial=true", "licenses.allowed=['My Shop']"
    )
    assert len(kept) == 3
    with pytest.raises(ConfigError, match=r"data\.train=.*rows under 'CC-BY-NC-4\.0', 'My Shop'"):
        load_rows("data.train", str(tmp_path / "mixed"), captions=False, licenses=COMMERCIAL)
    assert len(load_rows("data.train", str(tmp_path / "sold"), captions=False, licenses=COMMERCIAL)) == 2
    mixed = ["task=caption", "tracking=none", f"data.input={tmp_path / 'mixed'}", "licenses.commercial=true"]
    with pytest.raises(ConfigError, match=r"data\.input=.*rows under 'CC-BY-NC-4\.0', 'My Shop'"):
        caption(compose("caption_vlm", mixed))


def card(folder, head):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{head}\n---\n\n# A model\n")
    return folder


def test_weights_have_the_licence_of_card_or_data(tmp_path):
    assert weights_licenses("data/models/sdxl") == ["apache-2.0"]
    assert weights_licenses(str(card(tmp_path / "a", "license: openrail++"))) == ["openrail++"]
    (tmp_path / "a" / "vae").mkdir()
    assert weights_licenses(str(tmp_path / "a" / "vae")) == ["openrail++"]
    (tmp_path / "a" / "net.onnx").write_bytes(b"")
    assert weights_licenses(str(tmp_path / "a" / "net.onnx")) == ["openrail++"]
    assert weights_licenses(str(card(tmp_path / "b", "license: other\nlicense_name: bria-rmbg-1.4"))) == [
        "bria-rmbg-1.4"
    ]
    (tmp_path / "c" / "none").mkdir(parents=True)
    assert weights_licenses(str(tmp_path / "c" / "none")) == []
    (tmp_path / "b" / "data.json").write_text(json.dumps({"licenses": ["CC0-1.0", "unknown"]}))
    assert weights_licenses(str(tmp_path / "b")) == ["CC0-1.0", "unknown"]


@pytest.mark.parametrize(
    ("script", "key"),
    [
        ("build_data", "matte.model"),
        ("train_lora", "model.vae"),
        ("train_controlnet", "method.init"),
        ("train_ip_adapter", "model.base"),
        ("caption_vlm", "model.florence2"),
        ("caption_vlm", "captioner.adapter"),
        ("generate", "adapters.lora"),
        ("serve", "depth.onnx"),
    ],
)
def test_every_script_refuses_weights_that_do_not_allow_it(script, key, tmp_path):
    bad = card(tmp_path / "weights", "license: cc-by-nc-4.0")
    overrides = ["tracking=none", f"{key}={bad}"]
    if key == "depth.onnx":  # which only ControlNets read
        overrides.append(f"adapters.controlnets=[{card(tmp_path / 'net', 'license: mit')}]")
    refuse_weights(compose(script, overrides))
    with pytest.raises(ConfigError, match=rf"{key}=.*is under 'cc-by-nc-4\.0'.*licenses\.commercial=true") as caught:
        refuse_weights(compose(script, [*overrides, "licenses.commercial=true"]))
    assert 'licenses.allowed=["cc-by-nc-4.0"]' in str(caught.value.hint)
    refuse_weights(compose(script, [*overrides, "licenses.commercial=true", "licenses.allowed=[cc-by-nc-4.0]"]))
    refuse_weights(compose(script, [*overrides, "licenses.commercial=true", f"licenses.allowed=[{bad}]"]))
    (bad / "README.md").unlink()
    with pytest.raises(ConfigError, match=rf"{key}=.*names no licence"):
        refuse_weights(compose(script, [*overrides, "licenses.commercial=true"]))


def test_lists_of_weights_are_all_looked_at(tmp_path):
    good, bad = card(tmp_path / "good", "license: mit"), card(tmp_path / "bad", "license: cc-by-nc-4.0")
    with pytest.raises(ConfigError, match=rf"adapters\.controlnets={bad}"):
        refuse_weights(compose("generate", ["licenses.commercial=true", f"adapters.controlnets=[{good},{bad}]"]))


def test_scripts_stop_before_anything_is_written(tmp_path):
    """With the shipped data and weights they run."""
    bad = card(tmp_path / "base", "license: cc-by-nc-4.0")
    for script, run in (("train_lora", train), ("generate", generate)):
        out = tmp_path / script
        with pytest.raises(ConfigError, match=r"model\.base="):
            run(compose(script, ["tracking=none", "licenses.commercial=true", f"model.base={bad}", f"run.dir={out}"]))
        assert not out.exists()
    out = tmp_path / "shipped"
    shipped = ["tracking=none", "licenses.commercial=true", f"run.dir={out}", "num_images=1", "num_inference_steps=1"]
    generate(compose("generate", shipped))
    assert (out / "coffee-0.png").exists()
    for part in ("train", "heldout"):
        assert load_rows("data.train", f"data/rendered/{part}", licenses=COMMERCIAL).licenses == ["CC0-1.0"]


def test_a_hub_id_whose_card_cannot_be_read_names_no_licence(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.ModelCard.load", offline)
    assert weights_licenses("somebody/model") == []
    head = SimpleNamespace(data={"license": "other", "license_name": "llama3.2"})
    monkeypatch.setattr("huggingface_hub.ModelCard.load", lambda *_, **__: head)
    assert weights_licenses("somebody/model") == ["llama3.2"]


def test_an_export_keeps_the_licences_of_its_weights(tmp_path):
    bad = card(tmp_path / "vae", "license: cc-by-nc-4.0")
    rows = load_rows("data.train", "data/rendered/heldout")
    export = tmp_path / "export"
    (export / "beside-1").mkdir(parents=True)
    write_provenance(export, rows, compose("train_lora", [f"model.vae={bad}"]))
    for folder in (export, export / "beside-1"):
        assert weights_licenses(str(folder)) == ["CC0-1.0", "apache-2.0", "cc-by-nc-4.0"]
        with pytest.raises(ConfigError, match=r"adapters\.lora=.*'cc-by-nc-4\.0'"):
            refuse_weights(compose("generate", ["licenses.commercial=true", f"adapters.lora={folder}"]))
    write_provenance(export, rows, compose("train_lora", []))
    refuse_weights(compose("generate", ["licenses.commercial=true", f"adapters.lora={export}"]))
    for text in ("{}", "[]", "nonsense"):
        (export / "data.json").write_text(text)
        assert weights_licenses(str(export)) == []


def test_rows_without_a_licence_are_unknown(tmp_path):
    table = pq.read_table("data/rendered/heldout/part-00000.parquet")
    (tmp_path / "set").mkdir()
    pq.write_table(table.drop_columns("license"), tmp_path / "set" / "part-00000.parquet")
    load_rows("data.train", str(tmp_path / "set"))
    with pytest.raises(ConfigError, match="rows under 'unknown'"):
        load_rows("data.train", str(tmp_path / "set"), licenses=COMMERCIAL)


def test_allowed_names_need_the_profile():
    """Without it they would have no effect."""
    with pytest.raises(ConfigError, match=r"licenses\.allowed=.* has no effect"):
        compose("train_lora", ["licenses.allowed=[mine]"])


def test_the_card_of_a_place_on_the_hub_is_its_repositorys(monkeypatch):
    """Folder, file, revision and condition of a value are no part of the repository's name."""
    asked = []

    def read(source, **_):
        if isinstance(source, str):  # not a local card
            asked.append(source)
        return SimpleNamespace(data={"license": "mit"})

    monkeypatch.setattr("huggingface_hub.ModelCard.load", read)
    keys = ["licenses.commercial=true", "model.base=data/models/sdxl"]
    places = ["model.image_encoder=one/first/models/image_encoder", "adapters.lora=one/second/a.safetensors@v2"]
    refuse_weights(compose("generate", [*keys, *places, "adapters.controlnets=[canny:one/third]"]))
    assert sorted(asked) == ["one/first", "one/second", "one/third"]


def test_loras_of_the_base_are_looked_at(tmp_path):
    bad = card(tmp_path / "bad", "license: cc-by-nc-4.0")
    with pytest.raises(ConfigError, match=rf"model\.loras={bad}"):
        refuse_weights(compose("merge", ["licenses.commercial=true", f"model.loras=[{bad}]"]))
