"""`foreword serve --engine vllm`: becomes vLLM's server, with foreword's connector and middleware."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer

from foreword.cli._shared import quiet
from foreword.errors import ConfigError, MissingPartError

# Options of `foreword serve` that mean the same here; the others are those of its own engine.
_TAKEN = {
    "model", "prefix_dir", "host", "port", "name", "max_length", "api_keys", "dtype", "engine", "dry_run",
    "vllm_python", "prompt_logprobs", "prefix_memory", "vllm_arguments", "events",
}  # fmt: skip
ONLY_HERE = {"dry_run", "vllm_python", "prompt_logprobs", "prefix_memory", "vllm_arguments", "events"}


def check_options(context: typer.Context, engine: str) -> None:
    """Make sure that no option was given that the engine doesn't have.

    Raises:
        ConfigError: one was, or there is no such engine.
    """
    if engine not in ("foreword", "vllm"):
        raise ConfigError(f"--engine {engine!r}; expected foreword or vllm")
    given = {
        name for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }  # fmt: skip
    odd = sorted(given - _TAKEN) if engine == "vllm" else sorted(given & ONLY_HERE)
    if not odd:
        return
    option = "arguments after --" if odd[0] == "vllm_arguments" else f"--{odd[0].replace('_', '-')}"
    other = "foreword" if engine == "vllm" else "vllm"
    more = "; vLLM's own options can be given after --" if engine == "vllm" else ""
    raise ConfigError(f"{option} is for --engine {other}{more}")


def run(
    model: str, folder: Path | None, *, name: str, host: str, port: int, length: int | None, dtype: str | None,
    api_keys: Path | None, memory: str, prompt_logprobs: bool, events: Path | None, python: str | None,
    arguments: list[str], dry: bool,
) -> None:  # fmt: skip
    """Print the command, or become it."""
    if folder is None:
        raise ConfigError("--engine vllm serves the prefixes of a folder; give --prefix-dir")
    quiet()
    from foreword.models import cache_dir, files_of
    from foreword.serve.budget import parse_bytes
    from foreword.serve.http.keys import read_keys
    from foreword.serve.shelf import Shelf
    from foreword.serve.vllm import launch
    from foreword.serve.vllm.options import Options

    shelf = Shelf(folder.resolve())
    if name in shelf.names():
        raise ConfigError(f"{name!r} is the base model's name; call it or the task something else (--name)")
    if api_keys is not None:
        read_keys(api_keys, "FOREWORD_API_KEYS")
    source, config, tokenizer = files_of(model)
    launch.check_model(config)
    ends = _ends(config)
    number, text = launch.placeholder(tokenizer, ends)
    options = Options(
        str(shelf.folder), number, text, parse_bytes(memory), prompt_logprobs,
        str(api_keys.resolve()) if api_keys is not None else "", str(events.resolve()) if events is not None else "",
    )  # fmt: skip
    template = launch.chat_template(tokenizer, cache_dir() / "vllm")
    command = launch.command(
        source, options, name=name, host=host, port=port, template=template, length=length, dtype=dtype,
        python=python or sys.executable, more=arguments,
    )  # fmt: skip
    if dry:
        typer.echo(str(command))
        return
    _check_installed(command.arguments[0])
    os.execvpe(command.arguments[0], command.arguments, {**os.environ, **command.environment})


def _check_installed(python: str) -> None:
    """Without importing either: vLLM takes its time."""
    asks = "import importlib.util as u; print(*(n for n in ('vllm', 'foreword') if u.find_spec(n) is None))"
    try:
        asked = subprocess.run([python, "-c", asks], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as exc:
        raise ConfigError(f"{python} can't be run as a python ({exc}); give --vllm-python") from exc
    if missing := asked.stdout.split():
        raise MissingPartError(
            f"{' and '.join(missing)} can't be found by {python}; install it there, or name the python of an environment "
            "that has vLLM and foreword with --vllm-python (docs/vllm.md)"
        )


def _ends(config: Any) -> list[int]:
    """Token ids that end a text."""
    ends = config.get_text_config().eos_token_id
    return list(ends) if isinstance(ends, list) else [ends] if ends is not None else []
