"""How rich the change is that a prefix makes to what an attention site gives.

At each site and token, the attention's output as it stands less what the model's own would give *for the same input of
the layer*: ``d = o_with - o_base``, all heads side by side, ``(H * value_dim,)``. Over many tokens, the eigenvalues of
the covariance of d tell in how many directions the method moves that output with the text: PrefixMemory-Tuning
(arXiv 2506.13674) compares a prefix and a memory by such a spectrum. What is the same for all tokens is no part of a
covariance; it is reported as ``constant``, for a prefix can do little else than push each head's output along a few
fixed directions (Petrov et al. 2024, arXiv 2310.19698).

The definition knows no method: virtual tokens, a memory, LoRA on q, k or v, trained biases and weights all change d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from foreword.evaluate.inside._rows import Batches, Unavailable, rows_of, standing
from foreword.evaluate.inside._taps import Tap, tapped
from foreword.evaluate.inside.attention import Progress, silent
from foreword.prefix import Prefix
from foreword.sites import Site, sites
from foreword.tuning import Tuning
from foreword.weights import OwnParameters

KEPT = 64  # eigenvalues in a report


@dataclass(frozen=True)
class SiteSpectrum:
    """The change at one site.

    Attributes:
        size: root mean square of the change, by that of the base's output: 0.1 is a tenth of it.
        constant: the part of the change's energy that is the same for all tokens, ``|mean d|^2 / mean |d|^2``.
        values: the largest eigenvalues of the covariance, as parts of their sum.
        effective_rank: ``exp`` of the entropy of the eigenvalues (Roy & Vetterli 2007): how many directions, softly.
        participation: ``(sum)^2 / sum of squares`` of the eigenvalues: the same, led by the large ones.
    """

    name: str
    kind: str
    size: float
    constant: float
    values: list[float]
    effective_rank: float
    participation: float


@dataclass(frozen=True)
class Spectrum:
    """Spectra at all sites.

    Attributes:
        tokens: how many the covariance is over; the ranks can't be larger.
        width: numbers that the widest site gives for a token.
    """

    tokens: int
    width: int
    sites: list[SiteSpectrum]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def spectrum(
    model: PreTrainedModel,
    prefix: Prefix,
    batches: Batches,
    *,
    max_tokens: int = 1024,
    force: bool = False,
    progress: Progress = silent,
) -> Spectrum | Unavailable:
    """The spectrum of what the prefix (memory, LoRA, …) changes in each attention site's output.

    Args:
        model: the base model, with nothing attached.
        batches: arguments of forward passes, padded on the right.
        max_tokens: stop after so many; the first texts count.
    """
    rows = rows_of(model, batches)
    changes: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    with standing(model, prefix, force=force) as tuning:
        own = {s.name for s in prefix.sites}
        there = sites(model, rows[0]) if prefix.parts else prefix.sites  # layers that are changed reach beyond these
        chosen = [s for s in there if s.name in own or not s.tower]
        with _compared(tuning, chosen, changes, outputs):
            for i, row in enumerate(rows):
                model(**row)
                progress(i + 1, len(rows))
                if sum(map(len, changes[chosen[0].name])) >= max_tokens:
                    break
        progress(len(rows), len(rows))
    noise = torch.finfo(model.dtype).eps
    results = [_of_site(s, torch.cat(changes[s.name]), torch.cat(outputs[s.name]), max_tokens, noise) for s in chosen]
    if not any(s.size for s in results):
        return Unavailable("nothing in it changes what an attention site gives for the same input")
    tokens = min(max_tokens, max(sum(map(len, c)) for c in changes.values()))
    return Spectrum(tokens, max(s.heads * s.value_dim for s in chosen), results)


def methods_of(prefix: Prefix) -> dict[str, Prefix]:
    """What is in a prefix, each alone: virtual tokens, a memory, each method on the layers."""
    bare: dict[str, Any] = {"parts": (), "weights": {}}
    empty: dict[str, Any] = {"keys": {n: k[:, :0] for n, k in prefix.keys.items()},
                             "values": {n: v[:, :0] for n, v in prefix.values.items()},
                             "bias": {}, "gates": {}, "readings": {}, "log_weights": {}}  # fmt: skip
    found = {}
    if prefix.longest:
        found["virtual tokens"] = replace(prefix, memory={}, memory_up={}, **bare)
    if prefix.memory:
        found["memory"] = replace(prefix, **empty, **bare)
    for part in prefix.parts:
        method = str(part["method"])
        weights = {n: t for n, t in prefix.weights.items() if n.startswith(f"{method}/")}
        found[method] = replace(prefix, **empty, memory={}, memory_up={}, parts=(part,), weights=weights)
    return found


# ------------------------------------------------------------------------------------------ with and without


@contextmanager
def _compared(
    tuning: Tuning, chosen: list[Site], changes: dict[str, list[Tensor]], outputs: dict[str, list[Tensor]]
) -> Iterator[None]:
    """Inside the block, each site's attention runs twice: as it stands, and as the base model's."""
    model = tuning.model
    before = _base_parameters(tuning)
    lora = any(part.method == "lora" for part in tuning.weight_parts())
    handles = []
    with tapped(model, [s.name for s in chosen]) as taps:
        for site in chosen:
            changes[site.name], outputs[site.name] = [], []
            module = model.get_submodule(site.name)
            off = partial(_adapters_off, module) if lora else nullcontext
            compare = _Comparing(
                taps[site.name], before.get(site.name, {}), off, changes[site.name], outputs[site.name]
            )
            handles.append(module.register_forward_hook(compare, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Comparing:
    """A hook that runs a module again as the base model has it, and notes the difference.

    Args:
        before: parameters that were trained, as they were.
        off: a context without adapters.
    """

    def __init__(
        self, tap: Tap, before: Mapping[str, Tensor], off: Callable[[], AbstractContextManager[None]],
        changes: list[Tensor], outputs: list[Tensor],
    ) -> None:  # fmt: skip
        self.tap, self.before, self.off, self.changes, self.outputs = tap, dict(before), off, changes, outputs

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        with_it = self.tap.out
        if self.tap.bare or with_it is None:
            return
        self.tap.bare = True
        try:
            with self.off():
                functional_call(module, self.before, args, kwargs)
            base = self.tap.out
        finally:
            self.tap.bare, self.tap.out = False, None
        assert base is not None
        self.changes.append((with_it.float() - base.float()).flatten(2).flatten(0, 1).cpu())  # (B * S, H * E)
        self.outputs.append(base.float().square().sum((-1, -2)).flatten().cpu())


def _base_parameters(tuning: Tuning) -> dict[str, dict[str, Tensor]]:
    """What trained parameters of the model's own were, by site."""
    found: dict[str, dict[str, Tensor]] = {}
    names = {name for name, _ in tuning.model.named_modules()}
    for part in tuning.weight_parts():
        if not isinstance(part, OwnParameters):
            continue
        for name, original in zip(part.names, part.originals, strict=True):
            parts = name.split(".")
            for end in range(1, len(parts)):
                if (site := ".".join(parts[:end])) in names:
                    found.setdefault(site, {})[".".join(parts[end:])] = original
    return found


