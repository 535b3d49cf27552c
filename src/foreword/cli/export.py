"""`foreword export`: a prefix for programs that know nothing of foreword."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from foreword.cli._shared import load_base, print_json, quiet
from foreword.errors import ConfigError, MissingPartError

if TYPE_CHECKING:
    from foreword.exchange.llama_cpp import Exported
    from foreword.prefix import Prefix

_LLAMA = "llama.cpp"


class Target(StrEnum):
    """Who is to run it."""

    llama_cpp = "llama.cpp"
    peft = "peft"
    onnx = "onnx"


class Cache(StrEnum):
    """Numbers in llama.cpp's cache."""

    f16 = "f16"
    f32 = "f32"


class Kind(StrEnum):
    """Kinds of state files."""

    slot = "slot"
    session = "session"


def run(
    folder: Annotated[Path, Argument(help="Folder of a saved prefix.")],
    to: Annotated[Target, Option(help="Who is to run it.")],
    out: Annotated[Path, Option(help="The file to write (llama.cpp; a JSON file is written beside it), or the folder (peft, onnx).")],
    gguf: Annotated[Path | None, Option(help="The base model as llama.cpp runs it, in any quantisation.", show_default="the demo model's", rich_help_panel=_LLAMA)] = None,
    cache: Annotated[Cache, Option(help="Numbers in llama.cpp's cache (its --cache-type-k and -v).", rich_help_panel=_LLAMA)] = Cache.f16,
    flash_attention: Annotated[bool, Option("--flash-attention/--no-flash-attention", help="Whether llama.cpp runs with it (its -fa).", rich_help_panel=_LLAMA)] = True,
    kind: Annotated[Kind, Option(help="slot: for llama-server; session: for llama_state_load_file.", rich_help_panel=_LLAMA)] = Kind.slot,
    old_format: Annotated[bool, Option("--old-format", help="For builds before the states' formats 4 and 11.", rich_help_panel=_LLAMA)] = False,
    model: Annotated[str | None, Option(help="Base model in transformers, as for train.", show_default="the one that the prefix names")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what was exported to --out before.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print what was written as JSON.")] = False,
) -> None:  # fmt: skip
    """Write a prefix as others read it: a state that an unmodified llama-server restores, an adapter of PEFT, or ONNX's cache."""
    quiet()
    from foreword.prefix import Prefix

    prefix = Prefix.load(folder)
    if gguf is not None and to is not Target.llama_cpp:
        raise ConfigError(f"--gguf is for llama.cpp; leave it out with --to {to.value}")
    if to is Target.peft:
        _to_peft(prefix, out, model, overwrite, as_json)
    elif to is Target.onnx:
        _to_onnx(prefix, folder.resolve().name, out, model, overwrite, as_json)
    else:
        form = (kind.value, cache.value, flash_attention, old_format)
        _to_llama_cpp(prefix, out, gguf, model, form, overwrite, as_json)


def _check_free(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; give another --out, or --overwrite")


def _to_peft(prefix: Prefix, out: Path, model: str | None, overwrite: bool, as_json: bool) -> None:
    from foreword.exchange.peft import CONFIG, write_peft

    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / CONFIG).exists())):
        raise ConfigError(f"--out {out} is something else; PEFT's adapter is a folder, give the name of a new one")
    _check_free(out / CONFIG, overwrite)
    write_peft(prefix, load_base(prefix, model, dtype=None)[0], out)
    if as_json:
        print_json({"path": str(out), "length": prefix.longest})
    else:
        typer.secho(
            f"{out}: {prefix.longest} virtual tokens, for peft.PeftModel.from_pretrained(model, {str(out)!r})",
            fg="green",
        )


def _to_onnx(prefix: Prefix, name: str, out: Path, model: str | None, overwrite: bool, as_json: bool) -> None:
    from foreword._prefix_file import DESCRIPTION
    from foreword.cacheable import check_all_layers
    from foreword.exchange.onnx import MODEL, check_exportable, export_base, write_past

    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder, which holds the model once and each prefix beside it")
    if (out / DESCRIPTION).exists():
        raise ConfigError(f"--out {out} is the folder of a saved prefix; give one for the exported model")
    target = out / f"{name}.safetensors"
    _check_free(target, overwrite)
    check_exportable(prefix)  # before a large model is loaded
    network, _ = load_base(prefix, model, dtype="float32")
    check_all_layers(prefix, network, "ONNX Runtime")
    if not as_json and not (out / MODEL).exists():
        typer.echo(
            f"exporting {prefix.fingerprint.base_model or 'the model'}, once; by its number of layers this takes minutes",
            err=True,
        )
    base, past = export_base(network, out), write_past(prefix, target)
    if as_json:
        print_json({"model": str(base), "past": str(past), "length": prefix.longest})
    else:
        typer.secho(f"{base}: the base model\n{past}: {prefix.longest} virtual tokens, its past_key_values", fg="green")


def _to_llama_cpp(
    prefix: Prefix, out: Path, gguf: Path | None, model: str | None, form: tuple[Any, Any, bool, bool],
    overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    from foreword.exchange.llama_cpp import Form, check_exportable, export_llama_cpp

    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; give the name of a file in it, like {out / 'prefix.bin'}")
    base = gguf or _own_gguf(prefix, model)
    if out.exists() and base.exists() and out.samefile(base):
        raise ConfigError(f"--out {out} is the base model itself; give another name")
    _check_free(out, overwrite)
    check_exportable(prefix, base)  # before a large model is loaded
    network, _ = load_base(prefix, model, dtype=None)
    done = export_llama_cpp(prefix, network, base, out, Form(*form))
    if as_json:
        print_json({"path": str(done.path), "bytes": done.bytes, "length": done.length, "tokens": list(done.tokens)})
    else:
        _tell(done)


def _own_gguf(prefix: Prefix, model: str | None) -> Path:
    """The file of the demo model; any other has to be named."""
    from foreword.models import DEMO, packaged_model

    try:
        packaged = packaged_model()
    except MissingPartError:
        packaged = None
    if packaged is not None and (model or prefix.fingerprint.base_model) in (DEMO, packaged.stem, str(packaged)):
        return packaged
    if model is not None and model.endswith(".gguf"):
        return Path(model)
    raise ConfigError("--gguf names the base model's file that llama.cpp runs; give one")


def _tell(done: Exported) -> None:
    form, file = done.form, done.path
    attention = "with" if form.flash_attention else "without"
    typer.secho(f"{file}: {done.length} virtual tokens for llama.cpp, {done.bytes:,} bytes "
                f"({form.kind} {form.version}, {form.cache}, {attention} flash attention)", fg="green")  # fmt: skip
    if form.kind == "session":
        typer.echo(
            f"Load it with llama_state_load_file; the prompt goes on after the {done.length} tokens that it gives back."
        )
        return
    flags = "" if form.cache == "f16" else " --cache-type-k f32 --cache-type-v f32"
    typer.echo(
        f"  llama-server -m {done.base.path} --slot-save-path {file.parent} --kv-unified --cache-ram 0"
        f" -fa {'on' if form.flash_attention else 'off'}{flags}\n"
        f"  curl 'http://127.0.0.1:8080/slots/0?action=restore' -d '{{\"filename\": \"{file.name}\"}}'\n"
        f"Then prompts for slot 0 begin with the {done.length} tokens in {file}.json, and timings.cache_n in an answer\n"
        f"is {done.length} or more: less, and the prefix was lost and has to be restored again."
    )
