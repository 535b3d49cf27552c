"""Where a meta-training stands, in one file: written under another name and renamed, so it is whole or not there.

``meta_state.safetensors`` holds what is trained (``holder.<name>``), the state of the optimizers
(``inner.<parameter>.<name>``, ``outer.…``), and as metadata the settings, the step and the losses so far. What a step
draws depends on its number only, so with these a run goes on to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from foreword.errors import ConfigError, PrefixFileError
from foreword.train.trainer import LAST_GOOD
from foreword.tuning import Tuning

STATE = "meta_state.safetensors"
_HOLDER = "holder."


def check_out(out: Path, resume: bool) -> None:
    """Raise ConfigError unless a meta-training can be begun in the folder, or gone on with."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give the name of a folder for the prefix")
    begun = (out / STATE).exists()
    if resume and not begun:
        raise ConfigError(f"--resume: {out} holds no meta-training; leave --resume out to begin one")
    if begun and not resume:
        raise ConfigError(f"{out} holds a meta-training already; go on with it (--resume), or give another --out")
    left = {f".{STATE}", LAST_GOOD}  # of one that ended before it had a state, or diverged
    strange = sorted(p.name for p in out.iterdir() if p.name not in left) if out.is_dir() and not begun else []
    if strange:
        raise ConfigError(f"{out} holds {strange[0]}, which is not of a meta-training; choose another --out")


def check_same(out: Path, known: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if a run was begun with other settings."""
    for name in settings:
        if known.get(name) != settings[name]:
            there, here = (_short(s.get(name)) for s in (known, settings))
            raise ConfigError(
                f"{out} holds another meta-training: {name} was {there} there and is {here} here; give what it was "
                "begun with, or another --out"
            )


def save_state(out: Path, tuning: Tuning, optimizers: Mapping[str, Optimizer], record: Mapping[str, Any]) -> None:
    """Write the state of a run; ``record`` is what :func:`read_record` gives back."""
    tensors = {f"{_HOLDER}{n}": t for n, t in tuning.holder.state_dict().items()}
    for name, optimizer in optimizers.items():
        for i, parameter in enumerate(_parameters(optimizer)):
            found = optimizer.state.get(parameter, {})
            tensors |= {f"{name}.{i}.{key}": value for key, value in found.items() if isinstance(value, Tensor)}
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".{STATE}"
    kept = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    save_file(kept, temporary, metadata={"meta": json.dumps(record)})
    temporary.replace(out / STATE)


def read_record(out: Path) -> dict[str, Any]:
    """Settings, step and losses of the run in a folder.

    Raises:
        PrefixFileError: the file is damaged, or not one of ours.
    """
    return _read(out / STATE)[1]


def load_state(out: Path, tuning: Tuning, optimizers: Mapping[str, Optimizer]) -> None:
    """Go back to what :func:`save_state` wrote.

    Raises:
        PrefixFileError: the file is damaged, or of another configuration.
    """
    path = out / STATE
    tensors, _ = _read(path)
    own = tuning.holder.state_dict()
    saved = {n.removeprefix(_HOLDER): t for n, t in tensors.items() if n.startswith(_HOLDER)}
    for name in own.keys() | saved.keys():
        if name not in own or name not in saved or own[name].shape != saved[name].shape:
            raise PrefixFileError(f"{path} is of another configuration: {name} differs; give what it was begun with")
        if not torch.isfinite(saved[name]).all():
            raise PrefixFileError(f"{path}: {name} has numbers that are not finite; begin anew in another folder")
    tuning.holder.load_state_dict(saved)
    for name, optimizer in optimizers.items():
        parameters = _parameters(optimizer)
        for full, tensor in tensors.items():
            own_name, _, rest = full.partition(".")
            if own_name == name:
                number, _, key = rest.partition(".")
                parameter = parameters[int(number)]
                optimizer.state[parameter][key] = tensor.to(parameter.device) if tensor.dim() else tensor


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("meta", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as exc:
        raise PrefixFileError(f"{path} can't be read as safetensors: {exc}; begin anew in another folder") from exc
    if not isinstance(record, dict) or not {"settings", "step", "history"} <= record.keys():
        raise PrefixFileError(f"{path} doesn't say where its run stands; begin anew in another folder")
    return tensors, record


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
