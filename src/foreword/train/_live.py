"""How many bytes of tensors are alive during a training step, op by op, and what that comes to for a larger batch.

A step of two sizes runs the same ops in the same order, and after each of them what is alive is a polynomial in the
rows and tokens of the batch: linear in the rows, at most quadratic in the tokens (attention that keeps its weights).
So a few small steps give the polynomial of every moment, and the peak of a large step is the largest of their values:
which moment is the highest may differ between small and large, and this finds it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

# One row alone is computed with fewer ops than several; up to 32 tokens, long prefixes take another path.
ROWS, TOKENS = (2, 3), (34, 40, 46)
Batch = dict[str, Any]


class LiveBytes(TorchDispatchMode):
    """Counts the storages that ops make inside the block, from when they are made until they are freed.

    Args:
        standing: the parameters that are there all the time. Others that ops are given were brought in for the step
            (from where they are kept: offloaded), and count from their first use.

    Attributes:
        moments: after each op, the bytes alive, and those of them that are as wide as the vocabulary.
    """

    def __init__(self, vocabulary: int | None, standing: Iterable[Tensor] | None = None) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.standing: set[int] | None = None
        if standing is not None:
            self.standing = {_storage(t)._cdata for given in standing for t in _plain(given)}
        self.now = [0, 0]
        self.moments: list[tuple[int, int]] = []
        self._known: dict[int, tuple[int, bool]] = {}
        self._lasting: list[weakref.finalize[Any, Any]] = []  # of what may live as long as the model

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(is_traceable_wrapper_subclass(t) for t in given):
            return NotImplemented  # quantised weights: what they do inside comes back here op by op
        if self.standing is not None:
            brought = [self._note(t, self.standing) for t in given if isinstance(t, nn.Parameter)]
            self._lasting += [end for end in brought if end is not None]
        own = {_storage(t)._cdata for t in given}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not is_traceable_wrapper_subclass(tensor):
                self._note(tensor, own)
        self.moments.append((self.now[0], self.now[1]))
        return result

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for end in self._lasting:
            end.detach()

    def _note(self, tensor: Tensor, own: set[int]) -> weakref.finalize[Any, Any] | None:
        storage = _storage(tensor)
        name = storage._cdata
        if name in own or name in self._known or tensor.is_meta:  # a view, or written in place; or no bytes at all
            return None
        wide = self.vocabulary is not None and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
        size = storage.nbytes()
        self._known[name] = size, wide
        self._add(size, wide)
        return weakref.finalize(storage, self._freed, name)

    def _freed(self, name: int) -> None:
        size, wide = self._known.pop(name)
        self._add(-size, wide)

    def _add(self, size: int, wide: bool) -> None:
        self.now[0] += size
        self.now[1] += size * wide


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages, each once; of a quantised weight, those of what it is made of."""
    storages = {_storage(t)._cdata: _storage(t).nbytes() for given in tensors for t in _plain(given)}
    return sum(storages.values())


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the numbers of a tensor: of a quantised one its integers, scales and the like."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
        return
    yield tensor
    for value in vars(tensor).values():  # bitsandbytes hangs its scales on the weight
        for inner in vars(value).values() if hasattr(value, "absmax") else (value,):
            if isinstance(inner, Tensor) and inner is not tensor:
                yield from _plain(inner)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


@dataclass(frozen=True)
class StepPeak:
    """The highest moment of one step, in bytes.

    Attributes:
        once: whatever the batch (the prefix being made, weights cast for autocast, gradients).
        rows: that grows with the rows and not with their tokens (a prefix's copies for each row).
        tokens: that grows with the tokens, without the logits.
        logits: as wide as the vocabulary: the logits, their softmax and its gradient.
    """

    once: int
    rows: int
    tokens: int
    logits: int

    @property
    def total(self) -> int:
        return self.once + self.rows + self.tokens + self.logits


