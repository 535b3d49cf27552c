"""What is tried: the plans of a search, the cheap ones first, and the best of what was measured.

A plan is at most one way to fewer tokens and one way to write their numbers. Each of these is tried alone, for the
curve, and then every two of them together, with as many tokens as the limit of bytes leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from foreword.compression.storing import as_stored, halve
from foreword.errors import ConfigError
from foreword.prefix import Prefix
from foreword.storage import Packing, Storage

METHODS = ("half", "int8", "int4", "prune", "merge", "low-rank", "distill")
QUICK = METHODS[:-1]
FRACTIONS = (0.75, 0.5, 0.25)
PRUNE, UNIFORM, MERGE, DISTILL = "prune", "prune uniformly", "merge", "distill"
LONGEST = 99.9999  # a loss in a record whose numbers aren't known yet: as long as one gets


@dataclass(frozen=True)
class Numbers:
    """A way to write keys and values."""

    name: str
    storage: Storage = field(default_factory=Storage)
    half: bool = False
    rank: int | None = None

    def of(self, prefix: Prefix) -> Prefix:
        """The prefix as it will be read back."""
        written = self.written(prefix)
        return written if written.storage.plain else as_stored(written, written.storage)

    def written(self, prefix: Prefix) -> Prefix:
        """The prefix so that it will be written in this way: of the same size, and not yet of the same numbers."""
        if self.half:
            prefix = halve(prefix)
        packing = Packing(rank=self.rank) if self.rank is not None else None
        return replace(prefix, storage=Storage(packing, packing) if packing is not None else self.storage)


@dataclass(frozen=True)
class Plan:
    """Something to try.

    Attributes:
        shorter: the way to fewer tokens; None: all stay.
        tokens: at each site, or on average over the sites.
    """

    numbers: Numbers
    shorter: str | None = None
    tokens: int | None = None

    @property
    def name(self) -> str:
        shorter = f"{self.shorter} to {self.tokens}" if self.shorter else ""
        return ", ".join(part for part in (shorter, self.numbers.name) if part) or "as it is"


@dataclass(frozen=True)
class Limits:
    """What a plan has to keep to."""

    target_bytes: int | None
    max_loss_increase: float | None
    before_bytes: int

    @property
    def most_bytes(self) -> int:
        """A plan that saves nothing is none."""
        return self.before_bytes - 1 if self.target_bytes is None else self.target_bytes


@dataclass(frozen=True)
class Candidate:
    """A plan that was tried.

    Attributes:
        nbytes: of its ``prefix.safetensors``.
        memory_nbytes: of its tensors in memory.
        loss: on held-out examples, in nats a token.
        increase: of it over the loss before, and ``error``, its standard error over the examples.
        seconds: that it took to make and to measure.
    """

    plan: Plan
    nbytes: int
    memory_nbytes: int
    loss: float
    increase: float
    error: float
    seconds: float

    def small(self, limits: Limits) -> bool:
        return self.nbytes <= limits.most_bytes

    def good(self, limits: Limits) -> bool:
        """Whether the loss keeps to its limit; one that isn't a number keeps to none."""
        most = limits.max_loss_increase if limits.max_loss_increase is not None else torch.inf
        return self.increase <= most and self.increase < torch.inf


def best(candidates: Sequence[Candidate], limits: Limits) -> Candidate | None:
    """Of those within both limits the one of the least loss; with no limit of bytes, the smallest."""
    fitting = [c for c in candidates if c.small(limits) and c.good(limits)]
    if limits.target_bytes is None:
        return min(fitting, key=lambda c: (c.nbytes, c.loss), default=None)
    return min(fitting, key=lambda c: (c.loss, c.nbytes), default=None)


def nearest(candidates: Sequence[Candidate], limits: Limits) -> list[Candidate]:
    """Where none is within both limits: the least loss within the bytes, and the smallest within the loss."""
    small = min((c for c in candidates if c.small(limits) and c.loss == c.loss), key=lambda c: c.loss, default=None)
    good = min((c for c in candidates if c.good(limits)), key=lambda c: c.nbytes, default=None)
    return [c for c in (small, good) if c is not None]


def check_methods(methods: Sequence[str]) -> None:
    """Raise ConfigError for a name that is none, or none at all."""
    if not methods or (unknown := [m for m in methods if m not in METHODS]):
        said = f"{unknown[0]!r} is no method" if methods else "no method is named"
        raise ConfigError(f"{said}; expected some of {', '.join(METHODS)}")


