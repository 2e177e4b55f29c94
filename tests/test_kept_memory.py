"""Freed memory comes back without fresh pages; told by the system's count of them, not by a clock."""

from __future__ import annotations

import subprocess
import sys

import pytest

from expertmesh.kernels import kept_memory
from expertmesh.kernels.kept_memory import keep_freed_memory

STEP = """
import resource, sys, torch
from expertmesh.kernels.kept_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    tensors = [torch.ones(megabytes << 18) for megabytes in (48, 64, 40, 80)]  # more than the library ever keeps
    del tensors
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def fresh_pages(how: str) -> int:
    """Of five steps, after five. The setting is for a whole process, so each way gets its own."""
    done = subprocess.run([sys.executable, "-c", STEP, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is GNU's")
def test_freed_memory_is_used_again():
    # Not all of it: a hole is used again only if nothing small has settled at its edge.
    assert fresh_pages("keep") < fresh_pages("leave") / 2


def test_a_c_library_without_the_setting_says_so(monkeypatch):
    monkeypatch.setattr(kept_memory.ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
