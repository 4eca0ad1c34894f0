"""What every process sets when it starts."""

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
