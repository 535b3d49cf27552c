"""How a prefix's keys and values are written to its file: as they are, in 8 or 4 bits, or as two factors.

A prefix in memory is always numbers that a model can read; its ``storage`` says what ``save`` makes of them. Keys and
values are packed apart, because they differ: the keys of many models have a few dimensions of large numbers, so a
scale is shared along a dimension (*by channel*), values don't, so it is shared along a token (KIVI, Liu et al. 2024,
arXiv 2402.02750).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from foreword.errors import ConfigError

GROUP = 64


@dataclass(frozen=True, slots=True)
class Packing:
    """Of all keys, or of all values.

    Attributes:
        bits: 8 or 4, with a scale and a start for each run of numbers; None: in the dtype that they have.
        by: what a run goes along: ``"channel"``: one dimension of one head, token after token; ``"token"``: one token
            of one head, dimension after dimension.
        group: the most numbers in a run.
        rank: two factors of this rank a site, where they take fewer bytes; None: whole. Not together with ``bits``.
    """

    bits: int | None = None
    by: str = "token"
    group: int = GROUP
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (None, 8, 4):
            raise ConfigError(f"bits={self.bits!r}; expected 8, 4, or None for numbers as they are")
        if self.by not in ("channel", "token"):
            raise ConfigError(f'by={self.by!r}; expected "channel" or "token"')
        for name, least in (("group", 2), ("rank", 1)):
            value = getattr(self, name)
            if name == "rank" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r}; expected a whole number of {least} or more")
        if self.bits is not None and self.rank is not None:
            raise ConfigError(f"bits={self.bits} and rank={self.rank}; factors keep their dtype, give one of the two")

    @property
    def plain(self) -> bool:
        return self.bits is None and self.rank is None

    def __str__(self) -> str:
        if self.bits is not None:
            return f"int{self.bits} by {self.by}"
        return f"rank {self.rank}" if self.rank is not None else "as they are"


@dataclass(frozen=True, slots=True)
class Storage:
    """Of a prefix: ``Storage.of("int4")``, or keys and values apart: ``Storage.of("int4", "int8")``."""

    keys: Packing = field(default_factory=Packing)
    values: Packing = field(default_factory=Packing)

    @classmethod
    def of(cls, keys: str, values: str | None = None) -> Storage:
        """From ``"plain"``, ``"int8"`` or ``"int4"``, or with what shares a scale: ``"int4:token"``.

        Args:
            keys: by channel where nothing else is said.
            values: by token where nothing else is said; None: as the keys.

        Raises:
            ConfigError: none of these forms.
        """
        return cls(_parse(keys, "channel"), _parse(values if values is not None else keys, "token"))

    @property
    def plain(self) -> bool:
        return self.keys.plain and self.values.plain

    def to_json(self) -> dict[str, Any]:
        return {"keys": asdict(self.keys), "values": asdict(self.values)}

    @classmethod
    def from_json(cls, record: Any) -> Storage:
        """What :meth:`to_json` gave; None is plain.

        Raises:
            ConfigError: it isn't that.
        """
        if record is None:
            return cls()
        if not isinstance(record, dict) or record.keys() != {"keys", "values"}:
            raise ConfigError(f"storage is {record!r}; expected how keys and values are packed")
        known = {f.name for f in fields(Packing)}
        for kind, own in record.items():
            if not isinstance(own, dict) or not own.keys() <= known:
                raise ConfigError(f"storage says of {kind} {own!r}; expected some of {', '.join(sorted(known))}")
        return cls(Packing(**record["keys"]), Packing(**record["values"]))

    def __str__(self) -> str:
        return f"keys {self.keys}, values {self.values}"


def _parse(text: str, by: str) -> Packing:
    name, _, along = text.partition(":")
    bits = {"plain": None, "int8": 8, "int4": 4}
    if name not in bits or along not in ("", "channel", "token"):
        raise ConfigError(f'storage {text!r}; expected "plain", "int8", "int4", or "int8:token", "int4:channel", …')
    return Packing(bits[name], along or by)
