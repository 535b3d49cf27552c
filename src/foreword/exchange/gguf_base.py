"""What a GGUF file says of its model, and how it has laid out the keys: proved on the weights themselves.

llama.cpp rotates the dimensions of a head in pairs. For some families it takes the pairs (2i, 2i+1) where transformers
takes (i, i + D/2), and the converter has permuted their query and key weights accordingly. We keep no list of such
families: the file's own key weights say whether they stand as in the model or permuted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foreword.cacheable import layer_number
from foreword.errors import ConfigError, MismatchError, MissingPartError
from foreword.prefix import Prefix
from foreword.sites import Site

_NEAR = 0.5  # of a weight's norm: 2-bit quantisation is off by about 0.3, another matrix by 1.4


@dataclass(frozen=True, slots=True)
class GgufBase:
    """Of a base model that llama.cpp runs.

    Attributes:
        path: the file.
        architecture: by llama.cpp's name.
        layers: attention layers.
        vocabulary: token ids that there are.
        paired: keys have the dimensions that rotate together side by side.
    """

    path: Path
    architecture: str
    layers: int
    vocabulary: int
    paired: bool

    def arranged(self, keys: Tensor) -> Tensor:
        """Keys ``(..., key_dim)`` of transformers in the file's order of dimensions."""
        return paired(keys) if self.paired else keys


def paired(keys: Tensor) -> Tensor:
    """Dimension ``i`` and ``i + D/2`` of ``(..., D)`` to ``2i`` and ``2i + 1``."""
    return keys.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def read_gguf(path: Path, model: PreTrainedModel, prefix: Prefix) -> GgufBase:
    """Read what an export needs, and make sure that the file holds the prefix's base model.

    Args:
        model: the same base in transformers.

    Raises:
        ConfigError: it is no GGUF file.
        MismatchError: it is of another model, or of one whose cache can't take a prefix; the message says why.
        MissingPartError: the package that reads it is not installed.
    """
    reader = open_gguf(path)
    fields = reader.fields
    architecture = str(fields["general.architecture"].contents())
    layers = int(fields[f"{architecture}.block_count"].contents())
    window = fields.get(f"{architecture}.attention.sliding_window")
    if window is not None and window.contents():
        raise MismatchError(
            f"{path} has a sliding window of {window.contents()} tokens: llama.cpp would let it slide past the prefix, "
            "and its saved states have another form. Serve it with `foreword serve`"
        )
    if len(prefix.sites) != layers:
        raise MismatchError(
            f"the prefix has keys for {len(prefix.sites)} layers and {path} has {layers}; llama.cpp's cache has one "
            "length for all of them. Train a prefix for all layers (sites=None)"
        )
    tokens = fields.get("tokenizer.ggml.tokens")
    vocabulary = len(tokens.data) if tokens is not None else int(fields[f"{architecture}.vocab_size"].contents())
    first = min(prefix.sites, key=lambda s: layer_number(s.name))
    is_paired = _paired(path, _key_weight(reader, path, first), model, first)
    rotation = prefix.rotations.get(first.name)
    if is_paired and (rotation is None or 2 * len(rotation.inv_freq) != first.key_dim or rotation.layout != "half"):
        raise MismatchError(f"{path} has its keys permuted, which was not expected of a model that rotates them so")
    return GgufBase(path, architecture, layers, vocabulary, is_paired)


def open_gguf(path: Path) -> Any:
    """gguf's reader of a file.

    Raises:
        ConfigError: there is none, or it is of another kind.
        MissingPartError: the package that reads it is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as exc:
        raise MissingPartError("reading GGUF files needs the package gguf: pip install 'foreword[export]'") from exc
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; --gguf names the base model that llama.cpp runs")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError) as exc:
        raise ConfigError(
            f"{path} can't be read as a GGUF file ({exc}); --gguf names the model that llama.cpp runs"
        ) from exc


def _key_weight(reader: Any, path: Path, site: Site) -> Tensor:
    """``(kv_heads * key_dim, hidden)`` of a site's layer."""
    from gguf.quants import dequantize

    found = {t.name: t for t in reader.tensors}
    rows, layer = site.kv_heads * site.key_dim, layer_number(site.name)
    for name, start in ((f"blk.{layer}.attn_k.weight", 0), (f"blk.{layer}.attn_qkv.weight", site.heads * site.key_dim)):
        if name in found:
            weight = torch.from_numpy(dequantize(found[name].data, found[name].tensor_type).copy())
            if weight.shape[0] < start + rows:
                break
            return weight[start : start + rows].float()
    raise MismatchError(
        f"{path} has no keys of {site.kv_heads} heads of {site.key_dim} dimensions in layer {layer}, as the prefix "
        "has; give the file of its base model"
    )


def _paired(path: Path, weight: Tensor, model: PreTrainedModel, site: Site) -> bool:
    """Whether a file's key weights are the model's with paired dimensions, rather than as they are."""
    heads = weight.unflatten(0, (site.kv_heads, site.key_dim))
    off = {False: 2.0, True: 2.0}
    for own in _candidates(model, site, weight):
        own = own.to("cpu", torch.float32).unflatten(0, (site.kv_heads, site.key_dim))
        for key, there in ((False, own), (True, paired(own.transpose(-1, -2)).transpose(-1, -2))):
            off[key] = min(off[key], float((heads - there).norm() / there.norm().clamp_min(1e-12)))
    best = min(off.values())
    if best > _NEAR:
        raise MismatchError(
            f"{path} is not of this base model: the keys' weights of layer {layer_number(site.name)} differ by "
            f"{best:.2f} of their norm, in whatever order; give the GGUF file of {model.config._name_or_path or 'it'}"
        )
    return off[True] < off[False]


def _candidates(model: PreTrainedModel, site: Site, weight: Tensor) -> Iterator[Tensor]:
    """What may be a site's key weights: a matrix of their shape, or that part of [queries; keys; values]."""
    rows, columns = weight.shape
    for parameter in model.get_submodule(site.name).parameters():
        if parameter.ndim != 2:
            continue
        for matrix in (parameter.detach(), parameter.detach().T):
            if matrix.shape[1] == columns:
                for start in {0, site.heads * site.key_dim}:
                    if matrix.shape[0] >= start + rows:
                        yield matrix[start : start + rows]
