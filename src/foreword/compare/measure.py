"""What a run costs: the memory of its process at its highest moment, and how fast texts are written."""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(line: str = "VmRSS") -> int | None:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (the most so far); None where the system does not say (Linux does)."""
    try:
        found = re.search(rf"{line}:\s+(\d+) kB", _STATUS.read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found is not None else None


def forget_peak() -> bool:
    """Begin the high-water mark anew; whether that could be done."""
    gc.collect()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def speed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    attached: Callable[[], AbstractContextManager[object]],
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    *,
    tokens: int = 24,
    rounds: int = 3,
) -> dict[str, float]:
    """Tokens a second with what is attached and without it, in turns in one process, each writing equally many.

    Returns:
        ``tokens_per_second``, ``base_tokens_per_second`` (medians), and ``ratio``: the median over rounds of the
        first by the second. Below 1 is slower than the base.
    """
    from foreword.data.encode import prompt_ids
    from foreword.generation import write_on

    rows = prompt_ids(prompts, tokenizer, seq2seq=bool(model.config.is_encoder_decoder))
    times: dict[bool, list[float]] = {True: [], False: []}

    def timed(ours: bool, keep: bool) -> None:
        began = time.perf_counter()
        write_on(model, tokenizer, rows, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        if keep:
            times[ours].append(time.perf_counter() - began)

    for turn in range(rounds + 1):  # the first is warm-up
        for ours in (True, False) if turn % 2 else (False, True):
            if ours:
                with attached():
                    timed(True, turn > 0)
            else:
                timed(False, turn > 0)
    written = tokens * len(rows)
    return {
        "tokens_per_second": written / statistics.median(times[True]),
        "base_tokens_per_second": written / statistics.median(times[False]),
        "ratio": statistics.median(b / a for a, b in zip(times[True], times[False], strict=True)),
    }
