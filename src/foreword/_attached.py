"""Prefixes on a model for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel

from foreword.prefix import Prefix
from foreword.tuning import attach


@contextmanager
def attached(
    model: PreTrainedModel,
    prefix: Prefix | Sequence[Prefix] | None,
    *,
    strength: float | None = None,
    force: bool = False,
) -> Iterator[None]:
    """Inside the block a prefix (or several together) stands on the model; None, or none of several: what stood there.

    Args, Raises: as for ``fw.attach``.
    """
    several = [prefix] if isinstance(prefix, Prefix) else list(prefix or ())
    tuning = attach(model, several, strength=strength, force=force) if several else None
    try:
        yield
    finally:
        if tuning is not None:
            tuning.detach()
