"""Prefixes as PEFT keeps them, both ways.

PEFT writes a row a virtual token, with (layer, key or value, head, dim) side by side, an MLP already applied, for text
that starts after the virtual tokens. We read and write its ``adapter_config.json`` and ``adapter_model.safetensors``;
PEFT itself is not needed. Adapters in pickle files are not read: that would run code.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from torch import Tensor
from transformers import PreTrainedModel

from foreword._begun import write_whole
from foreword._wrapped import unwrapped
from foreword.cacheable import check_all_layers, check_cacheable, for_cache, layer_number
from foreword.errors import ConfigError, MismatchError, PrefixFileError
from foreword.hub import located
from foreword.prefix import Prefix
from foreword.sites import Site, sites
from foreword.weights import head_parameters

CONFIG, WEIGHTS, PICKLE, EMBEDDINGS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "prompt_embeddings",
)
_HEADS = {"SEQ_CLS": "sequence", "TOKEN_CLS": "token", "QUESTION_ANS": "question"}
_INSTEAD = "Use it with foreword, which needs no PEFT"


def read_peft(folder: str | Path, model: PreTrainedModel, *, keep_positions: bool = False) -> Prefix:
    """A prefix that PEFT trained (``PrefixTuningConfig``), for text that starts at position 0, with its trained head.

    Args:
        folder: here, or on a hub (``"hf://owner/name"``).
        model: its base model: a decoder whose layers all have the same key/value heads.
        keep_positions: leave it for text that starts after the virtual tokens, as PEFT has it. Models that aren't
            rotary are always left so.

    Raises:
        PrefixFileError: files are missing, damaged, of another method, or hold what can't be read.
        MismatchError: it is for another model, or its trained head is for another one.
    """
    model = unwrapped(model)
    folder = located(folder, (CONFIG, WEIGHTS))
    config = _config(folder)
    tensors = _tensors(folder)
    rows = _embeddings(folder, config, tensors.pop(EMBEDDINGS, None), tensors)
    head = _head(folder, config, tensors, model)
    found = [s for s in sites(model) if s.kind == "self" and not s.tower]
    first = _uniform(found, model)
    length, width = rows.shape
    want = len(found) * 2 * first.kv_heads * first.key_dim
    if width != want:
        raise MismatchError(
            f"{folder} has {width} numbers a virtual token; {type(model).__name__} needs {len(found)} layers · 2 · "
            f"{first.kv_heads} heads · {first.key_dim} = {want}. Give the base model that it was trained on: "
            f"{config.get('base_model_name_or_path') or 'it names none'}"
        )
    # (token, layer, key or value, head, dim) -> (layer, key or value, head, token, dim)
    states = rows.view(length, len(found), 2, first.kv_heads, first.key_dim).permute(1, 2, 3, 0, 4)
    by_site = {
        s.name: (keys.contiguous(), values.contiguous()) for s, (keys, values) in zip(found, states, strict=True)
    }
    prefix = Prefix.from_tensors(model, by_site, position_offset=length)
    source = {"format": "peft", "base_model": config.get("base_model_name_or_path")}
    prefix = replace(prefix, metadata={**prefix.metadata, "from": source}, **head)
    movable = all(s.name in prefix.rotations for s in found)
    return prefix.shift(-length) if movable and not keep_positions else prefix


def base_of(folder: str | Path) -> str | None:
    """The name that PEFT's base model was loaded by, where the adapter says it.

    Raises:
        PrefixFileError: there is no adapter, or one of another method.
    """
    return _config(located(folder, (CONFIG, WEIGHTS))).get("base_model_name_or_path") or None


def write_peft(prefix: Prefix, model: PreTrainedModel, folder: str | Path) -> Path:
    """Write a prefix as an adapter that ``peft.PeftModel.from_pretrained`` loads.

    Args:
        model: its base model: PEFT wants a row for each of its layers.

    Raises:
        MismatchError: PEFT has no such prefixes, or it is another model's; the message says what differs.
    """
    length = check_cacheable(prefix, "PEFT", _INSTEAD)
    check_all_layers(prefix, model, "PEFT")
    moved = for_cache(prefix, length)
    ordered = sorted(moved.sites, key=lambda s: layer_number(s.name))
    first = _uniform(ordered, None)
    # (layer, key or value, head, token, dim) -> (token, layer, key or value, head, dim)
    states = torch.stack([torch.stack((moved.keys[s.name], moved.values[s.name])) for s in ordered])
    rows = states.permute(3, 0, 1, 2, 4).reshape(length, -1).contiguous()
    width = first.kv_heads * first.key_dim
    config: dict[str, Any] = {
        "base_model_name_or_path": prefix.fingerprint.base_model, "encoder_hidden_size": width, "inference_mode": True,
        "num_attention_heads": first.kv_heads, "num_layers": len(ordered), "num_transformer_submodules": 1,
        "num_virtual_tokens": length, "peft_type": "PREFIX_TUNING", "prefix_projection": False, "revision": None,
        "task_type": "CAUSAL_LM", "token_dim": width,
    }  # fmt: skip
    folder = Path(folder)
    write_whole(folder / WEIGHTS, as_safetensors({EMBEDDINGS: rows}, {"format": "pt"}))
    write_whole(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return folder


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise PrefixFileError(f"{folder} holds no {CONFIG}; give the folder that PEFT's save_pretrained wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, TypeError, KeyError) as exc:
        raise PrefixFileError(f"{path} is not PEFT's: {exc!r}") from exc
    if kind != "PREFIX_TUNING":
        raise PrefixFileError(f"{folder} holds an adapter of type {kind}; foreword reads PREFIX_TUNING")
    if config.get("task_type") == "SEQ_2_SEQ_LM":
        raise PrefixFileError(
            f"{folder} is for an encoder-decoder model, where PEFT lays prefixes out otherwise; decoders only are read"
        )
    return dict(config)


def _head(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Any]:
    """What was trained beside the virtual tokens (``modules_to_save``), as a prefix keeps a head; empty: nothing.

    Raises:
        PrefixFileError: it is not the head of a task, or it is missing.
        MismatchError: it is not the model's.
    """
    kept = ", ".join(sorted(tensors)) or ", ".join(config.get("modules_to_save") or ())
    task = config.get("task_type")
    if not kept:
        return {}
    if not tensors:
        raise PrefixFileError(f"{folder} says that it holds trained modules ({kept}), and its {WEIGHTS} has none")
    if task not in _HEADS:
        raise PrefixFileError(
            f"{folder} holds more than virtual tokens: {kept}. Of what PEFT trains beside them, foreword reads the "
            f"heads of {', '.join(_HEADS)}, and this adapter is of task type {task}"
        )
    try:
        part = head_parameters(model, _HEADS[task])
    except ConfigError as exc:
        raise MismatchError(f"{folder} holds a trained head ({kept}) of task type {task}: {exc}") from exc
    named = {n.removeprefix("base_model."): t for n, t in tensors.items()}
    there = part.tensors()  # what PEFT did not train is as the model has it
    odd = next((n for n, t in named.items() if n not in there or there[n].shape != t.shape), None)
    if odd is not None:
        here = f"it of shape {tuple(there[odd].shape)}" if odd in there else f"one of {', '.join(there)}"
        raise MismatchError(
            f"{folder} holds a trained head with {odd} of shape {tuple(named[odd].shape)}, and {type(model).__name__} "
            f"has {here}; load the model as the adapter was trained (num_labels)"
        )
    record = {"method": "head", "kind": _HEADS[task]}
    return {"parts": (record,), "weights": {f"head/{n}": t for n, t in {**there, **named}.items()}}


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLE).is_file():
            raise PrefixFileError(
                f"{folder} holds {PICKLE}, a pickle, which runs code when it is read; load it with PEFT where you "
                "trust it and save it again with safe_serialization=True"
            )
        raise PrefixFileError(f"{folder} holds no {WEIGHTS}; give the folder that PEFT's save_pretrained wrote")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as exc:
        raise PrefixFileError(f"{path} can't be read: {exc}") from exc


def _embeddings(folder: Path, config: dict[str, Any], rows: Tensor | None, others: dict[str, Tensor]) -> Tensor:
    """``(P, numbers a virtual token)``, checked."""
    path = folder / WEIGHTS
    if rows is None or rows.ndim != 2 or not rows.is_floating_point():
        raise PrefixFileError(f"{path} holds no matrix {EMBEDDINGS!r}; it has {', '.join(sorted(others)) or 'nothing'}")
    if rows.shape[0] != config.get("num_virtual_tokens"):
        raise PrefixFileError(
            f"{path} has {rows.shape[0]} virtual tokens and {CONFIG} says {config.get('num_virtual_tokens')}"
        )
    if not torch.isfinite(rows).all():
        raise PrefixFileError(f"{path} holds numbers that aren't finite")
    return rows


def _uniform(found: list[Site], model: PreTrainedModel | None) -> Site:
    """One of the sites, all of which have its shape."""
    shapes = {(s.kv_heads, s.key_dim, s.value_dim) for s in found}
    if len(shapes) != 1 or (model is not None and model.config.is_encoder_decoder):
        of = type(model).__name__ if model is not None else "the prefix"
        raise MismatchError(
            f"{of} has layers of different heads, or is no decoder; PEFT has one row for all layers of a decoder"
        )
    site = found[0]
    if site.key_dim != site.value_dim:
        raise MismatchError(
            f"{site.name} has keys of {site.key_dim} and values of {site.value_dim} dimensions; PEFT has one width"
        )
    return site
