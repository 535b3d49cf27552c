"""The worker's half: prefixes by content, as many as there is room for, in the layers and heads that it holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from foreword.errors import ConfigError, PrefixFileError
from foreword.serve.shelf import Shelf
from foreword.serve.vllm.rows import Rows, rows_of
from foreword.serve.vllm.salt import Salt


class Store:
    """Rows of prefixes, the one that was not used for longest leaving first.

    Args:
        part: what of all layers and heads this worker holds.
        most_bytes: that are kept, in the CPU's memory.
    """

    def __init__(self, shelf: Shelf, part: Callable[[Rows], Rows], most_bytes: int) -> None:
        self.shelf, self.most_bytes, self.nbytes = shelf, most_bytes, 0
        self._part = part
        self._held: OrderedDict[str, Rows] = OrderedDict()

    def get(self, salt: Salt) -> Rows:
        """The rows of a prefix.

        Raises:
            ForewordError: it is gone, was replaced by another one, is damaged, or doesn't fit.
        """
        if (found := self._held.get(salt.digest)) is not None:
            self._held.move_to_end(salt.digest)
            return found
        prefix, digest = self.shelf.read(salt.name)
        if digest != salt.digest:
            raise PrefixFileError(
                f"the prefix {salt.name!r} was replaced while a request for the old one waited; ask again"
            )
        rows = rows_of(prefix)
        if rows.length != salt.length:
            raise ConfigError(
                f"the prefix {salt.name!r} has {rows.length} tokens, the request was made for {salt.length}"
            )
        rows = self._part(rows)
        self._keep(salt.digest, rows)
        return rows

    def __len__(self) -> int:
        return len(self._held)

    def _keep(self, digest: str, rows: Rows) -> None:
        if rows.nbytes > self.most_bytes:
            return
        self._held[digest] = rows
        self.nbytes += rows.nbytes
        while self.nbytes > self.most_bytes:
            self.nbytes -= self._held.popitem(last=False)[1].nbytes
