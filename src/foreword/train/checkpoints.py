"""Checkpoints: which of them a run can go on from, and the numbers in them.

Trainer writes a checkpoint file by file, ``trainer_state.json`` last, so one whose writing was cut short lacks that
file. Files can be lost or cut short later as well, and transformers passes over a lost optimizer without a word; so all
that a run needs to go on as if it had not stopped is looked at first.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from foreword.errors import PrefixFileError
from foreword.tuning import Tuning

STATE = "training_state.safetensors"
WATCH = "watch.safetensors"
_OPTIMIZER, _SCHEDULER, _SCALER, _RANDOM = "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole."""
    return next((p for p in written_checkpoints(folder) if not damage(p)), None)


def written_checkpoints(folder: Path) -> list[Path]:
    """Those that were written to their end, the newest first, whatever has become of them."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.rsplit("-", 1)[1].isdigit()]
    return sorted((p for p in found if _ended(p)), key=lambda p: int(p.name.rsplit("-", 1)[1]), reverse=True)


def resume_point(folder: Path) -> Path | None:
    """The newest whole checkpoint; None: a run was broken off before its first.

    Raises:
        PrefixFileError: there are checkpoints, and all lack something; to begin anew would be the end of them.
    """
    if (last := last_checkpoint(folder)) is not None:
        return last
    for path in written_checkpoints(folder)[:1]:
        require_whole(path)
    return None


def damage(folder: Path) -> str:
    """What keeps a run from going on from a checkpoint; empty: nothing."""
    if not _ended(folder):
        return "its trainer_state.json, which is written last, is missing or cut short"
    needed = {STATE}
    if not any(folder.glob("global_step*")):  # DeepSpeed keeps its own
        needed |= {_OPTIMIZER, _SCHEDULER, *([_SCALER] if _in_fp16(folder) else [])}
    if missing := sorted(n for n in needed if not (folder / n).is_file()):
        return f"it has no {missing[0]}"
    if not any(folder.glob(f"{_RANDOM}*.pth")):
        return f"it has no {_RANDOM}.pth"
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".pt", ".pth", ".safetensors")):
        if not _reads(path):
            return f"its {path.name} is cut short or damaged"
    return ""


def require_whole(folder: Path) -> None:
    """Raise PrefixFileError if a run can't go on from a checkpoint."""
    if what := damage(folder):
        older = last_checkpoint(folder.parent) if folder.name.startswith("checkpoint-") else None
        other = f"go on from {older}" if older is not None else "train its prefix further in a new run"
        raise PrefixFileError(
            f"a run can't go on from {folder} as if it had not stopped: {what}; {other} (fw.attach(model, prefix, "
            "trainable=True), `foreword train --start`)"
        )


def load_training_state(tuning: Tuning, folder: Path) -> None:
    """Put a checkpoint's numbers into the prefix that is being trained.

    Raises:
        PrefixFileError: the checkpoint is missing, damaged, or of another configuration.
    """
    path = folder / STATE
    if not path.is_file():
        raise PrefixFileError(f"{folder} holds no {STATE}; expected a checkpoint that PrefixTrainer wrote")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as exc:
        raise PrefixFileError(f"{path} can't be read as safetensors: {exc}") from exc
    own = tuning.holder.state_dict()
    for name in own.keys() | state.keys():
        mine, theirs = own.get(name), state.get(name)
        if mine is None or theirs is None or mine.shape != theirs.shape:
            there = tuple(theirs.shape) if theirs is not None else "absent"
            here = tuple(mine.shape) if mine is not None else "absent"
            raise PrefixFileError(
                f"{folder} was trained with another configuration: {name} is {there} there and {here} here; "
                "attach with the configuration that it was started with"
            )
        if not torch.isfinite(theirs).all():
            raise PrefixFileError(f"{path}: {name} has numbers that are not finite")
    tuning.holder.load_state_dict(state)


def _in_fp16(folder: Path) -> bool:
    """Whether its run scaled the loss: without the scale, the first steps that follow would be skipped."""
    try:
        return bool(json.loads((folder / "training_args.json").read_text(encoding="utf-8")).get("fp16"))
    except (OSError, ValueError):
        return False


def _ended(folder: Path) -> bool:
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _reads(path: Path) -> bool:
    """Whether a file has its beginning and its end: a zip's directory stands last, safetensors' lengths first."""
    if path.suffix != ".safetensors":
        return zipfile.is_zipfile(path)
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False
