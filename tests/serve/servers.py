"""Real servers on loopback: in a thread of this process, or in one of their own."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import engines
import uvicorn

import foreword as fw
import zoo
from foreword.serve.admission import Limits
from foreword.serve.engine import Engine
from foreword.serve.http.app import create_app
from foreword.serve.http.keys import Keys
from foreword.serve.http.service import Settings

KEY, ADMIN = "a-key-of-the-tests", "the-admin-key-of-the-tests"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
    "PYTHONPATH": str(Path(fw.__file__).parents[1]),
}  # fmt: skip


def tokenizer():
    made = zoo.tokenizer()
    made.chat_template = TEMPLATE
    return made


@contextmanager
def serving(held=None, *, shelf=None, keys=(), admin=(), drain=5, send_buffer=None, **options):
    """A server in a thread: its ``url``, ``engine`` and ``app``."""
    held = held if held is not None else engines.library()
    limits = {k: options.pop(k) for k in list(options) if k in ("rows", "queue", "length", "columns", "step_tokens")}
    engine = Engine(held, tokenizer(), Limits(**{"rows": 8, **limits})).start()
    settings = Settings("base", Keys(keys), Keys(admin), shelf, **options)
    app = create_app(engine, settings)
    bound = socket.socket()
    if send_buffer is not None:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    bound.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=drain, timeout_keep_alive=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = bound.getsockname()[1]
        yield SimpleNamespace(
            url=f"http://127.0.0.1:{port}", port=port, engine=engine, app=app, server=server, held=held,
            service=app.state.service,
        )  # fmt: skip
    finally:
        server.should_exit = True
        thread.join(60)
        engine.stop()
        bound.close()
        assert not thread.is_alive()


class Process:
    """`foreword serve` as people run it."""

    def __init__(self, *options, environment=None):
        command = [sys.executable, "-m", "foreword", "serve", "--port", "0", *map(str, options)]
        self.process = subprocess.Popen(
            command, env={**ENVIRONMENT, **(environment or {})}, text=True,
            stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.lines = []
        self.url = None
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(120)
        assert self.url, "".join(self.lines)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)
            if self.url is None and (found := re.search(r'"url": "([^"]+)"', line)):
                self.url = found[1]
                self._ready.set()
        self._ready.set()

    def log(self):
        """The lines of its log."""
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    def end(self, number=None, timeout=60):
        """Send a signal and wait. Returns the exit code."""
        if number is not None:
            self.process.send_signal(number)
        code = self.process.wait(timeout)
        self._reader.join(10)
        return code

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(20)
        self.process.stdout.close()
        self.process.stderr.close()


def wait_for(what, seconds=60):
    """Until something is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
