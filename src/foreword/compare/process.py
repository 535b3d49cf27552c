"""Runs in processes of their own, forked from one that has the libraries loaded and nothing else.

So the memory and the time of a run are its own, a kill loses only it, and no run waits for imports.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

from foreword import errors
from foreword.errors import ForewordError

_PRELOADED = ["foreword.compare._loaded"]


class RunFailedError(ForewordError):
    """A run's process ended without a result; the message says how."""


def call(function: str, *arguments: Any, tell: Callable[[Mapping[str, Any]], None] | None = None) -> Any:
    """What ``module:function`` of this package returns for the arguments and a last one, which it can tell things.

    Args:
        tell: is given what the function tells, as it goes.

    Raises:
        RunFailedError: the process was killed, or ended with an error that isn't foreword's or the system's.
        KeyboardInterrupt: Ctrl-C; the process is ended first.
    """
    context = _context()
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, function, arguments), daemon=True)
    try:
        with _no_ctrl_c():
            process.start()
        theirs.close()
        return _answer(ours, process, tell or (lambda told: None))
    finally:
        ours.close()
        if process.pid is not None:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()


@contextlib.contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Ctrl-C waits while a process is made: half made, it could not be ended. Those made inside never see it."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    asked: list[int] = []
    # The mask is for the new processes; here another thread may get the signal, and the handler runs all the same.
    handler = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if asked:
        raise KeyboardInterrupt


def _context() -> Any:
    if sys.platform == "win32" or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _answer(pipe: Connection, process: Any, tell: Callable[[Mapping[str, Any]], None]) -> Any:
    while True:
        connection.wait([pipe, process.sentinel])
        if not pipe.poll():
            process.join()
            raise RunFailedError(f"its process ended without a result ({_how(process.exitcode)})")
        try:
            kind, *content = pipe.recv()
        except EOFError:
            process.join()
            raise RunFailedError(f"its process ended without a result ({_how(process.exitcode)})") from None
        if kind == "told":
            tell(content[0])
        elif kind == "done":
            return content[0]
        else:
            _raise(*content)


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else str(-code)
    return f"signal {name}" + ("; was there enough memory?" if -code == getattr(signal, "SIGKILL", 9) else "")


def _raise(kind: str, arguments: tuple[Any, ...], trace: str) -> None:
    if kind == "OSError":
        raise OSError(*arguments)
    known = getattr(errors, kind, None)
    if known is not None:
        raise known(*arguments)
    raise RunFailedError(f"it failed:\n{trace}")


# ---------------------------------------------------------------- in the process


def _child(pipe: Connection, function: str, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who started it decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import warnings

    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate)\b.*")
    from transformers.utils import logging

    logging.disable_progress_bar()
    module, name = function.split(":")
    try:
        found = getattr(importlib.import_module(f"foreword.compare.{module}"), name)(
            *arguments, lambda told: pipe.send(("told", told))
        )
        pipe.send(("done", found))
    except OSError as exc:
        _send(pipe, ("error", "OSError", (exc.errno or 0, exc.strerror or str(exc), exc.filename), ""))
    except ForewordError as exc:
        _send(pipe, ("error", _nearest(exc), (str(exc),), ""))
    except Exception as exc:
        if full := re.search(r"\(os error (\d+)\)", str(exc)):  # safetensors' word for the system's errors
            code = int(full[1])
            _send(pipe, ("error", "OSError", (code, os.strerror(code)), ""))
            return
        _send(pipe, ("error", type(exc).__name__, (str(exc),), traceback.format_exc(limit=-4)))


def _nearest(exc: ForewordError) -> str:
    """Of the error's classes, the first that foreword names."""
    return next(c.__name__ for c in type(exc).__mro__ if hasattr(errors, c.__name__))


def _send(pipe: Connection, message: tuple[Any, ...]) -> None:
    with contextlib.suppress(OSError):
        pipe.send(message)


def _end_with_parent() -> None:
    """A run that nobody waits for any more ends: the one who started it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
