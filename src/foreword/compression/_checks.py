"""What can't be compressed, said before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from foreword.conditional import part_of
from foreword.errors import ConfigError, MismatchError
from foreword.prefix import Prefix


def check_prefix(prefix: Prefix) -> None:
    """Raise ConfigError for a prefix without virtual tokens of its own."""
    if part_of(prefix) is not None:
        raise ConfigError(
            "this prefix depends on a condition vector: its tokens are made anew for each row. Make a plain one of it, "
            "prefix.given(vector), and compress that"
        )
    if not prefix.longest:
        others = [*(["a memory"] if prefix.memory else []), *(str(p["method"]) for p in prefix.parts)]
        raise ConfigError(
            f"there are no virtual tokens to compress, only {' and '.join(others) or 'nothing'}; what is compressed is "
            "keys and values (of a memory, give it a lower rank in training: MemoryConfig(rank=4))"
        )
    prefix.visible.to_json()  # a rule that can't be saved says so


def check_limits(target_bytes: int | None, max_loss_increase: float | None) -> None:
    """Raise ConfigError unless there is a limit, and each makes sense."""
    if target_bytes is None and max_loss_increase is None:
        raise ConfigError("compressing needs a limit: --target-bytes N, --max-loss-increase X (nats a token), or both")
    if target_bytes is not None and target_bytes < 1:
        raise ConfigError(f"target bytes {target_bytes}; expected a number of bytes above 0")
    if max_loss_increase is not None and not 0 <= max_loss_increase < math.inf:
        raise ConfigError(
            f"max loss increase {max_loss_increase}; expected 0 or more nats a token, e.g. 0.02 (a limit below 0 would "
            "ask that compressing betters the prefix)"
        )


def check_tokens(prefix: Prefix, tokens: int) -> None:
    """Raise ConfigError unless this many tokens a site are some, and fewer than there are."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"tokens={tokens!r}; expected a whole number of virtual tokens a site, 1 or more")
    if tokens >= prefix.longest:
        raise ConfigError(f"tokens={tokens}; the prefix has {prefix.longest} at most already, expected fewer")


def check_shares(prefix: Prefix, shares: Mapping[str, Tensor]) -> None:
    """Raise MismatchError unless there is a share for each token of each head."""
    for site in prefix.sites:
        length = prefix.length(site.name)
        found = tuple(shares[site.name].shape) if site.name in shares else None
        if length and found != (site.kv_heads, length):
            raise MismatchError(
                f"the shares of attention at {site.name} are {found or 'missing'}, expected "
                f"({site.kv_heads} heads, {length} tokens); measure them on this prefix: token_shares(...)"
            )
    if odd := sorted(n for n in shares if n not in prefix.keys or not prefix.length(n)):
        raise MismatchError(f"there are shares of attention at {odd[0]}, where the prefix has no token")