def ways_to_write(prefix: Prefix, methods: Sequence[str]) -> list[Numbers]:
    """From the most bytes to the fewest, the present one first."""
    found = [Numbers("", prefix.storage)]
    wide = any(t.element_size() > 2 for t in prefix.keys.values())
    if "half" in methods and prefix.storage.plain and wide:
        found.append(Numbers("float16", half=True))
    bits = [b for b in ("int8", "int4") if b in methods]
    pairs = [("int8", "int8"), ("int8", "int4"), ("int4", "int8"), ("int4", "int4")]
    for keys, values in pairs:
        if {keys, values} <= set(bits) and (storage := Storage.of(keys, values)) != prefix.storage:
            found.append(Numbers(keys if keys == values else f"{keys} keys and {values} values", storage))
    return found


def ways_to_shorten(methods: Sequence[str]) -> list[str]:
    return [way for way in (PRUNE, UNIFORM, MERGE) if way.split()[0] in methods]


def quick_plans(prefix: Prefix, methods: Sequence[str], limits: Limits) -> list[Plan]:
    """All but those that train."""
    numbers, shorter = ways_to_write(prefix, methods), ways_to_shorten(methods)
    plans = [Plan(own) for own in numbers[1:]]
    plans += [Plan(numbers[0], way, n) for way in shorter for n in usual_lengths(prefix)]
    if "low-rank" in methods:
        plans += [Plan(own) for own in _ranks(prefix, numbers, limits)]
    for own in numbers:
        lengths = {
            weighed: fitting(prefix, own, limits, weighed=weighed) for weighed in {way == MERGE for way in shorter}
        }
        plans += [Plan(own, way, n) for way in shorter for n in lengths[way == MERGE]]
    return list(dict.fromkeys(plans))


def usual_lengths(prefix: Prefix) -> list[int]:
    return [n for f in FRACTIONS if 0 < (n := round(f * prefix.longest)) < prefix.longest]


def fitting(prefix: Prefix, numbers: Numbers, limits: Limits, *, weighed: bool = False) -> list[int]:
    """The most tokens that the limit of bytes leaves, if it asks for fewer; without one, the usual lengths."""
    way = MERGE if weighed else UNIFORM
    target = limits.target_bytes
    if target is None:
        return usual_lengths(prefix)
    if size_of(prefix, Plan(numbers)) <= target:
        return []
    most = _largest(prefix.longest - 1, lambda n: size_of(prefix, Plan(numbers, way, n)) <= target)
    return [most] if most else []


def _ranks(prefix: Prefix, numbers: Sequence[Numbers], limits: Limits) -> Iterator[Numbers]:
    """Low ranks: of the numbers as they are, and, in half precision, the highest within the limit of bytes."""
    for rank in usual_lengths(prefix):
        yield Numbers(f"rank {rank}", rank=rank)
    if (target := limits.target_bytes) is None or not any(n.half for n in numbers):
        return

    def halved(rank: int) -> Numbers:
        return Numbers(f"rank {rank} in float16", half=True, rank=rank)

    if most := _largest(prefix.longest, lambda rank: size_of(prefix, Plan(halved(rank))) <= target):
        yield halved(most)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``most`` that fits, where all below fit as well; 0 if none does."""
    if most < 1 or fits(most):
        return max(most, 0)
    low, high = 0, most  # the first fits (as nothing would), the last doesn't
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def size_of(prefix: Prefix, plan: Plan) -> int:
    """Bytes of a plan's file, with the first tokens of each site in place of those that would stay (to a few bytes)."""
    if plan.tokens is not None:
        prefix = prefix.slice(0, plan.tokens)
        if plan.shorter == MERGE:
            weights = {s.name: torch.zeros(prefix.length(s.name)) for s in prefix.sites}
            prefix = replace(prefix, log_weights=weights)
    return noted(plan.numbers.written(prefix), plan, LONGEST, LONGEST).stored_nbytes


def noted(prefix: Prefix, plan: Plan, before: float, after: float) -> Prefix:
    """The prefix with what was done to it in its metadata. Metrics of its training aren't its own any more."""
    loss = {"before": round(before, 4), "after": round(after, 4)}
    metadata = {k: v for k, v in prefix.metadata.items() if k not in ("metrics", "compression")}
    return replace(prefix, metadata={**metadata, "compression": {"plan": plan.name, "loss": loss}})


def least_size(prefix: Prefix, methods: Sequence[str]) -> tuple[int, str]:
    """Bytes of one token at each site, in the narrowest numbers there are, and their name."""
    sizes = [(size_of(prefix, Plan(n, UNIFORM, 1)), n.name or "as it is") for n in ways_to_write(prefix, methods)]
    return min(sizes)
