"""Several sets in ``data.train``: repeats, weights, prefixes, rows in doubt, and what is said of each."""

import io
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from packshot.api import run
from packshot.config.compose import compose
from packshot.dataset.rows import load_rows
from packshot.dataset.sets import balanced, load_training
from packshot.engine.batches import Listed, SampleOrder, listed
from packshot.engine.compatibility import check, made_with
from packshot.engine.keyed_random import SampleKey
from packshot.errors import ConfigError, PackshotError
from packshot.train.run import build_task


def png(color, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_set(folder, ids, size=(8, 6), **columns):
    """A set with these ids; the captions name them."""
    folder.mkdir()
    table = {
        "id": ids,
        "image": [png((len(ids), number, ord(name[0])), size) for number, name in enumerate(ids)],
        "text": [f"{name} on a table" for name in ids],
        "license": ["MIT"] * len(ids),
        **columns,
    }
    pq.write_table(pa.table(table), folder / "part-00000.parquet")
    return str(folder)


@pytest.fixture
def sets(tmp_path):
    """Two sets, of 4 and of 2 samples."""
    return write_set(tmp_path / "a", ["a0", "a1", "a2", "a3"]), write_set(tmp_path / "b", ["b0", "b1"])


@pytest.fixture
def screen(caplog):
    logging.getLogger("packshot").propagate = True
    caplog.set_level(logging.INFO)
    return caplog


def loaded(tmp_path, *keys):
    config = compose("train_lora", [*keys, f"data.cache_dir={tmp_path / 'cache'}", "tracking=none"])
    return load_training(config, ("image", "mask"), validates=False)


def texts(data):
    return [data.rows.texts[index] for index in data.order or range(len(data.rows))]


def test_a_path_alone_is_a_list_of_one(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("# @package _global_\ndata:\n  train: sets/a, b\n  train_repeats: 3\n")
    assert compose("train_lora", ["data.train=sets/a, b"]).data.train == ["sets/a, b"]
    assert compose("train_lora", ["data.train=[sets/a,sets/b]"]).data.train == ["sets/a", "sets/b"]
    assert compose("train_lora", [f"experiment={file}"]).data.train == ["sets/a, b"]
    assert compose("train_lora", [f"experiment={file}"]).data.train_repeats == [3]
    assert compose("caption_vlm", ["data.train=sets/a", "data.train_prefixes=sks bottle,"]).data.train == ["sets/a"]


@pytest.mark.parametrize("key", ["train_repeats=[2]", "train_weights=[1,2,3]", "train_prefixes=[sks]"])
def test_lists_of_another_length_are_refused(key):
    with pytest.raises(ConfigError, match=rf"data\.{key.partition('=')[0]}=.* but data.train names 2 sets"):
        compose("train_lora", ["data.train=[a,b]", f"data.{key}"])


@pytest.mark.parametrize("key", ["train_repeats=[1,0]", "train_weights=[1,0]", "train_weights=[1,-2]", "train=[]"])
def test_values_out_of_range_are_refused(key):
    with pytest.raises(ConfigError, match=rf"data\.{key.partition('=')[0]}"):
        compose("train_lora", ["data.train=[a,b]", f"data.{key}"])


def test_one_set_is_read_as_ever(tmp_path, sets):
    """No list of an epoch, and the samples and their identity are those of the set itself."""
    data = loaded(tmp_path, f"data.train={sets[0]}")
    alone = load_rows("data.train", sets[0])
    assert data.order is None
    assert (data.rows.ids, data.rows.fingerprint()) == (alone.ids, alone.fingerprint())
    assert listed(data.rows, data.order) is data.rows


def test_sets_follow_each_other_with_repeats_and_prefixes(tmp_path, sets):
    lists = ["data.train_repeats=[1,3]", "data.train_prefixes=['','sks bottle,']"]
    data = loaded(tmp_path, f"data.train=[{','.join(sets)}]", *lists)
    assert data.rows.ids == ["a0", "a1", "a2", "a3", "b0", "b1"]
    assert texts(data) == [
        *(f"a{number} on a table" for number in range(4)),
        *["sks bottle, b0 on a table"] * 3,
        *["sks bottle, b1 on a table"] * 3,
    ]
    assert data.rows[5]["image"].getpixel((0, 0)) == (2, 1, ord("b"))
    assert f"data.train: 2 samples of {sets[1]} are 60.0 % of an epoch of 10" in data.notes
    first, second = data.records()
    assert (first["rows"], first["shown_per_epoch"], first["sha256"]) == (
        4, 4, load_rows("data.train", sets[0]).fingerprint(),
    )  # fmt: skip
    assert (second["rows"], second["shown_per_epoch"], second["prefix"]) == (2, 6, "sks bottle,")


def test_weights_decide_the_shares_whatever_the_sizes(tmp_path, sets):
    data = loaded(tmp_path, f"data.train=[{','.join(sets)}]", "data.train_weights=[1,3]")
    shown = [one.shown for one in data.sets]
    assert shown[1] == 3 * shown[0]
    assert {data.order.count(index) for index in (4, 5)} == {shown[1] // 2}


@pytest.mark.parametrize(
    ("sizes", "shares"), [([100, 80], [2, 1]), ([1000, 10], [1, 1]), ([7, 11, 13], [0.2, 0.3, 0.5]), ([5, 5], [1, 9])]
)
def test_whole_repeats_come_near_the_shares(sizes, shares):
    factors = balanced(sizes, shares)
    total = sum(factor * size for factor, size in zip(factors, sizes, strict=True))
    for factor, size, share in zip(factors, sizes, shares, strict=True):
        assert factor * size / total == pytest.approx(share / sum(shares), rel=0.05)


def test_a_set_far_too_small_for_its_weight_is_refused(tmp_path, sets):
    with pytest.raises(ConfigError, match=r"data\.train_weights: .*is so small"):
        loaded(tmp_path, f"data.train=[{','.join(sets)}]", "data.train_weights=[1,1000000]")


def test_the_column_repeats_is_honoured_and_said(tmp_path):
    path = write_set(tmp_path / "kohya", ["a", "b"], repeats=pa.array([1, 4], pa.int32()))
    data = loaded(tmp_path, f"data.train={path}", "data.train_repeats=2")
    assert data.order == [0, 0, *[1] * 8]
    assert any("the column repeats" in note for note in data.notes)


def test_rows_in_doubt_are_left_out_and_counted(tmp_path, screen):
    path = write_set(tmp_path / "set", ["a", "b", "c"], status=["accepted", "needs_review", None])
    plain = write_set(tmp_path / "plain", ["d"])
    assert loaded(tmp_path, f"data.train=[{path},{plain}]").rows.ids == ["a", "c", "d"]
    assert "1 of 3 rows are left out because their status is not accepted (data.needs_review=true" in screen.text
    assert loaded(tmp_path, f"data.train={path}", "data.needs_review=true").rows.ids == ["a", "b", "c"]


def test_a_set_with_nothing_accepted_is_refused(tmp_path):
    path = write_set(tmp_path / "set", ["a"], status=["needs_review"])
    with pytest.raises(ConfigError, match="none of its 1 rows has the status accepted") as caught:
        loaded(tmp_path, f"data.train={path}")
    assert "data.needs_review=true" in str(caught.value)


def test_columns_that_only_one_set_has_are_empty_in_the_other(tmp_path):
    sized = write_set(tmp_path / "a", ["a"], width=[8], height=[6], score=[0.5])
    bare = write_set(tmp_path / "b", ["b"], size=(4, 2))
    data = loaded(tmp_path, f"data.train=[{sized},{bare}]")
    assert data.rows.sizes == [(6, 8), (2, 4)]
    assert data.rows.column("score") == [0.5, None]


def test_columns_of_other_types_are_refused_with_the_sets(tmp_path):
    a = write_set(tmp_path / "a", ["a"], score=[0.5])
    b = write_set(tmp_path / "b", ["b"], score=["good"])
    with pytest.raises(ConfigError, match=r"data\.train: the columns of .*do not fit together"):
        loaded(tmp_path, f"data.train=[{a},{b}]")


def test_every_place_of_a_sample_has_draws_of_its_own(tmp_path, sets):
    data = loaded(tmp_path, f"data.train=[{','.join(sets)}]", "data.train_repeats=[1,2]")
    epoch = Listed(data.rows, data.order)
    assert epoch.ids == ["a0", "a1", "a2", "a3", "b0", "b0#2", "b1", "b1#2"]
    assert epoch[5]["id"] == "b0"
    order = SampleOrder([0] * len(epoch), seed=0, size=4)
    seen = [place for step in range(2) for place, _ in order.step(step)]
    assert sorted(seen) == list(range(8))  # an epoch shows every place once


@pytest.mark.parametrize(
    "keys",
    [
        ["data.train=[{b},{a}]"],
        ["data.train=[{a},{b}]", "data.train_repeats=[1,2]"],
        ["data.train=[{a},{b}]", "data.train_weights=[1,2]"],
        ["data.train=[{a},{b}]", "data.train_prefixes=[sks,'']"],
        ["data.train={a}"],
    ],
)
def test_another_list_of_sets_does_not_resume(tmp_path, sets, keys):
    a, b = sets

    def made(*keys):
        keys = [key.format(a=a, b=b) for key in keys]
        config = compose("train_lora", [*keys, f"data.cache_dir={tmp_path / 'cache'}", "tracking=none"])
        data = load_training(config, ("image",), validates=False)
        return made_with(config, listed(data.rows, data.order), 1)

    then = made("data.train=[{a},{b}]")
    check(then, made("data.train=[{a},{b}]", "data.train_repeats=[1,1]"), 5)
    with pytest.raises(PackshotError, match=r"data\.train: "):
        check(then, made(*keys), 5)


def test_a_run_of_an_older_version_with_one_path_resumes(tmp_path, sets):
    config = compose("train_lora", [f"data.train={sets[0]}", "tracking=none"])
    rows = load_rows("data.train", sets[0])
    now = made_with(config, rows, 1)
    then = made_with(config, rows, 1)
    then.config["data"]["train"] = sets[0]
    for key in ("train_repeats", "train_weights", "train_prefixes", "needs_review"):
        del then.config["data"][key]
    check(then, now, 5)


def test_the_plan_counts_what_an_epoch_shows(tmp_path, sets):
    keys = {"data.train": list(sets), "data.train_repeats": [1, 3], "mode": "plan", "train.max_steps": 10}
    keys["train.validation_steps"] = 0  # otherwise one of the six is held out
    folder = run("train_lora", {**keys, "train.batch_size": 2, "run.dir": tmp_path / "run"}, tracking="none")
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["samples"], plan["samples_per_epoch"], plan["epochs"]) == (6, 10, 2.0)
    assert [one["rows"] for one in plan["sets"]] == [4, 2]


def test_a_training_on_two_sets_records_each_in_its_export(tmp_path, root):
    """Real training, one product set and one background set; the manifest and the card know both."""
    held_out = root / "data/rendered/heldout"
    whole = pq.read_table(sorted(held_out.glob("*.parquet"))[0]).slice(0, 4)
    for name, table in (("a", whole), ("b", whole.slice(0, 2).drop_columns(["mask"]))):
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "part-00000.parquet")
    keys = {
        "data.train": [tmp_path / "a", tmp_path / "b"],
        "data.train_repeats": [1, 2],
        "data.train_prefixes": ["", "sks,"],
        "data.validation": held_out,
        "data.cache_dir": tmp_path / "cache",
        "train.max_steps": 2,
        "train.batch_size": 2,
        "train.validation_steps": 0,
        "run.dir": tmp_path / "run",
    }
    folder = run("train_lora", keys, tracking="none")
    assert "are 50.0 % of an epoch of 8" in (folder / "log.txt").read_text()
    data = json.loads((folder / "export/data.json").read_text())
    assert (data["rows"], [one["shown_per_epoch"] for one in data["sets"]]) == (6, [4, 4])
    assert [one["prefix"] for one in data["sets"]] == ["", "sks,"]
    card = (folder / "export/README.md").read_text()
    for name in ("a", "b"):
        assert str(tmp_path / name) in card
    assert "each caption after `sks,`" in card


class Bare:
    """Two samples of a set, of which the second has no caption."""

    def __init__(self, rows):
        self.ids = rows.ids[:2]
        self.texts = [rows.texts[0], ""]
        self.sizes = rows.sizes[:2]
        self.read = rows.read
        self.digest = rows.digest

    def __len__(self):
        return len(self.ids)


def test_a_sample_without_a_caption_is_trained_as_unconditional(rows, parts):
    """Its prompt is what a dropped one is, zeros here, and not the encoding of the empty text."""
    keys = ["tracking=none", "data.cache=false", "objective.caption_dropout=0"]
    few = Bare(rows)
    task, examples = build_task(compose("train_lora", keys), parts, few, few, Accelerator(cpu=True))
    batch = task.collate([examples[0], examples[1]], [SampleKey(0, 0, id) for id in few.ids])
    assert batch["prompt_kept"].tolist() == [1, 0]
    assert batch["prompt_embeds"][0].abs().sum() > 0
    assert not batch["prompt_embeds"][1].any()
    assert not batch["pooled_prompt_embeds"][1].any()


def test_a_captioner_learns_nothing_from_empty_captions():
    with pytest.raises(ConfigError, match=r"data\.allow_empty_captions=true: a captioner"):
        compose("caption_vlm", ["data.allow_empty_captions=true"])


SEVERAL = ["a mug on oak", "a cup on a table", "stoneware"]


def test_a_list_of_captions_is_read_as_several(tmp_path):
    """A raw Parquet may hold a list in ``text``: the first is the text, and the prefix stands before each."""
    path = write_set(tmp_path / "set", ["a", "b"], text=[SEVERAL, ["one", ""]])
    rows = loaded(tmp_path, f"data.train={path}", "data.train_prefixes=sks").rows
    assert rows.texts == ["sks a mug on oak", "sks one"]
    assert rows.captions == [[f"sks {text}" for text in SEVERAL], ["sks one"]]
    other = write_set(tmp_path / "other", ["a", "b"], text=[SEVERAL[:2], ["one", ""]])
    assert loaded(tmp_path, f"data.train={other}").rows.fingerprint() != load_rows("data.train", path).fingerprint()


def test_a_caption_is_drawn_at_each_access_by_its_key(rows, parts):
    """All of them come, each in its turn of the key, and the same key draws the same one."""
    keys = ["tracking=none", "data.cache=false", "objective.caption_dropout=0"]
    few = Bare(rows)
    few.captions = [SEVERAL, None]
    few.texts = [SEVERAL[0], rows.texts[1]]
    task, examples = build_task(compose("train_lora", keys), parts, few, few, Accelerator(cpu=True))
    encoded = [examples.encoder.text([text])[0]["pooled_prompt_embeds"] for text in SEVERAL]
    drawn = []
    for epoch in range(12):
        for _ in range(2):
            sample_key = SampleKey(0, epoch, few.ids[0])
            pooled = task.collate([examples[0]], [sample_key])["pooled_prompt_embeds"][0]
            drawn += [index for index, one in enumerate(encoded) if torch.equal(one, pooled)]
    assert len(drawn) == 24
    assert drawn[::2] == drawn[1::2]
    assert set(drawn) == {0, 1, 2}


def test_several_captions_are_cached_and_read_back(rows, parts, tmp_path):
    few = Bare(rows)
    few.captions = [SEVERAL, None]
    few.texts = [SEVERAL[0], rows.texts[1]]
    keys = ["tracking=none", f"data.cache_dir={tmp_path}"]
    _, examples = build_task(compose("train_lora", keys), parts, few, few, Accelerator(cpu=True))
    examples.fill(Accelerator(cpu=True))
    fresh = examples.fresh(0)["prompts"]
    for number, prompt in enumerate(examples[0]["prompts"]):
        torch.testing.assert_close(prompt["pooled_prompt_embeds"], fresh[number]["pooled_prompt_embeds"])
