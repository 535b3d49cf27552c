"""A prefix as a saved state of llama.cpp: what its cache would hold had it read as many tokens.

llama.cpp's own programs restore it: ``llama-server`` with ``POST /slots/0?action=restore`` (a *slot* file), its
library with ``llama_state_load_file`` (a *session* file). Nothing in llama.cpp is changed. Numbers are little-endian
and packed::

    slot     u32 'ggsq'  u32 version  u32 P  P x i32 token                                   cache
    session  u32 'ggsn'  u32 version  u32 P  P x i32 token   u32 n  architecture, n bytes    cache

    cache    u32 streams, 1
             u32 P   P x (i32 position  u32 1  i32 sequence 0)
             u32 values are transposed   u32 layers   [since slot 4, session 11:  u32 0  u32 0]
             layers x (i32 type  u64 bytes of a row   P rows of keys, (kv_heads, key_dim))
             layers x the same of values; transposed: (i32 type  u32 bytes of a number  u32 rows   rows of P)

The tokens in the head are placeholders: a prompt that begins with them is taken to have been read already. They are
drawn from the prefix's own numbers, so that two prefixes have different ones.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from foreword._begun import write_whole
from foreword.cacheable import check_all_layers, check_cacheable, for_cache, layer_number
from foreword.errors import ConfigError, MismatchError
from foreword.exchange.gguf_base import GgufBase, open_gguf, read_gguf
from foreword.prefix import Prefix

Kind = Literal["slot", "session"]
Numbers = Literal["f16", "f32"]

_MAGIC: dict[Kind, int] = {"slot": 0x67677371, "session": 0x6767736E}
_VERSIONS: dict[Kind, tuple[int, int]] = {"slot": (3, 4), "session": (10, 11)}
_DTYPES: dict[Numbers, tuple[int, torch.dtype]] = {"f32": (0, torch.float32), "f16": (1, torch.float16)}
_INSTEAD = "Serve it with `foreword serve`"


@dataclass(frozen=True, slots=True)
class Form:
    """What the llama.cpp that restores it was started with; a state in another form is refused there.

    Attributes:
        kind: what reads it: ``llama-server``'s slots, or ``llama_state_load_file``.
        cache: numbers in its cache (``--cache-type-k`` and ``-v``): ``"f16"`` is llama.cpp's default.
        flash_attention: whether it computes attention so (``-fa``); without, its cache has the values transposed.
        old: the format before the rotations of keys were written down (slot 3, session 10), for older builds.
    """

    kind: Kind = "slot"
    cache: Numbers = "f16"
    flash_attention: bool = True
    old: bool = False

    def __post_init__(self) -> None:
        for name, kinds in (("kind", Kind), ("cache", Numbers)):
            if getattr(self, name) not in get_args(kinds):
                raise ConfigError(f"{name}={getattr(self, name)!r}; expected one of {', '.join(get_args(kinds))}")

    @property
    def version(self) -> int:
        """The format's number."""
        return _VERSIONS[self.kind][0 if self.old else 1]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        path: the state; beside it stands a JSON file of this name and ``.json`` with what is here.
        tokens: the placeholders that a prompt has to begin with.
    """

    path: Path
    tokens: tuple[int, ...]
    base: GgufBase
    form: Form
    bytes: int

    @property
    def length(self) -> int:
        """Virtual tokens."""
        return len(self.tokens)


def export_llama_cpp(
    prefix: Prefix, model: PreTrainedModel, gguf: str | Path, out: str | Path, form: Form | None = None
) -> Exported:
    """Write a prefix as a state of llama.cpp.

    Args:
        model: the base model, which says how the GGUF file has laid out its keys.
        gguf: the base model as llama.cpp runs it, in any quantisation.
        out: the file; a JSON file is written beside it.

    Raises:
        ConfigError: ``gguf`` is no GGUF file.
        MismatchError: the prefix is of a kind that llama.cpp's cache can't hold, or one of the three is of another
            model.
    """
    form, out = form or Form(), Path(out)
    check_exportable(prefix, Path(gguf))
    check_all_layers(prefix, model, "llama.cpp")
    base = read_gguf(Path(gguf), model, prefix)
    tokens = placeholders(prefix, base.vocabulary)
    state = state_of(prefix, base, tokens, form)
    done = Exported(out, tokens, base, form, len(state))
    write_whole(out.with_name(out.name + ".json"), json.dumps(_record(done, prefix), indent=1) + "\n")
    write_whole(out, state)
    return done


def check_exportable(prefix: Prefix, gguf: Path) -> None:
    """What can be said without the model.

    Raises:
        ConfigError: ``gguf`` is no GGUF file.
        MismatchError: the prefix is of a kind that llama.cpp's cache can't hold.
    """
    check_cacheable(prefix, "llama.cpp", _INSTEAD)
    open_gguf(gguf)


def placeholders(prefix: Prefix, vocabulary: int) -> tuple[int, ...]:
    """Token ids to stand for a prefix: the same for the same numbers, others for others."""
    digest = hashlib.sha256()
    for name in sorted(prefix.keys):
        for part in (prefix.keys[name], prefix.values[name]):
            digest.update(name.encode() + part.detach().to("cpu", torch.float32).numpy().tobytes())
    draw = np.random.Generator(np.random.PCG64(int.from_bytes(digest.digest()[:16], "little")))
    return tuple(int(t) for t in draw.integers(0, vocabulary, prefix.longest))


def state_of(prefix: Prefix, base: GgufBase, tokens: tuple[int, ...], form: Form) -> bytes:
    """The bytes of a state file.

    Raises:
        MismatchError: a number is too large for the cache's 16 bits.
    """
    length = len(tokens)
    moved = for_cache(prefix, length)
    names = sorted(moved.keys, key=layer_number)
    head = struct.pack("<III", _MAGIC[form.kind], form.version, length) + struct.pack(f"<{length}i", *tokens)
    if form.kind == "session":
        name = base.architecture.encode()
        head += struct.pack("<I", len(name)) + name
    cells = b"".join(struct.pack("<iIi", position, 1, 0) for position in range(length))
    facts = struct.pack("<II", int(not form.flash_attention), len(names))
    if not form.old:
        facts += struct.pack("<II", 0, 0)
    keys = [_rows(n, base.arranged(moved.keys[n]), form) for n in names]
    values = [(_rows if form.flash_attention else _columns)(n, moved.values[n], form) for n in names]
    return b"".join((head, struct.pack("<II", 1, length), cells, facts, *keys, *values))


def _rows(name: str, tensor: Tensor, form: Form) -> bytes:
    """A layer's ``(kv_heads, P, D)``, token after token."""
    kind, data = _numbers(name, tensor.transpose(0, 1).flatten(1), form)  # (P, kv_heads * D)
    return struct.pack("<iQ", kind, data.shape[1] * data.element_size()) + _raw(data)


