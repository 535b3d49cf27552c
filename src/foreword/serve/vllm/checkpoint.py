"""A base model's checkpoint, of which a few numbers are read: enough to tell whether a prefix was made on it.

vLLM keeps weights in its own form, so they are compared in the files. A parameter that the files name otherwise, or
hold quantised, says nothing; norms and embeddings are there as a rule.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from foreword.fingerprint import Fingerprint


class Checkpoint:
    """The safetensors files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.glob("*.safetensors"))
        self._where: dict[str, Path] | None = None

    @classmethod
    def of(cls, model: str, revision: str | None = None) -> Checkpoint | None:
        """Of a folder, or of a model of the hub that was downloaded already; None where there is none to read."""
        if Path(model).is_dir():
            return cls(Path(model))
        try:
            from huggingface_hub import snapshot_download

            return cls(Path(snapshot_download(model, revision=revision, local_files_only=True)))
        except Exception:  # no such folder, another kind of address: not what this is here to report
            return None

    def difference(self, fingerprint: Fingerprint) -> str | None:
        """What differs between the weights that a prefix remembers and these, in words; None where nothing does."""
        mine = {name: numbers for name in fingerprint.weights if (numbers := self._numbers(name)) is not None}
        return fingerprint.difference(Fingerprint("", "", mine))

    def _numbers(self, name: str) -> list[float] | None:
        """The first eight of a parameter."""
        path = self._index().get(name)
        if path is None:
            return None
        with safe_open(path, framework="pt") as file:
            part = file.get_slice(name)
            shape = part.get_shape()
            row = max(prod(shape[1:]), 1)
            found = part[: -(-8 // row)] if shape else None
        if found is None or not found.is_floating_point():
            return None
        return [float(x) for x in found.flatten()[:8].float()]

    def _index(self) -> dict[str, Path]:
        if self._where is None:
            self._where = {}
            for path in self._files:
                try:
                    with safe_open(path, framework="pt") as file:
                        self._where |= dict.fromkeys(file.keys(), path)
                except (SafetensorError, OSError):
                    continue
        return self._where
