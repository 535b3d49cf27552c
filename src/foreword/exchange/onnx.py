"""A base model for ONNX Runtime, and prefixes as its first keys and values.

The model is exported once, with its cache as inputs and outputs under the names that ONNX decoders usually have
(``past_key_values.0.key`` … in, ``present.0.key`` … out). A prefix is what stands in that cache before the first token:
many prefixes, one file of the model. Batch, text and cache may have any length; an empty cache is the base model.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from foreword._begun import write_whole
from foreword.cacheable import check_cacheable, for_cache, layer_number
from foreword.errors import AttachError, ConfigError, MismatchError, MissingPartError, PrefixFileError
from foreword.fingerprint import Fingerprint
from foreword.prefix import Prefix
from foreword.sites import evaluating, sites

if TYPE_CHECKING:
    from numpy.typing import NDArray

MODEL, DATA, ABOUT = "model.onnx", "model.onnx.data", "model.json"
_OPSET = 20
_INSTEAD = "Serve it with `foreword serve`"


def export_base(model: PreTrainedModel, folder: str | Path) -> Path:
    """Write a decoder as ``model.onnx`` (weights beside it), once; a folder that has it already is left as it is.

    Takes half a minute and more, by the number of layers.

    Raises:
        ConfigError: the folder holds another model.
        AttachError: something is attached to the model, which would be exported with it.
        MismatchError: it is no decoder whose layers all have keys and values of one width.
        MissingPartError: onnx or onnxscript is not installed.
    """
    folder = Path(folder)
    mine = Fingerprint.of(model)
    if (folder / ABOUT).exists() and (folder / MODEL).exists():
        _check_same(folder, model)
        return folder / MODEL
    if hasattr(model, "foreword"):
        raise AttachError("something is attached to the model and would be exported with it; detach() it first")
    found = [s for s in sites(model) if s.kind == "self" and not s.tower]
    if model.config.is_encoder_decoder or not found or any(s.key_dim != s.value_dim for s in found):
        raise MismatchError(
            f"{type(model).__name__} can't be exported: it is no decoder with keys and values of one width"
        )
    folder.mkdir(parents=True, exist_ok=True)
    heads = [(s.kv_heads, s.key_dim) for s in sorted(found, key=lambda s: layer_number(s.name))]
    staging = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        _export(model, heads, staging / MODEL)
        for name in (DATA, MODEL):
            if (staging / name).exists():
                (staging / name).replace(folder / name)
        about = {"layers": len(heads), "heads": heads, "fingerprint": mine.to_json()}
        write_whole(folder / ABOUT, json.dumps(about, indent=1) + "\n")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder / MODEL


def check_exportable(prefix: Prefix) -> int:
    """The length of a prefix that a cache can hold.

    Raises:
        MismatchError: it is of another kind; the message says what it has more.
    """
    return check_cacheable(prefix, "ONNX Runtime", _INSTEAD)


def write_past(prefix: Prefix, path: str | Path) -> Path:
    """Write a prefix as what is in the cache first: ``past_key_values.{layer}.key``, ``.value``, ``(1, heads, P, D)``.

    Text starts at position P. The length stands in the file's metadata.

    Raises:
        MismatchError: a cache can't hold such a prefix; the message says what it has more.
    """
    length = check_exportable(prefix)
    moved = for_cache(prefix, length)
    tensors = {}
    for i, name in enumerate(sorted(moved.keys, key=layer_number)):
        tensors[f"past_key_values.{i}.key"] = moved.keys[name][None].contiguous()
        tensors[f"past_key_values.{i}.value"] = moved.values[name][None].contiguous()
    path = Path(path)
    write_whole(path, as_safetensors(tensors, {"format": "foreword onnx past", "length": str(length)}))
    return path


@dataclass
class OnnxModel:
    """Greedy writing with ONNX Runtime, as an example of how the parts are used, and for tests.

    Attributes:
        session: an ``onnxruntime.InferenceSession``.
        heads: ``(kv_heads, key_dim)`` by layer.
    """

    session: Any
    heads: Sequence[tuple[int, int]]

    @classmethod
    def load(cls, folder: str | Path) -> OnnxModel:
        """What :func:`export_base` wrote.

        Raises:
            ConfigError: the folder holds no exported model.
            MissingPartError: onnxruntime is not installed.
        """
        try:
            import onnxruntime
        except ImportError as exc:
            raise MissingPartError("running ONNX files needs onnxruntime: pip install 'foreword[export]'") from exc
        folder = Path(folder)
        if not (folder / ABOUT).exists():
            raise ConfigError(f"{folder} holds no exported model; write one with foreword export --to onnx")
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return cls(onnxruntime.InferenceSession(folder / MODEL), [tuple(h) for h in about["heads"]])

    def past(self, prefix: str | Path | None, batch: int) -> dict[str, NDArray[Any]]:
        """The cache before the first token, a copy of the prefix for each row; None: an empty one.

        Raises:
            PrefixFileError: the file can't be read, or holds numbers that aren't finite.
            MismatchError: it is of another model.
        """
        if prefix is None:
            return {
                f"past_key_values.{i}.{part}": np.zeros((batch, heads, 0, dim), np.float32)
                for i, (heads, dim) in enumerate(self.heads) for part in ("key", "value")
            }  # fmt: skip
        return {n: t.numpy().repeat(batch, axis=0) for n, t in _read_past(Path(prefix), self.heads).items()}

    def logits(
        self, ids: NDArray[Any], past: Mapping[str, NDArray[Any]]
    ) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        """``(B, S, vocabulary)`` for ids ``(B, S)`` that stand after the cache, and the cache with them."""
        before = past["past_key_values.0.key"].shape[2]
        batch, length = ids.shape
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, before + length), np.int64),
            "position_ids": np.arange(before, before + length)[None].repeat(batch, axis=0),
        }
        names = [output.name for output in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(names, {**inputs, **past}), strict=True))
        return found["logits"], {name: found[name.replace("past_key_values", "present")] for name in past}

    def generate(self, ids: NDArray[Any], max_new_tokens: int, prefix: str | Path | None = None) -> NDArray[Any]:
        """What is written after ids ``(B, S)``, ``(B, max_new_tokens)``: always the likeliest token."""
        past, written = self.past(prefix, len(ids)), []
        for _ in range(max_new_tokens):
            logits, past = self.logits(ids, past)
            ids = logits[:, -1:].argmax(-1)
            written.append(ids)
        return np.concatenate(written, axis=1)


class _WithCache(nn.Module):
    """A model whose cache is its arguments and results: what a graph can have."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        for i in range(0, len(past), 2):
            cache.update(past[i], past[i + 1], i // 2)
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        layers: Any = out.past_key_values.layers
        return out.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))


