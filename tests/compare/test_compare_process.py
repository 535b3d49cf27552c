"""Processes of runs: what they return, what they raise, how they end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import foreword as fw
from foreword.compare import process
from foreword.errors import ConfigError

HERE = Path(__file__).parent
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
    "PYTHONPATH": os.pathsep.join(map(str, [HERE.parent, HERE, HERE / "scripts", Path(fw.__file__).parents[1]])),
}  # fmt: skip

# What the processes run: a module that they find beside the package's own.
PARTS = textwrap.dedent('''
    """Put into the package for a test."""
    import os, signal, time
    from foreword.errors import ConfigError

    def adds(a, b, tell):
        for i in range(3):
            tell({"at": i})
        return a + b, os.getpid()

    def refuses(tell):
        raise ConfigError("too small")

    def is_full(tell):
        raise OSError(28, "No space left on device", "there")

    def fills_a_tensor_file(tell):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    def breaks(tell):
        return {}["nothing"]

    def is_killed(tell):
        os.kill(os.getpid(), signal.SIGKILL)

    def leaves(tell):
        os._exit(3)

    def lasts(path, tell):
        open(path, "w").write(str(os.getpid()))
        time.sleep(120)
''')


@pytest.fixture(scope="module", autouse=True)
def parts():
    path = Path(process.__file__).with_name("_parts_of_a_test.py")
    path.write_text(PARTS)
    yield
    path.unlink()


def call(name, *given, **more):
    return process.call(f"_parts_of_a_test:{name}", *given, **more)


def test_what_it_returns_and_tells():
    told = []
    value, pid = call("adds", 2, 3, tell=told.append)
    assert value == 5 and pid != os.getpid() and told == [{"at": 0}, {"at": 1}, {"at": 2}]


def test_errors_come_back_as_they_were():
    with pytest.raises(ConfigError, match="too small"):
        call("refuses")
    for name in ("is_full", "fills_a_tensor_file"):
        with pytest.raises(OSError, match="No space left") as caught:
            call(name)
        assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("breaks", "KeyError: 'nothing'"),
        ("is_killed", "signal SIGKILL; was there enough memory"),
        ("leaves", "exit code 3"),
    ],
)
def test_a_process_that_fails_says_how(name, said):
    with pytest.raises(process.RunFailedError, match=said):
        call(name)


def test_no_run_outlives_the_one_who_waits_for_it(tmp_path):
    script = f"from foreword.compare import process; process.call('_parts_of_a_test:lasts', {str(tmp_path / 'pid')!r})"
    waiting = subprocess.Popen([sys.executable, "-c", script], env=ENVIRONMENT)
    deadline = time.time() + 100
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.time() < deadline and waiting.poll() is None
        time.sleep(0.05)
    child = int((tmp_path / "pid").read_text())
    waiting.send_signal(signal.SIGKILL)
    waiting.wait()
    while Path(f"/proc/{child}").exists() and time.time() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
