"""The file format of a prefix: a folder of safetensors, JSON and a model card. Loading it never runs code.

``prefix.safetensors`` holds ``<site>.keys``, ``<site>.values``, ``<site>.bias``, ``<site>.gate``, ``<site>.reading``,
``<site>.log_weight``, ``<site>.memory``, ``<site>.memory_up``, ``weights/<method>/<name>`` and ``rotary.<i>.inv_freq``;
``foreword.json`` describes them. Keys and values may be packed instead (``foreword.storage``): then it holds
``packed.keys.codes`` and the like. Both files are checked against each other on loading.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialized
from safetensors.torch import save as serialized
from safetensors.torch import save_file
from torch import Tensor

from foreword import _packing
from foreword.errors import ForewordError, PrefixFileError
from foreword.fingerprint import Fingerprint
from foreword.memory import Recall
from foreword.positions import Rotation, group_rotations
from foreword.sites import Site
from foreword.storage import Storage
from foreword.visibility import parse

if TYPE_CHECKING:
    from foreword.prefix import Prefix

FORMAT, PACKED_FORMAT = 1, 2  # what versions that know no packing and no weights of tokens can't read has the second
WEIGHTS, DESCRIPTION, CARD = "prefix.safetensors", "foreword.json", "README.md"
_WEIGHT = "weights/"


def save(prefix: Prefix, folder: Path, *, overwrite: bool) -> Path:
    """Write a prefix folder under a temporary name, then rename it into place.

    Other files that stand in the folder (a report, a trainer's state) stay.
    """
    existing = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if folder.exists() and not folder.is_dir():
        raise PrefixFileError(f"{folder} is a file; a prefix is saved as a folder: choose another name")
    if DESCRIPTION in existing and not overwrite:
        raise PrefixFileError(f"{folder} already holds a prefix; pass overwrite=True or choose another name")
    if CARD in existing and DESCRIPTION not in existing:
        raise PrefixFileError(f"{folder} holds a {CARD} but no prefix; save into an empty folder")
    tensors, description = _describe(prefix)
    embedded = _embedded(description)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            save_file(tensors, staging / WEIGHTS, metadata=embedded)
            (staging / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
            (staging / CARD).write_text(model_card(prefix, folder.name), encoding="utf-8")
            move(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as exc:
        raise PrefixFileError(f"can't save a prefix to {folder}: {exc}") from exc
    return folder


def stored_nbytes(prefix: Prefix) -> int:
    """The size of the ``prefix.safetensors`` that :func:`save` would write, its head and description included."""
    tensors, description = _describe(prefix)
    return len(serialized(tensors, metadata=_embedded(description)))


def _embedded(description: dict[str, Any]) -> dict[str, str]:
    """The metadata of the tensors' file, the description among it."""
    try:
        return {"format": "pt", "foreword": json.dumps(description, separators=(",", ":"))}
    except (TypeError, ValueError) as exc:
        raise PrefixFileError(f"the prefix's metadata has something that JSON can't hold: {exc}") from exc


def move(staging: Path, folder: Path) -> None:
    """Put a prefix's staged files into place: in one rename where the folder is new, else file by file.

    The weights go first and carry their own description, so a save that is cut short loses nothing.
    """
    staging.chmod(0o755)
    if not folder.exists():
        staging.rename(folder)
        return
    for name in (WEIGHTS, DESCRIPTION, CARD):
        if (staging / name).exists():
            (staging / name).replace(folder / name)


def _describe(prefix: Prefix) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    tensors |= _packing.pack(prefix.keys, "keys", prefix.storage.keys)
    tensors |= _packing.pack(prefix.values, "values", prefix.storage.values)
    for kind, group in (
        ("bias", prefix.bias), ("gate", prefix.gates), ("reading", prefix.readings), ("log_weight", prefix.log_weights),
        ("memory", prefix.memory), ("memory_up", prefix.memory_up),
    ):  # fmt: skip
        for name, tensor in group.items():
            tensors[f"{name}.{kind}"] = tensor.detach().cpu().contiguous().clone()
    for name, tensor in prefix.weights.items():
        tensors[_WEIGHT + name] = tensor.detach().cpu().contiguous().clone()
    groups, index = group_rotations(prefix.rotations)
    for i, rotation in enumerate(groups):
        tensors[f"rotary.{i}.inv_freq"] = rotation.inv_freq.detach().cpu().to(torch.float64).clone()
    newer = not prefix.storage.plain or bool(prefix.log_weights)
    description = {
        "format": PACKED_FORMAT if newer else FORMAT,
        "fingerprint": prefix.fingerprint.to_json(),
        "position_offset": prefix.position_offset,
        "sites": [
            {**s.to_json(), "length": prefix.length(s.name), "rotation": index.get(s.name)} for s in prefix.sites
        ],
        "rotations": [{"layout": r.layout, "start": r.start} for r in groups],
        "visible": prefix.visible.to_json(),
        "recall": asdict(prefix.recall),
        "parts": [dict(p) for p in prefix.parts],
        **({"storage": prefix.storage.to_json()} if not prefix.storage.plain else {}),
        "checksum": _checksum(tensors),
        "metadata": dict(prefix.metadata),
    }
    return tensors, description


def checksum(prefix: Prefix) -> str:
    """Of all numbers in it, by name."""
    return str(_describe(prefix)[1]["checksum"])


def load(folder: Path) -> Prefix:
    """Read and check a prefix folder."""
    return read(folder)[0]


def read(folder: Path) -> tuple[Prefix, str]:
    """A prefix that was read and checked, and a digest of all that it does (what it remembers doesn't count)."""
    description = _read_description(folder)
    tensors, embedded = _read_tensors(folder)
    checksum = _checksum(tensors)
    if description.get("checksum") != checksum:
        # A save was cut short between the two files; the weights carry their own description.
        description = _parse(embedded, folder / WEIGHTS) if embedded else description
    if (told := description.get("checksum")) != checksum:
        raise PrefixFileError(
            f"{folder}: {WEIGHTS} is not the file that {DESCRIPTION} was written with (checksum {checksum}, expected "
            f"{told}); it was changed or damaged, save the prefix again"
        )
    _check_finite(tensors, folder)
    try:
        prefix = _build(description, _unpacked(description, tensors))
    except KeyError as exc:
        raise PrefixFileError(f"{folder}: {exc} is missing; the folder is incomplete, save the prefix again") from exc
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError, ForewordError) as exc:
        raise PrefixFileError(f"{folder}: {DESCRIPTION} and {WEIGHTS} don't fit together: {exc}") from exc
    _check_finite({f"{n}.{k}": t for k in ("keys", "values") for n, t in getattr(prefix, k).items()}, folder)
    for entry in description["sites"]:
        if prefix.length(entry["name"]) != entry["length"]:
            raise PrefixFileError(
                f"{folder}: {entry['name']} has {prefix.length(entry['name'])} tokens but {DESCRIPTION} says "
                f"{entry['length']}"
            )
    return prefix, _digest(description)


