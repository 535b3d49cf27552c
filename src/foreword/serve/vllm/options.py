"""The connector's options: what stands under ``kv_connector_extra_config``, for workers, scheduler and middleware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from foreword.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Options:
    """Of the connector.

    Attributes:
        prefixes: the folder of prefixes. Every worker and API server reads it under this path.
        placeholder: a token id, one that models don't write and texts don't have.
        placeholder_text: what the tokenizer makes that id of.
        prefix_bytes: of prefixes that each worker keeps in the CPU's memory.
        prompt_logprobs: whether requests for tasks may ask for them. On GPUs it costs whole CUDA graphs.
        api_keys: a file of keys that clients must show; empty: ``FOREWORD_API_KEYS``, else anybody may ask.
        events: a file for a line of JSON at each load; empty: none.
    """

    prefixes: str
    placeholder: int
    placeholder_text: str
    prefix_bytes: int = 2 << 30
    prompt_logprobs: bool = False
    api_keys: str = ""
    events: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Options:
        """What :meth:`to_json` made.

        Raises:
            ConfigError: something is missing, unknown, or of another type.
        """
        known = {f.name: f for f in fields(cls)}
        if odd := sorted(set(given) - set(known)):
            raise ConfigError(f"kv_connector_extra_config has {odd[0]!r}; expected only {', '.join(known)}")
        if lacking := [n for n in ("prefixes", "placeholder", "placeholder_text") if n not in given]:
            raise ConfigError(
                f"kv_connector_extra_config has no {lacking[0]!r}; `foreword serve --engine vllm` writes it"
            )
        kinds = {"str": str, "int": int, "bool": bool}
        for name, value in given.items():
            if type(value) is not kinds[str(known[name].type)]:
                raise ConfigError(f"kv_connector_extra_config: {name} is {value!r}; expected {known[name].type}")
        return cls(**given)
