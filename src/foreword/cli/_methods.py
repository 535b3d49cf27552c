"""From the options about what is trained to configurations, for the commands that train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from foreword.methods import Config


class Reparam(StrEnum):
    direct = "direct"
    mlp = "mlp"
    low_rank = "low-rank"


class Gate(StrEnum):
    none = "none"
    head = "head"
    input = "input"
    zero = "zero"


class Method(StrEnum):
    prefix = "prefix"
    memory = "memory"
    prompt = "prompt"
    lora = "lora"
    adapter = "adapter"
    bitfit = "bitfit"
    full = "full"


def configs(
    chosen: Sequence[Method],
    *,
    length: int,
    init: str | None,
    repeat: bool,
    reparam: Reparam,
    depth: int,
    hidden: int,
    rank: int,
    memory_rank: int | None,
    width: int,
    sites: str | None,
    kinds: str,
    visible: str,
    gate: Gate,
    seed: int,
    position_offset: int = 0,
    several: Mapping[str, Any] | None = None,
    **more: Any,
) -> list[Config]:
    """A configuration for each method chosen.

    Args:
        several: fields of ``PrefixConfig`` that are about tasks, before the others.
        more: further fields of ``PrefixConfig``.

    Raises:
        ConfigError: one of them refuses its options.
    """
    from foreword import methods
    from foreword.config import PrefixConfig

    where: dict[str, Any] = {"sites": sites, "kinds": tuple(k.strip() for k in kinds.split(","))}
    text: dict[str, Any] = {
        "length": length, "init": init, "repeat": repeat, "visible": visible, "position_offset": position_offset,
        "seed": seed,
    }  # fmt: skip
    makers: dict[Method, Callable[[], Config]] = {
        Method.prefix: lambda: PrefixConfig(
            **{**text, **(several or {})}, reparam=reparam.value, depth=depth, hidden=hidden, rank=rank,
            gate=cast("Any", None if gate is Gate.none else gate.value), **where, **more,
        ),
        Method.memory: lambda: methods.MemoryConfig(rank=memory_rank, seed=seed, **where),
        Method.prompt: lambda: methods.PromptConfig(**text),
        Method.lora: lambda: methods.LoRAConfig(rank=rank, seed=seed),
        Method.adapter: lambda: methods.AdapterConfig(width=width, seed=seed),
        Method.bitfit: lambda: methods.BitFitConfig(missing="add"),
        Method.full: lambda: methods.FullConfig(),
    }  # fmt: skip
    return [makers[m]() for m in chosen]
