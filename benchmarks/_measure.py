"""Fair timing on a machine that drifts: the variants take turns in one process, and each ratio is of medians."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

RESULTS = Path(__file__).parent / "results"


Variant = Callable[[], AbstractContextManager[Callable[[], Any]]]


def hold_memory() -> None:
    """Give no freed memory back to the system (glibc), as a GPU's caching allocator doesn't either.

    Otherwise each large tensor is mapped and cleared anew, page by page, or isn't, by how the heap happens to lie: a
    difference of several percent that falls on any variant.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped by itself
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def plainly(run: Callable[[], Any]) -> Variant:
    """A variant that needs nothing set up."""
    return lambda: nullcontext(run)


def take_turns(variants: Mapping[str, Variant], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each variant's runs; within a round every variant runs once.

    A variant is a context manager that gives what to time: attaching and detaching, so that all variants run on one
    copy of the model, stay outside the clock.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warmup + rounds):
        order = list(variants.items())
        order = order[number % len(order) :] + order[: number % len(order)]
        if number % 2:  # so that none always runs after the same one, or first
            order.reverse()
        for name, variant in order:
            with variant() as run:
                began = time.perf_counter()
                run()
                taken = time.perf_counter() - began
            if number >= warmup:
                times[name].append(taken)
    return times


def ratios(times: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """Median over rounds of each variant's time by the base's in the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(own, times[base], strict=True)) for name, own in times.items()
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch
    import transformers

    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def keep(name: str, record: dict[str, Any], *, add: bool = False) -> Path:
    """Write ``results/<name>.json``; ``add``: and keep what else it has, of parts that were measured before."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if add and path.exists() else {}
    path.write_text(json.dumps({**before, "machine": machine(), **record}, indent=1) + "\n", encoding="utf-8")
    return path