def step_peak(
    step: Callable[[Batch], None],
    batch: Mapping[str, Any],
    vocabulary: int | None,
    standing: Iterable[Tensor] | None = None,
    chunk: int = 1,
) -> StepPeak:
    """The peak of a step on this batch, from steps on smaller ones.

    Args:
        step: one forward and backward pass; it leaves no gradients.
        batch: as the model is given it; tensors of shape (rows, ...), those of integers (rows, tokens).
        vocabulary: the width of the logits; None: the model has none.
        standing: the model's parameters, without those that a step brings in.
        chunk: the tokens that some layer computes at a time, a part counting as a whole: only whole ones are compared.
    """
    rows, tokens = size_of(batch)
    tried = TOKENS if chunk == 1 else tuple(chunk * (i + 1) for i in range(len(TOKENS)))
    sizes = list(product(ROWS if rows > max(ROWS) else (rows,), tried if tokens > max(tried) else (tokens,)))
    runs = []
    for size in sizes:
        live = LiveBytes(vocabulary, standing)
        small = smaller(batch, *size)
        with live:
            step(small)
        runs.append(np.array(live.moments, dtype=float))
    if len({len(run) for run in runs}) > 1:  # experts are called or not: then only the peaks can be compared
        runs = [run[[int(run[:, 0].argmax())]] for run in runs]
    return _extrapolated(np.stack(runs), sizes, (rows, -(-tokens // chunk) * chunk))


def _extrapolated(runs: NDArray[Any], sizes: list[tuple[int, int]], target: tuple[int, int]) -> StepPeak:
    """The highest moment at the target; ``runs`` is (sizes, moments, 2)."""
    row_powers = range(len({r for r, _ in sizes}))
    # At one moment, attention that keeps no weights gives a quadratic term of exactly 0. A peak alone has corners.
    token_powers = range(len({t for _, t in sizes}) if runs.shape[1] > 1 else min(2, len({t for _, t in sizes})))
    powers = list(product(row_powers, token_powers))

    def terms(size: tuple[int, int]) -> list[float]:
        return [float(size[0] ** i * size[1] ** j) for i, j in powers]

    inverse = np.linalg.pinv(np.array([terms(s) for s in sizes]))
    parts = np.einsum("ps,smk->pmk", inverse, runs) * np.array(terms(target))[:, None, None]
    at = parts[:, int(parts[:, :, 0].sum(0).argmax())]  # (powers, 2)
    by_power = dict(zip(powers, at[:, 0] - at[:, 1], strict=True))
    once = by_power[0, 0] if len(powers) > 1 else 0.0
    per_row = by_power.get((1, 0), 0.0) if len(token_powers) > 1 else 0.0
    rest = sum(by_power.values()) - once - per_row
    return StepPeak(round(once), round(per_row), round(rest), round(at[:, 1].sum()))


def size_of(batch: Mapping[str, Any]) -> tuple[int, int]:
    """Rows, and tokens of the longest tensor of ids; 1 where there is none (images only)."""
    tensors = [v for v in batch.values() if isinstance(v, Tensor) and v.dim()]
    return len(tensors[0]), max((t.shape[1] for t in tensors if _by_token(t)), default=1)


def smaller(batch: Mapping[str, Any], rows: int, tokens: int) -> Batch:
    """The first rows, and of each tensor of ids the first tokens, the shorter ones in proportion.

    What has padding keeps some, because a batch without is computed in another way.
    """
    _, longest = size_of(batch)
    small: Batch = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            small[name] = value[:rows] if isinstance(value, list) else value
            continue
        cut = value[:rows]
        if _by_token(value) and tokens < longest:
            cut = cut[:, : max(1, round(value.shape[1] * tokens / longest))].clone()
            if name.endswith("attention_mask"):
                cut.fill_(1)
                if not value.all():
                    cut[-1, -1] = 0
            elif name == "labels":
                _supervise(cut, value)
        small[name] = cut
    return small


def _supervise(cut: Tensor, labels: Tensor) -> None:
    """Have as large a share of the columns be answers as there is in the whole: they may all stand at its end."""
    answers = int((labels != -100).any(0).sum())
    first = cut.shape[1] - max(min(1, answers), round(answers * cut.shape[1] / labels.shape[1]))
    cut[:, :first] = -100
    cut[:, first:] = labels.max()


def _by_token(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_floating_point()
