"""`foreword generate`: write with a prefix, or without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from typer import Option

from foreword.cli._shared import print_json, quiet
from foreword.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DRAWN = {"temperature": 0.8, "top_p": 0.95, "top_k": 0}


def run(
    model: Annotated[str, Option(help="Base model: hub name, folder, .gguf file, or 'demo'.")],
    prefix: Annotated[Path | None, Option(help="Folder of a saved prefix; none: the base model.")] = None,
    prompt: Annotated[list[str] | None, Option(help="A prompt (several).")] = None,
    prompts: Annotated[Path | None, Option(help="A file with one prompt a line.")] = None,
    max_new_tokens: Annotated[int, Option(min=1)] = 60,
    sample: Annotated[bool, Option("--sample/--greedy", help="Draw tokens, or take the likeliest.")] = False,
    temperature: Annotated[float | None, Option(min=0.01, help="With --sample.", show_default="0.8")] = None,
    top_p: Annotated[float | None, Option(min=0.01, max=1.0, help="With --sample.", show_default="0.95")] = None,
    top_k: Annotated[int | None, Option(min=0, help="With --sample; 0: all.", show_default="0")] = None,
    beams: Annotated[int, Option(min=1)] = 1,
    n: Annotated[int, Option(min=1, help="Answers to each prompt (with --sample or --beams).")] = 1,
    strength: Annotated[float, Option(min=0.0, help="Weight of the prefix: 1 as trained, 0 none.")] = 1.0,
    chat: Annotated[
        bool | None,
        Option(
            "--chat/--no-chat",
            help="Put each prompt into the model's chat template.",
            show_default="what the prefix was trained on",
        ),
    ] = None,
    seed: Annotated[int, Option()] = 0,
    dtype: Annotated[str | None, Option()] = None,
    force: Annotated[bool, Option("--force", help="Accept a base model with other weights.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print prompts and texts as JSON.")] = False,
) -> None:
    """Write from prompts, streaming to the terminal; several prompts run as one batch."""
    asked = _prompts(prompt, prompts)
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in drawing.items() if value is not None}
    if given and not sample:
        option = f"--{next(iter(given)).replace('_', '-')}"
        raise ConfigError(
            f"{option} goes with --sample, and without it no token is drawn; add --sample, or leave {option} out"
        )
    if n > max(1, beams) and not sample:
        raise ConfigError(f"--n {n} asks for different answers; add --sample, or --beams {n}")
    quiet()
    from transformers import set_seed

    from foreword.conditional import plain_prefixes
    from foreword.generation import write_on
    from foreword.models import load_model
    from foreword.tuning import attach

    loaded = plain_prefixes([prefix] if prefix is not None else [])
    base, tokenizer = load_model(model, dtype=dtype)
    if loaded:
        attach(base, loaded, strength=strength, force=force)
    set_seed(seed)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_beams": beams,
        "num_return_sequences": n,
        "do_sample": sample,
    }
    if sample:
        options |= {**_DRAWN, **given}
    form = _form(chat, loaded, prefix, tokenizer)
    rows = [_ids(form, p, tokenizer, bool(base.config.is_encoder_decoder)) for p in asked]
    if len(asked) == 1 and n == 1 and beams == 1 and not as_json:
        _stream(base, tokenizer, rows[0], options, echo=asked[0] if form == "text" else "")
        return
    written = write_on(base, tokenizer, rows, **options)
    record = [{"prompt": p, "texts": written[i * n : (i + 1) * n]} for i, p in enumerate(asked)]
    if as_json:
        print_json(record)
        return
    for entry in record:
        for text in entry["texts"]:
            typer.secho(str(entry["prompt"]), bold=True, nl=False)
            typer.echo(text + "\n")


def _stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    row: list[int],
    options: dict[str, Any],
    *,
    echo: str,
) -> None:
    import torch
    from transformers import TextStreamer

    from foreword.sites import input_device

    ids = torch.tensor([row], device=input_device(model))
    if echo:
        typer.secho(echo, bold=True, nl=False)
    streamer = TextStreamer(tokenizer, skip_prompt=not model.config.is_encoder_decoder, skip_special_tokens=True)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    cast("Any", model).generate(
        ids, attention_mask=torch.ones_like(ids), streamer=streamer, pad_token_id=pad, **options
    )


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    found = list(given or [])
    if file is not None:
        try:
            found += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as exc:
            raise DataError(f"--prompts {file}: {exc}; expected a UTF-8 text file with one prompt a line") from exc
    if not found or any(not p for p in found):
        raise ConfigError('there is no prompt (or an empty one); give --prompt "The film was", or --prompts FILE')
    return found


def _form(
    chat: bool | None, loaded: Sequence[Any], folder: Path | None, tokenizer: PreTrainedTokenizerBase
) -> Literal["chat", "alpaca", "text"]:
    """What becomes of a prompt: what was asked for, else what the prefix was trained on."""
    if chat is not None:
        if chat and tokenizer.chat_template is None:
            raise ConfigError("--chat: this model's tokenizer has no chat template; leave --chat out")
        return "chat" if chat else "text"
    form = next((p.metadata["form"] for p in loaded if p.metadata.get("form") in ("chat", "alpaca")), "text")
    if form == "alpaca":
        _note(f"{folder} was trained on instructions; the prompt is put into their form (--no-chat: as it is)")
        return "alpaca"
    if form == "chat" and tokenizer.chat_template is not None:
        _note(f"{folder} was trained on conversations; the prompt goes into the chat template (--no-chat: as it is)")
        return "chat"
    if form == "chat":
        _note(
            f"{folder} was trained on conversations, but this tokenizer has no chat template: the prompt stays as it is"
        )
    return "text"


def _note(line: str) -> None:
    typer.echo(f"note: {line}", err=True)


def _ids(form: str, prompt: str, tokenizer: PreTrainedTokenizerBase, seq2seq: bool) -> list[int]:
    """A prompt's ids; of conversations, with the special tokens that the template writes and no others."""
    from foreword.data.encode import prompt_ids
    from foreword.data.shapes import alpaca

    if form == "chat":
        return prompt_ids([[{"role": "user", "content": prompt}]], tokenizer, seq2seq=seq2seq)[0]
    return list(tokenizer(alpaca(prompt) if form == "alpaca" else prompt)["input_ids"])