@contextmanager
def _adapters_off(module: nn.Module) -> Iterator[None]:
    """Inside the block, PEFT's layers below a module are the layers that they stand on."""
    layers: list[Any] = [m for m in module.modules() if hasattr(m, "enable_adapters") and hasattr(m, "get_base_layer")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


# ------------------------------------------------------------------------------------------ eigenvalues


def _of_site(site: Site, changes: Tensor, energies: Tensor, most: int, noise: float) -> SiteSpectrum:
    """From changes ``(N, D)`` and the base outputs' energies ``(N,)``; ``noise``: the rounding of a number."""
    changes, energies = changes[:most].double(), energies[:most].double()
    energy, base = float(changes.square().sum(1).mean()), float(energies.mean())
    floor = 4 * noise**2 * base / changes.shape[1]  # what rounding leaves in each direction, with room
    if energy <= floor * changes.shape[1]:
        return SiteSpectrum(site.name, site.kind, 0.0, 0.0, [], 0.0, 0.0)
    mean = changes.mean(0)
    size, constant = (energy / base) ** 0.5, float(mean.square().sum()) / energy
    values = eigenvalues(changes - mean, floor)
    if not len(values):
        return SiteSpectrum(site.name, site.kind, size, constant, [], 0.0, 0.0)
    parts = values / values.sum()
    return SiteSpectrum(
        site.name, site.kind, size, constant, parts[:KEPT].tolist(),
        float((-(parts * parts.log()).sum()).exp()), float(1 / parts.square().sum()),
    )  # fmt: skip


def eigenvalues(rows: Tensor, floor: float) -> Tensor:
    """Of ``rows^T rows / N``, largest first, those above ``floor``: by the smaller of both products."""
    n, width = rows.shape
    values = torch.linalg.eigvalsh((rows @ rows.T if n < width else rows.T @ rows) / n).flip(0)
    return values[values > floor]