def _digest(description: dict[str, Any]) -> str:
    """Of the tensors, by their checksum, and of how they are used."""
    import hashlib

    used = {key: value for key, value in description.items() if key not in ("metadata", "fingerprint")}
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:32]


def _check_finite(tensors: dict[str, Tensor], folder: Path) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise PrefixFileError(
                f"{folder}: {name} has numbers that are not finite; train again from an earlier state"
            )


def _unpacked(description: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors, with the keys and values as a prefix has them."""
    storage = Storage.from_json(description.get("storage"))
    if storage.plain:
        return tensors
    found, entries = dict(tensors), description["sites"]
    for kind, packing, dim in (("keys", storage.keys, "key_dim"), ("values", storage.values, "value_dim")):
        shapes = {e["name"]: (e["kv_heads"], e["length"], e[dim]) for e in entries}
        for name, shape in shapes.items():
            if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape):
                raise ValueError(f"{name} has the shape {shape}; expected whole numbers of 0 or more")
        found |= _packing.unpack(found, kind, packing, shapes)
    return found


def _build(description: dict[str, Any], tensors: dict[str, Tensor]) -> Prefix:
    from foreword.prefix import Prefix

    known = {f.name for f in fields(Site)}
    sites = [Site(**{k: v for k, v in entry.items() if k in known}) for entry in description["sites"]]
    at_sites = {n: t for n, t in tensors.items() if not n.startswith(_WEIGHT)}
    kinds = ("keys", "values", "bias", "gate", "reading", "log_weight", "memory", "memory_up")
    pick = {kind: _pick(at_sites, kind) for kind in kinds}
    return Prefix(
        {s.name: pick["keys"][s.name] for s in sites},
        {s.name: pick["values"][s.name] for s in sites},
        sites,
        int(description["position_offset"]),
        _rotations(description, tensors),
        pick["bias"],
        pick["gate"],
        Fingerprint(**description["fingerprint"]),
        dict(description.get("metadata", {})),
        visible=parse(description.get("visible", "all")),
        readings=pick["reading"],
        memory=pick["memory"],
        memory_up=pick["memory_up"],
        recall=Recall(**description.get("recall", {})),
        parts=[dict(p) for p in description.get("parts", [])],
        weights={n.removeprefix(_WEIGHT): t for n, t in tensors.items() if n.startswith(_WEIGHT)},
        log_weights=pick["log_weight"],
        storage=Storage.from_json(description.get("storage")),
    )


def _read_description(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise PrefixFileError(f"{folder} is not a folder; expected one that Prefix.save wrote, or hf://OWNER/NAME")
    path = folder / DESCRIPTION
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise PrefixFileError(f"{folder} holds no {DESCRIPTION} (it holds {there}); expected a folder of Prefix.save")
    return _parse(path.read_bytes(), path)


def _parse(text: bytes | str, path: Path) -> dict[str, Any]:
    try:
        description = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as exc:
        raise PrefixFileError(f"{path} is not valid JSON: {exc}") from exc
    stated = description.get("format") if isinstance(description, dict) else None
    if not isinstance(description, dict) or isinstance(stated, bool) or stated not in (FORMAT, PACKED_FORMAT):
        raise PrefixFileError(
            f"{path} has format {stated!r}; this version of foreword reads format {FORMAT} and {PACKED_FORMAT}"
        )
    return description


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors, and the description that was saved with them.

    The file is opened once and read whole: opened for the header and again for the tensors it could be two files, where
    somebody replaces it in between; and a mapped one would change under a prefix in use.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise PrefixFileError(f"{folder} holds no {WEIGHTS}; the folder is incomplete, save the prefix again")
    try:
        data = path.read_bytes()
        tensors = deserialized(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return tensors, header.get("__metadata__", {}).get("foreword")
    except (SafetensorError, OSError, ValueError, KeyError) as exc:
        raise PrefixFileError(f"{path} can't be read as safetensors: {exc}") from exc


def _pick(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    ending = f".{kind}"
    return {name.removesuffix(ending): t for name, t in tensors.items() if name.endswith(ending)}


def _rotations(description: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Rotation]:
    groups = [
        Rotation(tensors[f"rotary.{i}.inv_freq"], entry["layout"], int(entry["start"]))
        for i, entry in enumerate(description["rotations"])
    ]
    for rotation in groups:
        if rotation.layout not in ("half", "interleaved") or rotation.inv_freq.dim() != 1 or rotation.start < 0:
            raise ValueError(f"a rotation of layout {rotation.layout!r} from {rotation.start} makes no sense")
    return {e["name"]: groups[e["rotation"]] for e in description["sites"] if e["rotation"] is not None}


def checksum_of(prefix: Prefix) -> str:
    """The checksum that a prefix has in its file."""
    return _checksum(_describe(prefix)[0])


def _checksum(tensors: dict[str, Tensor]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def model_card(prefix: Prefix, name: str, address: str | None = None) -> str:
    """A README for the folder, in the form that model hubs read; ``address``: where it is loaded from."""
    base = prefix.fingerprint.base_model
    metrics = prefix.metadata.get("metrics", {})
    rows = "".join(f"| {k} | {v:.4g} |\n" for k, v in metrics.items() if isinstance(v, int | float))
    asked = _ASKED.get(str(prefix.metadata.get("form")), "")
    table = f"\n## Metrics\n\n| metric | value |\n| --- | --- |\n{rows}" if rows else ""
    return (
        f"---\nlibrary_name: foreword\ntags: [prefix-tuning]\n{f'base_model: {base}' + chr(10) if base else ''}---\n\n"
        f"# {name}\n\n"
        f"{_what(prefix)} of "
        f"`{base or prefix.fingerprint.model_class}` ({prefix.num_parameters:,} numbers, {prefix.nbytes:,} bytes"
        f"{'' if prefix.storage.plain else f' in memory; stored: {prefix.storage}'}).\n\n"
        f"```python\nimport foreword as fw\n\nfw.attach(model, fw.Prefix.load({(address or name)!r}))\n```\n"
        f"{asked}{table}"
    )


# How a prefix is asked, by the form of what it was trained on.
_ASKED = {
    "chat": "\nTrained on conversations: put prompts into the model's chat template.\n",
    "alpaca": "\nTrained on instructions: put prompts into Alpaca's form (`foreword generate` does).\n",
}


def _what(prefix: Prefix) -> str:
    parts = []
    if prefix.longest:
        parts.append(f"A prefix of {prefix.longest} virtual tokens at {len(prefix.sites)} attention sites")
    if prefix.memory:
        parts.append(f"a memory at {len(prefix.memory)} attention sites")
    return ", ".join([*parts, *(f"trained weights ({p['method']})" for p in prefix.parts)])
