"""The cache of encoded samples, on tensors made up here."""

import os
from types import SimpleNamespace

import torch

from packshot.train.cache import Job, TensorCache


def process(rank=0, world=1):
    return SimpleNamespace(
        process_index=rank, num_processes=world, is_main_process=False, wait_for_everyone=lambda: None
    )


def fill(folder, chunks, value, accelerator):
    cache = TensorCache(folder)
    jobs = [[Job(key, key, key) for key in chunk] for chunk in chunks]
    cache.fill("encoding", jobs, lambda items: [{"x": torch.tensor([value])} for _ in items], accelerator)
    return cache


def test_no_chunk_is_left_out_when_files_appear_between_the_looks_of_two_processes(tmp_path):
    chunks = [["a"], ["b"], ["c"], ["d"]]
    for rank in range(2):  # the second looks when the first has written its share
        cache = fill(tmp_path, chunks, 1.0, process(rank, 2))
    assert all(key in cache for key in "abcd")


def test_an_entry_that_is_there_stays_when_its_chunk_is_encoded_again(tmp_path):
    for number in range(8):  # the names of files are digests: in whatever order they come
        folder = tmp_path / str(number)
        fill(folder, [[f"old{number}"]], 1.0, process())
        fill(folder, [[f"old{number}", f"new{number}"]], 2.0, process())
        cache = TensorCache(folder)
        cache.open()
        assert cache.get(f"old{number}")["x"] == 1
        assert cache.get(f"new{number}")["x"] == 2


def test_of_two_copies_of_an_entry_the_older_counts(tmp_path):
    for number in range(8):
        folder = tmp_path / str(number)
        for age, key in enumerate((f"late{number}", "early")):
            before = set(folder.glob("*.safetensors"))
            TensorCache(folder)._put({name: {"x": torch.tensor([2.0 - age])} for name in ("both", key)})
            (written,) = set(folder.glob("*.safetensors")) - before
            os.utime(written, (1000 - age, 1000 - age))
        cache = TensorCache(folder)
        cache.open()
        assert cache.get("both")["x"] == 1
