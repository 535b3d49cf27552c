"""OpenMP's worker threads, which a thread that computes keeps for itself."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

_SOFT = 1  # omp_pause_soft


def let_workers_go() -> bool:
    """End the OpenMP workers of the calling thread, if it has any; they come back when it computes again.

    GNU's OpenMP lets workers spin between two products only while it has no more threads than there are processors.
    With the workers of the thread that loaded the model beside those of the thread that runs it, all of them sleep
    and are woken thousands of times a second: a generation step on two cores takes a fifth longer.

    Returns:
        Whether they were let go; False where torch brings another OpenMP than GNU's.
    """
    if not sys.platform.startswith("linux"):
        return False
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            return bool(ctypes.CDLL(str(path)).omp_pause_resource_all(_SOFT) == 0)
        except (OSError, AttributeError):  # older than OpenMP 5
            continue
    return False
