"""Memory that a training frees is there again without the system's help."""

import platform
import subprocess
import sys

import pytest

# Page faults of allocating 48 MB, writing to it, and freeing it, 50 times.
FAULTS = """
import resource, sys
import torch
from depthfuse.training.memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()


def step():
    torch.zeros(12 * 2**20).add_(1.0)


step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_taken_again_without_page_faults():
    def faults(how):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("kept") < faults("given back") / 5
