"""The cache of encoded samples, on tensors made up here."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from packshot.engine import tensor_cache
from packshot.engine.tensor_cache import Job, TensorCache
from packshot.errors import PackshotError
from packshot.runs.files import _UMASK as UMASK


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
            before = set(folder.glob("*.safetensors"))
            TensorCache(folder).put({name: {"x": torch.tensor([2.0 - age])} for name in ("both", key)})
            (written,) = set(folder.glob("*.safetensors")) - before
            os.utime(written, (1000 - age, 1000 - age))
        cache = TensorCache(folder)
        cache.open()
        assert cache.get("both")["x"] == 1


def test_unreadable_files_are_skipped_and_kept(tmp_path, monkeypatch, caplog):
    """They may be another user's, or their storage may be away for a moment."""
    cache = fill(tmp_path, [["a", "b"]], 1.0, process())
    (file,) = tmp_path.glob("*.safetensors")
    assert file.stat().st_mode & 0o777 == 0o666 & ~UMASK  # others may read what they share

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("packshot.engine.tensor_cache.safe_open", refuse)
    again = TensorCache(tmp_path)
    again.open()
    assert not any(key in again for key in cache._places)
    cache.verify(file)
    assert not cache._places
    assert file.exists()


def test_entries_of_another_run_are_not_written_again(tmp_path, monkeypatch):
    """Another run wrote them after the main process looked; an empty file must not be written."""
    fill(tmp_path, [["a"], ["b"]], 1.0, process())
    before = set(tmp_path.glob("*.safetensors"))
    monkeypatch.setattr(
        "packshot.engine.tensor_cache.broadcast_from_main", lambda accelerator, make: [0, 1]
    )  # as it was a moment ago
    fill(tmp_path, [["a"], ["b"]], 2.0, process(1, 2))
    assert set(tmp_path.glob("*.safetensors")) == before


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
