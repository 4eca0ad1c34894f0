"""The cache of encoded samples, on tensors made up here."""

import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from packshot.engine import packed, tensor_cache
from packshot.engine.tensor_cache import Filling, Job, TensorCache
from packshot.errors import PackshotError
from packshot.runs.files import _UMASK as UMASK
from packshot.runs.folder import log


def process(rank=0, world=1, wait=lambda: None):
    return SimpleNamespace(process_index=rank, num_processes=world, is_main_process=False, wait_for_everyone=wait)


def fill(folder, chunks, value, accelerator):
    cache = TensorCache(folder)
    jobs = [[Job(key, key, key) for key in chunk] for chunk in chunks]
    cache.fill("encoding", jobs, lambda items: [{"x": torch.tensor([value])} for _ in items], accelerator)
    return cache


def test_no_chunk_is_left_out_while_another_run_writes(tmp_path, monkeypatch):
    """The main process decides what is missing, even if files appear before the second process looks."""
    chunks, decided = [["a"], ["b"], ["c"], ["d"]], []

    def broadcast_from_main(accelerator, make):
        if accelerator.process_index == 0:
            decided.append(make())
            TensorCache(tmp_path).put({"a": {"x": torch.tensor([9.0])}})
            written.wait()
        else:
            written.wait()
            make()
        return decided[0]

    written, meet = threading.Barrier(2), threading.Barrier(2)
    monkeypatch.setattr("packshot.engine.tensor_cache.broadcast_from_main", broadcast_from_main)
    with ThreadPoolExecutor(2) as pool:
        accelerators = [process(rank, 2, meet.wait) for rank in range(2)]
        caches = list(pool.map(lambda accelerator: fill(tmp_path, chunks, 1.0, accelerator), accelerators))
    assert decided == [[0, 1, 2, 3]]
    assert all(key in cache for key in "abcd" for cache in caches)


def test_a_folder_that_is_not_shared_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("packshot.engine.tensor_cache.broadcast_from_main", lambda accelerator, make: make())
    with pytest.raises(PackshotError, match=r"lacks 1 of 2 entries.*have just written"):
        fill(tmp_path, [["a"], ["b"]], 1.0, process(0, 2))


def test_an_existing_entry_stays_when_its_chunk_is_redone(tmp_path):
    """File names are digests, so several are tried to get both orders."""
    for number in range(8):  # the names of files are digests: in whatever order they come
        folder = tmp_path / str(number)
        fill(folder, [[f"old{number}"]], 1.0, process())
        fill(folder, [[f"old{number}", f"new{number}"]], 2.0, process())
        cache = TensorCache(folder)
        cache.open()
        assert cache.get(f"old{number}")["x"] == 1
        assert cache.get(f"new{number}")["x"] == 2


def test_the_older_of_two_copies_wins(tmp_path):
    for number in range(8):
        folder = tmp_path / str(number)
        for age, key in enumerate((f"late{number}", "early")):
            before = set(folder.glob("*.packed"))
            TensorCache(folder).put({name: {"x": torch.tensor([2.0 - age])} for name in ("both", key)})
            (written,) = set(folder.glob("*.packed")) - before
            os.utime(written, (1000 - age, 1000 - age))
        cache = TensorCache(folder)
        cache.open()
        assert cache.get("both")["x"] == 1


def test_unreadable_files_are_skipped_and_kept(tmp_path, monkeypatch, caplog):
    """They may be another user's, or their storage may be away for a moment."""
    cache = fill(tmp_path, [["a", "b"]], 1.0, process())
    (file,) = tmp_path.glob("*.packed")
    assert file.stat().st_mode & 0o777 == 0o666 & ~UMASK  # others may read what they share

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    assert all(key in cache for key in "ab")
    monkeypatch.setattr("packshot.engine.tensor_cache.open_packed", refuse)
    again = TensorCache(tmp_path)
    again.open()
    assert not any(key in again for key in "ab")
    assert file.exists()


ENTRY = {
    "mean": torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)),
    "plane": torch.arange(15, dtype=torch.uint8).reshape(1, 3, 5),
    "embeds": torch.randn(7, 2).to(torch.bfloat16),
    "ids": torch.arange(3),
    "nothing": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
}


def test_tensors_come_back_in_their_dtypes_and_shapes(tmp_path):
    cache = TensorCache(tmp_path)
    cache.put({"a": ENTRY, "b": {"mean": torch.zeros(2)}})
    cache.open()
    found = cache.get("a")
    assert list(found) == list(ENTRY)
    for name, tensor in ENTRY.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)
    assert cache.get("b")["mean"].shape == (2,)
    assert len(cache) == 2


