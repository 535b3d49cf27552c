"""`foreword generate`: write with a prefix, or without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer import Option

from foreword.cli._shared import print_json, quiet
from foreword.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run(
    model: Annotated[str, Option(help="Base model: hub name, folder, .gguf file, or 'demo'.")],
    prefix: Annotated[Path | None, Option(help="Folder of a saved prefix; none: the base model.")] = None,
    prompt: Annotated[list[str] | None, Option(help="A prompt (several).")] = None,
    prompts: Annotated[Path | None, Option(help="A file with one prompt a line.")] = None,
    max_new_tokens: Annotated[int, Option(min=1)] = 60,
    sample: Annotated[bool, Option("--sample/--greedy", help="Draw tokens, or take the likeliest.")] = False,
    temperature: Annotated[float, Option(min=0.01)] = 0.8,
    top_p: Annotated[float, Option(min=0.01, max=1.0)] = 0.95,
    top_k: Annotated[int, Option(min=0)] = 0,
    beams: Annotated[int, Option(min=1)] = 1,
    n: Annotated[int, Option(min=1, help="Answers to each prompt (with --sample or --beams).")] = 1,
    strength: Annotated[float, Option(min=0.0, help="Weight of the prefix: 1 as trained, 0 none.")] = 1.0,
    chat: Annotated[bool, Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    seed: Annotated[int, Option()] = 0,
    dtype: Annotated[str | None, Option()] = None,
    force: Annotated[bool, Option("--force", help="Accept a base model with other weights.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print prompts and texts as JSON.")] = False,
) -> None:
    """Write from prompts, streaming to the terminal; several prompts run as one batch."""
    asked = _prompts(prompt, prompts)
    if n > max(1, beams) and not sample:
        raise ConfigError(f"--n {n} asks for different answers; add --sample, or --beams {n}")
    quiet()
    from transformers import set_seed

    from foreword.conditional import plain_prefixes
    from foreword.generation import write
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
    }
    options |= {"do_sample": sample}
    if sample:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    texts = [_in_template(tokenizer, p) for p in asked] if chat else asked
    if len(asked) == 1 and n == 1 and beams == 1 and not as_json:
        _stream(base, tokenizer, texts[0], options, echo=not chat)
        return
    written = write(base, tokenizer, texts, **options)
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
    text: str,
    options: dict[str, Any],
    *,
    echo: bool,
) -> None:
    from transformers import TextStreamer

    batch = tokenizer(text, return_tensors="pt").to(model.device)
    batch.pop("token_type_ids", None)
    if echo:
        typer.secho(text, bold=True, nl=False)
    streamer = TextStreamer(tokenizer, skip_prompt=not model.config.is_encoder_decoder, skip_special_tokens=True)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    cast("Any", model).generate(**batch, streamer=streamer, pad_token_id=pad, **options)


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


def _in_template(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    if tokenizer.chat_template is None:
        raise ConfigError("--chat: this model's tokenizer has no chat template; leave --chat out")
    return str(
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    )
