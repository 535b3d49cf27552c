"""The scheduler's half: which tokens of a request come from its prefix, and into which slots of the cache they go.

Knows vLLM's requests by their attributes only. It reads no file: what it has to know is in the salt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from foreword.errors import ConfigError
from foreword.serve.vllm.salt import MARK, Salt


class Asked(Protocol):
    """What is read of vLLM's requests."""

    request_id: str
    cache_salt: str | None
    prompt_token_ids: Sequence[int] | None
    skip_reading_prefix_cache: bool

    @property
    def num_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Load:
    """An order to the workers.

    Attributes:
        salt: of the prefix; None: the request can't be served, its blocks are to be reported as failed.
        start, stop: positions to write.
        slots: of these positions, in the paged cache.
        blocks: all blocks that hold them.
        over: the placeholders run through the model in this step, and what it writes for them is to be written over.
    """

    request_id: str
    salt: Salt | None
    start: int
    stop: int
    slots: tuple[int, ...]
    blocks: tuple[int, ...]
    over: bool = False


class Planner:
    """Between the steps of vLLM's scheduler.

    Args:
        placeholder: the token id that stands where the prefix goes.
        block_size: asked late, since the platform may still change it.
    """

    def __init__(self, placeholder: int, block_size: Callable[[], int]) -> None:
        self._placeholder, self._block_size = placeholder, block_size
        self._loads: list[Load] = []
        self._over: dict[str, Salt] = {}

    def matched(self, request: Asked, computed: int) -> int:
        """How many tokens after the first ``computed`` come from the prefix.

        For a request that can't be served it claims what can be claimed, so that there are blocks to report as failed:
        only that request ends, with an error.
        """
        if not _ours(request):
            return 0
        salt = self._salt(request)
        return max((salt.length if salt else request.num_tokens - 1) - computed, 0)

    def allocated(self, request: Asked, blocks: Sequence[int], external: int) -> None:
        """A request got its blocks; ``external`` of its tokens were matched."""
        if not _ours(request):
            return
        salt = self._salt(request)
        if salt is None:
            # Not the blocks that were cached already: others may be reading them.
            own = blocks[(request.num_tokens - 1 - external) // self._block_size() :]
            self._loads.append(Load(request.request_id, None, 0, 0, (), tuple(own)))
        elif external > 0:
            self._loads.append(self._load(request.request_id, salt, salt.length - external, salt.length, blocks))
        elif request.skip_reading_prefix_cache:
            # With prompt_logprobs vLLM takes nothing from caches: the placeholders go through the model.
            self._over[request.request_id] = salt

    def planned(
        self, scheduled: Mapping[str, int], computed: Mapping[str, int], blocks_of: Callable[[str], Sequence[int]]
    ) -> list[Load]:
        """The orders for a step.

        Args:
            scheduled: tokens that each request has in this step.
            computed: tokens that it had before.
        """
        loads, self._loads = self._loads, []
        for request_id, salt in list(self._over.items()):
            if request_id not in scheduled:
                continue
            start = min(computed[request_id], salt.length)
            stop = min(computed[request_id] + scheduled[request_id], salt.length)
            if stop > start:
                loads.append(self._load(request_id, salt, start, stop, blocks_of(request_id), over=True))
            if stop >= salt.length:
                del self._over[request_id]
        return loads

    def finished(self, request_id: str) -> None:
        self._over.pop(request_id, None)

    def _salt(self, request: Asked) -> Salt | None:
        """None: no such salt, no placeholders in front, or no text after them."""
        try:
            salt = Salt.parse(request.cache_salt or "")
        except ConfigError:
            return None
        before = request.prompt_token_ids[: salt.length] if request.prompt_token_ids is not None else []
        whole = request.num_tokens > salt.length and list(before) == [self._placeholder] * salt.length
        return salt if whole else None

    def _load(
        self, request_id: str, salt: Salt, start: int, stop: int, blocks: Sequence[int], over: bool = False
    ) -> Load:
        size = self._block_size()
        slots = tuple(blocks[p // size] * size + p % size for p in range(start, stop))
        return Load(request_id, salt, start, stop, slots, tuple(blocks[start // size : (stop - 1) // size + 1]), over)


def _ours(request: Asked) -> bool:
    return bool(request.cache_salt and request.cache_salt.startswith(MARK))