def test_equal_entries_make_equal_files(tmp_path):
    for name in ("one", "two"):
        TensorCache(tmp_path / name).put({"a": ENTRY, "b": ENTRY})
    (one,), (two,) = ((tmp_path / name).iterdir() for name in ("one", "two"))
    assert (one.name, one.read_bytes()) == (two.name, two.read_bytes())


@given(keys=st.sets(st.text(max_size=8), max_size=40), absent=st.sets(st.text(max_size=8), max_size=10))
def test_the_index_finds_what_is_there_and_nothing_else(keys, absent):
    with TemporaryDirectory() as name:
        path = Path(name)
        for number, key in enumerate(sorted(keys)):
            TensorCache(path / str(number % 3)).put({key: {"x": torch.tensor([number])}})
        merged = path / "all"
        merged.mkdir()
        for file in path.glob("[0-2]/*"):
            file.rename(merged / file.name)
        cache = TensorCache(merged)
        cache.open()
        assert len(cache) == len(keys)
        for number, key in enumerate(sorted(keys)):
            assert cache.get(key)["x"] == number
        assert not any(key in cache for key in absent - keys)


def test_keys_that_begin_alike_are_told_apart(tmp_path, monkeypatch):
    """The first eight bytes of two digests are equal as good as never."""
    monkeypatch.setattr(tensor_cache, "halves", lambda key: (7, ord(key)))
    monkeypatch.setattr(packed, "halves", lambda key: (7, ord(key)))
    cache = TensorCache(tmp_path)
    cache.put({key: {"x": torch.tensor([ord(key)])} for key in "zax"})
    cache.open()
    assert [cache.get(key)["x"].item() for key in "axz"] == list(map(ord, "axz"))
    assert "b" not in cache
    assert "~" not in cache


@pytest.mark.parametrize("damage", ["cut", "longer", "index", "foreign"])
def test_a_file_that_is_not_whole_is_set_aside_at_once(tmp_path, damage, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    fill(tmp_path, [["a", "b"]], 1.0, process())
    (file,) = tmp_path.glob("*.packed")
    whole = bytearray(file.read_bytes())
    changed = {"cut": whole[:-3], "longer": whole + b"x", "foreign": b"PK" * 99}
    whole[12] ^= 1  # in the index: the entries take eight bytes
    file.write_bytes(changed.get(damage, whole))
    cache = fill(tmp_path, [["a", "b"]], 2.0, process())
    assert cache.get("a")["x"] == 2
    assert "is set aside" in caplog.text
    assert file.with_name(f"{file.name}.damaged").exists()


def test_a_damaged_entry_is_noticed_when_it_is_used(tmp_path):
    cache = fill(tmp_path, [["a"], ["b"]], 1.0, process())
    (file,) = tmp_path.glob("*.packed")
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    cache = fill(tmp_path, [["a"], ["b"]], 2.0, process())
    assert cache.get("b")["x"] == 1
    with pytest.raises(PackshotError, match="is damaged"):
        cache.get("a")
    assert fill(tmp_path, [["a"], ["b"]], 2.0, process()).get("a")["x"] == 2


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_cache, "MOST_OPEN", 3)
    cache = TensorCache(tmp_path)
    for number in range(10):
        cache.put({str(number): {"x": torch.tensor([number])}})
    cache.open()
    before = len(os.listdir("/proc/self/fd"))
    assert [cache.get(str(number))["x"].item() for number in (*range(10), *range(10))] == [*range(10), *range(10)]
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_a_loader_process_reads_what_is_there(tmp_path):
    cache = fill(tmp_path, [["a"]], 3.0, process())
    assert pickle.loads(pickle.dumps(cache)).get("a")["x"] == 3


def test_one_pass_fills_several_caches(tmp_path):
    """Each item is prepared once; a cache that has a chunk does not encode it again."""
    prepared, encoded = [], []

    def prepare(item):
        prepared.append(item)
        return item

    def encoder(name):
        def encode(items):
            encoded.append((name, *items))
            return [{"x": torch.tensor([float(item)])} for item in items]

        return encode

    one, two = (TensorCache(tmp_path / name) for name in ("one", "two"))
    chunks = [[Job("a", "a", 1), Job("b", "b", 2)], [Job("c", "c", 3)]]
    one.fill("one", chunks[1:], encoder("before"), process())
    fillings = [Filling(one, "one", encoder("one")), Filling(two, "two", encoder("two"))]
    tensor_cache.fill("pictures", fillings, chunks, process(), prepare)
    assert sorted(prepared) == [1, 2, 3]
    assert encoded == [("before", 3), ("one", 1, 2), ("two", 1, 2), ("two", 3)]
    assert [cache.get("b")["x"].item() for cache in (one, two)] == [2, 2]


