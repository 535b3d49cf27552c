"""The command that starts vLLM with foreword's connector and middleware, from what the model's files say.

Reads configuration and tokenizer, no weights; starts nothing.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foreword.errors import ConfigError, UnsupportedModelError
from foreword.serve.vllm import CONNECTOR, MIDDLEWARE
from foreword.serve.vllm.bodies import VARIABLE
from foreword.serve.vllm.options import Options

# What the command has to say itself: given again, one of the two would be lost.
_OURS = (
    "--model", "--served-model-name", "--host", "--port", "--middleware", "--kv-transfer-config", "--chat-template",
    "--api-key",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Command:
    """What to run.

    Attributes:
        environment: what it needs beside the environment that it is run in.
    """

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """For a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.arguments)])


def command(
    model: str,
    options: Options,
    *,
    name: str,
    host: str,
    port: int,
    template: Path | None,
    length: int | None = None,
    dtype: str | None = None,
    python: str,
    more: Sequence[str] = (),
) -> Command:
    """The command of vLLM's server.

    Args:
        model: a folder, or a name of the hub.
        name: what clients call the base model.
        template: the chat template's file (see :func:`chat_template`); None where the model has none.
        python: of the environment that vLLM is installed in.
        more: arguments of vLLM's own.

    Raises:
        ConfigError: an argument that the command has itself.
    """
    for argument in more:
        if (option := argument.split("=")[0].replace("_", "-")) in _OURS:
            raise ConfigError(f"{option} is set by foreword; use its own options (foreword serve --help)")
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": options.to_json(),
    }
    # Not `vllm serve`: the module is there in every build, under every distribution's name.
    arguments = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", name]
    arguments += ["--host", host, "--port", str(port), "--middleware", MIDDLEWARE]
    arguments += ["--kv-transfer-config", json.dumps(transfer, separators=(",", ":"))]
    if template is not None:
        arguments += ["--chat-template", str(template)]
    if length is not None:
        arguments += ["--max-model-len", str(length)]
    if dtype is not None:
        arguments += ["--dtype", dtype]
    return Command([*arguments, *more])


def check_model(config: Any) -> None:
    """Make sure, from a model's configuration, that vLLM can serve it with prefixes.

    vLLM's own view of it is checked when the server starts; this says the common reasons before.

    Raises:
        UnsupportedModelError: it caches something else than keys and values of all positions in all layers.
    """
    text = config.get_text_config()
    kind = text.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} has an encoder; prefixes are served by vLLM for decoders only")
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(f"{kind} has latent attention (MLA): vLLM caches no keys and values of its heads")
    layers = set(getattr(text, "layer_types", None) or [])
    if other := sorted(layers - {"full_attention", "attention"}):
        raise UnsupportedModelError(
            f"{kind} has layers of type {other[0]}, which forget the prefix or have none; use `foreword serve`"
        )
    window = getattr(text, "sliding_window", None)
    if window and not layers and getattr(text, "use_sliding_window", True):
        raise UnsupportedModelError(
            f"{kind} has a sliding window of {window} tokens, which would slide past the prefix; use `foreword serve`"
        )


def placeholder(tokenizer: Any, avoid: Sequence[int] = ()) -> tuple[int, str]:
    """A token to stand where a prefix goes: one that texts don't have and the model doesn't write.

    A special token that isn't the end of a text: a repetition penalty, which counts prompts, must not make ends rarer.
    Its text has to become that token again, however often it is repeated and whatever follows it.

    Args:
        avoid: more ids that end a text.

    Raises:
        UnsupportedModelError: no special token is fit.
    """
    last = {tokenizer.eos_token_id, *avoid}
    template = json.dumps(tokenizer.chat_template or "")
    known = [(i, t) for i, t in zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)]

    def rank(entry: tuple[int, str]) -> tuple[bool, bool, int]:
        return entry[0] in last, entry[1] in template, entry[0]

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    for number, text in sorted(known, key=rank):
        if all(ids(text * 3 + after) == [number] * 3 + ids(after) for after in ("The film", "\n x", text)):
            return number, text
    raise UnsupportedModelError("the tokenizer has no special token that stands for itself, to hold a prefix's place")


def chat_template(tokenizer: Any, folder: Path) -> Path | None:
    """A file with the tokenizer's template, placeholders before it where a request has them; None without a template.

    Raises:
        ConfigError: it can't be written.
    """
    template = tokenizer.chat_template
    if isinstance(template, Mapping):  # several by name: the one that chats use
        template = template.get("default")
    if not template:
        return None
    # An expression, not a block: Jinja drops a line's end after a block.
    text = f"{{{{ {VARIABLE} | default('') }}}}{template}"
    path = folder / f"chat-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jinja"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            staged = path.with_suffix(".tmp")
            staged.write_text(text, encoding="utf-8")
            staged.replace(path)
        except OSError as exc:
            raise ConfigError(f"the chat template can't be written to {path}: {exc}") from exc
    return path
