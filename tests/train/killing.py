"""Runs in processes of their own that are killed, beside the same run that is left alone."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import tiny

SCRIPTS = Path(__file__).parent / "scripts"


def start(*command):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *map(str, command)], env=tiny.ENVIRONMENT, text=True, **pipes)


def whole_and_killed(script, what, folder):
    """A script's ``train`` in this process, and beside it the script, which is killed six times.

    Returns both folders and, for messages, what was said, with the seed of the kills.
    """
    sys.path.insert(0, str(SCRIPTS))
    try:
        module = importlib.import_module(script)
    finally:
        sys.path.remove(str(SCRIPTS))
    whole, killed, seed = folder / "whole", folder / "killed", time.time_ns()
    read, write = os.pipe()
    module.train(whole, write, what)
    os.close(read)
    os.close(write)
    process = start(SCRIPTS / f"{script}.py", killed, seed, what)
    printed, err = process.communicate(timeout=400)
    told = f"seed {seed}\n{printed}\n{err[-3000:]}"
    assert process.returncode == 0, told
    ends = [int(line.split()[2]) for line in printed.splitlines()]
    assert len(ends) == 6 and ends.count(signal.SIGKILL) >= 4 and set(ends) <= {0, signal.SIGKILL}, told
    return whole, killed, told
