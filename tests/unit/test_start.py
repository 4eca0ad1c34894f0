"""How every process starts and ends."""

import json
import os
import subprocess
import sys

import pytest

MEASURE = """
import json, resource, sys
from packshot.runs.start import start_process
start_process()
import torch
from packshot.engine.memory import return_freed_memory

def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1])

def use():
    blocks = [torch.ones(2 * 2**20) for _ in range(8)]  # 8 MiB each
    return len(blocks)

use()
before = pages()
for _ in range(5):
    use()
mapped = pages() - before
held = resident()
return_freed_memory()
print(json.dumps({"mapped": mapped, "returned": held - resident()}))
"""


def measured(**environment: str) -> dict[str, int]:
    """4 KiB pages that five rounds of using 64 MiB had to map anew, and those that were given back afterwards."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    process = subprocess.run(
        [sys.executable, "-c", MEASURE], env=inherited | environment, check=True, capture_output=True, text=True
    )
    return json.loads(process.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again_without_new_pages():
    kept = measured()
    assert kept["mapped"] < 10_000  # of 5 x 16,384
    assert kept["returned"] > 10_000  # when return_freed_memory asks for it


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_the_environment_decides_over_the_allocator():
    assert measured(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")["mapped"] > 20_000


GROUP = """
import atexit, sys
from packshot.runs.start import end_process, start_process

class Kept:
    def __del__(self):
        print("Python took itself apart")

start_process()
import torch
import torch.distributed as distributed

file, rank, processes = sys.argv[1:]
atexit.register(print, "exit handlers have run")
if int(processes):
    distributed.init_process_group("gloo", f"file://{file}", rank=int(rank), world_size=int(processes))
    distributed.all_reduce(torch.ones(1))
kept = Kept()
end_process(3)
"""


@pytest.mark.parametrize("processes", [0, 1, 2])  # 0: without a group
def test_a_process_of_a_group_leaves_with_its_code(processes, tmp_path):
    """Its exit handlers run. Python does not take itself apart beside the threads of the group."""
    command = [sys.executable, "-c", GROUP, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(rank), str(processes)], stdout=subprocess.PIPE, text=True)
        for rank in range(max(1, processes))
    ]
    expected = "exit handlers have run\n" + ("" if processes else "Python took itself apart\n")
    for process in ranks:
        printed, _ = process.communicate(timeout=120)
        assert (process.returncode, printed) == (3, expected)
