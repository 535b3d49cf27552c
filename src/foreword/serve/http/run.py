"""The server's life: it listens, serves, and on SIGTERM finishes what it has begun."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from foreword.serve.engine import Engine
from foreword.serve.http.logs import event


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one.

    Raises:
        OSError: the address can't be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as exc:
        bound.close()
        raise OSError(exc.errno, f"can't listen on {host}:{port}: {exc.strerror}") from exc
    return bound


def serve(
    app: FastAPI, engine: Engine, bound: socket.socket, *, drain: float, ready: Callable[[], None] | None = None
) -> None:
    """Serve until SIGTERM or Ctrl-C; then no new connections, and what was begun may finish.

    Args:
        drain: seconds that it may take.
        ready: called when connections are taken.
    """
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", server_header=False, timeout_keep_alive=15,
        timeout_graceful_shutdown=max(1, round(drain)), h11_max_incomplete_event_size=1 << 16,
    )  # fmt: skip
    # uvicorn raises the signal again when all is done, which would end the process as if it had been killed.
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        _Server(config, ready).run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, before)
        waiting, running = engine.stats.waiting, engine.stats.rows
        engine.stop()
        bound.close()
        event("stopped", unfinished=waiting + running)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets=sockets)
        if self._ready is not None:
            self._ready()

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        event("stopping", signal=signal.Signals(sig).name)