def _export(model: PreTrainedModel, heads: Sequence[tuple[int, int]], path: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as exc:
        raise MissingPartError("exporting to ONNX needs onnx and onnxscript: pip install 'foreword[export]'") from exc
    batch, length, before = 2, 4, 3  # an example; the dimensions are dynamic
    past = [torch.zeros(batch, h, before, d, dtype=model.dtype) for h, d in heads for _ in range(2)]
    text = (
        torch.zeros(batch, length, dtype=torch.long),
        torch.ones(batch, before + length, dtype=torch.long),
        torch.arange(before, before + length).repeat(batch, 1),
    )
    free = torch.export.Dim.DYNAMIC
    names = [f"{i}.{part}" for i in range(len(heads)) for part in ("key", "value")]
    with evaluating(model), _quiet():
        program = torch.onnx.export(
            _WithCache(model), (*text, *past), dynamo=True, opset_version=_OPSET, verbose=False,
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}" for n in names)],
            output_names=["logits", *(f"present.{n}" for n in names)],
            dynamic_shapes=(*({0: free, 1: free} for _ in text), tuple({0: free, 2: free} for _ in past)),
        )  # fmt: skip
    assert program is not None
    program.save(path, external_data=True)


def _read_past(path: Path, heads: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as exc:
        raise PrefixFileError(f"{path} can't be read: {exc}") from exc
    length = max((t.shape[2] for t in tensors.values() if t.dim() == 4), default=0)
    wanted = {
        f"past_key_values.{i}.{part}": (1, h, length, d) for i, (h, d) in enumerate(heads) for part in ("key", "value")
    }
    if {name: tuple(t.shape) for name, t in tensors.items()} != wanted:
        raise MismatchError(
            f"{path} is no prefix for this model of {len(heads)} layers; write it with foreword export --to onnx into "
            "the folder of this model"
        )
    if not all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in tensors.values()):
        raise PrefixFileError(f"{path} holds numbers that aren't finite, or not in 32 bits; export the prefix again")
    return tensors


def _check_same(folder: Path, model: PreTrainedModel) -> None:
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["fingerprint"]
    there = Fingerprint(about["base_model"], about["model_class"], about["weights"], about["layer_types"])
    if difference := there.difference(Fingerprint.of(model, there.weights)):
        raise ConfigError(f"{folder} holds another model ({there.base_model}): {difference}; give another --out")


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports at length on what is none of the user's business (torchvision is not there, …)."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