def _columns(name: str, tensor: Tensor, form: Form) -> bytes:
    """The same, dimension after dimension."""
    kind, data = _numbers(name, tensor.transpose(1, 2).flatten(0, 1), form)  # (kv_heads * D, P)
    return struct.pack("<iII", kind, data.element_size(), data.shape[0]) + _raw(data)


def _numbers(name: str, data: Tensor, form: Form) -> tuple[int, Tensor]:
    kind, dtype = _DTYPES[form.cache]
    if (largest := float(data.abs().max())) > torch.finfo(dtype).max:
        raise MismatchError(
            f"{name} holds {largest:.4g}, which is beyond 16 bits; export with cache f32 and start llama.cpp with "
            "--cache-type-k f32 --cache-type-v f32"
        )
    return kind, data.to("cpu", dtype).contiguous()


def _raw(data: Tensor) -> bytes:
    array = data.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _record(done: Exported, prefix: Prefix) -> dict[str, Any]:
    return {
        "format": "llama.cpp state",
        "kind": done.form.kind,
        "version": done.form.version,
        "cache": done.form.cache,
        "flash_attention": done.form.flash_attention,
        "length": done.length,
        "tokens": list(done.tokens),
        "architecture": done.base.architecture,
        "gguf": done.base.path.name,
        "base": prefix.fingerprint.to_json(),
    }