def test_files_of_another_version_are_counted_and_kept(tmp_path, caplog, monkeypatch):
    """One line for all of them: they are whole, and the other version reads them still."""
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(packed, "VERSION", packed.VERSION + 1)
    fill(tmp_path, [["a", "b"]], 1.0, process())
    fill(tmp_path, [["c"]], 1.0, process())
    monkeypatch.undo()
    monkeypatch.setattr(log, "propagate", True)
    cache = fill(tmp_path, [["a"], ["d"]], 2.0, process())
    said = [record for record in caplog.records if "files of another version of Packshot: 2" in record.getMessage()]
    assert len(set(map(id, said))) == 1  # the same record may reach the fixture in two ways
    assert cache.get("a")["x"] == 2
    assert not list(tmp_path.glob("*.damaged"))


def test_what_killed_runs_left_is_removed_when_it_is_old(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    log.setLevel("INFO")
    old, new, foreign = (tmp_path / name for name in (".a.packed.12.tmp", ".b.packed.34.tmp", ".notes.tmp"))
    for file in (old, new, foreign):
        file.write_bytes(bytes(2**20))
    for file in (old, foreign):
        os.utime(file, (time.time() - 7200,) * 2)
    TensorCache(tmp_path).fill("encoding", [], list, Accelerator(cpu=True))
    assert "removed 1.0 MiB that killed runs had left" in caplog.text
    assert not old.exists()
    assert new.exists()
    assert foreign.exists()


def test_a_folder_that_cannot_be_made_names_its_key(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PackshotError, match="cannot be written: Not a directory") as caught:
        fill(tmp_path / "file" / "cache", [["a"]], 1.0, process())
    assert "data.cache_dir names another folder" in caught.value.hint


def test_entries_of_another_run_are_not_written_again(tmp_path, monkeypatch):
    """Another run wrote them after the main process looked; an empty file must not be written."""
    fill(tmp_path, [["a"], ["b"]], 1.0, process())
    before = set(tmp_path.glob("*.packed"))
    monkeypatch.setattr(
        "packshot.engine.tensor_cache.broadcast_from_main", lambda accelerator, make: [0, 1]
    )  # as it was a moment ago
    fill(tmp_path, [["a"], ["b"]], 2.0, process(1, 2))
    assert set(tmp_path.glob("*.packed")) == before


def test_items_are_prepared_while_the_encoder_works(tmp_path):
    """The preparation of a later chunk has begun before the encoder has finished an earlier one."""
    begun = threading.Event()
    order = []

    def prepare(item):
        order.append(item)
        if item == 2:
            begun.set()
        return item * 10

    def encode(items):
        if 0 in items:
            assert begun.wait(timeout=30)
        return [{"x": torch.tensor([float(item)])} for item in items]

    chunks = [[Job(str(number), "item", number)] for number in range(6)]
    cache = TensorCache(tmp_path)
    cache.fill("encoding", chunks, encode, Accelerator(cpu=True), prepare)
    assert [cache.get(str(number))["x"].item() for number in range(6)] == [0, 10, 20, 30, 40, 50]
    assert sorted(order) == list(range(6))


def test_only_a_few_items_are_prepared_ahead(tmp_path, monkeypatch):
    """Prepared pictures are large."""
    monkeypatch.setattr(tensor_cache, "MOST_DECODERS", 2)
    prepared = 0
    most = 0

    def prepare(item):
        nonlocal prepared
        prepared += 1
        return item

    def encode(items):
        nonlocal most
        time.sleep(0.02)
        most = max(most, prepared - items[0])
        return [{"x": torch.zeros(1)} for _ in items]

    chunks = [[Job(str(number), "item", number)] for number in range(40)]
    TensorCache(tmp_path).fill("encoding", chunks, encode, Accelerator(cpu=True), prepare)
    assert 1 < most <= 2 * 2 + 2


def test_an_error_while_preparing_reaches_the_caller(tmp_path):
    def prepare(item):
        if item == 3:
            raise PackshotError("sample 3 cannot be decoded.")
        return item

    chunks = [[Job(str(number), "item", number)] for number in range(5)]
    with pytest.raises(PackshotError, match="sample 3"):
        TensorCache(tmp_path).fill(
            "encoding", chunks, lambda items: [{"x": torch.zeros(1)} for _ in items], Accelerator(cpu=True), prepare
        )
