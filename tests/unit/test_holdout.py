"""What is held out of the training samples for validation: fixed, by groups, and said."""

import io
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from packshot.config.compose import compose
from packshot.dataset.holdout import held_out, near_only, read_looks
from packshot.dataset.near_duplicates import Groups, hamming, join_near
from packshot.dataset.rows import load_rows
from packshot.dataset.sets import load_training
from packshot.engine.compatibility import check, made_with
from packshot.errors import PackshotError


def picture(seed, quality=95):
    """Large random blobs: pictures of different seeds are not alike, however they are encoded."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return {"bytes": buffer.getvalue(), "path": None}


def write_set(folder, ids, seeds=None, qualities=None, **columns):
    folder.mkdir()
    seeds = seeds or range(len(ids))
    pictures = [picture(seed, quality) for seed, quality in zip(seeds, qualities or [95] * len(ids), strict=True)]
    table = pa.table({"id": ids, "image": pictures, "text": ["a table"] * len(ids), **columns})
    pq.write_table(table, folder / "part-00000.parquet")
    return str(folder)


def loaded(tmp_path, *keys, **options):
    config = compose("train_lora", [*keys, f"data.cache_dir={tmp_path / 'cache'}", "tracking=none"])
    return load_training(config, ("image",), **options)


IDS = [f"{number:03d}" for number in range(60)]


@pytest.fixture
def screen(caplog):
    logging.getLogger("packshot").propagate = True
    caplog.set_level(logging.INFO)
    return caplog


def test_a_share_is_held_out_and_said(tmp_path):
    data = loaded(tmp_path, f"data.train={write_set(tmp_path / 'set', IDS)}")
    held = data.validation.ids
    assert sorted([*data.rows.ids, *held]) == IDS
    # those whose sha256 of "held out <id>" begins below a tenth of its range
    assert held == ["008", "023", "027", "028", "037", "040", "041"]
    (note,) = data.notes
    assert note.startswith(
        f"{len(held)} of 60 samples of data.train are held out for validation (data.holdout_share=0.1"
    )


def test_the_same_samples_are_held_out_when_others_join(tmp_path):
    few = loaded(tmp_path, f"data.train={write_set(tmp_path / 'few', IDS[:40])}")
    more = loaded(tmp_path, f"data.train={write_set(tmp_path / 'more', IDS[::-1], seeds=list(range(60))[::-1])}")
    assert set(few.validation.ids) == set(more.validation.ids) & set(IDS[:40])


def test_products_and_near_duplicates_are_never_split(tmp_path):
    """Twenty products of three pictures; and copies of picture 0 in another quality under other products."""
    products = [f"p{number // 3}" for number in range(60)]
    seeds = [0 if number % 15 == 0 else number for number in range(60)]
    qualities = [95 - number % 10 for number in range(60)]
    path = write_set(tmp_path / "set", IDS, seeds, qualities, product_id=products)
    for share in (0.05, 0.2, 0.5):
        data = loaded(tmp_path, f"data.train={path}", f"data.holdout_share={share}")
        sides = dict.fromkeys(data.validation.ids, "held") | dict.fromkeys(data.rows.ids, "kept")
        for one in range(0, 60, 3):
            assert len({sides[IDS[one + other]] for other in range(3)}) == 1
        assert len({sides[IDS[number]] for number in range(0, 60, 15)}) == 1
        assert data.validation.ids


def test_one_product_alone_is_split_by_its_pictures(tmp_path, screen):
    path = write_set(tmp_path / "set", IDS[:12], product_id=["mine"] * 12)
    data = loaded(tmp_path, f"data.train={path}")
    assert data.validation.ids
    assert "shares its only product with the training samples" in screen.text


def test_no_set_is_held_out_whole(tmp_path):
    paths = [write_set(tmp_path / str(number), [IDS[number]], [number]) for number in range(3)]
    data = loaded(tmp_path, f"data.train=[{','.join(paths)}]", "data.holdout_share=0.5")
    assert len(data.rows) == 3
    assert data.validation.ids == data.rows.ids  # nothing else to validate on, which is said


def test_the_shipped_set_keeps_its_held_out_part(tmp_path):
    data = load_training(compose("train_lora", [f"data.cache_dir={tmp_path}"]), ("image",))
    assert data.validation.ids == load_rows("data.validation", "data/rendered/heldout").ids
    assert data.rows.ids == load_rows("data.train", "data/rendered/train").ids


def test_a_validation_set_of_its_own_leaves_the_training_whole(tmp_path):
    mine, other = write_set(tmp_path / "a", IDS), write_set(tmp_path / "b", ["x", "y"], [100, 101])
    data = loaded(tmp_path, f"data.train={mine}", f"data.validation={other}")
    assert (data.rows.ids, data.validation.ids) == (IDS, ["x", "y"])


def test_without_validation_nothing_is_held_out(tmp_path):
    path = write_set(tmp_path / "set", IDS)
    assert loaded(tmp_path, f"data.train={path}", validates=False).rows.ids == IDS
    data = loaded(tmp_path, f"data.train={path}", "data.holdout_share=0")
    assert (data.rows.ids, data.validation.ids) == (IDS, IDS)
    assert data.notes == ["validation uses samples that are trained on: data.validation names another set"]


def test_another_share_does_not_resume(tmp_path):
    path = write_set(tmp_path / "set", IDS)

    def made(*keys):
        config = compose("train_lora", [f"data.train={path}", f"data.cache_dir={tmp_path / 'cache'}", *keys])
        return made_with(config, load_training(config, ("image",)).rows, 1)

    with pytest.raises(PackshotError, match=r"data\.train: .*data\.holdout_share"):
        check(made(), made("data.holdout_share=0.3"), 5)


def test_large_groups_are_not_held_out():
    roots = [0] * 8 + [8, 9]
    held = held_out([str(number) for number in range(10)], roots, [0] * 10, share=0.5)
    assert held
    assert set(held) <= {8, 9}


def test_pictures_are_looked_at_once(tmp_path, monkeypatch):
    rows = load_rows("data.train", write_set(tmp_path / "set", IDS[:5], [0, 1, 1, 2, 3]))
    first = read_looks(rows, tmp_path / "cache")
    monkeypatch.setattr("packshot.dataset.holdout.look", lambda rows, index: pytest.fail("read again"))
    assert read_looks(rows, tmp_path / "cache") == first
    assert near_only(first) == [0, 1, 1, 3, 4]


def test_joining_finds_what_comparing_all_pairs_finds():
    rng = np.random.default_rng(0)
    hashes = [int.from_bytes(rng.bytes(8), "big") for _ in range(40)]
    for origin in hashes[:30]:
        turned = rng.choice(64, size=int(rng.integers(0, 9)), replace=False)
        hashes.append(origin ^ sum(1 << int(bit) for bit in turned))
    groups, expected = Groups(len(hashes)), Groups(len(hashes))
    join_near(groups, hashes, 4, [b"\0" * 192] * len(hashes))
    for one, value in enumerate(hashes):
        for other in range(one):
            if hamming(value, hashes[other]) <= 4:
                expected.join(one, other)
    everyone = range(len(hashes))
    assert [groups.root(one) for one in everyone] == [expected.root(one) for one in everyone]
    assert len({groups.root(one) for one in everyone}) < len(hashes)
