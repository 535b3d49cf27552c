"""A thread that stops computing gives its OpenMP workers back."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, threading, time
import torch
from foreword.serve._workers import let_workers_go

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
a = torch.randn(600, 600, generator=torch.Generator().manual_seed(0))
before = threads()
first = (a @ a).exp().sum()
busy = threads()
assert busy == before + 2, (before, busy)
assert let_workers_go()
end = time.monotonic() + 20
while threads() > before and time.monotonic() < end:
    time.sleep(0.01)
assert threads() == before, (before, threads())
assert (a @ a).exp().sum() == first and threads() == busy
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts a process's threads in /proc")
def test_they_end_and_come_back():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
