"""From what is trained to the artefact: the prefix as it stands, without what made it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foreword import conditional
from foreword.encoders import MLP, States
from foreword.errors import ConfigError
from foreword.prefix import Prefix

if TYPE_CHECKING:
    from foreword.tuning import Tuning


def bake(tuning: Tuning, condition: Any, task: str | None) -> Prefix:
    """What :meth:`Tuning.bake` returns."""
    if condition is not None:
        tuning.read_given(condition=condition)
        return bake(tuning, None, None).given(condition)
    if tuning.tasks and task is None:
        raise ConfigError(f"this prefix has several tasks; bake one of them: task={tuning.tasks[0]!r}, or save() all")
    states = _states(tuning, task)
    sites, strength = tuning.sites, tuning.strength or 1.0
    memory, memory_up = tuning.holder.memory.baked(strength) if tuning.holder.memory is not None else ({}, {})
    for site in sites:
        if site.name in memory:
            states.setdefault(site.name, tuning.nothing_at(site))
    kept = _kept(tuning)
    weights = {f"{p.method}/{n}": t for p in tuning.weight_parts() for n, t in p.tensors().items()}
    return Prefix(
        {s.name: states[s.name][0].detach().clone() for s in sites},
        {s.name: states[s.name][1].detach().clone() for s in sites},
        sites,
        tuning.position_offset,
        tuning.rotations,
        {s.name: b.detach().clone() for i, s in enumerate(sites) if (b := tuning.bias_at(i, strength)) is not None},
        {s.name: g.detach().clone() for i, s in enumerate(sites) if (g := tuning.gate_at(i, strength)) is not None},
        tuning.fingerprint,
        _metadata(tuning, task),
        visible=tuning.visible,
        readings={s.name: r.detach().clone() for i, s in enumerate(sites) if (r := tuning.reading_at(i)) is not None},
        memory=memory,
        memory_up=memory_up,
        recall=tuning.recall,
        parts=[*(dict(p) for p in tuning.parts), *([conditional.record_of(kept)] if kept is not None else [])],
        weights=weights | (conditional.weights_of(kept) if kept is not None else {}),
        log_weights={
            s.name: tuning.holder.token_weights[str(i)].detach().clone()
            for i, s in enumerate(sites)
            if str(i) in tuning.holder.token_weights
        },
    )


def _kept(tuning: Tuning) -> MLP | None:
    """An encoder that can't be baked: it reads a condition."""
    encoder = tuning.encoder
    return encoder if isinstance(encoder, MLP) and encoder.asks == "condition" else None


def _states(tuning: Tuning, task: str | None) -> States:
    """The encoder's keys and values, or the start of one that is kept."""
    encoder = tuning.encoder
    if task is None and (kept := _kept(tuning)) is not None:
        return kept.start()
    given = tuning.read_given(task=task) if task is not None else None
    training = encoder.training
    encoder.eval()
    try:
        states = encoder(given)
    finally:
        encoder.train(training)
    return states if task is None else {n: (k[0], v[0]) for n, (k, v) in states.items()}


def _metadata(tuning: Tuning, task: str | None) -> dict[str, Any]:
    metadata = dict(tuning.metadata)
    if task is not None:
        metadata["task"] = task
    if tuning.configs:
        metadata["config"] = tuning.configs[0].to_json()
        metadata["configs"] = [c.to_json() for c in tuning.configs]
    return metadata
