"""The cache of encoded samples, on tensors made up here."""

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
