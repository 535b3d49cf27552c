"""Fair timing on a machine that drifts: the variants take turns in one process, and each ratio is of medians."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

RESULTS = Path(__file__).parent / "results"


def take_turns(variants: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each variant's runs; within a round every variant runs once."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warmup + rounds):
        order = list(variants.items())
        if number % 2:  # so that none always runs after the same one
            order.reverse()
        for name, run in order:
            began = time.perf_counter()
            run()
            if number >= warmup:
                times[name].append(time.perf_counter() - began)
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


def keep(name: str, record: dict[str, Any]) -> Path:
    """Write ``results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **record}, indent=1) + "\n", encoding="utf-8")
    return path
